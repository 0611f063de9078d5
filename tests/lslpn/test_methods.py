"""The methods that the paper compares with, each against a direct implementation."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from synthetic import CHECKOUT, synthetic_ct, write_nifti, write_synthetic_dataset
from torch import Tensor

from lslpn.checkpoint import load_checkpoint, load_model, save_checkpoint
from lslpn.cli import main
from lslpn.config import Config, Method, ModelConfig, TrainConfig, preset, with_overrides
from lslpn.data.dataset import Dataset
from lslpn.data.episodes import Batch
from lslpn.data.volumes import read_image, read_labels
from lslpn.errors import InputError
from lslpn.evaluation.scoring import evaluate, evaluate_grids
from lslpn.models import METHODS, ALPNet, FewShotNetwork, PANet, SENet, untrained
from lslpn.models.senet import dice_loss
from lslpn.segmentation.segment import segment
from lslpn.training import learning_rate, make_optimizer, train, train_step
from lslpn_kernels import GridSpec

S = 64


def config(method: str, **values: object) -> Config:
    plain = {"method": method, "size": S, "channels": 8, "weights": "random", "dropout": 0.0}
    return with_overrides(preset("published"), **{**plain, **values})


def network(method: str, seed: int = 3) -> FewShotNetwork:
    return untrained(config(method), seed=seed)


def blobs(B: int, K: int, seed: int = 0, N: int = 1) -> tuple[Tensor, Tensor]:
    """Images with a bright square per class on noise, and the squares."""
    g = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand(B, K, S, S, generator=g)
    masks = torch.zeros(B, K, N, S, S, dtype=torch.uint8)
    for b in range(B):
        for k in range(K):
            for n in range(N):
                y = int(torch.randint(4, 28, (1,), generator=g))
                x = (4, 34)[n % 2] + int(torch.randint(0, 6, (1,), generator=g))
                masks[b, k, n, y : y + 24, x : x + 20] = 1
                images[b, k, y : y + 24, x : x + 20] += 0.6 - 0.4 * n
    return images.clamp(0, 1), masks


def batch(B: int = 2, K: int = 1, N: int = 1) -> Batch:
    support, masks = blobs(B, K, 1, N)
    queries, truth = blobs(B, 1, 2, N)
    classes = torch.arange(1, N + 1).view(1, 1, N, 1, 1)
    return Batch(support, masks, queries, (truth * classes).amax(2).long())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosines of a feature with each prototype; 0 if either is zero."""
    norms = a.norm() * b.norm(dim=-1)
    return torch.where(norms > 0, (b @ a) / norms.clamp_min(1e-30), 0.0)


def upsampled(x: Tensor, size: tuple[int, int] = (S, S)) -> Tensor:
    return F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0]


# --- the definitions, a pixel at a time -----------------------------------------------------


def panet_prototypes(features: Tensor, masks: Tensor) -> Tensor:
    """features [K, D, h, w], masks [K, N, H, W] -> [N + 1, D]."""
    background = 1 - masks.float().amax(1, keepdim=True)
    classes = torch.cat((background, masks.float()), 1)
    found = torch.zeros(classes.shape[1], features.shape[1])
    for k, feature in enumerate(features):
        up = upsampled(feature, tuple(masks.shape[-2:]))
        for c, mask in enumerate(classes[k]):
            if mask.sum() > 0:
                found[c] += (up * mask).sum((1, 2)) / mask.sum() / len(features)
    return found


def panet_scores(query: Tensor, prototypes: Tensor) -> Tensor:
    """query [D, h, w] -> [C, h, w]."""
    D, h, w = query.shape
    out = torch.stack([20 * cosine(f, prototypes) for f in query.view(D, -1).T], 1)
    return out.view(-1, h, w)


