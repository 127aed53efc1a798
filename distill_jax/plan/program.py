"""What a compiled program does, read from its text: products, memory traffic, collectives.

The compiler's own totals count the body of a loop once, however often it runs; here it counts as
often as its condition says. Loops whose end nobody knows beforehand count once.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "copy-done", "slice-done", "iota",
}  # fmt: skip
NEAR = "S(1)"  # how a layout says that an array lies in the memory beside the arithmetic units

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of a result."""

    dtype: str
    dims: tuple[int, ...]
    near: bool

    @property
    def bytes(self) -> float:
        """Its size, whatever memory it lies in."""
        return math.prod(self.dims) * BITS.get(self.dtype, 0) / 8

    @property
    def far_bytes(self) -> float:
        """Its size in main memory."""
        return 0.0 if self.near else self.bytes


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str  # of operands and attributes
    root: bool

    def called(self, word: str) -> str:
        """The computation that an attribute names, or an empty string."""
        found = re.search(rf"\b{word}=%?([\w.\-]+)", self.text)
        return found[1] if found else ""


@dataclass
class Computation:
    """The lines of one computation by name, in order."""

    lines: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The line whose result is the computation's."""
        return next(line for line in self.lines.values() if line.root)

    def users(self, name: str) -> list[Instruction]:
        """The lines that read a result, seen through changes of shape."""
        found = []
        for line in self.lines.values():
            if name in line.operands:
                found += self.users(line.name) if line.opcode == "bitcast" else [line]
        return found


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: One of `COLLECTIVES`.
      bytes: That a device sends each time, if it goes round a ring.
      group: The devices that exchange, as places in the mesh; of several alike the first.
      times: How often in one call of the program.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    times: int


@dataclass(frozen=True)
class Work:
    """What each device does in one call of a program."""

    flops: float  # of products
    bytes: float  # to and from its main memory
    collectives: tuple[Collective, ...]


