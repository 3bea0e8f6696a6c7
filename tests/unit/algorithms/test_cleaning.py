"""Tests of cleaning against a slow version of the published selection."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import Invoke, tiny_model
from tests.support.weights import trained_weights
from wmtp.algorithms.cleaning import Cleaning
from wmtp.data.collate import IGNORED, collate
from wmtp.data.dataset import Dataset
from wmtp.data.split import TokenizedSplit
from wmtp.ops.targets import targets

Position = tuple[int, int]
"""The number of a sample, and a position in this sample."""


@pytest.fixture(scope="module")
def split(tiny_data: Dataset) -> TokenizedSplit:
    """Return a training split with random losses of a reference and of its start, which are both positive."""
    losses = np.random.default_rng(0).exponential(size=(len(tiny_data.train.samples.tokens), 2))
    return tiny_data.train.with_columns(reference_losses=losses.astype(np.float32))


def differences(split: TokenizedSplit) -> list[list[tuple[float, Position]]]:
    """Return CE_start − CE_reference of each token of each solution, with its position."""
    samples, found = split.samples, []
    assert split.reference_losses is not None
    for index, (start, stop) in enumerate(zip(samples.offsets, samples.offsets[1:], strict=False)):
        first = int(samples.prompt_lengths[index])
        losses = split.reference_losses[start:stop].tolist()
        found.append([(losses[i][1] - losses[i][0], (index, i)) for i in range(first, stop - start)])
    return found


def top(tokens: list[tuple[float, Position]], fraction: float) -> set[Position]:
    ordered = sorted(tokens, key=lambda token: token[0], reverse=True)
    return {position for _, position in ordered[: int(len(ordered) * fraction)]}


def published_selection(split: TokenizedSplit, fraction: float, level: str) -> set[Position]:
    by_solution = differences(split)
    if level == "global":
        return top([token for tokens in by_solution for token in tokens], fraction)
    return {position for tokens in by_solution for position in top(tokens, fraction)}


@pytest.mark.parametrize("fraction", [0.6, 0.25, 1.0])
@pytest.mark.parametrize("level", ["sample", "global"])
def test_unscaled_weights_are_the_published_ones_for_all_heads(
    split: TokenizedSplit, level: str, fraction: float
) -> None:
    model, indices = tiny_model(), [7, 0, 3, 12]
    algorithm = Cleaning(level=level, keep_fraction=fraction, rescale=False)  # type: ignore[arg-type]
    algorithm.prepare(split)
    batch = collate(split, indices, padding=0)
    valid = targets(batch.labels, model.num_heads) != IGNORED

    def agrees(weights: Tensor, selection: set[Position], offset: int = 1) -> bool:
        return all(
            weights[k, row, t].item() == ((indices[row], t + k + offset) in selection)
            for k, row, t in valid.nonzero().tolist()
        )

    expected = published_selection(split, fraction, level)
    for weights in trained_weights(algorithm, model, batch):
        assert agrees(weights, expected)
        assert not weights[~valid].any()
        if fraction < 1:
            assert not agrees(
                weights, published_selection(split, fraction, "sample" if level == "global" else "global")
            )
            assert not agrees(weights, expected, offset=0), "the control: the token that the head has read"


def test_controls_other_differences_select_other_tokens(split: TokenizedSplit) -> None:
    expected = published_selection(split, 0.6, "global")
    assert split.reference_losses is not None
    reference, start = split.reference_losses.T
    others: list[Callable[[], np.ndarray]] = [
        lambda: np.stack([start, reference], axis=1),
        lambda: np.stack([reference, 0 * start], axis=1),
        lambda: np.stack([0 * reference, start], axis=1),
    ]
    for other in others:
        assert published_selection(split.with_columns(reference_losses=other()), 0.6, "global") != expected


def test_at_least_one_token_of_a_solution_is_kept(split: TokenizedSplit) -> None:
    """The public code keeps no token of a solution that is too short."""
    model, batch = tiny_model(), collate(split, [0, 1], padding=0)
    for weights in trained_weights(Cleaning(level="sample", keep_fraction=1e-3, rescale=False), model, batch):
        assert weights[0].sum(dim=1).tolist() == [1.0, 1.0]
    assert not published_selection(split, 1e-3, "sample")


def test_equal_differences(split: TokenizedSplit) -> None:
    """If all differences are equal, as in a dry run, the first tokens of each sample are chosen, or all tokens."""
    assert split.reference_losses is not None
    equal = split.with_columns(reference_losses=np.zeros_like(split.reference_losses))
    batch, model = collate(equal, [0, 1], padding=0), tiny_model()
    in_order, everything = Cleaning(level="sample", rescale=False), Cleaning(rescale=False)
    everything.prepare(equal)
    for weights in trained_weights(in_order, model, batch):
        chosen = published_selection(equal, 0.6, "sample")
        tokens = [(row, t + 1) for row, t in weights[0].nonzero().tolist()]
        assert set(tokens) == {position for position in chosen if position[0] in (0, 1)}
    for weights in trained_weights(everything, model, batch):
        assert torch.equal(weights, (targets(batch.labels, 4) != IGNORED).float())


@pytest.mark.slow
@pytest.mark.parametrize("level", ["sample", "global"])
def test_a_run_trains_a_reference_and_then_on_the_chosen_share(invoke: Invoke, tmp_path: Path, level: str) -> None:
    run = ["algo=cleaning", f"algo.level={level}", "algo.rescale=false", "num_samples=0", "max_steps=3"]
    outcome = invoke(*run, "hydra.run.dir=run", "objective.shares=target", "log_interval=1", "batch_size=16")
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    means = [line["train/weight_mean"] for line in lines if "train/weight_mean" in line]
    assert len(means) == 3 and sum(means) / 3 == pytest.approx(0.6, abs=0.05)  # an epoch
    dry = invoke(*run, "dry_run=true")
    assert dry.code == 0, dry.err


def test_the_policy_before_training_is_no_reference(invoke: Invoke) -> None:
    outcome = invoke("algo=cleaning", "algo.reference=initial")
    assert outcome.code == 2 and "algo.reference" in outcome.err and "does not exist" in outcome.err