def alpnet_prototypes(features: Tensor, masks: Tensor, cell: int) -> list[Tensor]:
    """features [K, D, h, w], masks [K, N, H, W] -> for each class [P, D]."""
    h, w = features.shape[-2:]
    background = 1 - masks.float().amax(1, keepdim=True)
    small = torch.stack([upsampled(m, (h, w)) for m in torch.cat((background, masks.float()), 1)])
    found = []
    for c in range(small.shape[1]):
        cells, whole = [], []
        for feature, mask in zip(features, small[:, c], strict=True):
            for y in range(0, h - cell + 1, cell):
                for x in range(0, w - cell + 1, cell):
                    if mask[y : y + cell, x : x + cell].mean() > 0.95:
                        cells.append(feature[:, y : y + cell, x : x + cell].mean((1, 2)))
            if mask.sum() > 0:
                whole.append((feature * mask).sum((1, 2)) / mask.sum())
        found.append(torch.stack(cells + whole if c > 0 or not cells else cells))
    return found


def alpnet_scores(query: Tensor, prototypes: list[Tensor]) -> Tensor:
    D, h, w = query.shape
    out = []
    for of_class in prototypes:
        d = torch.stack([20 * cosine(f, of_class) for f in query.view(D, -1).T])
        out.append((d.softmax(1) * d).sum(1).view(h, w))
    return torch.stack(out)


@pytest.mark.parametrize(("K", "N"), [(1, 1), (3, 2)])
def test_panet_is_a_global_average_and_a_cosine(K: int, N: int) -> None:
    model = network("panet")
    support, masks, query = blobs(2, K, 1, N)[0], blobs(2, K, 1, N)[1], blobs(2, 2, 2)[0]
    masks[1, 0, 0] = 0  # an image without the class
    with torch.no_grad():
        logits = model(support, masks, query)
        for b in range(2):
            prototypes = panet_prototypes(model.encode(support[b]), masks[b])
            for q in range(2):
                expected = upsampled(panet_scores(model.encode(query[b, q]), prototypes))
                torch.testing.assert_close(logits[b, q], expected, rtol=1e-3, atol=2e-3)
    assert logits.shape == (2, 2, N + 1, S, S)


@pytest.mark.parametrize(("K", "N", "training"), [(1, 1, False), (1, 1, True), (2, 2, False)])
def test_alpnet_is_cells_and_a_soft_maximum(K: int, N: int, training: bool) -> None:
    model = untrained(config("alpnet", batch_norm="frozen"), seed=3).train(training)
    support, masks = blobs(2, K, 1, N)
    query = blobs(2, 2, 2)[0]
    with torch.no_grad():
        logits = model(support, masks, query)
        for b in range(2):
            prototypes = alpnet_prototypes(model.encode(support[b]), masks[b], 4 if training else 2)
            assert len(prototypes[0]) > 1
            for q in range(2):
                expected = upsampled(alpnet_scores(model.encode(query[b, q]), prototypes))
                torch.testing.assert_close(logits[b, q], expected, rtol=1e-3, atol=2e-3)


def test_alpnet_takes_the_masks_mean_where_no_cell_passes() -> None:
    """Small organs and a background without a full cell: the prototype is the mask's mean."""
    model = network("alpnet")
    support, masks = blobs(1, 1)
    masks.zero_()
    masks[..., ::3, :] = 1  # no cell holds 95% of either class
    with torch.no_grad():
        features = model.encode(support)
        found = model.describe(features, masks)[0]
        expected = alpnet_prototypes(features[0], masks[0], 2)
    assert [len(p) for p in found] == [1, 1]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, F.normalize(theirs, dim=1), rtol=1e-4, atol=1e-5)


def test_a_class_absent_from_the_support_scores_zero() -> None:
    support, masks = blobs(1, 1)
    for method in ("panet", "alpnet"):
        with torch.no_grad():
            logits = network(method)(support, torch.zeros_like(masks), support)
        assert (logits[:, :, 1] == 0).all()
        assert (logits[:, :, 0] > 0).all()