def read_work(text: str) -> Work:
    """Counts what a compiled program does on each device.

    Args:
      text: As `jax.stages.Compiled.as_text` gives it.
    """
    program, entry = _parse(text)
    flops = moved = 0.0
    collectives: list[Collective] = []
    for computation, times in _executed(program, entry, 1):
        seen: set[str] = set()
        for line in computation.lines.values():
            for place, inner in _inside(program, computation, line):
                flops += times * _product_flops(place, inner)
                exchange = _collective(place, inner, times)
                channel = re.search(r"channel_id=\d+", inner.text)
                name = f"{inner.opcode} {channel[0] if channel else inner.name}"
                if exchange is not None and name not in seen:
                    # One that runs beside other work is written into each part of that work.
                    collectives.append(exchange)
                    seen.add(name)
            moved += times * _moved_bytes(program, computation, line)
    return Work(flops, moved, tuple(collectives))


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations, and the name of the one that a call begins with."""
    program: dict[str, Computation] = {}
    entry, current = "", Computation()
    for raw in text.splitlines():
        head = _HEAD.match(raw)
        if head:
            current = program[head[2]] = Computation()
            entry = head[2] if head[1] else entry
        elif line := _LINE.match(raw):
            root, name, rest = line.groups()
            made, rest = _split(rest)
            opcode, _, rest = rest.partition("(")
            operands, rest = _split(f"({rest}")
            arrays = tuple(
                Array(kind, tuple(map(int, filter(None, dims.split(",")))), NEAR in (layout or ""))
                for kind, dims, layout in _ARRAY.findall(made)
            )
            names = tuple(_NAME.findall(operands))
            current.lines[name] = Instruction(
                name, opcode, arrays, names, operands + rest, bool(root)
            )
    return program, entry


def _split(text: str) -> tuple[str, str]:
    """The first word, or all that stands in the first parentheses; and what follows."""
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = end = 0
    while not end or depth:
        depth += (text[end] == "(") - (text[end] == ")")
        end += 1
    return text[:end], text[end:].lstrip()


def _executed(
    program: Mapping[str, Computation], name: str, times: int
) -> Iterator[tuple[Computation, int]]:
    """Every computation that a call runs as such, and how often."""
    computation = program[name]
    yield computation, times
    for line in computation.lines.values():
        if line.opcode == "while":
            body = line.called("body")
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.text)
            trips = (
                int(known[1]) if known else _trips(program[line.called("condition")], program[body])
            )
            yield from _executed(program, body, times * trips)
        elif line.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", line.text)
            names = _NAME.findall(branches[1]) if branches else []
            names = names or [line.called("true_computation"), line.called("false_computation")]
            yield from _executed(program, names[0], times)
        elif line.opcode == "call":
            yield from _executed(program, line.called("to_apply"), times)


def _trips(condition: Computation, body: Computation) -> int:
    """How often a loop runs that counts from 0 up to a constant; 1 for any other."""
    root = condition.root
    if root.opcode != "compare" or "direction=LT" not in root.text:
        return 1
    counter, limit = (condition.lines[name] for name in root.operands)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return 1
    place = re.search(r"index=(\d+)", counter.text)
    assert place is not None, f"an element has an index: {counter.name}"
    after = body.lines[body.root.operands[int(place[1])]]
    steps = [line for name in after.operands if (line := body.lines[name]).opcode == "constant"]
    if after.opcode != "add" or not steps:
        return _value(limit)
    return -(-_value(limit) // _value(steps[0]))


def _value(constant: Instruction) -> int:
    """The number in parentheses."""
    found = re.match(r"\((\d+)\)", constant.text)
    return int(found[1]) if found else 1


def _inside(
    program: Mapping[str, Computation], computation: Computation, line: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """A line, or all lines that are fused into it."""
    name = line.called("calls")
    if not name or name not in program:
        yield computation, line
        return
    for inner in program[name].lines.values():
        yield from _inside(program, program[name], inner)


def _product_flops(computation: Computation, line: Instruction) -> float:
    """Operations of a product of matrices."""
    if line.opcode == "dot":
        left = computation.lines[line.operands[0]].arrays[0].dims
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.text)
        sizes = [left[int(dim)] for dim in summed[1].split(",") if dim] if summed else []
        return 2.0 * math.prod(line.arrays[0].dims) * math.prod(sizes)
    if line.opcode == "convolution":
        return 2.0 * _convolution_sums(computation, line)
    return 0.0


def _convolution_sums(computation: Computation, line: Instruction) -> float:
    """Products that are added up in a convolution; those with padding don't count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.text)
    assert labels is not None, f"a convolution names its dims: {line.name}"
    left, right = (computation.lines[name].arrays[0].dims for name in line.operands[:2])
    made = dict(zip(labels[3], line.arrays[0].dims, strict=True))
    sizes, kernel = (
        dict(zip(names, dims, strict=True))
        for names, dims in ((labels[1], left), (labels[2], right))
    )
    window = re.search(r"window=\{([^}]*)\}", line.text)
    said = dict(part.split("=") for part in window[1].split()) if window else {}
    total = float(made["b"] * made["f"] * kernel["i"])
    for place, dim in enumerate(sorted(set(made) - {"b", "f"})):
        step, dilated, spread = (
            int(said[word].split("x")[place]) if word in said else 1
            for word in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(said["pad"].split("x")[place].split("_")[0]) if "pad" in said else 0
        at = np.arange(made[dim])[:, None] * step + np.arange(kernel[dim])[None] * spread - low
        inside = (at >= 0) & (at <= (sizes[dim] - 1) * dilated) & (at % dilated == 0)
        total *= int(inside.sum())
    return total


def _collective(computation: Computation, line: Instruction, times: int) -> Collective | None:
    kind = line.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    group = _group(line.text)
    size = _received(line)
    count = len(group)
    part = (count - 1) / count
    sent = {
        "all-gather": size * part,
        "all-reduce": 2 * size * part,
        "reduce-scatter": size * (count - 1),
        "all-to-all": size * part,
        "collective-permute": size,
    }
    return Collective(kind, sent[kind], group, times)


def _received(line: Instruction, *, far: bool = False) -> float:
    """Bytes of what a collective gives; in main memory, if `far`."""
    arrays = line.arrays
    if line.opcode in ("all-gather-start", "collective-permute-start"):  # the operand comes first
        arrays = arrays[1:2]
    return sum(array.far_bytes if far else array.bytes for array in arrays)


def _group(text: str) -> tuple[int, ...]:
    """The first of the groups that exchange, in any of the ways that they are written."""
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text)
    if pair:
        return int(pair[1]), int(pair[2])
    if listed:
        return _numbers(listed[1])
    if counted:
        return tuple(_places(counted[3], counted[4]).reshape(-1, int(counted[2]))[0].tolist())
    assert named is not None, f"a collective names its groups: {text[:200]}"
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    used = re.findall(r"'([^']+)'", named[3])
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", named[2])
    places = _places(order[1], order[2]) if order else np.arange(math.prod(axes.values()))
    grid = places.reshape([*axes.values()])
    index = tuple(slice(None) if axis in used else 0 for axis in axes)
    return tuple(grid[index].ravel().tolist())


