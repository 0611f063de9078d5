"""The head of a location-sensitive local prototype network, fast and exact.

Masked average pooling over an overlapping grid of windows, and cosine matching with the best of
them, at image resolution. Depends on torch alone; works with any encoder.
"""

from importlib.metadata import PackageNotFoundError, version

from ._backends import BackendStatus
from ._backends import status as _status
from .geometry import GridSpec
from .head import LocalPrototypeHead
from .ops import cosine_match, cosine_match_loss, masked_average_pool

__all__ = [
    "BackendStatus",
    "GridSpec",
    "LocalPrototypeHead",
    "__version__",
    "backends",
    "cosine_match",
    "cosine_match_loss",
    "masked_average_pool",
]

try:
    __version__ = version("lslpn")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"


def backends() -> dict[str, BackendStatus]:
    """Every backend, whether it is usable on this machine, and one line on why not."""
    return _status()
