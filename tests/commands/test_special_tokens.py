"""Tests of commands with data that contain the names of special tokens."""

import json
from pathlib import Path

import pytest

from tests.conftest import Invoke

SOLUTION = "def run():\n    return 'a<end>b'\n"


@pytest.mark.slow
def test_solutions_that_contain_the_end_tokens_name_are_learned_and_generated(invoke: Invoke, tmp_path: Path) -> None:
    """When `<end>` in a solution became the end token, pass@1 was 0."""
    for split, count in (("train", 48), ("validation", 4), ("test", 2)):
        rows = [
            {"task_id": f"{split}/{number}", "prompt": "Print the <end> tag.", "solution": SOLUTION,
             "tests": ["assert run() == 'a<' + 'end>b'"]}
            for number in range(count)
        ]  # fmt: skip
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    length = ["num_epochs=5", "batch_size=16", "optimizer.lr=1e-2", "scheduler=constant", "early_stopping=none"]
    samples = ["num_samples=2", "num_validation_samples=0", "report=false", "sandbox=none"]
    data = ["data=jsonl", f"data.path={tmp_path}", "model=nano", "model.num_heads=1", "hydra.run.dir=run"]
    done = invoke(*data, *length, *samples, tiny=False)
    assert done.code == 0, done.err
    assert json.loads(Path("run/summary.json").read_text())["pass@1"]["value"] == 1.0
    answer = invoke("checkpoint=run", "prompt=Print the <end> tag.", command="generate")
    assert (answer.out, "ended by end;" in answer.err) == (SOLUTION + "\n", True)
