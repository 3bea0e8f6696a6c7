"""Write the calculated tables of the docs: `scripts/write_doc_tables.py [--check]`.

A table is replaced if the line before it is `<!-- from scripts/NAME.py -->`. With `--check`, nothing is written, and
the exit code is 1 if a table differs from the output of its script.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import benchmark_algorithms
import estimate_presets
import estimate_scaling
import simulate_studies
import tabulate_weightings

DOCS = Path(__file__).resolve().parents[1] / "docs"


def replace_tables(page: str, script: str, tables: Sequence[str]) -> str:
    """Replace the tables of a page that are marked with the name of `script`, in order, and return the page.

    Raises:
        ValueError: the number of marked tables is not that of `tables`.
    """
    marked = re.compile(rf"(<!-- from scripts/{script}\.py -->\n)(?:\|.*\n)+")
    if len(marked.findall(page)) != len(tables):
        raise ValueError(f"{len(tables)} tables, but {len(marked.findall(page))} places marked scripts/{script}.py")
    each = iter(tables)
    return marked.sub(lambda found: f"{found[1]}{next(each).strip()}\n", page)


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the path of each page and its text with current tables."""
    texts: dict[str, str] = {}
    for name, script, tables in (
        ("scaling.md", "estimate_scaling", estimate_scaling.default_tables()),
        ("presets.md", "estimate_presets", estimate_presets.tables()),
        ("statistics.md", "simulate_studies", simulate_studies.tables()),
        ("weightings.md", "tabulate_weightings", tabulate_weightings.tables()),
        ("weightings.md", "benchmark_algorithms", benchmark_algorithms.tables()),
    ):
        texts[name] = replace_tables(texts.get(name) or (DOCS / name).read_text(), script, tables)
    for name, text in texts.items():
        yield DOCS / name, text


def main() -> int:
    """Write the pages, or check them; return the exit code."""
    stale = [(path, text) for path, text in pages() if path.read_text() != text]
    for path, text in stale:
        print(f"{path.relative_to(DOCS.parent)} differs" if "--check" in sys.argv else f"writing {path}")
        if "--check" not in sys.argv:
            path.write_text(text)
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
