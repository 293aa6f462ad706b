"""Reads the text of an optimised, scheduled HLO module, as `compiled.as_text()` gives it.

No more is read than a cost model needs: instructions in the order they run, the arrays they make,
what they call, how often a loop goes round. https://openxla.org/xla/operation_semantics
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BITS = {
    "pred": 8, "token": 0, "opaque": 0, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8,
    "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16,
    "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f4e2m1fn": 4,
}  # fmt: skip
"""Bits of one element; every f8 has 8."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
      dtype: as HLO calls it, "bf16".
      dims: extents.
      space: the memory it lives in: 0 is HBM, 1 is on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Of the elements, padding left out."""
        bits = 8 if self.dtype.startswith("f8") else BITS[self.dtype]
        return (math.prod(self.dims) * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the %.
      opcode: such as "fusion" or "all-gather-start".
      arrays: of its result, a tuple's one after the other.
      operands: names of instructions of the same computation; or what a constant holds.
      attributes: the rest of the line.
      root: whether it is what the computation returns.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of its result."""
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate for one run, if it made one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @functools.cached_property
    def calls(self) -> Mapping[str, tuple[str, ...]]:
        """Attribute (calls, body, condition, to_apply, branch_computations) -> computations."""
        found = re.findall(
            r"\b(calls|body|condition|to_apply|called_computations|branch_computations|"
            r"true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)",
            self.attributes,
        )
        return {key: tuple(re.findall(r"%([\w.\-]+)", names)) for key, names in found}

    @property
    def branches(self) -> tuple[str, ...]:
        """Of a conditional."""
        keys = ("branch_computations", "true_computation", "false_computation")
        return sum((self.calls.get(key, ()) for key in keys), ())


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order they run."""

    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.root)

    @functools.cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """By their number."""
        lines = self.instructions.values()
        return {int(one.operands[0]): one for one in lines if one.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that one reads."""
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program for each of `num_partitions` devices."""

    computations: Mapping[str, Computation]
    entry: Computation
    num_partitions: int

    def called(self, instruction: Instruction, key: str = "calls") -> Computation:
        """The computation that an instruction calls."""
        return self.computations[instruction.calls[key][0]]

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Every instruction of what one calls, and of what those call."""
        for names in instruction.calls.values():
            for name in names:
                computation = self.computations[name]
                for inner in computation.instructions.values():
                    yield computation, inner
                    yield from self.inside(inner)

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop goes round; None if that is not to be read.

        The compiler prints it, or the condition compares a counter, which begins at zero and rises
        by one as `lax.scan` has it, with a constant.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.called(loop, "condition")
        lines = [*condition.instructions.values()]
        lines += [inner for one in lines for _, inner in self.inside(one)]
        bounds = {
            int(one.operands[0])
            for one in lines
            if one.opcode == "constant" and one.arrays[0].dtype in ("s32", "u32", "s64", "u64")
        }
        compares = [one for one in lines if one.opcode == "compare"]
        if len(bounds) != 1 or not any("direction=LT" in one.attributes for one in compares):
            return None
        return bounds.pop()


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      ValueError: if it is none.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = None, "", dict[str, Instruction]()
    for line in logical_lines(text):
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            name, lines = header[2], {}
            entry = name if header[1] else entry
        elif re.fullmatch(r"\}(, execution_thread=.*)?", line):
            computations[name] = Computation(name, lines)
        elif " = " in line and not line.startswith("HloModule "):
            one = instruction(line)
            lines[one.name] = one
    if entry is None:
        raise ValueError(f"wanted the text of an HLO module, got {text[:40]!r}")
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, computations[entry], int(partitions[1]) if partitions else 1)


def logical_lines(text: str) -> Iterator[str]:
    """Lines of a module, joined where the metadata of a kernel breaks one."""
    begins = re.compile(
        r"\s+(ROOT )?%?[\w.\-]+ = |(ENTRY )?%?[\w.\-]+ \(.*\) -> |"
        r"\}(, execution_thread=.*)?$|HloModule |\s*$"
    )
    line = ""
    for part in text.splitlines():
        if begins.match(part):
            if line:
                yield line.strip()
            line = part
        else:
            line += " " + part.strip()
    if line:
        yield line.strip()


def instruction(line: str) -> Instruction:
    """Reads `[ROOT] %name = shape opcode(operands), attributes`."""
    left, _, right = line.partition(" = ")
    root = left.startswith("ROOT ")
    shape, rest = split_shape(right)
    opcode, _, rest = rest.partition("(")
    inner, attributes = split_bracket("(" + rest)
    inner = inner[1:-1]
    if opcode in ("constant", "parameter"):
        operands: tuple[str, ...] = (inner.strip(),)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inner))
    arrays = tuple(
        Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(space or 0))
        for dtype, dims, space in re.findall(
            r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^}S]*(?:S\((\d+)\))?[^}]*\})?", shape
        )
    )
    return Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%").strip(),
        opcode=opcode.strip(),
        arrays=arrays,
        operands=operands,
        attributes=attributes,
        root=root,
    )


def split_shape(text: str) -> tuple[str, str]:
    """A shape, and what follows it."""
    if text.startswith("("):
        return split_bracket(text)
    shape, _, rest = text.partition(" ")
    return shape, rest


def split_bracket(text: str) -> tuple[str, str]:
    """Up to the bracket that closes the first one, and what follows it; strings are skipped."""
    depth = 0
    for part in re.finditer(r'"(?:[^"\\]|\\.)*"|[(){}\[\]]', text):
        if part[0] in "([{":
            depth += 1
        elif part[0] in ")]}":
            depth -= 1
            if depth == 0:
                return text[: part.end()], text[part.end() :].lstrip()
    raise ValueError(f"a bracket is not closed in {text[:80]!r}")
