"""`python -m lslpn` is `lslpn`."""

import sys

from .cli import main

sys.exit(main())
