"""The network: shapes, what goes into the encoder, and the n-way convention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lslpn.config import ModelConfig, preset
from lslpn.errors import InputError
from lslpn.models import LSLPN, untrained
from lslpn.models.encoder import IMAGENET_MEAN, IMAGENET_STD, feature_size

S = 72


@pytest.fixture(scope="module")
def model() -> LSLPN:
    return untrained("published")


def episode(
    B: int = 2, K: int = 1, N: int = 1, Q: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(B, K, N, S, S, dtype=torch.uint8)
    for n in range(N):
        masks[:, :, n, 10 + 20 * n : 26 + 20 * n, 12:40] = 1
    return torch.rand(B, K, S, S, generator=g), masks, torch.rand(B, Q, S, S, generator=g)


@pytest.mark.parametrize(("B", "K", "N", "Q"), [(1, 1, 1, 1), (2, 3, 2, 2), (1, 2, 3, 1)])
def test_shapes(model: LSLPN, B: int, K: int, N: int, Q: int) -> None:
    with torch.no_grad():
        logits = model(*episode(B, K, N, Q))
    assert logits.shape == (B, Q, N + 1, S, S)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert logits.abs().max() <= model.config.logit_scale * (1 + 1e-5)


def test_query_equal_to_support_is_segmented(model: LSLPN) -> None:
    images = torch.full((1, 1, S, S), 0.2)
    masks = torch.zeros(1, 1, 1, S, S, dtype=torch.uint8)
    masks[..., 24:56, 20:52] = 1
    images[masks[:, :, 0] == 1] = 0.8
    with torch.no_grad():
        found = model(images, masks, images).argmax(2)[0, 0]
    truth = masks[0, 0, 0]
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.8


def test_forward_is_encode_and_head(model: LSLPN) -> None:
    support, masks, query = episode(K=2)
    with torch.no_grad():
        whole = model(support, masks, query)
        parts = model.head(model.encode(support), masks, model.encode(query))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_encode_takes_any_leading_axes_and_many_images(model: LSLPN) -> None:
    images = torch.rand(2, 11, 40, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = model.encode(images)  # 22 images: more than one chunk
        single = model.encode(images[1, 10])
    assert features.shape == (2, 11, 256, feature_size(40), feature_size(48))
    torch.testing.assert_close(features[1, 10], single, rtol=1e-4, atol=1e-4)


def test_imagenet_normalisation_is_that_of_the_weights(model: LSLPN) -> None:
    normalised = untrained(ModelConfig(imagenet_normalisation=True))
    grey = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(4))
    colour = (grey[None].expand(1, 3, 40, 40) - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / (
        torch.tensor(IMAGENET_STD).view(3, 1, 1)
    )
    with torch.no_grad():
        torch.testing.assert_close(normalised.encode(grey), normalised.encoder(colour))
        # With the published preset the encoder gets the grey values unchanged.
        torch.testing.assert_close(
            model.encode(grey), model.encoder(grey[None].expand(1, 3, 40, 40))
        )
        assert not torch.allclose(normalised.encode(grey), model.encode(grey), atol=1e-2)


def test_separate_support_images_per_way_give_the_means_over_ways_and_shots(model: LSLPN) -> None:
    """Two ways with one image each: each way's prototypes are its own image's, the background's
    is the mean of both images'."""
    support, _, query = episode(B=1, K=2)
    masks = torch.zeros(1, 2, 2, S, S, dtype=torch.uint8)
    masks[:, 0, 0, 8:40, 8:40] = 1
    masks[:, 1, 1, 30:64, 30:64] = 1
    with torch.no_grad():
        features = model.encode(torch.cat((support, query), 1))
        logits = model.head(features[:, :2], masks, features[:, 2:])
        alone = [
            model.head(features[:, n : n + 1], masks[:, n : n + 1, n : n + 1], features[:, 2:])
            for n in range(2)
        ]
        prototypes = [
            model.head.prototypes(features[:, n : n + 1], masks[:, n : n + 1, n : n + 1])
            for n in range(2)
        ]
        background = (prototypes[0][:, :1] + prototypes[1][:, :1]) / 2
        expected = model.head.match(features[:, 2:], background, (S, S))
    for n in range(2):
        torch.testing.assert_close(logits[:, :, n + 1], alone[n][:, :, 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, :, 0], expected[:, :, 0], rtol=1e-4, atol=1e-4)


def test_presets_reach_the_head() -> None:
    paper = LSLPN(preset("paper").model)
    assert paper.head.logit_scale == 1.0
    assert paper.head.min_pixels == 0
    published = LSLPN(preset("published").model)
    assert published.head.logit_scale == 20.0
    assert published.head.min_pixels == 10
    odd = LSLPN(ModelConfig(grid_scale=0.25, grid_spacing=1.0, reduce="mean", weights="random"))
    assert (odd.head.grid.scale, odd.head.grid.spacing, odd.head.reduce) == (0.25, 1.0, "mean")


def test_untrained_depends_on_the_seed_and_leaves_torchs_generator_unchanged() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = untrained(seed=1).encoder.reduction.weight
    # Building the convolutions draws from torch's generator; the result must not depend on it.
    torch.manual_seed(8)
    assert torch.equal(first, untrained(seed=1).encoder.reduction.weight)
    assert not torch.equal(first, untrained(seed=2).encoder.reduction.weight)
    torch.manual_seed(7)
    untrained(seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_bfloat16_encoder_gives_float32_features_near_the_exact_ones(model: LSLPN) -> None:
    images = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact = model.encode(images)
        model.amp = True
        try:
            rough = model.encode(images)
        finally:
            model.amp = False
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert torch.nn.functional.cosine_similarity(rough, exact, dim=1).min() > 0.99


def test_gradients_reach_the_whole_encoder() -> None:
    model = untrained("published").train()
    support, masks, query = episode()
    model(support, masks, query)[:, :, 1].mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert model.encoder.conv1.weight.grad.abs().sum() > 0


def test_an_exported_network_takes_any_number_of_episodes(model: LSLPN) -> None:
    batch = torch.export.Dim("B", min=1, max=8)
    exported = torch.export.export(model, episode(), dynamic_shapes=({0: batch},) * 3).module()
    for B in (1, 3):
        given = episode(B=B)
        torch.testing.assert_close(exported(*given), model(*given))


def test_wrong_shapes_are_named(model: LSLPN) -> None:
    support, masks, query = episode()
    with pytest.raises(InputError, match=r"support_masks \[B, K, N, S, S\].*\(2, 1, 72, 72\)"):
        model(support, masks[:, :, 0], query)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x: {"out": x}, "dict"),
        (lambda x: [x], "list"),
        (lambda x: x.flatten(2).mT, r"\(2, 81, 3\)"),  # as a transformer's tokens
        (lambda x: x[:1], r"\(1, 3, 9, 9\)"),
    ],
)
def test_an_encoder_without_a_feature_map_for_each_image(wrong: Any, said: str) -> None:
    class Wrong(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return wrong(F.avg_pool2d(images, 8))

    model = LSLPN(ModelConfig(), encoder=Wrong())
    with pytest.raises(InputError, match=rf"encoder: expected features \[2, D, h, w\].*{said}"):
        model.encode(torch.rand(2, 72, 72))


def test_unknown_weights_file_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"nowhere\.pth"):
        LSLPN(ModelConfig(weights="nowhere.pth"))
