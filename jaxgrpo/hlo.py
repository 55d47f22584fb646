"""Reads the optimised HLO of a compiled program: which arrays it writes, where, and how often.

What a fusion computes inside never reaches memory, so only its results count.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_GROUPS = re.compile(
    r"replica_groups=(mesh\[[^\]]*\] ?\{[^}]*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{\{[\d,]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

# Names for what is there already.
_NO_WRITE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"}
_CONTROL_FLOW = {"while", "conditional", "call", "async-start"}
_MOVES = {
    *("copy", "copy-start", "transpose", "reshape", "convert"),
    *("slice", "dynamic-slice", "concatenate"),
}
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?"
)


class Shape(NamedTuple):
    """An array's element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes without padding; types narrower than a byte count as one."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.dims) * (max(8, int(bits[0])) if bits else 8) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: of its result.
      op: `fusion`, `while`, `copy`, ...
      results: an array, or those of a tuple.
      first: the name of its first operand, if any.
      contracted: of a product, the axes of that operand which are summed over.
      called: computations it names: a loop's body and condition, a fusion's inside.
      trips: of a loop, where the compiler knows how many.
      group: of a collective, the devices of the first of the groups that exchange among
        themselves; empty where all do, or pairs.
    """

    name: str
    op: str
    results: tuple[Shape, ...]
    first: str
    contracted: tuple[int, ...]
    called: tuple[str, ...]
    trips: int | None
    group: tuple[int, ...]


class Program(NamedTuple):
    """A module's computations by name."""

    entry: str
    computations: dict[str, list[Instruction]]


def parse(text: str) -> Program:
    """Reads a module as `compiled.as_text()` prints it."""
    entry = ""
    computations: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            instructions = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            branches = [name for group in _BRANCHES.findall(line) for name in group.split(", ")]
            called = [*_CALLED.findall(line), *(name.lstrip("%") for name in branches)]
            trips, contracted = _TRIPS.search(line), _CONTRACTED.search(line)
            groups = _GROUPS.search(line)
            operands = re.findall(r"%([\w.\-]+)", match[4])
            instructions.append(
                Instruction(
                    match[1],
                    match[3],
                    tuple(_shapes(match[2])),
                    operands[0] if operands else "",
                    _ints(contracted[1]) if contracted else (),
                    tuple(called),
                    int(trips[1]) if trips else None,
                    _first_group(groups[1]) if groups else (),
                )
            )
    return Program(entry, computations)


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims in _ARRAY.findall(text):
        yield Shape(dtype, _ints(dims))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _first_group(text: str) -> tuple[int, ...]:
    """The devices of the first group, from any of XLA's three ways to write them.

    `{{0,1},{2,3}}`; `[2,2]<=[4]`, or with a permutation `[2,2]<=[2,2]T(1,0)`; and axes of a mesh,
    `mesh['a'=2,'b'=2] {'a'}`, of which a part may be meant, `{'a':(1)2}`.
    """
    if text.startswith("{"):
        return _ints(text[2:])
    if text.startswith("mesh"):
        sizes, named = text.split("]", 1)
        mesh = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)]
        shape, free = [size for _, size in mesh], {}
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named):
            axis = [n for n, _ in mesh].index(name)
            free[axis] = (int(before or 1), int(size or shape[axis]))
        group = np.zeros(1, int)
        for axis, (before, size) in sorted(free.items()):
            stride = math.prod(shape[axis:]) // (before * size)
            group = (group[:, None] + stride * np.arange(size)).ravel()
        return tuple(map(int, group))
    groups, dims, *order = (_ints(numbers) for numbers in re.findall(r"[\d,]+", text))
    numbers = np.arange(math.prod(dims)).reshape(dims).transpose(*order)
    return tuple(map(int, numbers.reshape(groups)[0]))


