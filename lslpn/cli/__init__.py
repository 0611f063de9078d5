"""The command line; `app` has its commands."""

from .app import main

__all__ = ["main"]
