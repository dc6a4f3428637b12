"""What every source must hold, whatever its format: cut anywhere it reads the same, and damage is said, not raised."""

from hypothesis import strategies as st

from lmx.data import Document
from lmx.data.sources import UNIT, Omitted


def read(source, size=UNIT):
    return [item for unit in source.units(size) for item in source.read(unit)]


def documents(items):
    return [item for item in items if isinstance(item, Document)]


def omitted(items):
    """Places (without their folder) and reasons."""
    return [(item.where.rpartition("/")[2], item.reason) for item in items if isinstance(item, Omitted)]


def damage(items):
    return omitted(item for item in items if isinstance(item, Omitted) and item.damaged)


def same_in_units_of(source, sizes):
    """Reads the source in units of many sizes; what it read. Ids are unique."""
    whole = alike(source, sizes)
    ids = [document.id for document in documents(whole)]
    assert len(set(ids)) == len(ids)
    return whole


def alike(source, sizes):
    whole = read(source, 1 << 40)
    for size in sizes:
        assert read(source, size) == whole, size
        names = [unit.name for unit in source.units(size)]
        assert len(set(names)) == len(names)
    return whole


@st.composite
def wrecks(draw, whole: bytes):
    """A file that was cut off, written over, or lost or got bytes in its middle; or one that never was of this kind."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["cut", "flip", "lose", "insert", "zeros"])):
            case "cut":
                del data[at:]
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "lose":
                del data[at : at + draw(st.integers(1, 60))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=60))
            case "zeros":
                stop = min(at + draw(st.integers(1, 600)), len(data))
                data[at:stop] = bytes(stop - at)
    return bytes(data)


def survives(source, sizes):
    """A damaged source is read to its end, the same in units of every size; nothing is raised."""
    items = alike(source, sizes)  # damage may give two documents one id
    for item in items:
        assert isinstance(item, Document | Omitted)
        if isinstance(item, Omitted):
            assert "\n" not in item.reason
            assert item.reason
    return items
