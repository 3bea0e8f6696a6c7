"""Small artificial run folders in the format of `wmtp.train`, for tests of code that reads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

BASE: dict[str, Any] = {
    "algo": {"_target_": "wmtp.algorithms.uniform.Uniform"},
    "model": {
        "_target_": "wmtp.models.llama.Llama",
        "num_heads": 4,
        "tokenizer": {"_target_": "wmtp.data.tokenizer.task_tokenizer", "vocab_size": 512},
    },
    "data": {"_target_": "wmtp.data.sources.TaskSource", "num_train": 40, "seed": 0},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "seed": 0,
    "run_name": None,
}
TOKENS_PER_STEP = 1_000
STEPS_PER_VALIDATION = 10


def fake_run(
    folder: Path,
    *,
    algo: str = "baseline",
    seed: int = 0,
    val_losses: Sequence[float] = (2.0, 1.0),
    passes: Sequence[bool] | None = None,
    attempts: Sequence[Sequence[bool]] | None = None,
    weights: dict[str, float | None] | None = None,
    state: str = "FINISHED",
    tokens: bool = True,
    stage_tokens: int | None = None,
    metrics: dict[str, Sequence[float]] | None = None,
    provenance: dict[str, Any] | None = None,
    choices: dict[str, str] | None = None,
    started: str = "2026-11-21T09:30:00+00:00",
    **config: Any,
) -> Path:
    """Write the folder of a run, with its parents, and return it.

    Args:
        folder: the folder to write; it must not contain a run.
        algo: the chosen option in `.hydra/hydra.yaml`; the config contains `algo: {"name": algo}`.
        seed: the seed of the run.
        val_losses: val/loss of each validation; validations are 10 steps of 1,000 tokens apart, from step 10 on.
        passes: for each test problem (`task_id` "test/0" …), whether its sample passed; None: no samples.
        attempts: for each of these problems, whether each of its samples at temperature 1 passed; None: no samples.
        weights: the measures of the weights in summary.json.
        state: the state in status.json; summary.json is only written for FINISHED.
        tokens: whether the lines of metrics.jsonl contain the number of tokens trained on.
        stage_tokens: tokens of stage 1; None: there was no stage 1.
        metrics: additional metrics by name, with one value for each validation.
        provenance: entries of `data` in provenance.json that replace the defaults (`train_fingerprint`, …).
        choices: other chosen options, by config group.
        started: the start time in status.json.
        config: values that replace those of the config, by dotted key: `**{"optimizer.lr": 0.01}`.
    """
    (folder / ".hydra").mkdir(parents=True)
    resolved = json.loads(json.dumps(BASE)) | {"seed": seed, "algo": {"name": algo}}
    for key, value in config.items():
        *parents, last = key.split(".")
        node = resolved
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    chosen = {"algo": algo, "model": "micro", "data": "tasks"} | (choices or {})
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": {"runtime": {"choices": chosen}}}))
    steps = [STEPS_PER_VALIDATION * (number + 1) for number in range(len(val_losses))]
    status = {"state": state, "exit_code": 0, "stop_reason": None, "error": None, "step": steps[-1], "pid": 1}
    write_json(folder / "status.json", status | {"started": started, "ended": started})
    lines = [
        {"step": step, "epoch": 0, "time": 0.0}
        | ({"tokens": step * TOKENS_PER_STEP} if tokens else {})
        | {"val/loss": val_losses[number]}
        | {name: values[number] for name, values in (metrics or {}).items()}
        for number, step in enumerate(steps)
    ]
    write_lines(folder / "metrics.jsonl", lines)
    data = {
        "name": "tasks", "fingerprint": "all", "tokenizer": "bpe", "train_fingerprint": "train",
        "validation_fingerprint": "validation", "test_fingerprint": "test", "train": 40, "validation": 8,
    } | (provenance or {})  # fmt: skip
    write_json(folder / "provenance.json", {"command": [f"algo={algo}"], "data": data})
    if state != "FINISHED":
        return folder
    passed = None if passes is None else {"value": sum(passes) / len(passes), "low": None, "high": None}
    summary = {
        "total_steps": steps[-1],
        "total_tokens": steps[-1] * TOKENS_PER_STEP,
        "last": lines[-1],
        "best": min(lines, key=lambda line: line["val/loss"]),
        "pass@1": passed and {**passed, "problems": len(passes or ())},
        "pretrain": None if stage_tokens is None else {"total_tokens": stage_tokens},
    }
    common = {"step": steps[-1], "split": "test", "completion": "return x"}
    rows = [common | problem(number) | _outcome(passed) for number, passed in enumerate(passes or ())]
    if attempts is not None:
        rates = [sum(each) / len(each) for each in attempts]
        summary["sampled_pass@1"] = {
            "value": sum(rates) / len(rates),
            "low": None,
            "high": None,
            "problems": len(rates),
        }
        rows += [
            common | {"temperature": 1.0, "index": index} | problem(number) | _outcome(passed)
            for number, each in enumerate(attempts) for index, passed in enumerate(each)
        ]  # fmt: skip
    if weights is not None:
        summary["weights"] = weights
    write_json(folder / "summary.json", summary)
    if rows:
        write_lines(folder / "samples.jsonl", rows)
    return folder


def fake_evaluation(run: Path, name: str, passes: Sequence[Sequence[bool]], k: int = 1, **identity: Any) -> Path:
    """Write an evaluation of a run to `evaluations/<name>`, and return its folder.

    `passes` holds, for each problem, whether each of its samples passed. `identity` replaces entries of its
    evaluation.json.
    """
    from wmtp.statistics.pass_at_k import pass_at_k

    folder = run / "evaluations" / name
    folder.mkdir(parents=True)
    values = [pass_at_k(len(each), sum(each), k) for each in passes]
    estimates = {str(k): {"value": sum(values) / len(values), "low": None, "high": None}}
    write_json(folder / "summary.json", {"data": "tasks", "split": "test", "step": 1, "pass_at_k": estimates})
    fields = {"checkpoint": f"of {run.name}", "data.seed": 0, "generation.temperature": 0.8, "records": "test"}
    write_json(folder / "evaluation.json", fields | identity)
    write_lines(folder / "results.jsonl", [
        {**problem(number), "index": index, "outcome": "pass" if passed else "fail"}
        for number, each in enumerate(passes) for index, passed in enumerate(each)
    ])  # fmt: skip
    return folder


def _outcome(passed: bool) -> dict[str, str]:
    return {"outcome": "pass" if passed else "fail"}


def problem(number: int) -> dict[str, Any]:
    """Return the fields that describe a problem in a line of samples.jsonl or results.jsonl."""
    return {"task_id": f"test/{number}", "difficulty": 1 + number % 4, "prompt": f"problem {number}"}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content))


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