def senet_block(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    w = {k: state[f"{name}.{k}"] for k in ("0.weight", "0.bias", "1.weight", "2.weight", "2.bias")}
    x = F.conv2d(x, w["0.weight"], w["0.bias"], padding=2)
    x = torch.where(x > 0, x, w["1.weight"] * x)
    mean, var = state[f"{name}.2.running_mean"], state[f"{name}.2.running_var"]
    x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    return x * w["2.weight"].view(1, -1, 1, 1) + w["2.bias"].view(1, -1, 1, 1)


def unpooled(x: Tensor, before: Tensor) -> Tensor:
    """Each value of x at the position of the maximum of its 2 x 2 cell of `before`."""
    out = torch.zeros_like(before[:, : x.shape[1]])
    for c in range(x.shape[1]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                cell = before[0, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                y, z = divmod(int(cell.argmax()), 2)
                out[0, c, 2 * i + y, 2 * j + z] = x[0, c, i, j]
    return out


def senet_forward(state: dict[str, Tensor], support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
    x, gates, kept = torch.stack((support, mask.float()))[None], [], []

    def gate(x: Tensor) -> None:
        i = len(gates)
        gates.append(
            F.conv2d(x, state[f"squeeze.{i}.weight"], state[f"squeeze.{i}.bias"]).sigmoid()
        )

    for i in range(4):
        kept.append(senet_block(state, f"conditioner.down.{i}", x))
        x = F.max_pool2d(kept[-1], 2)
        gate(x)
    x = senet_block(state, "conditioner.bottom", x)
    gate(x)
    for i in range(4):
        x = senet_block(state, f"conditioner.up.{i}", unpooled(x, kept.pop()))
        gate(x)
    assert len(gates) == 9

    x = query[None, None]
    for i in range(4):
        kept.append(senet_block(state, f"segmenter.down.{i}", x))
        x = F.max_pool2d(kept[-1], 2) * gates[i]
    x = senet_block(state, "segmenter.bottom", x) * gates[4]
    for i in range(4):
        before = kept.pop()
        x = unpooled(x, before)
        if i == 0:
            x = torch.cat((x, before), 1)
        x = senet_block(state, f"segmenter.up.{i}", x) * gates[5 + i]
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"])[0]


def test_senet_is_two_arms_and_nine_gates() -> None:
    side = 36  # 36, 18, 9, 4, 2: one level is odd
    model = network("senet")
    # Statistics other than 0 and 1, so that batch norm does something.
    g = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=g))
    support, masks = (x[..., :side, :side] for x in blobs(1, 1))
    query = blobs(1, 2, 5)[0][..., :side, :side]
    with torch.no_grad():
        logits = model(support, masks, query)
        for q in range(2):
            expected = senet_forward(
                dict(model.state_dict()), support[0, 0], masks[0, 0, 0], query[0, q]
            )
            torch.testing.assert_close(logits[0, q], expected, rtol=1e-3, atol=1e-4)
    assert isinstance(model, SENet)
    assert model.conditioner.bottom[0].weight.shape == (16, 16, 5, 5)
    assert model.segmenter.bottom[0].weight.shape == (64, 64, 5, 5)
    assert model.segmenter.up[0][0].weight.shape == (64, 128, 5, 5)


# --- losses ---------------------------------------------------------------------------------


def align_oracle(model: FewShotNetwork, b: int, data: Batch, kind: str) -> Tensor:
    """PANet's second loss for one episode, one support image and one way at a time."""
    support, query = model.encode(data.support_images[b]), model.encode(data.query_images[b])
    masks = data.support_masks[b]

    def prototypes(features: Tensor, of: Tensor) -> list[Tensor] | Tensor:
        if kind == "panet":
            return panet_prototypes(features, of)
        return alpnet_prototypes(features, of, 4)

    def scores(features: Tensor, of: list[Tensor] | Tensor) -> Tensor:
        if kind == "panet":
            assert isinstance(of, Tensor)
            return panet_scores(features, of)
        assert isinstance(of, list)
        return alpnet_scores(features, of)

    coarse = scores(query[0], prototypes(support, masks))
    predicted = coarse.argmax(0)
    back = torch.stack([(predicted == n + 1) for n in range(masks.shape[1])])[None].to(torch.uint8)
    assert back.flatten(2).any(2).all(), "every class must be predicted somewhere in this test"
    from_query = prototypes(query, back)
    total, count = torch.zeros(()), 0
    for k in range(masks.shape[0]):
        logits = upsampled(scores(support[k], from_query))
        for n in range(masks.shape[1]):
            if masks[k, n].any():
                labels = masks[k, n].long()
                others = masks[k].clone()
                others[n] = 0
                labels[(others.amax(0) > 0) & (labels == 0)] = 255
                pair = logits[[0, n + 1]][None]
                total = total + F.cross_entropy(pair, labels[None], ignore_index=255)
                count += 1
    return total / count


@pytest.mark.parametrize("method", ["panet", "alpnet"])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (2, 2)])
def test_loss_is_cross_entropy_and_alignment(method: str, K: int, N: int) -> None:
    settings = config(method, batch_norm="frozen")
    model = untrained(settings, seed=3).train()
    data = batch(2, K, N)
    if N == 2:
        data.support_masks[:, 0, 1] = 0  # an image of the first way only
    data.query_labels[:, :, :5] = 255
    with torch.no_grad():
        logits = model(data.support_images, data.support_masks, data.query_images)
        weight = torch.tensor([0.05, *[1.0] * N]) if method == "alpnet" else None
        plain = F.cross_entropy(logits[:, 0], data.query_labels[:, 0], weight, ignore_index=255)
        aligned = torch.stack([align_oracle(model, b, data, method) for b in range(2)])
        off = dataclasses.replace(settings.train, alignment_weight=0.0)
        torch.testing.assert_close(model.loss(data, off), plain, rtol=1e-4, atol=1e-4)
        half = dataclasses.replace(settings.train, alignment_weight=0.5)
        expected = plain + 0.5 * aligned.mean()
        torch.testing.assert_close(model.loss(data, half), expected, rtol=2e-3, atol=2e-3)
    assert aligned.min() > 0.05


