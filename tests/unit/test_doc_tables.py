"""Tests that the calculated tables in the docs equal the output of the scripts."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from wmtp.config.schema import CONFIG_FOLDER


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(CONFIG_FOLDER.parent / "scripts"))
    import write_doc_tables

    yield write_doc_tables
    sys.path.pop(0)


@pytest.mark.slow
def test_the_tables_are_current(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["write_doc_tables.py", "--check"])
    simulated = script.simulate_studies.tables()  # only once, because the simulation takes two minutes
    monkeypatch.setattr(script.simulate_studies, "tables", lambda: simulated)
    assert script.main() == 0
    monkeypatch.setattr("wmtp.training.estimate.speed.RING_BANDWIDTH", 210e9)
    assert script.main() == 1, "the control"


def test_only_a_marked_table_is_replaced(script: ModuleType) -> None:
    page = "| a |\n\n<!-- from scripts/x.py -->\n| b |\n| c |\n\nText.\n"
    assert script.replace_tables(page, "x", ["| d |"]) == page.replace("| b |\n| c |", "| d |")
    with pytest.raises(ValueError, match="2 tables, but 1 places"):
        script.replace_tables(page, "x", ["| d |", "| e |"])
