"""Counts the FLOPs of a compiled program's matrix products, loops included.

XLA's own cost analysis counts a loop's body once.
"""

import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def matmul_flops(text: str, open_trips: int = 1) -> int:
    """FLOPs of all `dot`s of a module as `compiled.as_text()` prints it, per device.

    Args:
      text: optimised HLO.
      open_trips: how often a loop runs whose number of trips depends on data.
    """
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line)

    def count(name: str) -> int:
        total, shapes = 0, {}
        for line in computations[name]:
            if not (match := _INSTRUCTION.match(line)):
                continue
            result, op = match[2], match[3]
            shapes[match[1]] = result
            if op == "dot":
                lhs = _dims(shapes[re.findall(r"%?([\w.\-]+)", _operands(match[4]))[0]])
                inner = [lhs[int(i)] for i in _CONTRACTED.search(line)[1].split(",") if i]  # type: ignore[index]
                total += 2 * math.prod(_dims(result)) * math.prod(inner)
            called = _CALLED.findall(line)
            called += [n.strip(" %") for group in _BRANCHES.findall(line) for n in group.split(",")]
            if called:
                trips = _TRIPS.search(line)
                times = 1 if op != "while" else int(trips[1]) if trips else open_trips
                total += times * sum(count(inside) for inside in called)
        return total

    return count(entry)


def _operands(rest: str) -> str:
    """Operand names; newer XLA prints their types before them."""
    return re.sub(r"\w+\[[\d,]*\](\{[^}]*\})?\s*", "", rest.split(")")[0])


def _dims(shape: str) -> list[int]:
    return [int(n) for n in re.findall(r"\[([\d,]*)\]", shape)[0].split(",") if n]