@pytest.mark.parametrize("method", [PANet, ALPNet])
def test_a_class_predicted_nowhere_has_an_alignment_loss_in_alpnet_only(
    method: type[PANet | ALPNet],
) -> None:
    class Timid(method):  # type: ignore[misc, valid-type]
        """Predicts background everywhere."""

        def scores(self, features: Tensor, support: object) -> Tensor:
            found = super().scores(features, support)
            return torch.cat((found[:, :, :1] + 100, found[:, :, 1:]), 2)

    model = Timid(config(method.name).model).train()
    data = batch()
    with torch.no_grad():
        first = model.loss(data, TrainConfig(alignment_weight=0))
        second = model.loss(data, TrainConfig()) - first
    if method is PANet:
        assert second == 0
    else:
        # The share of organ pixels, all predicted as background with a logit of 100 or more.
        share = data.support_masks.float().mean()
        assert 100 * share < second < 121 * share


def test_dice_loss_by_hand() -> None:
    logits = torch.zeros(1, 1, 2, 1, 4)
    logits[0, 0, 1, 0] = torch.tensor([50.0, 50.0, -50.0, -50.0])
    labels = torch.tensor([[[[1, 0, 0, 1]]]])
    # Each class: 2 x 1 / (2 + 2). Without the last pixel: foreground 2 / 3, background 2 / 3.
    assert dice_loss(logits, labels) == pytest.approx(0.5)
    labels[..., 3] = 255
    assert dice_loss(logits, labels) == pytest.approx(1 - 2 / 3)
    assert dice_loss(logits, torch.tensor([[[[1, 1, 0, 0]]]])) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_everything_that_learns_and_steps_lower_the_loss(method: str) -> None:
    # No dropout, no momentum and small steps: the loss falls with any rounding.
    lr = 0.3 if method == "senet" else 0.001
    settings = config(
        method,
        batch_norm="frozen",
        lr=lr,
        momentum=0,
        dropout=0,
        weights="imagenet",
        channels=32,
    )
    model = untrained(settings).train()
    optimizer = make_optimizer(model, settings.train)
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in model.parameters() if p.requires_grad}
    data = batch()
    losses = []
    for step in range(8):
        losses.append(float(train_step(model, optimizer, data, settings.train)))
        for name, parameter in model.named_parameters():
            if step == 0 and parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
                # The gradient of a bias before batch norm may be zero.
                assert parameter.grad.abs().sum() > 0, name
    assert losses[-1] < 0.9 * losses[0], losses


