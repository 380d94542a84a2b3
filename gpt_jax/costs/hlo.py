"""What a compiled program does, read from its text (XLA's HLO): arithmetic, memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and has no numbers for GPUs.
Here a loop whose length is known is counted that often. Numbers are per device: a partitioned program is
written from the view of one of them.

Source: the HLO text format and its operations, openxla.org/xla/operation_semantics.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move no bytes: they name what is there.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "add-dependency", "domain",
)  # fmt: skip
# Custom calls that are annotations of the TPU compiler: nothing is run.
ANNOTATIONS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast")
_BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")


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
        size = _BYTES.get(self.dtype)
        if size is None:
            size = max(int(re.findall(r"\d+", self.dtype)[0]) // 8, 1)
        return size * math.prod(self.dims)


@dataclass
class Instruction:
    """One line: `name = shapes opcode(operands), attributes`."""

    name: str
    shapes: list[Shape]  # several where the result is a tuple
    opcode: str
    operands: list[str]
    attributes: str

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `calls` or `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """A list of instructions in order; the last one, or the one marked as root, is its result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The users of each instruction."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        return users

    @cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of the arguments."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.attributes))


@dataclass
class Costs:
    """What one run of a program does on one device.

    Attributes:
        flops: of matrix products and convolutions.
        bytes_moved: read from and written to main memory by each kernel.
        kernels: how many are started: fusions, products, copies, custom calls.
        cycles: what the compiler expects these to take; 0 where it does not say (it does for TPUs, but not
            for custom calls nor for waiting).
        custom_calls: how often each target is called.
        collectives: size in bytes of the arrays that are gathered, reduced or sent, by (kind, shapes), see
            `describe_shapes`. What crosses the links is more: a ring all-reduce sends nearly twice as much.
    """

    flops: float = 0
    bytes_moved: float = 0
    kernels: float = 0
    cycles: float = 0
    custom_calls: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    collectives: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def divided_by(self, n: int) -> "Costs":
        """The costs of one of `n` equal parts."""
        calls = {target: times / n for target, times in self.custom_calls.items()}
        moved = {what: n_bytes / n for what, n_bytes in self.collectives.items()}
        return Costs(
            self.flops / n, self.bytes_moved / n, self.kernels / n, self.cycles / n, calls, moved
        )  # fmt: skip


