"""What a compiled program does, read from its text: memory traffic, kernels, collectives.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and has no numbers for GPUs.
Here a loop whose length is known is counted that often. Numbers are per device: a partitioned program is
written from the view of one of them. Source: the HLO text format, openxla.org/xla/operation_semantics.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move no bytes: they name what is there, or are annotations of the TPU compiler.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "add-dependency", "domain", "custom-call AllocateBuffer",
    "custom-call AssumeGatherIndicesInBound", "custom-call ConcatBitcast",
)  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, ([\w\-]+=.*))?$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass
class Costs:
    """What one run of a program does on one device."""

    bytes_moved: float = 0  # read from and written to main memory by each kernel
    kernels: float = 0  # launched: fusions, products, copies, custom calls
    # What the compiler expects these to take; it says so for TPUs, but not for custom calls nor for waiting.
    cycles: float = 0
    custom_calls: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by target
    # Bytes of the arrays that are gathered, reduced or sent, by kind and shapes (see `describe_shapes`). What
    # crosses the links is more: a ring all-reduce sends nearly twice as much.
    collectives: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True)
class Shape:
    """One array: element type, dimensions, and whether it lies in the main memory of the device.

    On a TPU the compiler places some arrays in memory on the chip (`S(1)` in their layout).
    """

    dtype: str
    dims: tuple[int, ...]
    main_memory: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of the elements, without padding."""
        bits = re.search(r"\d+", self.dtype)
        size = max(int(bits[0]) // 8, 1) if bits else self.dtype == "pred"  # neither: a token
        return size * math.prod(self.dims)


@dataclass(eq=False)
class Instruction:
    """One line: `name = shapes opcode(operands), attributes`."""

    shapes: list[Shape]  # several where the result is a tuple
    opcode: str  # of a custom call with its target
    operands: list["Instruction"]
    attributes: str  # of a parameter its number, of a constant its value
    called: list["Computation"]  # by a fusion one, by a loop its condition and its body
    users: list[tuple["Instruction", int]] = field(default_factory=list)  # with the number of the operand

    @property
    def main_bytes(self) -> int:
        """Bytes of the result that lie in main memory."""
        return size_of(shape for shape in self.shapes if shape.main_memory)


@dataclass
class Computation:
    """Instructions in order, and the one that is the result."""

    instructions: list[Instruction] = field(default_factory=list)
    root: Any = None

    @property
    def parameters(self) -> list[Instruction]:
        """In the order of the arguments."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.attributes))


def read_costs(text: str, n_units: int = 1) -> Costs:
    """Counted over one run. A loop of unknown length counts once; of a conditional, all branches do.

    Args:
        text: `compiled.as_text()`.
        n_units: equal parts of the run, such as tokens; the costs are those of one.
    """
    costs = Costs()
    for instruction, times in _executed(_parse(text), 1 / n_units):
        costs.kernels += times * any(shape.dims for shape in instruction.shapes)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        costs.cycles += times * int(estimate[1]) if estimate else 0
        costs.bytes_moved += times * _bytes_moved(instruction)
        for part in _within(instruction):
            kind, _, target = part.opcode.removesuffix("-start").partition(" ")
            if kind in COLLECTIVES:
                shapes = _exchanged(part)
                costs.collectives[kind, describe_shapes(shapes)] += times * size_of(shapes)
            elif target and part.opcode not in FREE:
                costs.custom_calls[target] += times
    return costs


def describe_shapes(shapes: list[Shape]) -> str:
    """`bf16[64,384] f32[65,384]`: the largest first, scalars left out."""
    arrays = sorted((s for s in shapes if s.dims), key=lambda s: -s.n_bytes)
    return " ".join(f"{s.dtype}[{','.join(map(str, s.dims))}]" for s in arrays) or "scalars"


def size_of(shapes: Iterable[Shape]) -> int:
    """Bytes of all of them."""
    return sum(shape.n_bytes for shape in shapes)


def _parse(text: str) -> Computation:
    """The computation that a program begins with. What an instruction uses and calls is written before it."""
    computations: dict[str, Computation] = {}
    names: dict[str, Instruction] = {}
    computation = entry = Computation()
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            is_root, name, result, opcode, arguments, attributes = found.groups(default="")
            shapes = [
                Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout)
                for dtype, dims, layout in _SHAPE.findall(result)
            ]
            called = [computations[n] for n in _NAME.findall(attributes) if n in computations]
            if target := re.search(r'custom_call_target="([^"]*)"', attributes):
                opcode += f" {target[1]}"
            is_value = opcode in ("parameter", "constant")
            operands = [] if is_value else [names[n] for n in _NAME.findall(arguments)]
            names[name] = Instruction(shapes, opcode, operands, arguments if is_value else attributes, called)
            for place, operand in enumerate(operands):
                operand.users.append((names[name], place))
            computation.instructions.append(names[name])
            if is_root:
                computation.root = names[name]
        elif header := _HEADER.match(line):
            names, computation = {}, Computation()
            computations[header[1]] = computation
            if line.startswith("ENTRY"):
                entry = computation
    return entry


def _executed(computation: Computation, times: float) -> Iterator[tuple[Instruction, float]]:
    """Each instruction that runs as a step of its own, and how often."""
    for instruction in computation.instructions:
        opcode = instruction.opcode
        if opcode in ("while", "call", "async-start", "conditional"):
            n = times * _trip_count(instruction) if opcode == "while" else times
            for inner in instruction.called:
                yield from _executed(inner, n)
        elif opcode not in FREE and not opcode.endswith("-done"):
            yield instruction, times


def _trip_count(loop: Instruction) -> int:
    """How often the body of a `while` runs, 1 where that is not known before."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    # Otherwise the condition is `i < limit` and the body adds a constant to i, which begins at 0.
    condition, body = loop.called
    compare = condition.root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return 1
    counter, limit = compare.operands
    place = re.search(r"index=(\d+)", counter.attributes)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element" or not place:
        return 1
    after = body.root.operands[int(place[1])]
    steps = [int(i.attributes) for i in after.operands if after.opcode == "add" and i.opcode == "constant"]
    return max(math.ceil(int(limit.attributes) / (steps or [1])[0]), 1)


def _within(instruction: Instruction) -> Iterator[Instruction]:
    """The instruction, or where it is a fusion, what was fused."""
    if instruction.opcode != "fusion":
        yield instruction
        return
    for part in instruction.called[0].instructions:
        yield from _within(part)


def _bytes_moved(instruction: Instruction) -> int:
    """What a kernel reads from main memory and writes to it."""
    if instruction.opcode in ("copy-start", "slice-start"):  # (destination, source, context), or the reverse
        ends = instruction.shapes[:2]
        return sum(shape.main_memory for shape in ends) * min(shape.n_bytes for shape in ends)
    if instruction.opcode.endswith("-start"):  # what is read is a part of the result
        return instruction.main_bytes
    n_read = sum(_bytes_read(instruction, place) for place in range(len(instruction.operands)))
    return n_read + _bytes_written(instruction)


def _bytes_read(instruction: Instruction, place: int) -> int:
    """What an instruction reads of operand number `place`: slices, where it looks at nothing else."""
    operand = instruction.operands[place]
    match instruction.opcode:
        case "dynamic-slice" | "slice" | "gather" if place == 0:
            n_bytes = size_of(instruction.shapes)
        case "dynamic-update-slice" if place == 0:
            n_bytes = 0  # written in place
        case "bitcast":
            n_bytes = sum(_bytes_read(user, n) for user, n in instruction.users)
        case "fusion":
            parameter = instruction.called[0].parameters[place]
            n_bytes = sum(_bytes_read(user, n) for user, n in parameter.users)
        case _:
            n_bytes = size_of(operand.shapes)
    # Inside a fusion no layout says where its arguments lie; outside it does.
    return min(n_bytes, operand.main_bytes)


def _bytes_written(instruction: Instruction) -> int:
    """What an instruction writes: of an array that it updates in place, the update."""
    root = instruction.called[0].root if instruction.opcode == "fusion" else instruction
    results = root.operands if root.opcode == "tuple" else [root] * len(instruction.shapes)
    total = 0
    for result, shape in zip(results, instruction.shapes, strict=False):  # a tuple may have tuples in it
        while result.opcode == "bitcast":
            result = result.operands[0]
        in_place = result.opcode == "dynamic-update-slice"
        total += shape.main_memory * (size_of(result.operands[1].shapes) if in_place else shape.n_bytes)
    return total


def _exchanged(collective: Instruction) -> list[Shape]:
    """The arrays that a collective works on: what it gathers, or else what it is given."""
    if collective.opcode.startswith("all-gather"):
        n = len(collective.operands)
        return collective.shapes[n : 2 * n] if collective.opcode.endswith("-start") else collective.shapes
    return [shape for operand in collective.operands for shape in operand.shapes]
