"""The encoder: ResNet-50 up to its third stage at output stride 8, then a reduction layer.

The trunk is CANet's, which LSLPN uses (the paper, section 4, "a customized version of ResNet-50"):

    conv1     7x7, stride 2
    max-pool  3x3, stride 2, ceil_mode          (which makes 512 -> 65 and 257 -> 33)
    layer1    3 bottlenecks,  256 channels
    layer2    4 bottlenecks,  512 channels, stride 2
    layer3    6 bottlenecks, 1024 channels, stride 1, dilation 2
    layer4    dropped
    reduction concat(layer2, layer3) -> 3x3 convolution, dilation 2, bias -> ReLU -> Dropout2d

The modules have torchvision's names, so torchvision's state dicts fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..assets import trunk_weights
from ..config import ModelConfig, StrideOn
from ..errors import InputError
from ..files import check_state, is_file, load_safetensors, load_tensors

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_EXPANSION = 4
_IGNORED_LAYERS = ("layer4.", "fc.")


def feature_size(pixels: int) -> int:
    """Feature locations along an axis of `pixels` pixels: 65 for 512, 33 for 257."""
    after_conv1 = (pixels + 1) // 2
    after_pool = after_conv1 // 2 + 1
    return (after_pool + 1) // 2


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 and a shortcut; one of the first two has the stride, see `stride_on`."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        stride_on: StrideOn = "1x1",
    ) -> None:
        super().__init__()
        out_channels = width * _EXPANSION
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(
            width, width, 3, stride=second, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(_normalised(self.conv1, self.bn1, x))
        y = self.relu(_normalised(self.conv2, self.bn2, y))
        y = _normalised(self.conv3, self.bn3, y)
        if self.downsample is not None:
            x = _normalised(self.downsample[0], self.downsample[1], x)
        y += x
        return self.relu(y)


def _normalised(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)). With stored statistics the two are run as one convolution: equal up to
    rounding, gradients included, and activations are read and written once less."""
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, _BatchNorm)  # BatchNorm2d, or SyncBatchNorm in its place
    if norm.training:
        y: Tensor = norm(conv(x))
        return y
    assert norm.running_var is not None
    assert norm.running_mean is not None
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * factor[:, None, None, None]
    bias = norm.bias - norm.running_mean * factor
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


def _stage(
    in_channels: int, width: int, blocks: int, *, stride: int, dilation: int, stride_on: StrideOn
) -> nn.Sequential:
    layers = [Bottleneck(in_channels, width, stride=stride, dilation=dilation, stride_on=stride_on)]
    layers += [Bottleneck(width * _EXPANSION, width, dilation=dilation) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Images to features at an eighth of the resolution.

    forward(images [N, 3, H, W]) -> features [N, channels, h, w], non-negative (the last step is
    a ReLU), in the dtype of the parameters; h = feature_size(H), w = feature_size(W).

    Args:
        config: `channels`, `dropout`, `weights`, `stride_on` and `batch_norm` are used. The affine
            parameters of batch norm are frozen in both modes.
        generator: for the reduction layer, N(0, 0.01); None uses torch's default generator.

    Raises:
        InputError: `weights` cannot be read or does not fit this trunk.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.batch_norm = config.batch_norm
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        stride_on = config.stride_on
        self.layer1 = _stage(64, 64, 3, stride=1, dilation=1, stride_on=stride_on)
        self.layer2 = _stage(256, 128, 4, stride=2, dilation=1, stride_on=stride_on)
        self.layer3 = _stage(512, 256, 6, stride=1, dilation=2, stride_on=stride_on)
        self.reduction = nn.Conv2d(512 + 1024, config.channels, 3, padding=2, dilation=2)
        self.dropout = nn.Dropout2d(config.dropout)

        nn.init.normal_(self.reduction.weight, 0.0, 0.01, generator=generator)
        assert self.reduction.bias is not None
        nn.init.zeros_(self.reduction.bias)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
        if config.weights != "random":
            own = config.weights != "imagenet"
            self.load_trunk(config.weights if own else trunk_weights())
        self.train(self.training)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(_normalised(self.conv1, self.bn1, images)))
        middle = self.layer2(self.layer1(x))
        deep = self.layer3(middle)
        features = self.relu(self.reduction(torch.cat((middle, deep), dim=1)))
        return self.dropout(features)

    def train(self, mode: bool = True) -> Encoder:
        """As `nn.Module.train`, but "frozen" batch norm stays in evaluation mode."""
        super().train(mode)
        if self.batch_norm == "frozen":
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def load_trunk(self, source: str | Path | Mapping[str, Tensor]) -> None:
        """Load conv1 .. layer3 from a state dict with torchvision's names, strictly.

        The state dict must have every tensor of the trunk in its shape (`num_batches_tracked` may
        be missing) and no others, except `layer4` and `fc`, which are ignored. Any floating dtype
        is accepted. The reduction layer is not changed.

        Raises:
            InputError: the file is missing, unreadable, damaged, or not a ResNet-50 state dict.
        """
        if isinstance(source, Mapping):
            name, state = "the state dict", source
        else:
            name, state = str(source), _read_state_dict(Path(source))
        state = {k: v for k, v in state.items() if not k.startswith(_IGNORED_LAYERS)}
        own = {
            key: value
            for key, value in self.state_dict().items()
            if not key.startswith("reduction.")
            and (key in state or not key.endswith("num_batches_tracked"))
        }
        names = "torchvision's names (conv1, bn1, layer1, layer2, layer3)"
        check_state(state, own, name, f"give a ResNet-50 state dict with {names}")
        with torch.no_grad():
            for key, tensor in state.items():
                own[key].copy_(tensor)


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors" or not is_file(path):
        return load_safetensors(path, "a ResNet-50 state dict")[0]
    state = load_tensors(path, "a ResNet-50 state dict written by torch.save")
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(
            f"{path}: is not a state dict, expected tensors by name; write one with "
            "torch.save(model.state_dict(), path)"
        )
    return state
