"""Rewrites the README's generated tables: `python tests/parallel/tables.py`."""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def block(name: str, table: str) -> str:
    """A table between its markers."""
    return f"<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->"


def main() -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    import test_planted
    import test_zero_memory

    import composition

    sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
    import test_families

    text = README.read_text()
    tables = {
        "families": test_families.table(),
        "planted bugs": test_planted.table(),
        "composition": composition.table(composition.cover()),
        "zero memory": test_zero_memory.table(test_zero_memory.measured()),
    }
    for name, table in tables.items():
        text, found = re.subn(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, b=block(name, table): b, text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"README.md has no place for the table {name!r}: put <!-- {name} --> and <!-- /{name} --> into it")
    README.write_text(text)


if __name__ == "__main__":
    main()
