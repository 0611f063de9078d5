"""Translates PTX text into programs for machine.cpp.

Nothing in here knows of any kernel. An instruction that the machine does not have, or an operand
that is not understood, is an error that shows the statement.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

SIZES = {
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 4),
    **dict.fromkeys(("u16x2", "s16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
}
PREDICATE = 1  # as the width of an operand
SPECIAL = (
    *("%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z"),
    *("%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"),
    *("%laneid", "%warpid", "%lanemask_lt"),
)  # in the machine's order
PLAIN, BRANCH, EXIT, BARRIER = range(4)
OPERANDS = 20
# What changes neither result nor cost here: memory is one, and every order is kept.
IGNORED = {
    *("sync", "aligned", "uni", "volatile", "relaxed", "weak", "acquire", "release", "acq_rel"),
    *("nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "cta", "cluster", "gpu", "sys"),
}
CLASSES = ("arithmetic", "tensor core", "shared memory", "global memory", "integer and control")


class TranslationError(Exception):
    """PTX that cannot be translated, with the statement."""


@dataclass
class Instruction:
    """See `Code` in machine.cpp."""

    name: str
    text: str
    kind: int = PLAIN
    predicate: int = 0
    negated: bool = False
    target: str = ""
    count: int = 0
    width: int = 0
    width2: int = 0
    flag: int = 0
    used: int = 0xFFFFFFFF
    immediate: int = 0
    operands: list[int] = field(default_factory=list)
    counted: bool = True  # whether it is in the PTX
    line: str = ""
    reconverge: int = 0
    target_index: int = 0

    @property
    def category(self) -> str:
        """One of `CLASSES`."""
        parts = self.name.split(".")
        if parts[0] == "mma":
            return "tensor core"
        if parts[0] in ("ldmatrix", "stmatrix") or (
            parts[0] in ("ld", "st", "atom") and "shared" in parts
        ):
            return "shared memory"
        if self.name == "cp.async" or (
            parts[0] in ("ld", "st", "atom") and not {"param", "local"} & set(parts)
        ):
            return "global memory"
        if parts[0] not in ("setp", "selp", "mov", "ld", "st", "atom") and any(
            part.startswith(("f16", "f32", "f64", "bf16", "tf32")) for part in parts
        ):
            return "arithmetic"
        return "integer and control"


@dataclass(frozen=True)
class Source:
    """One kernel of a PTX module, as text."""

    name: str
    parameters: str
    body: str
    ptx: str  # of the whole module

    @property
    def module(self) -> str:
        """What is declared before the kernels."""
        return re.sub(r"\.entry.*", "", _without_comments(self.ptx), flags=re.S)

    @property
    def parameter_places(self) -> list[tuple[str, int, int]]:
        """Name, offset and size of each parameter."""
        places, offset = [], 0
        for text in filter(None, (part.strip() for part in self.parameters.split(","))):
            found = re.fullmatch(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
                r"(?:\.ptr\s*(?:\.\w+\s*)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?",
                text,
            )
            if not found:
                raise TranslationError(f"{self.name}: the parameter {text!r} is not understood")
            align, type_, name, length = found.groups()
            size = SIZES[type_] * int(length or 1)
            unit = int(align or SIZES[type_])
            offset = -(-offset // unit) * unit
            places.append((name, offset, size))
            offset += size
        return places


def _without_comments(ptx: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)


def kernels(ptx: str) -> dict[str, Source]:
    """The kernels of a module by name."""
    text = _without_comments(ptx)
    found = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", text, re.S):
        depth, end = 1, match.end()
        while depth:
            brace = re.compile(r"[{}]").search(text, end)
            if brace is None:
                raise TranslationError(f"{match.group(1)}: its body has no end")
            depth += 1 if brace.group() == "{" else -1
            end = brace.end()
        found[match.group(1)] = Source(
            match.group(1), match.group(2) or "", text[match.end() : end - 1], ptx
        )
    return found


def _statements(body: str) -> Iterator[str]:
    """Labels ("NAME:"), braces of scopes, and statements without their semicolon."""
    label, line = re.compile(r"([\w$]+)\s*:(?!:)"), re.compile(r"\.(loc|file)\b[^\n]*")
    at = 0
    while True:
        while at < len(body) and body[at].isspace():
            at += 1
        if at >= len(body):
            return
        if body[at] in "{}":
            yield body[at]
            at += 1
        elif found := line.match(body, at):
            yield found.group()
            at = found.end()
        elif found := label.match(body, at):
            yield found.group(1) + ":"
            at = found.end()
        else:
            end = body.find(";", at)
            if end < 0:
                raise TranslationError(f"a statement without end: {body[at : at + 80]!r}")
            if statement := " ".join(body[at:end].split()):
                yield statement
            at = end + 1


def _split(text: str) -> list[str]:
    """Operands at commas outside of brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]


