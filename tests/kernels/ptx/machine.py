"""The machine that executes PTX on the host: machine.cpp, called through ctypes."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from instrumented import Unit, build

from .program import OPERANDS, Instruction, Program, TranslationError

HERE = Path(__file__).resolve().parent
# Of the machine that runs the tests: nothing is installed. No product and sum are joined.
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off")
FLAGS += ("-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
FLAGS += ("-Wall", "-Wextra", "-Werror", "-pthread")


class ExecutionError(Exception):
    """A kernel broke a rule of the machine; the message has the instruction."""


@cache
def library() -> ctypes.CDLL:
    """The machine, compiled where its source has changed."""
    unit = Unit(HERE / "machine.cpp", FLAGS)
    lib = ctypes.CDLL(str(build("ptx-machine", "machine.so", [unit], ["-shared", "-pthread"], [])))
    lib.machine_mnemonics.restype = ctypes.c_char_p
    lib.machine_run.restype = ctypes.c_char_p
    lib.machine_program.restype = ctypes.c_void_p
    return lib


@cache
def mnemonics() -> frozenset[str]:
    """The instructions that the machine has."""
    return frozenset(library().machine_mnemonics().decode().split())


@dataclass(frozen=True)
class Launch:
    """What a launch executed.

    Attributes:
        program: the kernel.
        grid, block: blocks, and threads of a block, along three axes.
        shared: bytes of shared memory of a block.
        issued: of each of the program's instructions, how many warps issued it.
        sectors: likewise the 32-byte sectors of global memory that warps asked for.
        wavefronts: likewise the passes over the banks of shared memory.
        read, written: bytes of global memory in 32-byte sectors, each counted once.

    Memory is counted where the settings say so.
    """

    program: Program
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    issued: array[int]
    sectors: array[int]
    wavefronts: array[int]
    read: int
    written: int

    @property
    def warps(self) -> int:
        threads = self.block[0] * self.block[1] * self.block[2]
        return self.grid[0] * self.grid[1] * self.grid[2] * threads // 32

    def by(self, key: Callable[[Instruction], str]) -> Counter[str]:
        """Warp instructions by a property of them, such as the category."""
        found: Counter[str] = Counter()
        for instruction, issued in zip(self.program.instructions, self.issued, strict=True):
            if instruction.counted and issued:
                found[key(instruction)] += issued
        return found

    @property
    def total(self) -> int:
        """Warp instructions."""
        return self.by(lambda _: "")[""]


class Kernel:
    """A translated kernel that can be launched."""

    _handle: ctypes.c_void_p | None = None

    def __init__(self, program: Program) -> None:
        for instruction in program.instructions:
            if instruction.name not in mnemonics():
                raise TranslationError(
                    f"{program.name}: unknown instruction: {instruction.text} ({instruction.name})"
                )
        self.program = program
        rows = program.rows()
        numbers = array("q", [n for row in rows for n in row])
        constants = array("q")
        for (width, value), slot in program.constants.items():
            signed = value - (1 << 64) if value >= 1 << 63 else value
            constants.extend((slot, width, signed))
        names = (ctypes.c_char_p * len(rows))(*(i.name.encode() for i in program.instructions))
        special = (ctypes.c_int * len(program.special))(*program.special)
        self._handle = ctypes.c_void_p(
            library().machine_program(
                len(rows), names, _pointer(numbers), 11 + OPERANDS, len(program.constants),
                _pointer(constants), ctypes.c_size_t(program.registers),
                ctypes.c_size_t(program.parameters), ctypes.c_size_t(program.local), special,
            )
        )  # fmt: skip

    def __del__(self) -> None:
        if self._handle:
            library().machine_forget_program(self._handle)

    def launch(
        self, grid: Sequence[int], block: Sequence[int], shared: int, parameters: bytes
    ) -> Launch:
        """Runs the kernel to its end.

        Args:
            grid, block: three numbers each.
            shared: bytes of dynamic shared memory.
            parameters: as the PTX lays them out.

        Raises:
            ExecutionError: it broke a rule of the machine.
        """
        program = self.program
        if len(parameters) != program.parameters:
            raise ExecutionError(
                f"{program.name} has {program.parameters} bytes of parameters, "
                f"and was given {len(parameters)}"
            )
        threads = block[0] * block[1] * block[2]
        if min(*grid, *block) < 1 or threads > 1024 or threads % 32:
            raise ExecutionError(f"{program.name} cannot be launched with {grid} {block}")
        n = len(program.instructions)
        counts = [array("Q", bytes(8 * n)) for _ in range(3)]
        distinct = array("Q", [0, 0])
        sizes = (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block)
        error = library().machine_run(
            self._handle, parameters, *sizes,
            ctypes.c_uint64(program.static_shared + shared), *map(_pointer, counts),
            _pointer(distinct),
        ).decode()  # fmt: skip
        if error:
            text, index, warp, place = error.rsplit("|", 3)
            instruction = program.instructions[int(place)]
            where = f" (source {instruction.line})" if instruction.line else ""
            raise ExecutionError(
                f"{program.name}, block {index}, warp {warp}: {text}: {instruction.text}{where}"
            )
        return Launch(
            program, tuple(grid), tuple(block), program.static_shared + shared, *counts,
            32 * distinct[0], 32 * distinct[1],
        )  # fmt: skip


def _pointer(numbers: array[int]) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.buffer_info()[0])


LAUNCHES: list[Launch] = []  # since the list was last cleared


def name_memory(begin: int, size: int) -> None:
    """Allow kernels to access these bytes."""
    if size:
        library().machine_name_memory(ctypes.c_uint64(begin), ctypes.c_uint64(size))


def forget_memory() -> None:
    """The inverse of `name_memory`."""
    library().machine_forget_memory()


@contextmanager
def settings(
    *,
    threads: int | None = None,
    checked: bool = True,
    truncates: bool = False,
    counts: bool = False,
) -> Iterator[None]:
    """How kernels are executed.

    Args:
        threads: of the host; by default all that this process may use.
        checked: whether races for shared memory, and what was never written there, are found.
        truncates: whether tensor cores cut off sums, as hardware does, instead of rounding.
        counts: whether accesses to memory are counted.
    """
    n = threads or len(os.sched_getaffinity(0))
    library().machine_settings(n, checked, truncates, counts)
    try:
        yield
    finally:
        library().machine_settings(1, True, False, False)