class Program:
    """A compiled program.

    Args:
        text: `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        computation = Computation("")
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            header = _HEADER.match(line)
            if header and not _INSTRUCTION.match(line):
                computation = self.computations[header[2]] = Computation(header[2])
                if header[1]:
                    self.entry = header[2]
            elif _INSTRUCTION.match(line):
                is_root, instruction = _parse_instruction(line)
                computation.instructions[instruction.name] = instruction
                if is_root:
                    computation.root = instruction.name

    def costs(self) -> Costs:
        """Counted over one run. A loop of unknown length counts once; of a conditional, all branches do."""
        costs = Costs()
        for instruction, computation, times in self._executed(self.entry, 1):
            self._add(costs, instruction, computation, times)
        return costs

    def trip_count(self, loop: Instruction) -> int:
        """How often the body of a `while` runs, 1 where that is not known before."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        # Otherwise the condition is `i < limit` and the body adds a constant to i, which begins at 0.
        condition = self.computations[loop.called("condition") or ""]
        compare = condition.instructions[condition.root]
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return 1
        counter, limit = (condition.instructions[name] for name in compare.operands)
        place = re.search(r"index=(\d+)", counter.attributes)
        if limit.opcode != "constant" or counter.opcode != "get-tuple-element" or not place:
            return 1
        body = self.computations[loop.called("body") or ""]
        after = body.instructions[body.instructions[body.root].operands[int(place[1])]]
        added = [body.instructions[name] for name in after.operands]
        steps = [int(i.attributes) for i in added if i.opcode == "constant"] if after.opcode == "add" else []
        return max(math.ceil(int(limit.attributes) / (steps or [1])[0]), 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        """Each instruction that runs as a step of its own, and how often."""
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            match instruction.opcode:
                case "while":
                    n = times * self.trip_count(instruction)
                    for part in ("condition", "body"):
                        yield from self._executed(instruction.called(part) or "", n)
                case "call" | "async-start":
                    inner = instruction.called("to_apply") or instruction.called("calls")
                    if inner:
                        yield from self._executed(inner, times)
                case "conditional":
                    branches = re.search(r"branch_computations=\{(.*?)\}", instruction.attributes)
                    names = _NAME.findall(branches[1]) if branches else []
                    names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
                    for branch in names:
                        yield from self._executed(branch, times)
                case opcode if (
                    opcode not in FREE and not opcode.endswith("-done") and not _is_annotation(instruction)
                ):
                    yield instruction, computation, times

    def _add(self, costs: Costs, instruction: Instruction, computation: Computation, times: int) -> None:
        costs.kernels += times * any(shape.dims for shape in instruction.shapes)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        costs.cycles += times * int(estimate[1]) if estimate else 0
        costs.bytes_moved += times * self._bytes_moved(instruction, computation)
        for part, home in self._within(instruction, computation):
            costs.flops += times * _flops(part, home)
            if _is_annotation(part):
                continue
            kind = part.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                shapes = _moved(part, home)
                costs.collectives[kind, describe_shapes(shapes)] += times * sum(s.n_bytes for s in shapes)
            elif kind == "custom-call":
                costs.custom_calls[_target(part)] += times

    def _within(
        self, instruction: Instruction, computation: Computation
    ) -> Iterator[tuple[Instruction, Computation]]:
        """The instruction, or where it is a fusion, what was fused."""
        inner = instruction.called("calls") if instruction.opcode == "fusion" else None
        if inner is None:
            yield instruction, computation
            return
        fused = self.computations[inner]
        for part in fused.instructions.values():
            yield from self._within(part, fused)

    def _bytes_moved(self, instruction: Instruction, computation: Computation) -> int:
        operands = [computation.instructions[name] for name in instruction.operands]
        written = sum(_main_bytes(shape) for shape in instruction.shapes)
        match instruction.opcode:
            case "fusion":
                fused = self.computations[instruction.called("calls") or ""]
                # Inside a fusion no layout says where its arguments lie; outside it does.
                read = sum(
                    min(self._read_bytes(parameter, fused), _all_bytes(operand))
                    for parameter, operand in zip(fused.parameters, operands, strict=True)
                )
                return read + self._written_bytes(instruction, fused)
            case "dynamic-slice" | "slice" | "gather":
                read = any(shape.main_memory for shape in operands[0].shapes)
                return written + read * sum(shape.n_bytes for shape in instruction.shapes)
            case "dynamic-update-slice":
                return 2 * _all_bytes(operands[1]) * int(bool(_all_bytes(operands[0])))
            case "copy-start" | "slice-start":  # (destination, source, context), or the other way round
                places = [shape.main_memory for shape in instruction.shapes[:2]]
                return sum(places) * min(shape.n_bytes for shape in instruction.shapes[:2])
            case opcode if opcode.endswith("-start"):
                return sum(_main_bytes(shape) for shape in instruction.shapes)
        return written + sum(_all_bytes(operand) for operand in operands)

    def _read_bytes(self, parameter: Instruction, fused: Computation) -> int:
        """What a fusion reads of an argument: slices, where it looks at nothing else."""
        total = 0
        for user in fused.users[parameter.name]:
            first = bool(user.operands) and user.operands[0] == parameter.name
            match user.opcode:
                case "dynamic-slice" | "slice" | "gather" if first:
                    total += sum(shape.n_bytes for shape in user.shapes)
                case "dynamic-update-slice" if first:
                    pass  # written in place
                case "bitcast":
                    total += self._read_bytes(user, fused)
                case "fusion":
                    inner = self.computations[user.called("calls") or ""]
                    for place, operand in enumerate(user.operands):
                        if operand == parameter.name:
                            total += self._read_bytes(inner.parameters[place], inner)
                case _:
                    return sum(shape.n_bytes for shape in parameter.shapes)
        return total

    def _written_bytes(self, fusion: Instruction, fused: Computation) -> int:
        """What a fusion writes: of an array that it updates in place, the update."""
        root = fused.instructions[fused.root]
        names = root.operands if root.opcode == "tuple" else [root.name]
        if len(names) != len(fusion.shapes):
            return sum(_main_bytes(shape) for shape in fusion.shapes)
        total = 0
        for name, shape in zip(names, fusion.shapes, strict=True):
            result = fused.instructions[name]
            while result.opcode == "bitcast":
                result = fused.instructions[result.operands[0]]
            if result.opcode == "dynamic-update-slice" and shape.main_memory:
                total += sum(s.n_bytes for s in fused.instructions[result.operands[1]].shapes)
            else:
                total += _main_bytes(shape)
        return total


def describe_shapes(shapes: list[Shape]) -> str:
    """`bf16[64,384] f32[65,384]`: the largest first, scalars left out."""
    arrays = sorted((s for s in shapes if s.dims), key=lambda s: -s.n_bytes)
    return " ".join(f"{s.dtype}[{','.join(map(str, s.dims))}]" for s in arrays) or "scalars"


def _parse_instruction(line: str) -> tuple[bool, Instruction]:
    found = _INSTRUCTION.match(line)
    assert found
    rest = line[found.end() :]
    end = _closing(rest) if rest.startswith("(") else re.match(r"\S+", rest).end()  # type: ignore[union-attr]
    shapes = [
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), "S(" not in layout)
        for dtype, dims, layout in _SHAPE.findall(rest[:end])
    ]
    opcode, rest = rest[end:].lstrip().split("(", 1)
    end = _closing("(" + rest) - 1
    arguments, attributes = rest[: end - 1], rest[end:].lstrip(", ")
    if opcode in ("parameter", "constant"):
        return bool(found[1]), Instruction(found[2], shapes, opcode, [], arguments)
    return bool(found[1]), Instruction(found[2], shapes, opcode, _NAME.findall(arguments), attributes)


