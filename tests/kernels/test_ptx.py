"""The compiled GPU code without a GPU: the PTX of nvcc and of Triton, executed on the host.

See ptx/. Kernels are launched by the host's code of either backend, with tensors of the CPU.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ALIKE,
    GOLDEN,
    INTERPOLATED,
    SITUATIONS,
    SPOILT,
    Case,
    NotFinite,
    assert_near,
    run,
)
from ptx import cuda, hooks, machine, triton_driver
from ptx.fixtures import kernels, module  # noqa: F401
from ptx.machine import ExecutionError, Kernel, Launch, settings
from ptx.program import Program, TranslationError
from ptx.program import kernels as kernels_of
from test_gpu import PAPER, _drawn
from torch import Tensor

from benchmarks import instructions
from lslpn_kernels import GridSpec, LocalPrototypeHead

np = pytest.importorskip("numpy", reason="numpy is not installed")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: test_gpu.py runs the kernels on it"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of test_gpu's cases; the fourth takes as long as the others together.
SEEDS = [seed for seed in range(int(os.environ.get("LSLPN_EXAMPLES", "6"))) if seed != 3]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Idle threads of PyTorch spin, and would take cores from the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_launches() -> None:
    machine.LAUNCHES.clear()


def executed_is_for(arch: int) -> None:
    """Whether something was launched, and all of it was compiled for a compute capability."""
    assert machine.LAUNCHES
    for launch in machine.LAUNCHES:
        assert re.search(rf"^\.target sm_{arch}a?$", launch.program.source.ptx, re.MULTILINE)


def close(case: Case, backend: str, dtype: torch.dtype, few: bool = True) -> None:
    """Forward and backward against the truth in float64, with tensor cores that cut off sums.

    Of many pixels some have two windows whose scores agree to rounding, and either may win: with
    `few` there are none of these, else the gradients of the matching are allowed what they change.
    """
    if case in SITUATIONS.values():
        expected = run(case, "reference", rounded=dtype)
    else:
        expected = run(case, "torch", torch.float64, "cpu", dtype)
    with settings(truncates=True):
        found = run(case, backend, dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-5
    smooth = {name: expected[name] for name in ("prototypes", "grad_support", "scores")}
    assert_near(found, smooth, tolerance)
    assert_near(found, expected, tolerance if few else 1e-2)


def golden(path: Path, backend: str) -> None:
    saved = np.load(path)

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(saved[name])

    support = tensor("support_features")[None].requires_grad_()
    query = tensor("query_features")[None].requires_grad_()
    grid = GridSpec(1 / int(saved["n_grid"]), 0.5 if saved["overlap"] else 1)
    head = LocalPrototypeHead(
        grid, float(saved["scale"]), int(saved["min_pixels"]), backend=backend
    )
    logits = head(support, tensor("foreground")[None], query)
    label = tensor("query_label").long()
    loss = F.cross_entropy(logits[0], label.expand(logits.shape[1], -1, -1))
    loss.backward()
    assert support.grad is not None
    assert query.grad is not None
    for actual, name, tolerance in (
        (logits[0], "logits", 1e-5),
        (support.grad[0], "grad_support", 1e-4),
        (query.grad[0], "grad_query", 1e-4),
    ):
        wanted = tensor(name).double()
        error = (actual.detach().double() - wanted).norm() / wanted.norm()
        assert error < tolerance, name
    assert abs(loss.item() - saved["loss"]) < 1e-5 * abs(saved["loss"])


# ---- the CUDA kernels, as nvcc compiles them ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SITUATIONS)
def test_cuda_situation(kernels: cuda.Module, name: str, dtype: torch.dtype) -> None:
    close(SITUATIONS[name], "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_for_another_gpu(kernels: cuda.Module, dtype: torch.dtype) -> None:
    kernels.take(80)
    close(SITUATIONS["channels_last"], "cuda", dtype)
    executed_is_for(80)


def test_float64_is_computed_by_torch_in_place_of_the_cuda_kernels(kernels: cuda.Module) -> None:
    case = SITUATIONS["channels_last"]
    torch.testing.assert_close(run(case, "cuda"), run(case, "reference"))
    assert not machine.LAUNCHES


@pytest.mark.parametrize("seed", SEEDS)
def test_cuda_drawn_at_random(kernels: cuda.Module, seed: int) -> None:
    case, dtype = _drawn(seed)
    close(case, "cuda", dtype, few=False)


def test_cuda_ignores_the_strides_of_dimensions_of_length_one(kernels: cuda.Module) -> None:
    """Some releases of torch export 1 for a dimension of length 1; the fast path is kept."""
    dense = torch.randn(1, 1, 9, 9, 32).movedim(-1, 2)
    single = dense.as_strided(dense.shape, (1, 1, *dense.stride()[2:]))
    masks = torch.rand(1, 1, 1, 64, 64) < 0.5
    issued = []
    for features in (dense, single):
        machine.LAUNCHES.clear()
        head = LocalPrototypeHead(PAPER, backend="cuda")
        logits = head(features, masks, features)
        issued.append([sum(launch.issued) for launch in machine.LAUNCHES])
    assert issued[0] == issued[1]
    assert logits.isfinite().all()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_cuda_golden(kernels: cuda.Module, path: Path) -> None:
    with settings(truncates=True):
        golden(path, "cuda")


def test_cuda_at_the_size_of_the_paper(kernels: cuda.Module) -> None:
    case = Case(D=256, h=65, w=65, H=512, W=512, grid=PAPER)
    close(case, "cuda", torch.bfloat16, few=False)


# ---- the Triton kernels, as Triton compiles them ----

TRITON = {
    "odd_rectangle": (SITUATIONS["odd_rectangle"], 90, (torch.float32, torch.float16)),
    "for_another_gpu": (SITUATIONS["soft_masks"], 80, (torch.float32, torch.bfloat16)),
    "channels_last": (SITUATIONS["channels_last"], 90, (torch.bfloat16,)),
    "mean": (SITUATIONS["mean_over_windows"], 90, (torch.float32,)),
    "as_large_as_image": (SITUATIONS["features_as_large_as_image"], 90, (torch.float32,)),
    # Sums over many channels or pixels, in which tensor cores lose what they cut off.
    "channels_of_the_paper": (Case(D=256, h=9, w=9, H=64, W=64, grid=PAPER), 90, DTYPES),
    "one_window": (Case(D=64, h=33, w=33, H=128, W=128, grid=GridSpec(1.0)), 90, (torch.float32,)),
}


@pytest.fixture
def triton() -> Callable[[int], AbstractContextManager[None]]:
    """triton(arch): `backend="triton"` executes what Triton makes for a compute capability."""
    if reason := triton_driver.obstacle():
        pytest.skip(reason)
    return hooks.triton


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, (_, _, dtypes) in TRITON.items() for dtype in dtypes],
)
def test_triton(triton: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    case, arch, _ = TRITON[name]
    with triton(arch):
        close(case, "triton", dtype)
    executed_is_for(arch)


def test_triton_golden(triton: Callable[..., Any]) -> None:
    with triton(90), settings(truncates=True):
        golden(GOLDEN[0], "triton")


@pytest.mark.parametrize(
    ("where", "sizes"),
    [
        *((where, INTERPOLATED) for where in SPOILT),
        *((where, sizes) for sizes in ALIKE.values() for where in ("query", "grad_scores")),
    ],
    ids=[*SPOILT, *(f"{where}_{size}" for size in ALIKE for where in ("query", "grad_scores"))],
)
def test_triton_not_finite(
    triton: Callable[..., Any], where: str, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """Results are not finite where the equations have it so, and right elsewhere."""
    case = NotFinite(where, torch.float32, "max", sizes)
    for value in (torch.nan, torch.inf):
        case.spoil(value)
        expected = case.results("reference", torch.float64)
        with triton(90):
            found = case.results("triton")
        for name, wanted in expected.items():
            good = wanted.isfinite()
            assert torch.equal(found[name].isfinite(), good), name
            assert (found[name] - wanted)[good].norm() < 1e-5 * wanted[good].norm(), name


# ---- how much is executed ----


@pytest.mark.parametrize("backend", instructions.BACKENDS)
def test_instruction_budget(backend: str) -> None:
    """Each kernel's warp instructions are within its budget, and the budget is not far above them.

    A compiler may change some; after larger changes run `python -m benchmarks.instructions
    --budgets`, and check the difference.
    """
    if reason := cuda.obstacle() if backend == "cuda" else triton_driver.obstacle():
        pytest.skip(reason)
    budgets = json.loads(instructions.BUDGETS.read_text())[backend]
    for dtype, found in instructions.budgets(backend).items():
        assert found.keys() == budgets[dtype].keys()
        for kernel, issued in found.items():
            budget = budgets[dtype][kernel]
            assert 0.8 * budget < issued < 1.03 * budget, (dtype, kernel)


# ---- what a wrong program does ----


def test_two_operands_of_one_matrix_product_exchanged(
    kernels: cuda.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests detect wrong layouts of fragments: in the most frequent matrix product, the parts
    of a with the lower rows and with the right columns are exchanged."""
    case = Case(D=64, h=9, w=9, H=64, W=64, grid=PAPER)
    close(case, "cuda", torch.bfloat16)
    _, launch, place = max(
        (
            (issued, launch, i)
            for launch in machine.LAUNCHES
            for i, issued in enumerate(launch.issued)
            if launch.program.instructions[i].name.startswith("mma.")
        ),
        key=lambda found: found[0],
    )
    program = Program(launch.program.source)
    a = program.instructions[place].operands
    a[5], a[6] = a[6], a[5]
    monkeypatch.setitem(kernels.kernels, program.name, Kernel(program))
    with pytest.raises(AssertionError, match=r"scores|grad|prototypes"):
        close(case, "cuda", torch.bfloat16)


HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %d<9>;\n"


def execute(
    body: str,
    data: np.ndarray | None = None,
    *,
    blocks: int = 1,
    threads: int = 64,
    shared: int = 256,
) -> Launch:
    """Runs a kernel. %d1 is the address of `data`, %r1 the thread."""
    ptx = f"""{HEADER}.extern .shared .align 16 .b8 memory[];
        .visible .entry kernel(.param .u64 data)
        {{ {REGISTERS} ld.param.u64 %d1, [data]; mov.u32 %r1, %tid.x; {body} ret; }}"""
    kernel = Kernel(Program(kernels_of(ptx)["kernel"]))
    data = np.zeros(64, np.uint32) if data is None else data
    machine.name_memory(data.ctypes.data, data.nbytes)
    try:
        return kernel.launch(
            (blocks, 1, 1), (threads, 1, 1), shared, struct.pack("<Q", data.ctypes.data)
        )
    finally:
        machine.forget_memory()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_of_two_widths(dtype: torch.dtype) -> None:
    kind = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
    given = torch.arange(-32, 32) / 7
    data = given.numpy().copy()
    execute(
        "mul.wide.u32 %d2, %r1, 4; add.s64 %d2, %d1, %d2; ld.global.b32 %r5, [%d2];"
        f"cvt.rn.{kind}.f32 %h1, %r5; fma.rn.f32.{kind} %r6, %h1, %h1, %r5;"
        f"add.f32.{kind} %r6, %h1, %r6; sub.rn.f32.{kind} %r6, %h1, %r6; st.global.b32 [%d2], %r6;",
        data,
    )
    half = given.to(dtype).float()
    product = (half.double() ** 2 + given.double()).float()
    np.testing.assert_array_equal(data, half - (half + product))


