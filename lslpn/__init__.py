"""Few-shot segmentation of organs by location-sensitive local prototypes."""

from typing import TYPE_CHECKING

__version__: str

if TYPE_CHECKING:
    from .checkpoint import load_model, pretrained, save_weights
    from .config import preset
    from .data.dataset import Dataset
    from .data.volumes import Volume, read_image, read_labels, write_labels
    from .evaluation.scoring import evaluate
    from .models import untrained
    from .segmentation.segment import segment
    from .training import train
    from .viewer import view

__all__ = [
    "Dataset",
    "Volume",
    "__version__",
    "evaluate",
    "load_model",
    "preset",
    "pretrained",
    "read_image",
    "read_labels",
    "save_weights",
    "segment",
    "train",
    "untrained",
    "view",
    "write_labels",
]

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