def _places(sizes: str, order: str | None) -> np.ndarray:
    """Consecutive numbers in a grid whose dims are put in another order."""
    shape = _numbers(sizes)
    grid = np.arange(math.prod(shape)).reshape(shape)
    return grid.transpose(_numbers(order)) if order else grid


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _moved_bytes(
    program: Mapping[str, Computation], computation: Computation, line: Instruction
) -> float:
    """Bytes that a line reads from main memory and writes to it."""
    if line.opcode in FREE or line.opcode.endswith("-done"):
        return 0.0
    sources = [computation.lines[name] for name in line.operands if name in computation.lines]
    if line.opcode in ("slice-start", "dynamic-slice", "slice", "gather"):
        return 2.0 * line.arrays[0].far_bytes or min(map(_far, sources), default=0.0)
    if line.opcode.removesuffix("-start") in COLLECTIVES:
        return sum(map(_far, sources)) + _received(line, far=True)
    if line.opcode == "copy-start":
        return sum(map(_far, sources)) + line.arrays[0].far_bytes
    fused = program.get(line.called("calls")) if line.opcode == "fusion" else None
    if fused is None:
        return sum(map(_far, sources)) + _far(line)
    takes = [x for x in fused.lines.values() if x.opcode == "parameter"]
    takes.sort(key=_value)
    reads = sum(
        min(_far(source), _read_bytes(fused, taken))
        for source, taken in zip(sources, takes, strict=True)
    )
    return reads + min(_far(line), _written_bytes(fused))


def _far(line: Instruction) -> float:
    return sum(array.far_bytes for array in line.arrays)


def _read_bytes(fused: Computation, taken: Instruction) -> float:
    """What a fused computation needs of one of its inputs: all, or a slice of it."""
    users = fused.users(taken.name)
    whole = sum(array.bytes for array in taken.arrays)
    if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return min(whole, sum(array.bytes for user in users for array in user.arrays))
    if users and all(user.opcode == "dynamic-update-slice" for user in users):
        return 0.0 if all(_target(fused, user) == taken.name for user in users) else whole
    return whole


def _target(fused: Computation, update: Instruction) -> str:
    """The input that an update goes into, seen through changes of shape."""
    line = fused.lines[update.operands[0]]
    while line.opcode == "bitcast":
        line = fused.lines[line.operands[0]]
    return line.name


def _written_bytes(fused: Computation) -> float:
    """What a fused computation writes: its results, of those that are updated only the part."""
    root = fused.root
    made: Sequence[str] = root.operands if root.opcode == "tuple" else (root.name,)
    total = 0.0
    for name in made:
        line = fused.lines[name]
        while line.opcode == "bitcast":
            line = fused.lines[line.operands[0]]
        if line.opcode == "dynamic-update-slice":
            line = fused.lines[line.operands[1]]
        total += sum(array.bytes for array in line.arrays)
    return total