# The place of a thread in shared memory, and of its neighbour in the other warp and in its own.
PLACES = "shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128; xor.b32 %r4, %r2, 4; "


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (PLACES + "st.shared.u32 [%r2], %r1; ld.shared.u32 %r5, [%r3];",
         "is read after it was written by warp|was never written"),
        (PLACES + "st.shared.u32 [%r2], %r1; bar.warp.sync -1; ld.shared.u32 %r5, [%r3];",
         "is read after it was written by warp|was never written"),
        (PLACES + "st.shared.u32 [%r2], %r1; ld.shared.u32 %r5, [%r4];", "is read after"),
        (PLACES + "st.shared.u32 [%r2], %r1; bar.sync 0; bar.sync 0; setp.lt.u32 %p1, %r1, 32; "
         "@%p1 ld.shared.u32 %r5, [%r3]; @!%p1 st.shared.u32 [%r2], %r5;",
         "is written after it was read by warp"),
        (PLACES + "st.shared.u32 [%r3], %r1; st.shared.u32 [%r2], %r1;",
         "is written after it was written by warp"),
        (PLACES + "ld.shared.u32 %r5, [%r2];", "was never written"),
        (PLACES + "st.shared.u32 [%r2+4], %r1;", "out of bounds: shared bytes 256 to 260 of 256"),
        (PLACES + "st.shared.u32 [%r2+2], %r1;", "misaligned access to shared memory"),
        ("cvt.u64.u32 %d2, %r1; add.s64 %d2, %d1, %d2; ld.global.u32 %r5, [%d2];",
         "misaligned access to global memory"),
        ("ld.global.u32 %r5, [%d1+256];", "4 beyond the end of an allocation of 256"),
        ("ld.global.u32 %r5, [%d1+-4];", "out of bounds"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra L; bar.sync 0; L:", "warps wait for each other"),
        ("and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0; @%p1 bra L; bar.sync 0; L:",
         "lanes 0xaaaaaaaa of a warp are at a barrier"),
        ("and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0; @%p1 bra L; "
         "shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; L:", "lanes 0xaaaaaaaa of a warp are here"),
        ("div.u32 %r2, %r1, %r1;", "division by zero"),
        ("and.b32 %r2, %r1, 3; shl.b32 %r2, %r2, 4; cp.async.cg.shared.global [%r2], [%d1], 16; "
         "ld.shared.u32 %r3, [%r2]; cp.async.wait_all;", "never written|overwritten"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_reported(body: str, complaint: str) -> None:
    with pytest.raises(ExecutionError, match=complaint) as caught:
        execute(body)
    assert "kernel, block 0,0,0, warp" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("st.global.u32 [%d1], %r2;", "is written and was written by block 1 of the launch"),
        ("@%p1 st.global.u32 [%d1], %r2; @!%p1 ld.global.u32 %r3, [%d1];",
         "is written and was read by block 1 of the launch"),
        ("@!%p1 st.global.u32 [%d1], %r2; @%p1 ld.global.u32 %r3, [%d1];",
         "is read and was written by block 1 of the launch"),
        ("red.global.add.u32 [%d1], 1;", ""),
        ("ld.global.u32 %r3, [%d1];", ""),
        ("mul.wide.u32 %d2, %r2, 4; add.s64 %d2, %d2, %d1; st.global.u32 [%d2], %r2;", ""),
    ],
)  # fmt: skip
def test_blocks_that_touch_the_same_memory(body: str, complaint: str) -> None:
    """Blocks run from the last to the first."""
    body = "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0; " + body
    if complaint:
        with pytest.raises(ExecutionError, match=complaint):
            execute(body, blocks=2)
    else:
        execute(body, blocks=2)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("frob.b32 %r2, %r1;", "frob.b32 %r2, %r1"),
        ("add.rz.f32 %r2, %r1, %r1;", "add.rz.f32"),
        ("add.s32 %r2, %r1, %d1;", "%d1 has 8 bytes and not 4"),
        ("mov.u32 %r2, %clock;", "%clock"),
        ("bra NOWHERE;", "NOWHERE"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r2, %r3}, {%r4, %r5, %r6, %r7}, "
         "{%r8, %r9}, {%r2, %r3};", "mma.m16n8k16"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_shown(body: str, shown: str) -> None:
    with pytest.raises(TranslationError) as caught:
        execute(body)
    assert shown in str(caught.value)


