"""Few-shot segmentation of organs by location-sensitive local prototypes."""

from typing import TYPE_CHECKING

__version__: str

if TYPE_CHECKING:
    from .checkpoint import load_model as load_model
    from .checkpoint import pretrained as pretrained
    from .checkpoint import save_weights as save_weights
    from .config import preset as preset
    from .data.dataset import Dataset as Dataset
    from .data.volumes import Volume as Volume
    from .data.volumes import read_image as read_image
    from .data.volumes import read_labels as read_labels
    from .data.volumes import write_labels as write_labels
    from .evaluation.scoring import evaluate as evaluate
    from .models import untrained as untrained
    from .segmentation.segment import segment as segment
    from .training import train as train
    from .viewer import view as view

# Where each name is; looked up when it is first used, so that importing lslpn imports no torch.
_HOMES = {
    "Dataset": "data.dataset",
    "Volume": "data.volumes",
    "evaluate": "evaluation.scoring",
    "load_model": "checkpoint",
    "preset": "config",
    "pretrained": "checkpoint",
    "read_image": "data.volumes",
    "read_labels": "data.volumes",
    "save_weights": "checkpoint",
    "segment": "segmentation.segment",
    "train": "training",
    "untrained": "models",
    "view": "viewer",
    "write_labels": "data.volumes",
}

__all__ = ["__version__", *_HOMES]

if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name):
        if name in _HOMES:
            from importlib import import_module

            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lslpn")
        except PackageNotFoundError:  # a checkout that was not installed
            return "0+unknown"

    def __dir__():
        return __all__
