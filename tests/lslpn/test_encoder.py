"""The encoder: shapes, weights, strides and what batch norm does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lslpn.assets import trunk_weights
from lslpn.config import BatchNormMode, ModelConfig
from lslpn.errors import InputError
from lslpn.models import encoder as encoder_module
from lslpn.models.encoder import Encoder, feature_size


def made(
    *, generator: torch.Generator | None = None, weights: str | Path = "imagenet", **options: object
) -> Encoder:
    return Encoder(ModelConfig(weights=str(weights), **options), generator=generator)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pretrained() -> Encoder:
    return made(generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(2, 3, 97, 129, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("pixels", "locations"), [(512, 65), (257, 33), (417, 53), (256, 33)])
def test_feature_size_at_the_sizes_of_the_papers(pixels: int, locations: int) -> None:
    assert feature_size(pixels) == locations


@settings(max_examples=12, deadline=None)
@given(H=st.integers(17, 150), W=st.integers(17, 150))
def test_output_has_feature_size_for_any_image(pretrained: Encoder, H: int, W: int) -> None:
    with torch.no_grad():
        features = pretrained(torch.zeros(1, 3, H, W))
    assert features.shape == (1, 256, feature_size(H), feature_size(W))


def test_512_gives_65(pretrained: Encoder) -> None:
    with torch.no_grad():
        assert pretrained(torch.zeros(1, 3, 512, 512)).shape == (1, 256, 65, 65)


def test_layers_have_the_strides_and_dilations_of_the_paper(pretrained: Encoder) -> None:
    first = pretrained.layer2[0]
    assert first.conv1.stride == (2, 2)
    assert first.conv2.stride == (1, 1)
    assert all(b.conv2.dilation == b.conv2.padding == (2, 2) for b in pretrained.layer3)
    assert all(b.conv1.stride == b.conv2.stride == (1, 1) for b in pretrained.layer3)
    assert pretrained.reduction.dilation == (2, 2)
    assert pretrained.reduction.in_channels == 1536
    assert [len(layer) for layer in (pretrained.layer1, pretrained.layer2, pretrained.layer3)] == [
        3,
        4,
        6,
    ]


def test_stride_on_3x3_moves_the_stride_and_nothing_else(image: torch.Tensor) -> None:
    moved = made(stride_on="3x3", generator=torch.Generator().manual_seed(0)).eval()
    assert moved.layer2[0].conv1.stride == (1, 1)
    assert moved.layer2[0].conv2.stride == (2, 2)
    with torch.no_grad():
        assert moved(image).shape[-2:] == (feature_size(97), feature_size(129))


def test_shipped_weights_are_loaded_into_the_trunk(pretrained: Encoder) -> None:
    shipped = safetensors.torch.load_file(trunk_weights())
    own = pretrained.state_dict()
    assert {k for k in own if not k.startswith("reduction.")} - set(shipped) == {
        k for k in own if k.endswith("num_batches_tracked")
    }
    for key, tensor in shipped.items():
        assert torch.equal(own[key], tensor.float()), key


def test_reduction_layer_is_small_noise_from_the_generator() -> None:
    first, second, other = (
        made(weights="random", generator=torch.Generator().manual_seed(s)).reduction
        for s in (5, 5, 6)
    )
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not first.bias.any()


def test_folding_stored_statistics_into_the_convolutions_changes_nothing(
    image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = made(batch_norm="frozen", dropout=0.0).double().train()

    def features_and_gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        encoder.zero_grad()
        features = encoder(image.double())
        features.square().sum().backward()
        return features.detach(), {
            k: p.grad for k, p in encoder.named_parameters() if p.grad is not None
        }

    folded, folded_gradients = features_and_gradients()
    monkeypatch.setattr(encoder_module, "_normalised", lambda conv, norm, x: norm(conv(x)))
    plain, plain_gradients = features_and_gradients()
    assert folded.std() > 0.01
    torch.testing.assert_close(folded, plain, rtol=1e-10, atol=1e-12)
    assert set(folded_gradients) == set(plain_gradients)
    for key, gradient in plain_gradients.items():
        torch.testing.assert_close(folded_gradients[key], gradient, rtol=1e-8, atol=1e-9)


def test_live_batch_norm_moves_its_statistics_and_frozen_does_not(image: torch.Tensor) -> None:
    for mode, moves in (("live", True), ("frozen", False)):
        encoder = made(batch_norm=mode)
        encoder.eval()
        encoder.train()
        before = {k: v.clone() for k, v in encoder.state_dict().items()}
        encoder(image)
        after = encoder.state_dict()
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        assert bool(changed) is moves, mode
        assert all("running" in k or "num_batches" in k for k in changed)


def test_only_the_affine_parameters_of_batch_norm_are_frozen(image: torch.Tensor) -> None:
    encoder = made().train()
    encoder(image).sum().backward()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.grad is None
            assert not module.weight.requires_grad
            assert not module.bias.requires_grad
        if isinstance(module, nn.Conv2d):
            assert module.weight.grad is not None
            assert module.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("batch_norm", ["live", "frozen"])
def test_synchronised_batch_norm_replaces_the_plain_one(
    image: torch.Tensor, batch_norm: BatchNormMode
) -> None:
    """As on several GPUs; SyncBatchNorm trains on GPUs only, so this compares evaluation."""
    plain = made(weights="random", batch_norm=batch_norm)
    for name, buffer in plain.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    norms = [m for m in synchronised.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) > 40
    with torch.no_grad():
        assert torch.equal(synchronised.eval()(image), plain.eval()(image))
    assert all(m.training is (batch_norm == "live") for m in norms if synchronised.train())
    assert not any(p.requires_grad for m in norms for p in m.parameters())


def test_dropout_zeroes_whole_channels_in_training_only(image: torch.Tensor) -> None:
    encoder = made(batch_norm="frozen").train()
    torch.manual_seed(0)
    with torch.no_grad():
        dead = (encoder(image) == 0).all(-1).all(-1)
        alive = (encoder.eval()(image) == 0).all(-1).all(-1)
    assert 0.3 < dead.float().mean() < 0.75
    assert alive.float().mean() < 0.1


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_users_torchvision_state_dict_loads(
    tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    source = made(weights="random")
    state = {
        k: v.to(dtype) if v.is_floating_point() else v
        for k, v in source.state_dict().items()
        if not k.startswith("reduction.")
    }
    state["layer4.0.conv1.weight"] = torch.zeros(512, 1024, 1, 1, dtype=dtype)
    state["fc.bias"] = torch.zeros(1000, dtype=dtype)
    path = tmp_path / f"resnet50{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    encoder = made(weights=path)
    for key, tensor in encoder.state_dict().items():
        if key in state:
            assert torch.equal(tensor, state[key].to(tensor.dtype)), key


def _state() -> dict[str, torch.Tensor]:
    state = made(weights="random").state_dict()
    return {k: v for k, v in state.items() if not k.startswith("reduction.")}


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    encoder = made(weights="random")
    missing = _state()
    del missing["layer3.5.conv3.weight"]
    with pytest.raises(InputError, match=r"1 tensors differ.*layer3\.5\.conv3\.weight: .* nothing"):
        encoder.load_trunk(missing)
    with pytest.raises(
        InputError, match=r"layer3\.6\.conv1\.weight: expected nothing, found \(1,\)"
    ):
        encoder.load_trunk({**_state(), "layer3.6.conv1.weight": torch.zeros(1)})
    with pytest.raises(
        InputError, match=r" conv1\.weight: expected \(64, 3, 7, 7\), found \(64, 1"
    ):
        encoder.load_trunk({**_state(), "conv1.weight": torch.zeros(64, 1, 7, 7)})


def test_a_refused_state_dict_leaves_the_encoder_unchanged() -> None:
    encoder = made(weights="random")
    before = encoder.conv1.weight.clone()
    with pytest.raises(InputError):
        encoder.load_trunk({**_state(), "other": torch.zeros(1)})
    assert torch.equal(encoder.conv1.weight, before)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("layer1.0.conv1.weight", float("nan"), "not finite"),
        ("bn1.running_var", -1.0, "negative variances"),
    ],
)
def test_weights_that_are_not_finite_real_numbers_are_refused(
    tmp_path: Path, name: str, value: float, said: str
) -> None:
    state = {k: v for k, v in made().state_dict().items() if not k.startswith("reduction")}
    state[name].view(-1)[3] = value
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=rf"w\.safetensors: is damaged: {name} .*{said}"):
        made(weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated"])
def test_unreadable_weights_are_one_clear_error(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are no weights\n")
    elif kind == "truncated":
        if suffix == ".pt":
            torch.save(_state(), path)
        else:
            safetensors.torch.save_file(_state(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"weights\.") as caught:
        made(weights=path)
    assert "\n" not in str(caught.value)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(nn.Linear(2, 2), path)  # a whole module needs unpickling of classes
    with pytest.raises(InputError, match="cannot be read"):
        made(weights=path)