# ---- instructions by themselves ----

MASK = (1 << 32) - 1


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


INSTRUCTIONS: dict[str, Callable[[int, int], int]] = {
    "add.s16x2 %r4, %r2, %r3": lambda a, b: (a + b & 0xFFFF) | (a >> 16) + (b >> 16) << 16,
    "mul.hi.s32 %r4, %r2, %r3": lambda a, b: _signed(a) * _signed(b) >> 32,
    "mul.hi.u32 %r4, %r2, %r3": lambda a, b: a * b >> 32,
    "shr.s32 %r4, %r2, %r3": lambda a, b: _signed(a) >> min(b, 31),
    "shl.b32 %r4, %r2, %r3": lambda a, b: a << b if b < 32 else 0,
    "bfe.u32 %r4, %r2, %r3, 5": lambda a, b: (a >> (b & 255) & 31) if (b & 255) < 32 else 0,
    "bfi.b32 %r4, %r2, %r3, 4, 8": lambda a, b: (b & ~0xFF0) | (a << 4 & 0xFF0),
    "prmt.b32 %r4, %r2, %r3, 0x7610": lambda a, b: (a & 0xFFFF) | (b & 0xFFFF0000),
    "prmt.b32 %r4, %r2, %r3, 0x89ab": lambda a, b: int.from_bytes(
        bytes(255 * (a >> 8 * i + 7 & 1) for i in (3, 2, 1, 0)), "little"
    ),
    "lop3.b32 %r4, %r2, %r3, %r1, 0xE8": lambda a, b: a & b,  # the majority, with %r1 = 0
    "shf.l.wrap.b32 %r4, %r2, %r3, 7": lambda a, b: b << 7 | a >> 25,
    "dp2a.hi.u32.s32 %r4, %r2, %r3, 9": lambda a, b: (
        (a & 0xFFFF) * ((b >> 16 & 255 ^ 128) - 128) + (a >> 16) * ((b >> 24 ^ 128) - 128) + 9
    ),
    "popc.b32 %r4, %r2": lambda a, b: a.bit_count(),
    "clz.b32 %r4, %r2": lambda a, b: 32 - a.bit_length(),
    "min.s32 %r4, %r2, %r3": lambda a, b: min(_signed(a), _signed(b)),
    "div.s32 %r4, %r2, 7": lambda a, b: int(_signed(a) / 7),
    "rem.s32 %r4, %r2, 7": lambda a, b: int(math.fmod(_signed(a), 7)),
    "mad.lo.s32 %r4, %r2, %r3, %r2": lambda a, b: a * b + a,
    "cvt.s32.s8 %r4, %r2": lambda a, b: ((a & 255) ^ 128) - 128,
    "{ .reg .b16 low, high; mov.b32 {low, high}, %r2; mov.b32 %r4, {high, low}; }": lambda a, b: (
        a >> 16 | a << 16
    ),
    "{ .reg .b64 %w; mul.wide.u32 %w, %r2, %r3; shr.u64 %w, %w, 16; cvt.u32.u64 %r4, %w; }": (
        lambda a, b: a * b >> 16
    ),
}


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_instruction(instruction: str) -> None:
    """On random bits and on small numbers, by all lanes and by half of them."""
    generator = np.random.default_rng(0)
    data = generator.integers(0, 1 << 32, (32, 2), np.uint32)
    data[16:] >>= 27
    before = data.copy()
    load = "mul.wide.u32 %d2, %r1, 8; add.s64 %d2, %d1, %d2; ld.global.v2.u32 {%r2, %r3}, [%d2];"
    zero = "setp.lt.u32 %p1, %r2, 0x90000000; mov.u32 %r1, 0; mov.u32 %r4, 1;"
    body = f"{load} {zero} {{ @!%p1 bra L; {instruction}; L: }} st.global.u32 [%d2], %r4;"
    execute(body, data, threads=32)
    for (found, _), (a, b) in zip(data.tolist(), before.tolist(), strict=True):
        expected = INSTRUCTIONS[instruction](a, b) & MASK if a < 0x90000000 else 1
        assert found == expected, (hex(a), hex(b))


