"""Few-shot segmentation of organs by location-sensitive local prototypes."""

from typing import TYPE_CHECKING

__all__ = ["__version__", "view"]

__version__: str

if TYPE_CHECKING:
    from .viewer import view


if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name):
        # Looked up when it is asked for, to keep the start of the command line short.
        if name == "view":
            from .viewer import view

            return view
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lslpn")
        except PackageNotFoundError:  # a checkout that was not installed
            return "0+unknown"
