"""Checkpoints: one file with the weights, the configuration and the progress of training.

They are written atomically, and read with `weights_only`, so that a checkpoint from elsewhere
cannot run code.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .assets import trained_weights
from .config import Config
from .errors import InputError
from .files import check_state, is_file, load_safetensors, load_tensors, look_up, write_bytes
from .models import METHODS, FewShotNetwork, build
from .torch_defaults import torch_defaults

FILE_NAME = "checkpoint.pt"
_FORMAT = "lslpn-checkpoint"
_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file."""

    config: Config
    step: int  # number of gradient steps so far
    model: dict[str, Any]  # the network's state dict
    optimizer: dict[str, Any]  # the optimizer's state dict
    data: dict[str, Any]  # "dataset", "cases", "organs", "hold_out", "checksum" of the training
    versions: dict[str, str]  # see `info.versions`


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; raises as `files.write_bytes`."""
    content = {
        **vars(checkpoint),
        "config": checkpoint.config.to_dict(),
        "format": _FORMAT,
        "version": _VERSION,
        "method": checkpoint.config.model.method,
    }
    # Through memory, since torch's own writer reports a full disk as an internal error.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer())


def save_weights(path: str | os.PathLike[str], model: FewShotNetwork) -> None:
    """Write only the weights as safetensors, with the network's configuration in the metadata.

    `load_model` restores the network. Any reader of safetensors can read the weights, which are the
    network's state dict.

    Raises:
        InputError: `path` does not end in .safetensors or cannot be written.
    """
    if not str(path).endswith(".safetensors"):
        raise InputError(f"{path}: expected a name that ends in .safetensors")
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    config = json.dumps(Config(model=model.config).to_dict()["model"])
    write_bytes(path, safetensors.torch.save(weights, {"model": config}))


def _load_weights_file(path: Path) -> FewShotNetwork:
    """The network in a file of `save_weights`."""
    expected = "a file written by lslpn.save_weights"
    weights, metadata = load_safetensors(path, expected)
    try:
        config = Config.from_dict({"model": json.loads(metadata["model"])})
    except (KeyError, ValueError) as error:
        what = f"no {error} in its metadata" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: cannot be read ({what}), expected {expected}") from error
    return restored(Checkpoint(config, 0, weights, {}, {}, {}), path)


def pretrained() -> FewShotNetwork:
    """The network that ships, in evaluation mode: LSLPN trained on CT scans without any label.

    docs/weights.md has its training data and results.

    Raises:
        InputError: the file is missing from the installation.
    """
    return load_model(trained_weights())


def checkpoint_path(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file of a RUN folder, or the file itself."""
    given = Path(path)
    if is_file(given):
        return given
    if look_up(given) is None:
        raise InputError(
            f"{given}: there is no such file or folder, expected a checkpoint or the folder of a "
            "training run; check the path"
        )
    if not is_file(given / FILE_NAME):
        raise InputError(
            f"{given}: has no {FILE_NAME}, expected the folder of a training run; check the path, "
            "or wait for the run's first checkpoint"
        )
    return given / FILE_NAME


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, given the file or the RUN folder, onto the CPU.

    Raises:
        InputError: it is missing, damaged, not an lslpn checkpoint, or has an unknown method or
            version.
    """
    file = checkpoint_path(path)
    content = load_tensors(file, "a checkpoint written by lslpn train")
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(
            f"{file}: is not an lslpn checkpoint, expected a file written by lslpn train; for "
            "weights of a ResNet-50 use the setting weights"
        )
    if content.get("version") != _VERSION or content.get("method") not in tuple(METHODS):
        raise InputError(
            f"{file}: is a checkpoint of method {content.get('method')!r}, version "
            f"{content.get('version')!r}, expected one of {', '.join(METHODS)}, version "
            f"{_VERSION}; use the lslpn that wrote it"
        )
    try:
        kinds = {"step": int, "model": dict, "optimizer": dict, "data": dict, "versions": dict}
        checkpoint = Checkpoint(
            config=Config.from_dict(content["config"]),
            **{name: _checked(content, name, kind) for name, kind in kinds.items()},
        )
        for name in ("cases", "organs", "hold_out"):
            if not all(isinstance(value, str) for value in _checked(checkpoint.data, name, list)):
                raise TypeError(f"{name} is not a list of names")
        # The weights do not tell: methods may have the same tensors.
        if (method := checkpoint.config.model.method) != content["method"]:
            raise ValueError(f"method {content['method']!r} is {method!r} in its configuration")
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"{file}: does not fit this version of lslpn ({what}); use an unmodified file, or the "
            "lslpn that wrote it"
        ) from error
    return checkpoint


def _checked(content: Mapping[str, Any], name: str, kind: type) -> Any:
    value = content[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value


@torch_defaults()
def load_model(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> FewShotNetwork:
    """Load a trained network, in evaluation mode, with its configuration in `model.config`.

    `path` is a checkpoint, the folder of a run, or a file of `save_weights`, which ends in
    .safetensors.

    Raises:
        InputError: as `load_checkpoint`, or the weights do not fit the configuration or are not
            finite.
    """
    if str(path).endswith(".safetensors"):
        return _load_weights_file(Path(path)).to(device)
    return restored(load_checkpoint(path), checkpoint_path(path)).to(device)


@torch_defaults()
def restored(checkpoint: Checkpoint, name: str | os.PathLike[str]) -> FewShotNetwork:
    """The network of a checkpoint, on the CPU and in evaluation mode; raises as `check_state`."""
    # The initial weights would be overwritten, and their file may be gone.
    config = dataclasses.replace(checkpoint.config.model, weights="random")
    # First without memory, since a broken configuration may ask for more than there is.
    try:
        with torch.device("meta"):
            shapes = build(config)
    except (RuntimeError, TypeError) as error:  # sizes that torch cannot represent
        raise InputError(
            f"{name}: no network can be built from its configuration "
            f"({str(error).splitlines()[0]}); use an unmodified file"
        ) from error
    check_state(checkpoint.model, shapes.state_dict(), name)
    with torch.random.fork_rng(devices=[]):
        model = build(config)
    model.load_state_dict(checkpoint.model)
    model.config = checkpoint.config.model
    return model.eval()
