"""Compiled programs read: their collectives, how large, over which axes of the mesh, how often they run, and what runs beside them."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", re.M)
_CALL = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ASYNC = re.compile(r"= .*? (?:async|call|fusion)(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_PRODUCT = re.compile(r' (?:dot|convolution)\(|custom_call_target="(?:__(?:cublas|cudnn|triton)|mosaic_gpu)')
_TRIPS = re.compile(r'known_trip_count\W+n\W+"?(\d+)')


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a compiled program.

    Attributes:
      kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`.
      axes: the axes of the mesh over which devices talk, in the mesh's order; None when they are no product of axes.
      size: bytes that one device has of the whole: an all-gather's result, a reduce-scatter's operand, any other's operand.
      group: devices that talk with each other.
      times: how often it runs, the trips of the loops around it multiplied.
      name: of the instruction, with the JAX source it comes from where the program says so.
      covered: whether products run between its start and its end, as the compiler has put them in order.
    """

    kind: str
    axes: tuple[str, ...] | None
    size: int
    group: int
    times: int
    name: str
    covered: bool = False

    @property
    def volume(self) -> int:
        """Bytes: `size x times`."""
        return self.size * self.times


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step.

    Attributes:
      target: what it was compiled for.
      arguments, temporary, total: bytes of a device; total is arguments, temporaries, and results that take no argument's place.
      collectives: as found in the text.
      seconds: that lowering and compiling took.
    """

    target: str
    arguments: int
    temporary: int
    total: int
    collectives: tuple[Collective, ...]
    seconds: float


def read(compiled: jax.stages.Compiled, mesh: Mesh, target: str, seconds: float) -> Compiled:
    """The figures of a compiled program."""
    stats = compiled.memory_analysis()
    arguments, temporary = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    total = arguments + stats.output_size_in_bytes - stats.alias_size_in_bytes + temporary
    return Compiled(target, arguments, temporary, total, tuple(collectives(compiled.as_text(), mesh)), seconds)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of `compiled.as_text()`, in order of the text; those that talk with nobody (groups of one) are left out.

    A loop whose number of trips the program does not say counts once.
    """
    bodies = _bodies(text)
    times = _times(text, bodies)
    found = []
    for name, lines in bodies.items():
        for place, line in enumerate(lines):
            match = _COLLECTIVE.search(line)
            if match is None or not times.get(name):
                continue
            axes, group = _who(match[2], line, mesh)
            if group > 1:
                beside = match[3] is not None and any(_computes(between, bodies) for between in _until_done(lines, place))
                found.append(Collective(match[2], axes, _size(match, line, group), group, times[name], _named(line), beside))
    return found


def covered(several: Iterable[Collective]) -> float:
    """The share of their bytes that move while products run."""
    several = list(several)
    return sum(one.volume for one in several if one.covered) / max(1, sum(one.volume for one in several))


def _until_done(lines: list[str], place: int) -> list[str]:
    """The instructions between a collective's start and its end; a scheduled program lists them in the order of their launch."""
    done = f"-done(%{re.search(r'%?([\w.\-]+) =', lines[place])[1]})"
    end = next((i for i in range(place, len(lines)) if done in lines[i]), place)
    return lines[place + 1 : end]


def _computes(line: str, bodies: dict[str, list[str]]) -> bool:
    """Whether an instruction is a product, or calls one."""
    return _PRODUCT.search(line) is not None or any(
        _computes(inner, bodies) for name in _CALL.findall(line) for inner in bodies.get(name, ())
    )