# --- what is shared -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write_synthetic_dataset(tmp_path_factory.mktemp("data"), cases=3))


@pytest.mark.parametrize("method", METHODS)
def test_training_and_evaluating_run_and_the_checkpoint_keeps_the_method(
    method: str, dataset: Dataset, tmp_path: Path
) -> None:
    settings = config(method, steps=2, batch=2, lr=1e-4, size=48)
    model = train(
        settings, dataset, hold_out=["kidney"], cases=dataset.cases, out=tmp_path, progress=False
    )
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) is METHODS[method]
    assert loaded.config == settings.model
    options: dict[str, object] = {
        "support": "syn_00",
        "queries": ["syn_01"],
        "organs": ["liver", "kidney"],
        "protocol": "alpnet",
        "progress": False,
    }
    found = [evaluate(m, dataset, **options) for m in (model, loaded)]  # type: ignore[arg-type]
    assert found[0].rows == found[1].rows
    assert [row.organ for row in found[0].rows] == ["liver", "kidney"]
    assert (found[0].method, found[0].model) == (method, method)
    if method == "lslpn":
        assert (found[0].scale, found[0].spacing) == (1 / 8, 1 / 2)
        grid = evaluate_grids(loaded, dataset, grids=[GridSpec(1 / 8)], **options)  # type: ignore
        assert grid[0].rows == found[0].rows
    else:
        assert found[0].scale is None
        assert "scale" not in found[0].table()


def test_checkpoints_without_a_method_are_lslpn(tmp_path: Path) -> None:
    model = network("lslpn")
    content = config("lslpn").to_dict()
    del content["model"]["method"]
    del content["train"]["alignment_weight"]
    assert Config.from_dict(content) == config("lslpn")
    file = tmp_path / "checkpoint.pt"
    from lslpn.checkpoint import Checkpoint

    data = {"cases": ["a"], "organs": ["liver"], "hold_out": []}
    save_checkpoint(file, Checkpoint(config("lslpn"), 1, model.state_dict(), {}, data, {}))
    stored = torch.load(file, weights_only=True)
    torch.save({**stored, "config": content}, file)
    assert load_checkpoint(file).config.model.method == "lslpn"
    # PANet has the same tensors: with a changed name, a file of LSLPN must not load as one.
    torch.save({**stored, "method": "panet"}, file)
    with pytest.raises(InputError, match=r"method 'panet' is 'lslpn' in its configuration"):
        load_model(file)


def test_senet_in_bfloat16_gives_float32_near_the_exact() -> None:
    model = network("senet")
    data = batch()
    with torch.no_grad():
        exact = model(data.support_images, data.support_masks, data.query_images)
        model.amp = True
        rough = model(data.support_images, data.support_masks, data.query_images)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05 * float(exact.std()))


def test_one_way_and_one_shot_for_senet() -> None:
    model = network("senet")
    images = torch.rand(1, 2, S, S)
    with pytest.raises(InputError, match=r"SENet.*1 way and 1 shot, got 1 ways and 2 support"):
        model(images, torch.zeros(1, 2, 1, S, S), images)
    with pytest.raises(InputError, match=r"SENet.*got 2 ways and 1 support"):
        model(images[:, :1], torch.zeros(1, 1, 2, S, S), images)