def _vector(operand: str) -> list[str]:
    if operand.startswith("{"):
        return [part.strip() for part in operand[1:-1].split(",")]
    return [operand]


@cache
def readable(name: str) -> str:
    """A kernel's name as in its source, without namespaces and arguments."""
    if not name.startswith("_Z") or shutil.which("c++filt") is None:
        return name
    text = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    text = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", text.strip())
    return re.sub(r"^void |\([^()]*\)$", "", text)


class Program:
    """A kernel translated."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name = source.name
        self.places = source.parameter_places
        self.parameters = self.places[-1][1] + self.places[-1][2] if self.places else 0
        self.instructions: list[Instruction] = []
        self.special = [0] * len(SPECIAL)
        self.constants: dict[tuple[int, int], int] = {}
        self.static_shared = 0
        self.local = 0
        self._bytes = 64  # slot 0 is none
        self._scopes: list[dict[str, tuple[int, int]]] = [{}]  # register: slot, width
        self._patterns: list[dict[str, int]] = [{}]  # prefix of %r<9>: width
        self._symbols = {name: offset for name, offset, _ in self.places}
        self._labels: dict[str, int] = {}
        self._used = 0xFFFFFFFF
        self._line = ""
        self._dynamic: list[str] = []
        self._translate()

    # ---- registers ----

    def _slot(self, width: int) -> int:
        size = 4 if width == PREDICATE else 32 * width
        unit = min(size, 64)
        self._bytes = -(-self._bytes // unit) * unit
        slot = self._bytes
        self._bytes += size
        return slot

    def _register(self, name: str) -> tuple[int, int]:
        """Slot and width of a register."""
        for scope, patterns in zip(reversed(self._scopes), reversed(self._patterns), strict=True):
            if name in scope:
                return scope[name]
            if width := patterns.get(name.rstrip("0123456789")):
                scope[name] = self._slot(width), width
                return scope[name]
        raise TranslationError(f"{name} is not declared")

    def _declare(self, statement: str) -> None:
        _, type_, names = statement.split(maxsplit=2)
        width = PREDICATE if type_ == ".pred" else SIZES[type_[1:]]
        for name in (part.strip() for part in names.split(",")):
            if found := re.fullmatch(r"(.*)<\d+>", name):
                self._patterns[-1][found.group(1)] = width
            else:
                self._scopes[-1][name] = self._slot(width), width

    def _constant(self, width: int, value: int) -> int:
        value &= (1 << (8 * width)) - 1
        key = width, value
        if key not in self.constants:
            self.constants[key] = self._slot(width)
        return self.constants[key]

    def _operand(self, text: str, width: int) -> int:
        """The slot of a register, or of a constant, of a width."""
        if text == "_":
            return 0
        if text in SPECIAL:
            index = SPECIAL.index(text)
            if width != 4:
                raise TranslationError(f"{text} in {width} bytes")
            self.special[index] = self.special[index] or self._slot(4)
            return self.special[index]
        if (address := self._symbol(text)) is not None:
            return self._constant(width, address)
        if re.match(r"[%a-zA-Z_$]", text):
            slot, found = self._register(text)
            if found != width:
                raise TranslationError(f"{text} has {found} bytes and not {width}")
            return slot
        return self._constant(width, _number(text, width))

    def _predicate(self, text: str) -> int:
        """A predicate, negated where it has a "!"."""
        if not text.startswith("!"):
            if re.fullmatch(r"-?\d+", text):
                return self._constant(PREDICATE, int(text != "0"))
            return self._operand(text, PREDICATE)
        slot = self._slot(PREDICATE)
        self.instructions.append(
            Instruction("not.pred", text, operands=[slot, self._predicate(text[1:])], counted=False)
        )
        return slot

    def _address(self, text: str) -> tuple[int, int, int]:
        """Slot (0 for none) and width of the base, and the offset, of [base+offset]."""
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if not found:
            raise TranslationError(f"the address {text} is not understood")
        base, offset = found.group(1), int(found.group(2) or "0", 0)
        if (address := self._symbol(base)) is not None:
            return 0, 8, address + offset
        if re.fullmatch(r"\d+", base):
            return 0, 8, int(base) + offset
        slot, width = self._register(base)
        return slot, width, offset

    def _container(self, names: list[str]) -> int:
        """The width that registers of a vector have in common."""
        for name in names:
            if name.startswith("%"):
                return self._register(name)[1]
        return 0

    # ---- statements ----

    def _translate(self) -> None:
        self._declare_shared(self.source.module)
        for statement in _statements(self.source.body):
            try:
                self._statement(statement)
            except (TranslationError, KeyError, ValueError, IndexError) as error:
                detail = str(error) if isinstance(error, TranslationError) else repr(error)
                raise TranslationError(f"{self.name}: {statement}: {detail}") from error
        if not self.instructions or self.instructions[-1].kind != EXIT:
            self.instructions.append(Instruction("ret", "ret", kind=EXIT, counted=False))
        self._link()

    def _declare_shared(self, text: str) -> None:
        """Shared memory of a given size comes first, then what the launch asks for."""
        for match in re.finditer(
            r"(\.extern\s+)?(?:\.visible\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
            r"([\w$]+)(?:\[(\d*)\])?",
            text,
        ):
            extern, align, type_, name, length = match.groups()
            if extern or length == "":
                self._dynamic.append(name)
                continue
            if any(name in self._symbols for name in self._dynamic):
                raise TranslationError("shared memory is declared after it was used")
            unit = int(align or SIZES[type_])
            self.static_shared = -(-self.static_shared // unit) * unit
            self._symbols[name] = self.static_shared
            self.static_shared += SIZES[type_] * int(length or 1)

    def _symbol(self, name: str) -> int | None:
        """The address of a parameter or of memory that was declared; None if there is none."""
        if name in self._dynamic and name not in self._symbols:
            self.static_shared = -(-self.static_shared // 128) * 128 if self.static_shared else 0
            self._symbols[name] = self.static_shared
        return self._symbols.get(name)

    def _statement(self, statement: str) -> None:
        if statement == "{":
            self._scopes.append({})
            self._patterns.append({})
        elif statement == "}":
            self._scopes.pop()
            self._patterns.pop()
        elif statement.endswith(":"):
            self._labels[statement[:-1]] = len(self.instructions)
        elif statement.startswith(".loc"):
            self._line = " ".join(statement.split()[1:3])
        elif statement.startswith(".file"):
            pass
        elif statement.startswith(".reg"):
            self._declare(statement)
        elif statement.startswith(".shared"):
            self._declare_shared(statement)
        elif statement.startswith(".local"):
            found = re.fullmatch(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", statement)
            if not found:
                raise TranslationError("not understood")
            unit = int(found.group(1))
            self.local = -(-self.local // unit) * unit
            self._symbols[found.group(2)] = self.local
            self.local += -(-int(found.group(3)) // 16) * 16
        elif statement.startswith(".pragma"):
            if found := re.search(r"used_bytes_mask (\w+)", statement):
                self._used = int(found.group(1), 0)
        elif statement.startswith("."):
            raise TranslationError("not understood")
        else:
            before = len(self.instructions)
            self._instruction(statement)
            for instruction in self.instructions[before:]:
                instruction.line = self._line

    def _instruction(self, statement: str) -> None:
        predicate, negated, text = 0, False, statement
        if found := re.match(r"@(!?)([%\w$]+)\s+(.*)", statement):
            negated = bool(found.group(1))
            predicate = self._operand(found.group(2), PREDICATE)
            text = found.group(3)
        opcode, _, rest = text.partition(" ")
        parts = [
            part
            for part in re.sub(r"::(cta|entry)\b", "", opcode).split(".")
            if part not in IGNORED and not part.startswith(("L1::", "L2::"))
        ]
        if parts[0] == "cp":  # its .ca and .cg are ignored as well
            instruction = self._copy(parts, _split(rest))
        else:
            translate = getattr(self, "_" + parts[0], self._plain)
            instruction = translate(parts, _split(rest))
        instruction.text = statement
        instruction.predicate, instruction.negated = predicate, negated
        instruction.used, self._used = self._used, 0xFFFFFFFF
        self.instructions.append(instruction)

    # ---- one function for each instruction that is not plain arithmetic ----

    def _plain(self, parts: list[str], operands: list[str]) -> Instruction:
        """Destination and sources, all of the width of the type unless said otherwise."""
        opcode, type_ = parts[0], parts[-1]
        if type_ == "pred":
            slots = [self._operand(operands[0], PREDICATE), *map(self._predicate, operands[1:])]
            return Instruction(".".join(parts), "", operands=slots)
        if opcode in ("membar", "fence", "prefetch", "nanosleep", "griddepcontrol", "trap"):
            return Instruction(opcode, "")
        if type_ not in SIZES:
            raise TranslationError("unknown instruction")
        width = SIZES[type_]
        widths = [width] * len(operands)
        if "wide" in parts:
            widths[0] = 2 * width
            if opcode == "mad":
                widths[3] = 2 * width
        elif opcode in ("shl", "shr"):
            widths[2] = 4
        elif opcode in ("popc", "clz"):
            widths[0] = 4
        elif parts[-2] == "f32":  # sums of floats, of factors of half the width
            widths[0] = widths[-1] = 4
        if opcode in ("mov", "and", "or", "xor", "not", "shl") and width > 1:
            parts = [opcode, f"b{8 * width}"]
        elif opcode == "shr" and type_[0] == "b":
            parts = [opcode, f"u{8 * width}"]
        elif ("f32" in parts[-2:] or type_ in ("f64", "f32x2")) and "rn" in parts:
            # What they do anyway.
            parts = [part for part in parts if part != "rn"]
        slots = [self._operand(o, w) for o, w in zip(operands, widths, strict=True)]
        return Instruction(".".join(parts), "", operands=slots)

    def _mov(self, parts: list[str], operands: list[str]) -> Instruction:
        d, a = operands
        if not (d.startswith("{") or a.startswith("{")):
            return self._plain(parts, operands)
        whole = SIZES[parts[-1]]
        name, vector, other = ("pack", a, d) if a.startswith("{") else ("unpack", d, a)
        items = _vector(vector)
        width = whole // len(items)
        slots = [self._operand(other, whole), *(self._operand(item, width) for item in items)]
        return Instruction(name, "", count=len(items), width=width, operands=slots)

    def _setp(self, parts: list[str], operands: list[str]) -> Instruction:
        joins = {"and": 1, "or": 2, "xor": 3}
        flag = next((joins[part] for part in parts if part in joins), 0)
        name = ".".join(part for part in parts if part not in joins)
        p, _, q = operands[0].partition("|")
        width = SIZES[parts[-1]]
        slots = [
            self._operand(p.strip(), PREDICATE),
            self._operand(q.strip(), PREDICATE) if q else 0,
            *(self._operand(o, width) for o in operands[1:3]),
        ]
        if flag:
            slots.append(self._predicate(operands[3]))
        return Instruction(name, "", flag=flag, operands=slots)

    def _selp(self, parts: list[str], operands: list[str]) -> Instruction:
        width = SIZES[parts[-1]]
        slots = [self._operand(o, width) for o in operands[:3]]
        return Instruction(
            f"selp.b{8 * width}", "", operands=[*slots, self._predicate(operands[3])]
        )

    def _cvt(self, parts: list[str], operands: list[str]) -> Instruction:
        d, s = parts[-2:]
        if len(operands) == 3:  # two numbers into one register
            slots = [self._operand(operands[0], 4)]
            slots += [self._operand(o, SIZES[s]) for o in operands[1:]]
            return Instruction(".".join(parts), "", operands=slots)
        widths = []
        for operand, type_ in zip(operands, (d, s), strict=True):
            if operand.startswith("%") and operand not in SPECIAL:
                widths.append(self._register(operand)[1])
            else:
                widths.append(max(SIZES[type_], 2))
        slots = [self._operand(o, w) for o, w in zip(operands, widths, strict=True)]
        return Instruction(".".join(parts), "", width=widths[0], width2=widths[1], operands=slots)

    def _bfe(self, parts: list[str], operands: list[str]) -> Instruction:
        return self._plain(parts, operands)

    def _lop3(self, parts: list[str], operands: list[str]) -> Instruction:
        return Instruction("lop3.b32", "", operands=[self._operand(o, 4) for o in operands])

    def _ld(self, parts: list[str], operands: list[str]) -> Instruction:
        return self._access(parts, operands[1], _vector(operands[0]), loads=True)

    def _st(self, parts: list[str], operands: list[str]) -> Instruction:
        return self._access(parts, operands[0], _vector(operands[1]), loads=False)

    def _access(
        self, parts: list[str], address: str, values: list[str], *, loads: bool
    ) -> Instruction:
        type_, size = parts[-1], SIZES[parts[-1]]
        space = next((f".{s}" for s in parts if s in ("global", "shared", "param", "local")), "")
        known = {"global", "shared", "param", "local", "v2", "v4", "v8", type_}
        if unknown := set(parts[1:]) - known:
            raise TranslationError(f"unknown modifiers {', '.join(sorted(unknown))}")
        sign = "s" if loads and type_[0] == "s" and size < 8 else "u"
        slot, base_width, offset = self._address(address)
        width = self._container(values) or max(size, 2)
        slots = [slot, *(self._operand(v, width) for v in values)]
        return Instruction(
            f"{parts[0]}{space}.{sign}{8 * size}", "", count=len(values), width=width,
            width2=base_width, immediate=offset, operands=slots,
        )  # fmt: skip

    def _atom(self, parts: list[str], operands: list[str]) -> Instruction:
        space = next((f".{s}" for s in parts if s in ("global", "shared")), "")
        width = SIZES[parts[-1]]
        type_ = parts[-1]
        if parts[-2] == "add" and type_ == "s64":
            type_ = "u64"
        slot, base_width, offset = self._address(operands[1])
        slots = [self._operand(operands[0], width), slot]
        slots += [self._operand(o, width) for o in operands[2:]]
        return Instruction(
            f"atom{space}.{parts[-2]}.{type_}", "", width2=base_width, immediate=offset,
            operands=slots,
        )  # fmt: skip

    def _red(self, parts: list[str], operands: list[str]) -> Instruction:
        return self._atom(parts, ["_", *operands])

    def _copy(self, parts: list[str], operands: list[str]) -> Instruction:
        if parts[1:3] == ["async", "commit_group"] or parts[1:3] == ["async", "wait_all"]:
            return Instruction(".".join(parts[:3]), "")
        if parts[1:3] == ["async", "wait_group"]:
            return Instruction("cp.async.wait_group", "", immediate=int(operands[0], 0))
        if parts[1:] != ["async", "shared", "global"]:
            raise TranslationError("unknown instruction")
        to, to_width, to_offset = self._address(operands[0])
        source, _, offset = self._address(operands[1])
        if not to:
            to, to_width, to_offset = self._constant(4, to_offset), 4, 0
        slots = [to, source, *(self._operand(o, 4) for o in operands[3:])]
        return Instruction(
            "cp.async", "", count=int(operands[2], 0), width2=to_width, flag=to_offset,
            immediate=offset, operands=slots,
        )  # fmt: skip

    def _mma(self, parts: list[str], operands: list[str]) -> Instruction:
        slots = [self._operand(name, 4) for operand in operands for name in _vector(operand)]
        return Instruction(".".join(parts), "", operands=slots)

    def _ldmatrix(self, parts: list[str], operands: list[str]) -> Instruction:
        return self._matrices(parts, operands[1], operands[0])

    def _stmatrix(self, parts: list[str], operands: list[str]) -> Instruction:
        return self._matrices(parts, operands[0], operands[1])

    def _matrices(self, parts: list[str], address: str, vector: str) -> Instruction:
        if set(parts[1:]) - {"m8n8", "x1", "x2", "x4", "trans", "shared", "b16"}:
            raise TranslationError("unknown instruction")
        slot, width, offset = self._address(address)
        names = _vector(vector)
        return Instruction(
            parts[0], "", count=len(names), width2=width, flag=int("trans" in parts),
            immediate=offset, operands=[slot, *(self._operand(name, 4) for name in names)],
        )  # fmt: skip

    def _shfl(self, parts: list[str], operands: list[str]) -> Instruction:
        d, _, p = operands[0].partition("|")
        slots = [self._operand(d.strip(), 4), self._operand(p.strip(), PREDICATE) if p else 0]
        slots += [self._operand(o, 4) for o in operands[1:]]
        return Instruction(".".join(parts), "", operands=slots)

    def _vote(self, parts: list[str], operands: list[str]) -> Instruction:
        d = self._operand(operands[0], 4 if "ballot" in parts else PREDICATE)
        slots = [d, self._predicate(operands[1]), self._operand(operands[2], 4)]
        return Instruction(".".join(parts), "", operands=slots)

    def _bra(self, parts: list[str], operands: list[str]) -> Instruction:
        return Instruction("bra", "", kind=BRANCH, target=operands[0])

    def _ret(self, parts: list[str], operands: list[str]) -> Instruction:
        return Instruction("ret", "", kind=EXIT)

    _exit = _ret

    def _bar(self, parts: list[str], operands: list[str]) -> Instruction:
        # "sync" is one of the modifiers that are dropped.
        if "warp" in parts:
            return Instruction("bar.warp", "", operands=[self._operand(operands[0], 4)])
        if set(parts[1:]) - {"arrive"}:
            raise TranslationError("unknown instruction")
        slots = [self._operand(o, 4) for o in operands]
        flag = int("arrive" in parts)
        return Instruction("bar.sync", "", kind=BARRIER, flag=flag, operands=slots)

    _barrier = _bar

    # ---- control flow ----

    def _link(self) -> None:
        """Targets of branches, and where divergent lanes reconverge: at the branch's immediate
        postdominator."""
        code, end = self.instructions, len(self.instructions)
        starts = {0, *self._labels.values()}
        starts |= {i + 1 for i, c in enumerate(code) if c.kind in (BRANCH, EXIT)}
        begins = sorted(start for start in starts if start < end)
        number = {begin: i for i, begin in enumerate(begins)}
        last = len(begins)  # a block that every exit leads to
        after: list[list[int]] = [[] for _ in range(last + 1)]
        ends = [*begins[1:], end]
        for block, stop in enumerate(ends):
            final = code[stop - 1]
            falls = final.kind not in (BRANCH, EXIT) or final.predicate
            if final.kind == BRANCH:
                if final.target not in self._labels:
                    raise TranslationError(f"{self.name}: there is no label {final.target}")
                final.target_index = self._labels[final.target]
                after[block].append(number.get(final.target_index, last))
            if final.kind == EXIT:
                after[block].append(last)
            if falls:
                after[block].append(number.get(stop, last))
        meets = _postdominators(after, last)
        for block, stop in enumerate(ends):
            if code[stop - 1].kind == BRANCH:
                code[stop - 1].reconverge = end if meets[block] == last else begins[meets[block]]

    def rows(self) -> list[list[int]]:
        """Numbers as machine.cpp reads them."""
        return [
            [
                *(c.kind, c.predicate, int(c.negated), c.target_index, c.reconverge),
                *(c.count, c.width, c.width2, c.flag, c.used, c.immediate),
                *c.operands,
                *([0] * (OPERANDS - len(c.operands))),
            ]
            for c in self.instructions
        ]

    @property
    def registers(self) -> int:
        """Bytes of a warp's registers."""
        return self._bytes + 64


