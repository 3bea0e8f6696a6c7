"""Tests of the train command with data files: invalid records stop the run with exit code 2, or are counted."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Invoke

SHORT_RUN = ["model=nano", "max_steps=2", "num_samples=0", "hydra.run.dir=run"]
"""Overrides of a run with two updates."""
VALID = [{"task_id": f"t/{i}", "prompt": f"Say {i}.", "solution": f"print({i})\n"} for i in range(60)]
"""Valid records."""
INVALID = {
    "truncated": '{"task_id": "x", "prompt": "p", "solu',
    "byte order mark": '\ufeff{"task_id": "x", "prompt": "p", "solution": "s"}',
    "NaN": '{"task_id": "x", "prompt": "p", "solution": "s", "difficulty": NaN}',
    "overflow": '{"task_id": "x", "prompt": "p", "solution": "s", "difficulty": 1e999}',
    "duplicate key": '{"task_id": "x", "prompt": "p", "prompt": "q", "solution": "s"}',
    "lone surrogate": '{"task_id": "x", "prompt": "\\ud800", "solution": "s"}',
    "nesting": '{"task_id": "x", "prompt": ' + "[" * 100_000 + "]" * 100_000 + ', "solution": "s"}',
    "long integer": '{"task_id": "x", "prompt": "p", "solution": "s", "difficulty": ' + "9" * 5_000 + "}",
    "null": '{"task_id": null, "prompt": "p", "solution": "s"}',
    "missing field": '{"task_id": "x", "prompt": "p"}',
    "wrong type": '{"task_id": "x", "prompt": 5, "solution": "s"}',
    "nothing to learn": '{"task_id": "x", "prompt": "p", "solution": ""}',
}
"""Invalid lines of a JSONL file, by the name of the error."""


@pytest.fixture
def invalid_file(tmp_path: Path) -> Path:
    """Return a JSONL file with sixty valid lines, followed by all invalid lines."""
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join([*map(json.dumps, VALID), *INVALID.values()]) + "\n")
    return path


def test_invalid_lines_stop_the_run_and_are_reported_by_number(invoke: Invoke, invalid_file: Path) -> None:
    outcome = invoke("data=jsonl", f"data.path={invalid_file}", *SHORT_RUN, tiny=False)
    assert outcome.code == 2
    assert re.findall(r"records\.jsonl:(\d+): ", outcome.err) == [str(61 + i) for i in range(len(INVALID))]
    assert "data.on_error=skip" in outcome.err and "Traceback" not in outcome.err
    assert json.loads(Path("run/status.json").read_text())["exit_code"] == 2
    assert not Path("run/metrics.jsonl").exists()


def test_invalid_lines_are_skipped_and_counted_with_on_error_skip(invoke: Invoke, invalid_file: Path) -> None:
    outcome = invoke("data=jsonl", f"data.path={invalid_file}", "data.on_error=skip", *SHORT_RUN, tiny=False)
    assert outcome.code == 0, outcome.err
    (warning,) = [line for line in outcome.err.splitlines() if "skipped" in line]
    assert "skipped 12 rows" in warning and "duplicate key ×1" in warning
    losses = [json.loads(line)["train/loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()[:1]]
    assert all(isinstance(loss, float) for loss in losses)


def test_more_invalid_lines_than_max_errors_stop_the_run(invoke: Invoke, invalid_file: Path) -> None:
    outcome = invoke(
        "data=jsonl", f"data.path={invalid_file}", "data.on_error=skip", "data.max_errors=11", *SHORT_RUN, tiny=False
    )
    assert outcome.code == 2
    assert "data.max_errors" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"), [("drop", "were dropped"), ("cut", "were cut at the end of the solution")]
)
def test_samples_that_are_too_long_are_counted_and_reported(
    invoke: Invoke, tmp_path: Path, option: str, message: str
) -> None:
    path = tmp_path / "records.jsonl"
    long_record = {"task_id": "t/long", "prompt": "Say much.", "solution": "print('much')\n" * 50}
    path.write_text("\n".join(map(json.dumps, [*VALID, long_record])) + "\n")
    outcome = invoke(
        "data=jsonl", f"data.path={path}", "data.max_length=64", f"data.long_samples={option}", *SHORT_RUN, tiny=False
    )
    assert outcome.code == 0, outcome.err
    assert "1 of " in outcome.err and f"longer than data.max_length=64 and {message}" in outcome.err


def test_a_dataset_without_usable_samples_is_an_error(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, VALID)) + "\n")
    outcome = invoke("data=jsonl", f"data.path={path}", "data.max_length=3", *SHORT_RUN, tiny=False)
    assert outcome.code == 2
    assert "increase data.max_length" in outcome.err


def test_missing_validation_data_are_an_error_if_a_setting_depends_on_them(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, VALID)) + "\n")
    overrides = ["data=jsonl", f"data.path={tmp_path / 'data'}", *SHORT_RUN[:3]]
    refused = invoke(*overrides, tiny=False)
    assert refused.code == 2 and "early_stopping.patience=5 and num_validation_samples=20 need some" in refused.err
    (remedy,) = re.findall(r"or train without: (.*)", refused.err)
    done = invoke(*overrides, *remedy.split(), "hydra.run.dir=run", tiny=False)
    assert done.code == 0, done.err
    start = "60 training and 0 validation samples, 0 test problems: no val/loss and no best checkpoint, no pass@1"
    assert start in done.out and "held-out" not in done.out and "tokens of solutions" not in done.out
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["pass@1"] is None and summary["label_shares"] == {}


@pytest.mark.slow
def test_a_run_prints_and_saves_the_shares_of_token_labels(invoke: Invoke) -> None:
    overrides = ["data.noise=0.7", "data.correct_ratio=0.5", "num_samples=0", "max_steps=1", "hydra.run.dir=run"]
    tried, done = (invoke(*overrides, f"dry_run={option}") for option in (True, False))
    assert done.code == tried.code == 0, done.err
    shares = json.loads(Path("run/summary.json").read_text())["label_shares"]
    line = re.compile(
        r"tokens of solutions: (\S+) % noise, (\S+) % decisive in correct and (\S+) % in incorrect ones, (\S+) % other"
    )
    names = ("noise", "decisive_correct", "decisive_incorrect", "other")
    for outcome in (tried, done):
        (printed,) = line.findall(outcome.out)
        assert [float(share) for share in printed] == pytest.approx([100 * shares[name] for name in names], abs=0.051)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0.005


@pytest.mark.slow
def test_a_run_trains_on_mbpp_files_with_crlf_line_ends(invoke: Invoke, tmp_path: Path) -> None:
    def rows(start: int, count: int) -> list[dict[str, object]]:
        return [
            {
                "task_id": i,
                "text": f"Write a function to add {i}.",
                "code": f"def add(x):\r\n\treturn x + {i}",
                "test_list": [f"assert add(1) == {1 + i}"],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
            for i in range(start, start + count)
        ]

    for name, start, count in (("train", 0, 40), ("validation", 40, 4), ("test", 44, 4)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows(start, count)))
    outcome = invoke(
        "data=mbpp", f"data.path={tmp_path}", *SHORT_RUN[:2], "num_samples=2", "hydra.run.dir=run", tiny=False
    )
    assert outcome.code == 0, outcome.err
    assert "40 training and 4 validation samples" in outcome.out
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert [line["split"] for line in samples].count("test") == 2
    assert all(line["outcome"] == "fail" for line in samples)
