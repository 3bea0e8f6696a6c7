"""samples.jsonl: what a run's model answers to held-out tasks."""

import json
from pathlib import Path
from typing import Any

from wmtp.data.dataset import Dataset
from wmtp.data.records import Record
from wmtp.generation.decoding import greedy
from wmtp.models.mtp import MtpModel
from wmtp.runtime.files import replace_atomically

FILE_NAME = "samples.jsonl"
PROMPTS_AT_ONCE = 25
"""Bounds the memory of the cache, whatever the number of tasks."""


def held_out_tasks(data: Dataset, count: int) -> list[Record]:
    """The first `count` different tasks of the test split, or of the validation split where there is none."""
    tasks: dict[str, Record] = {}
    for record in data.test or data.validation.records:
        tasks.setdefault(record.task_id, record)
    return list(tasks.values())[:count]


def write_samples(folder: Path, model: MtpModel, data: Dataset, step: int, count: int) -> Path | None:
    """Answer `count` held-out tasks greedily; None without such tasks. Solutions are not shown to the model."""
    tasks = held_out_tasks(data, count)
    if not tasks:
        return None
    prompts = data.tokenizer.encode([data.template.replace("{prompt}", task.prompt) for task in tasks])
    completions = [
        completion
        for start in range(0, len(prompts), PROMPTS_AT_ONCE)
        for completion in greedy(
            model, prompts[start : start + PROMPTS_AT_ONCE], data.max_new_tokens, data.tokenizer.end
        )
    ]
    lines = []
    for task, tokens in zip(tasks, completions, strict=True):
        fields: dict[str, Any] = task.model_dump(include={"task_id", "prompt", "difficulty", "tests", "setup"})
        lines.append(json.dumps({"step": step, **fields, "completion": data.tokenizer.decode(tokens)}))
    path = folder / FILE_NAME
    replace_atomically(path, ("\n".join(lines) + "\n").encode())
    return path
