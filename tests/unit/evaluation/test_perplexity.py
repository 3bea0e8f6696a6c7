"""Tests of the losses and accuracies of an evaluation against a loop over all targets."""

import math
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_model
from wmtp.data.collate import IGNORED, collate
from wmtp.data.dataset import Dataset
from wmtp.distributed.device import Hardware
from wmtp.evaluation import perplexity
from wmtp.evaluation.perplexity import prediction_metrics
from wmtp.ops.targets import targets


def metrics_by_loop(model: torch.nn.Module, data: Dataset) -> dict[str, float]:
    """Return the metrics from a loop over heads, samples and targets."""
    hits: dict[int, list[bool]] = {k: [] for k in range(1, 5)}
    losses: dict[int, list[float]] = {k: [] for k in range(1, 5)}
    for index in range(len(data.validation)):
        batch = collate(data.validation, [index], data.tokenizer.padding)
        with torch.no_grad():
            logits = model.unembedding(model(batch.tokens).states)
        labels = batch.labels[0].tolist()
        for k in hits:
            for position in range(len(labels) - k):
                target = labels[position + k]
                if target != IGNORED:
                    row = logits[k - 1, 0, position]
                    hits[k].append(int(row.argmax()) == target)
                    losses[k].append(float(row.logsumexp(0) - row[target]))
    values = {f"head_{k}_accuracy": sum(found) / len(found) for k, found in hits.items()}
    return values | {"perplexity": math.exp(sum(losses[1]) / len(losses[1]))}


def trained_model(data: Dataset) -> torch.nn.Module:
    """Return a model after a few steps, so that heads are sometimes correct."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = collate(data.validation, list(range(len(data.validation))), data.tokenizer.padding)
    target = targets(batch.labels, 4)
    for _ in range(5):
        logits = model.unembedding(model(batch.tokens).states)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("rows_at_once", [7, 2_048])
def test_metrics_equal_those_of_a_loop_over_targets(
    tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(perplexity, "ROWS_AT_ONCE", rows_at_once)
    model = trained_model(tiny_data)
    expected = metrics_by_loop(model, tiny_data)
    got = prediction_metrics(model, tiny_data.validation, tiny_data.tokenizer, Hardware(device="cpu"), 3)  # type: ignore[arg-type]
    assert expected["head_1_accuracy"] > 0.2
    assert len(set(expected.values())) > 2  # the heads differ, so exchanging them would be detected
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5)
    assert got["mtp_loss"] == pytest.approx(sum(got[f"head_{k}_loss"] for k in range(1, 5)) / 4)


def test_metrics_are_empty_without_samples(tiny_data: Dataset, cache: Path) -> None:
    from wmtp.data.sources import TaskSource
    from wmtp.data.split import build_split

    source = TaskSource(tokenizer=tiny_data.tokenizer, difficulties={1: 1.0})
    empty = build_split("test", [], source, None, cache)
    assert prediction_metrics(tiny_model(), empty, tiny_data.tokenizer, Hardware(device="cpu"), 4) == {}