@pytest.mark.parametrize("change", [{"ways": 2}, {"shots": 2}])
def test_senet_with_several_ways_or_shots_is_refused_before_training(
    change: dict[str, int],
) -> None:
    with pytest.raises(InputError, match=r"senet is for 1 way and 1 shot, not [12] and [12]"):
        config("senet", **change)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_segments_a_scan(method: str, tmp_path: Path) -> None:
    paths = {}
    for i, name in enumerate("ab"):
        image, labels = synthetic_ct(i, shape=(6, 56, 64), shift=0.02 * i)
        paths[name] = (
            write_nifti(tmp_path / f"{name}.nii.gz", image),
            write_nifti(tmp_path / f"{name}_mask.nii.gz", labels),
        )
    supports = [(read_image(a), read_labels(b)) for a, b in (paths["a"], paths["b"])]
    model = network(method)
    query = read_image(paths["b"][0])
    found = segment(model, supports, query, align="body")
    assert found.shape == query.data.shape
    assert set(found.ravel().tolist()) <= {0, 1, 2, 3}


def test_names_of_methods_equal_those_of_the_option() -> None:
    with pytest.raises(InputError, match=r"method.*'protonet'.*'lslpn' or 'panet'"):
        with_overrides(preset("published"), method="protonet")
    with pytest.raises(InputError, match=r"method.*'lslpn' or 'panet'"):
        ModelConfig(method="protonet")  # type: ignore[arg-type]
    assert list(METHODS) == list(get_args(Method))


def test_the_command_line_trains_and_evaluates_a_method(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run_folder = f"--data={dataset.root}", tmp_path / "run"
    settings = ["size=48", "steps=1", "batch=1", "weights=random", "channels=8"]
    words = ["train", data, "--hold-out=kidney", "--method=panet", f"--out={run_folder}", "-q"]
    assert main([*words, *(f"--set={s}" for s in settings)]) == 0
    plain = ["evaluate", data, "--support=syn_00", "--query=syn_01", "--organ=kidney", "-q"]
    assert main([*plain, f"--checkpoint={run_folder}", f"--out={tmp_path / 'a'}"]) == 0
    untrained_words = ["--untrained", "--method=alpnet", "--size=48", f"--out={tmp_path / 'b'}"]
    assert main([*plain, *untrained_words]) == 0
    found = [
        json.loads((tmp_path / name / "evaluation.json").read_text())["evaluations"][0]
        for name in "ab"
    ]
    assert [(e["method"], e["scale"]) for e in found] == [("panet", None), ("alpnet", None)]
    capsys.readouterr()
    out = f"--out={tmp_path / 'c'}"
    for bad, said in (
        (
            [f"--checkpoint={run_folder}", "--method=panet"],
            "--method: a trained network has its own",
        ),
        ([f"--checkpoint={run_folder}", "--scale=1/4"], "--scale: panet has no grid"),
        (["--untrained", "--method=protonet"], "protonet"),
    ):
        assert main([*plain, *bad, out]) == 2
        assert said in capsys.readouterr().err


def test_the_documented_published_settings_are_valid() -> None:
    """The settings in docs/methods.md, as a shell passes them."""
    text = (CHECKOUT / "docs" / "methods.md").read_text()
    text = text.replace("$(seq -s, 1000 1000 99000)", ",".join(map(str, range(1000, 100000, 1000))))
    commands = [
        shlex.split(c.replace("\\\n", " "))
        for c in re.findall(r"^lslpn train .*(?:\n    .*)*", text, re.M)
    ]
    steps = {}
    for words in commands:
        method = words[words.index("--method") + 1] if "--method" in words else "lslpn"
        values = dict(w.split("=", 1) for before, w in pairwise(words) if before == "--set")
        steps[method] = with_overrides(preset("published"), method=method, **values).train
    assert {m: (t.steps, t.batch) for m, t in steps.items()} == {
        "lslpn": (1000, 4),  # without labels
        "panet": (30_000, 1),
        "alpnet": (100_000, 1),
        "senet": (2000, 2),
    }
    assert learning_rate(steps["alpnet"], 99_999) == pytest.approx(1e-3 * 0.95**99)
    assert learning_rate(steps["senet"], 1999) == 1e-3