def matmul_flops(program: Program, open_trips: int = 1) -> int:
    """FLOPs of all `dot`s, on one device; XLA's own cost analysis counts a loop's body once.

    Args:
      program: from `parse`.
      open_trips: how often a loop runs whose number of trips depends on data.
    """

    def count(computation: str) -> int:
        total, results = 0, {}
        for instruction in program.computations[computation]:
            results[instruction.name] = instruction.results
            if instruction.op == "dot":
                left = results[instruction.first][0].dims
                inner = math.prod(left[i] for i in instruction.contracted)
                total += 2 * math.prod(instruction.results[0].dims) * inner
            times = instruction.trips or (open_trips if instruction.op == "while" else 1)
            total += times * sum(count(name) for name in instruction.called)
        return total

    return count(program.entry)


def written(program: Program, root: str, times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """What a computation writes, through loops, branches and calls, and how many times.

    A loop whose trips are not known counts once.
    """
    for instruction in program.computations[root]:
        if instruction.op not in _NO_WRITE:
            yield instruction, times
        if instruction.op in _CONTROL_FLOW:
            for name in instruction.called:
                yield from written(program, name, times * (instruction.trips or 1))


def open_loops(program: Program) -> list[str]:
    """Bodies of the entry's loops whose number of trips depends on data."""
    loops = (i for i in program.computations[program.entry] if i.op == "while" and i.trips is None)
    # The condition may stand before the body; it gives a single truth value.
    return [name for loop in loops for name in loop.called if not _is_condition(program, name)]


def _is_condition(program: Program, name: str) -> bool:
    return program.computations[name][-1].results == (Shape("pred", ()),)


def moves_only(program: Program, instruction: Instruction) -> bool:
    """Whether it copies, cuts, joins or reorders an array and computes nothing."""
    if instruction.op != "fusion":
        return instruction.op in _MOVES
    inside = (i for name in instruction.called for i in program.computations[name])
    # Scalars are indices of what is moved.
    ops = {i.op for i in inside if any(shape.dims for shape in i.results)}
    return bool(ops & _MOVES) and ops <= _MOVES | _NO_WRITE


def exchanged(instruction: Instruction) -> int:
    """Bytes of what a collective gives; 0 for other instructions."""
    match = _COLLECTIVE.fullmatch(instruction.op)
    if match is None:
        return 0
    results = instruction.results
    if match[2] and match[1] != "all-reduce":  # beside what they were given
        results = results[len(results) // 2 :]
    return sum(shape.nbytes for shape in results)


class Traffic(NamedTuple):
    """What a device gets from others in one collective.

    Attributes:
      kind: `all-gather`, `all-reduce`, `all-to-all`, `reduce-scatter` or `collective-permute`.
      nbytes: by the algorithm that moves least, a ring.
      between_nodes: of them, those from other nodes, where the group's devices of one node share
        out what comes in.
    """

    kind: str
    nbytes: float
    between_nodes: float


def traffic(instruction: Instruction, devices: int, node: int) -> Traffic | None:
    """A collective's, None for other instructions.

    Args:
      instruction: one line of the program.
      devices: of the whole program, for a collective among all.
      node: devices of one node, numbered one after the other.
    """
    match = _COLLECTIVE.fullmatch(instruction.op)
    if match is None:
        return None
    kind, size = match[1], exchanged(instruction)
    if kind == "collective-permute":
        return Traffic(kind, size, size if devices > node else 0)
    group = instruction.group or range(devices)
    # Parts of which a device has one and gets all others; an all-reduce scatters and gathers.
    parts = {"reduce-scatter": len(group), "all-reduce": 2}.get(kind, 1)
    here = sum(device // node == group[0] // node for device in group)
    away = (len(group) - here) / here
    whole = size * parts / len(group)
    return Traffic(kind, whole * (len(group) - 1), whole * away)


def spans(dims: Sequence[int], size: int) -> bool:
    """Whether an axis, or neighbouring axes together, have `size`."""
    return any(
        math.prod(dims[start:end]) == size
        for start in range(len(dims))
        for end in range(start + 1, len(dims) + 1)
    )