def _number(text: str, width: int) -> int:
    """The bits of an immediate."""
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        digits = found.group(1) or found.group(2)
        if len(digits) != 2 * width:
            raise TranslationError(f"{text} in {width} bytes")
        return int(digits, 16)
    if found := re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", text):
        return int(found.group(1), 0 if "x" in text.lower() else 10)
    raise TranslationError(f"the operand {text} is not understood")


def _postdominators(after: list[list[int]], last: int) -> list[int]:
    """The immediate postdominator of each block, after Cooper, Harvey and Kennedy; `last` where
    none is reached."""
    before: list[list[int]] = [[] for _ in after]
    for block, following in enumerate(after):
        for other in following:
            before[other].append(block)
    order: list[int] = []  # postorder of the reversed graph
    seen = {last}
    stack: list[tuple[int, Any]] = [(last, iter(before[last]))]
    while stack:
        block, rest = stack[-1]
        for other in rest:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(before[other])))
                break
        else:
            order.append(block)
            stack.pop()
    rank = {block: i for i, block in enumerate(order)}
    meets: dict[int, int] = {last: last}
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            new = None
            for other in after[block]:
                if other not in meets:
                    continue
                if new is None:
                    new = other
                    continue
                a, b = new, other
                while a != b:
                    while rank[a] < rank[b]:
                        a = meets[a]
                    while rank[b] < rank[a]:
                        b = meets[b]
                new = a
            if new is not None and meets.get(block) != new:
                meets[block] = new
                changed = True
    return [meets.get(block, last) for block in range(len(after))]