def _closing(text: str) -> int:
    """Just after the parenthesis that closes the first one."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _target(call: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    return found[1] if found else "?"


def _is_annotation(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and _target(instruction) in ANNOTATIONS


def _main_bytes(shape: Shape) -> int:
    return shape.n_bytes if shape.main_memory else 0


def _all_bytes(instruction: Instruction) -> int:
    return sum(_main_bytes(shape) for shape in instruction.shapes)


def _moved(collective: Instruction, computation: Computation) -> list[Shape]:
    """The arrays that a collective works on: what it gathers, or else what it is given."""
    if collective.opcode.startswith("all-gather"):
        n = len(collective.operands)
        return collective.shapes[n : 2 * n] if collective.opcode.endswith("-start") else collective.shapes
    given = (computation.instructions[name].shapes for name in collective.operands)
    return [shape for shapes in given for shape in shapes]


def _flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    left, right = (computation.instructions[name].shapes[0].dims for name in instruction.operands[:2])
    result = instruction.shapes[0].dims
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * math.prod(result) * math.prod(left[axis] for axis in axes)
    # A TPU's matrix products are convolutions; batch axes become windows of which one place is inside.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels
    products = math.prod(result[labels[3].index(c)] for c in "bf") * right[labels[2].index("i")]
    for place, axis in enumerate(sorted(c for c in labels[1] if c.isdigit())):
        products *= _places(
            left[labels[1].index(axis)],
            result[labels[3].index(axis)],
            _window(instruction.attributes, place),
        )
    return 2.0 * products


def _window(attributes: str, place: int) -> dict[str, int]:
    """The window of a convolution along its spatial axis number `place`."""
    window = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    found = re.search(r"window=\{([^}]*)\}", attributes)
    for entry in found[1].split() if found else []:
        name, values = entry.split("=")
        if name in window:
            window[name] = int(values.split("x")[place].split("_")[0])
    return window


def _places(n_in: int, n_out: int, window: dict[str, int]) -> int:
    """How many pairs (place of the result, place of the window) meet an element of the input."""
    return sum(
        0 <= at <= (n_in - 1) * window["lhs_dilate"] and at % window["lhs_dilate"] == 0
        for out in range(n_out)
        for k in range(window["size"])
        for at in [out * window["stride"] + k * window["rhs_dilate"] - window["pad"]]
    )