def _bodies(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name."""
    found: dict[str, list[str]] = {}
    current = None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            match = _COMPUTATION.match(line)
            current = found.setdefault(match[1], []) if match else None
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return found


def _times(text: str, bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs, from the entry down. Of a conditional's branches each counts."""
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]
    calls: dict[str, list[tuple[str, int]]] = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    times = dict.fromkeys(bodies, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for callee, trips in calls[name]:
            visit(callee, count * trips)

    visit(entry, 1)
    return times


def _calls(lines: list[str], bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    for line in lines:
        trips = _trips(line, bodies) if " while(" in line else 1
        named = [m for m in _CALL.findall(line) if m in bodies]
        named += [n.strip().lstrip("%") for group in _BRANCHES.findall(line) for n in group.split(",") if "," in group]
        for callee in dict.fromkeys(named):
            # Reducers (`to_apply` of a sum) hold no collective; counting them harms nothing.
            if callee in bodies:
                yield callee, trips


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """A loop's trips: what the compiler says, else the constant that its condition compares with."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = bodies.get(re.search(r"condition=%?([\w.\-]+)", line)[1], [])
    constants = [int(n) for text in condition for n in re.findall(r"s32\[\][^=]*? constant\((\d+)\)", text)]
    return constants[0] if len(constants) == 1 else 1


def _who(kind: str, line: str, mesh: Mesh) -> tuple[tuple[str, ...] | None, int]:
    """Axes of the mesh along which a collective's devices differ, and how many talk together."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)[1]
        sent = [tuple(map(int, p)) for p in re.findall(r"(\d+),(\d+)", pairs)]
        if all(a == b for a, b in sent):
            return (), 1
        places = np.stack([np.stack(np.unravel_index(side, mesh.devices.shape)) for side in zip(*sent, strict=True)])
        differ = (places[0] != places[1]).any(1)
        return tuple(n for n, d in zip(mesh.axis_names, differ, strict=True) if d), 2
    groups = _groups(line, mesh.devices.size)
    places = np.stack(np.unravel_index(groups, mesh.devices.shape))
    differ = (places != places[:, :, :1]).any((1, 2))
    axes = tuple(n for n, d in zip(mesh.axis_names, differ, strict=True) if d)
    whole = math.prod(mesh.shape[n] for n in axes) == groups.shape[1]
    return axes if whole else None, groups.shape[1]


def _groups(line: str, devices: int) -> np.ndarray:
    """Replica groups `[groups, members]`, as they are written: in full; as an iota, `[4,2]<=[2,4]T(1,0)`; as axes of a mesh,
    `mesh['x'=2,'y'=4] {'y'}`, of which one may be a part, `'y':(1)2`."""
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, sizes = (_integers(iota[i]) for i in (1, 2))
        return _iota(sizes, iota[3]).reshape(shape)
    named = re.search(r"replica_groups=(?:@?mesh)?\[('[^\]]*)\](?:, device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?\)?)?\s*\{([^}]*)\}", line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = (_iota(_integers(named[2]), named[3]) if named[2] else np.arange(devices)).reshape(list(sizes.values()))
        return _along(ids, list(sizes), re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[4]))
    written = re.search(r"replica_groups=(\{[\d,{} ]*\})", line)
    lists = re.findall(r"\{([\d,]+)\}", written[1]) if written else []
    return np.array([_integers(one) for one in lists]) if lists else np.arange(devices)[None]


def _along(ids: np.ndarray, names: list[str], axes: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups of the ids that differ along the named axes; an axis may be named in part: (name, product of what is before, size)."""
    shape: list[int] = []
    moved: dict[int, int] = {}  # which dimension of the refined shape each of `axes` is
    for name, size in zip(names, ids.shape, strict=True):
        parts = sorted((int(before), int(part), i) for i, (n, before, part) in enumerate(axes) if n == name and before)
        whole = next((i for i, (n, before, _) in enumerate(axes) if n == name and not before), None)
        if whole is not None:
            parts = [(1, size, whole)]
        done = 1
        for before, part, i in parts:
            shape += [before // done, part]
            moved[i] = len(shape) - 1
            done = before * part
        shape.append(size // done)
    last = [moved[i] for i in range(len(axes))]
    refined = ids.reshape(shape).transpose([d for d in range(len(shape)) if d not in last] + last)
    return refined.reshape(-1, math.prod(shape[d] for d in last))


def _iota(sizes: list[int], order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_integers(order)) if order else ids


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _size(match: re.Match, line: str, group: int) -> int:
    """Bytes of a collective on one device, from its result's type (an operand's is not always written)."""
    result, kind, started = match[1], match[2], match[3]
    arrays = [_bytes(*a) for a in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", result)) if a[0] in BITS or re.search(r"\d", a[0])]
    if started and (kind == "collective-permute" or result.startswith("((")):
        # The result is (operands, results, contexts): as many of each.
        operands = _operands(line)
        arrays = arrays[operands : 2 * operands]
    total = sum(arrays)
    return total * group if kind == "reduce-scatter" else total


def _operands(line: str) -> int:
    inside = re.search(r"-start\(([^)]*)\)", line)[1]
    return max(1, inside.count("%") or inside.count(",") + 1)


def _bytes(kind: str, shape: str) -> int:
    bits = BITS.get(kind)
    if bits is None:
        bits = int(re.search(r"\d+", kind)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _named(line: str) -> str:
    name, op = re.search(r"%?([\w.\-]+) =", line)[1], re.search(r'op_name="([^"]*)"', line)
    return f"{name} ({op[1]})" if op else name