def test_pairs_of_floats() -> None:
    data = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
    a, b, c = data[:, :2].copy(), data[:, 2:4].copy(), data[:, 4:].copy()
    body = """mul.wide.u32 %d2, %r1, 24; add.s64 %d2, %d1, %d2; ld.global.b64 %d3, [%d2];
        ld.global.b64 %d4, [%d2+8]; ld.global.b64 %d5, [%d2+16]; fma.rn.f32x2 %d6, %d3, %d4, %d5;
        add.rn.f32x2 %d7, %d3, %d4; mul.f32x2 %d8, %d3, %d4; st.global.b64 [%d2], %d6;
        st.global.b64 [%d2+8], %d7; st.global.b64 [%d2+16], %d8;"""
    execute(body, data, threads=32)
    joined = (a.astype(np.float64) * b + c).astype(np.float32)
    np.testing.assert_array_equal(data, np.hstack([joined, a + b, a * b]))


@pytest.mark.parametrize("bits", [16, 32])
def test_float_to_half_and_back(bits: int) -> None:
    """Every float16, and floats between them, as numpy converts them."""
    if bits == 16:
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        values = halves[np.isfinite(halves)].astype(np.float32)
    else:
        generator = np.random.default_rng(0)
        values = generator.standard_normal(1 << 12) * 2.0 ** generator.integers(-27, 18, 1 << 12)
        values = values.astype(np.float32)
    values = np.resize(values, -(-len(values) // 1024) * 1024)
    for start in range(0, len(values), 1024):
        data = values[start : start + 1024].copy()
        with np.errstate(over="ignore"):
            expected = data.astype(np.float16).astype(np.float32)
        body = "mul.wide.u32 %d2, %r1, 4; add.s64 %d2, %d1, %d2; ld.global.f32 %r2, [%d2]; "
        body += "cvt.rn.f16.f32 %h1, %r2; cvt.f32.f16 %r2, %h1; st.global.f32 [%d2], %r2;"
        execute(body, data, threads=1024)
        np.testing.assert_array_equal(data, expected)


def _product(kind: str, k: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a @ b through one mma: fragments are gathered here from the figures of the PTX ISA."""
    group, place = np.arange(32) // 4, np.arange(32) % 4
    if kind == "tf32":
        rows = [(group, place), (group + 8, place), (group, place + 4), (group + 8, place + 4)]
        columns = [(place, group), (place + 4, group)]
        words = [a[r, s] for r, s in rows] + [b[r, s] for r, s in columns]
        registers = [w.astype(np.float32).view(np.uint32) for w in words]
    else:
        rows = [(group, 2 * place), (group + 8, 2 * place)]
        columns = [(2 * place, group)]
        if k == 16:
            rows += [(group, 2 * place + 8), (group + 8, 2 * place + 8)]
            columns += [(2 * place + 8, group)]

        def bits(x: np.ndarray) -> np.ndarray:
            if kind == "f16":
                return x.astype(np.float16).view(np.uint16).astype(np.uint32)
            return x.astype(np.float32).view(np.uint32) >> 16  # of numbers that fit

        registers = [bits(a[r, s]) | bits(a[r, s + 1]) << 16 for r, s in rows]
        registers += [bits(b[r, s]) | bits(b[r + 1, s]) << 16 for r, s in columns]
    places = [(group + 8 * (i // 2), 2 * place + i % 2) for i in range(4)]
    registers += [c[p].astype(np.float32).view(np.uint32) for p in places]
    data = np.stack(registers, 1).copy()
    n = data.shape[1]
    loads = f"mul.wide.u32 %d2, %r1, {4 * n}; add.s64 %d2, %d1, %d2;" + "".join(
        f"ld.global.u32 %r{10 + i}, [%d2+{4 * i}];" for i in range(n)
    )
    names = [f"%r{10 + i}" for i in range(n)]
    n_a = len(rows)
    operands = [names[-4:], names[:n_a], names[n_a:-4], names[-4:]]
    text = ", ".join("{" + ", ".join(part) + "}" for part in operands)
    mma = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {text};"
    stores = "".join(f"st.global.u32 [%d2+{4 * i}], {names[-4 + i]};" for i in range(4))
    execute(loads + mma + stores, data, threads=32)
    result = np.zeros((16, 8), np.float32)
    for i, where in enumerate(places):
        result[where] = data[:, i].copy().view(np.float32)
    return result


@pytest.mark.parametrize(("kind", "k"), [("f16", 16), ("bf16", 16), ("f16", 8), ("tf32", 8)])
def test_matrix_product(kind: str, k: int) -> None:
    """Small whole numbers, so that nothing is rounded."""
    generator = np.random.default_rng(0)
    a, b, c = (generator.integers(-9, 9, shape) for shape in ((16, k), (k, 8), (16, 8)))
    for truncates in (False, True):
        with settings(truncates=truncates):
            np.testing.assert_array_equal(_product(kind, k, a, b, c), c + a @ b)


def test_tensor_cores_cut_off_sums() -> None:
    """1 + 8 x 15/16 ulp is nearly 8 ulp more, of which 7 stay; and what is 2^-26 is lost."""
    a, b, c = np.zeros((16, 8)), np.zeros((8, 8)), np.ones((16, 8))
    a[:], b[:] = 15 / 16, 2.0**-23
    exact = np.float32(1 + 7.5 * 2.0**-23)
    assert _product("f16", 8, a, b * 2.0**10, c * 2.0**10)[0, 0] == np.float32(exact * 2.0**10)
    with settings(truncates=True):
        found = _product("f16", 8, a, b * 2.0**10, c * 2.0**10)[0, 0] / 2.0**10
        assert found == np.float32(1 + 6 * 2.0**-23)  # each is cut to 3/4 of the last place
        assert _product("f16", 8, a / 15 * 16, b * 2.0**7, c * 2.0**10)[0, 0] == 2.0**10


def test_counts() -> None:
    """Every lane of the second warp loops once more than its number says: a divergent loop costs
    as much as its slowest lane."""
    body = """mov.u32 %r2, 0;
        L: add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, %r1; @%p1 bra L;
        mul.wide.u32 %d2, %r1, 4; add.s64 %d2, %d1, %d2; st.global.u32 [%d2], %r2;
        shl.b32 %r3, %r1, 7; and.b32 %r3, %r3, 0xfff; st.shared.u32 [%r3], %r1;"""
    with settings(counts=True, checked=False):
        aligned = torch.zeros(64, dtype=torch.int32).numpy()  # to 64 bytes, as by PyTorch
        launch = execute(body, aligned, shared=4096)
    opcodes = launch.by(lambda instruction: instruction.name)
    assert opcodes["add.u32"] == opcodes["bra"] == 31 + 63
    assert opcodes["st.global.u32"] == 2
    assert sum(launch.sectors) == 2 * 128 / 32
    assert (launch.read, launch.written) == (0, 256)
    assert sum(launch.wavefronts) == 2 * 32  # all lanes of a warp in one bank
    assert launch.by(lambda instruction: instruction.category)["global memory"] == 2
    assert launch.warps == 2
