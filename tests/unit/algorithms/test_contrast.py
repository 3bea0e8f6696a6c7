"""Tests of contrast against the published formula, computed from all logits, and against Bayes' rule."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import Invoke, tiny_model
from tests.support.weights import plain_losses, sharp_model, trained_weights, with_probable_labels
from tests.unit.objectives.test_objectives import ragged
from wmtp.algorithms.base import Observations, clip_weights
from wmtp.algorithms.contrast import Contrast
from wmtp.data.collate import IGNORED, Batch
from wmtp.models.mtp import MtpModel
from wmtp.ops.targets import targets


def with_columns(batch: Batch, correct: MtpModel, incorrect: MtpModel) -> Batch:
    """Add the losses of two models as those of the class-conditional model."""
    columns = torch.zeros(*batch.tokens.shape, 2)
    for number, model in enumerate((correct, incorrect)):
        columns[:, 1:, number] = plain_losses(model, batch)[0, :, :-1].float()
    return replace(batch, reference_losses=columns)


def test_unscaled_weights_are_the_published_ones_for_all_heads() -> None:
    """The weight of a token is exp((log p⁺ − log p⁻) / beta), whichever head predicts the token."""
    policy, correct, incorrect = tiny_model(seed=2), sharp_model(2.0), tiny_model(seed=1)
    batch = with_columns(with_probable_labels(correct, ragged()), correct, incorrect)
    target = targets(batch.labels, policy.num_heads)
    valid = target != IGNORED

    def log_probabilities(model: MtpModel) -> Tensor:
        return (model(batch.tokens).states[0].double() @ model.unembedding_weight.double().T).log_softmax(dim=-1)

    log_ratio = (log_probabilities(correct) - log_probabilities(incorrect)).detach()

    def published(beta: float, sign: int = 1, offset: int = 0) -> Tensor:
        """Compute the weights of the tokens at t + k, which head 1 of a reference predicts at t + k − 1."""
        ratios = [
            log_ratio[row, t + k - offset, batch.labels[row, t + k + 1]] for k, row, t in valid.nonzero().tolist()
        ]
        return (sign * torch.stack(ratios) / beta).exp()

    def differences(weights: Tensor, expected: Tensor) -> float:
        return float((weights[valid].double() - expected).abs().max())

    for beta in (4.0, 8.0):
        algorithm = Contrast(beta=beta, weight_min=1e-6, weight_max=1e6, rescale=False)
        expected = published(beta)
        assert expected.min() < 0.8 and expected.max() > 1.2
        for weights in trained_weights(algorithm, policy, batch):
            assert differences(weights, expected) <= 1e-6
            assert not weights[~valid].any()
            assert differences(weights, published(beta, sign=-1)) > 0.1, "the control: the sign reversed"
            assert differences(weights, published(beta, offset=1)) > 0.1, "the control: the token before"
            assert differences(weights, published(1.5 * beta)) > 0.1, "the control: another beta"


def weights_of(ratios: list[float], algorithm: Contrast) -> list[float]:
    """Return the weights of tokens whose probability in correct solutions is a multiple of that in incorrect ones."""
    losses = torch.stack([torch.full((len(ratios),), 2.0), 2.0 + torch.tensor(ratios).log()])
    observed = Observations(
        torch.ones(1, 1, len(ratios), dtype=torch.bool), torch.ones(1, len(ratios), dtype=torch.bool),
        reference_losses=losses[:, None, None],
    )  # fmt: skip
    clipped = clip_weights(algorithm.weights(observed), observed.valid, algorithm.weight_min, algorithm.weight_max)
    found: list[float] = clipped.flatten().tolist()
    return found


def test_weights_are_clipped_to_their_range() -> None:
    ratios = [1e-30, 0.01, 0.5, 1.0, 2.0, 100.0, 1e30]
    clipped = [0.25, 0.25, 0.5, 1.0, 2.0, 4.0, 4.0]
    assert weights_of(ratios, Contrast(weight_min=0.25, weight_max=4.0)) == pytest.approx(clipped, rel=1e-5)
    square_roots = [0.25, 0.25, 0.5**0.5, 1.0, 2**0.5, 4.0, 4.0]
    assert weights_of(ratios, Contrast(beta=2.0, weight_min=0.25, weight_max=4.0)) == pytest.approx(
        square_roots, rel=1e-5
    )
    assert weights_of(ratios, Contrast())[0] == pytest.approx(0.1) and weights_of(ratios, Contrast())[6] == 5.0


def test_a_token_has_the_same_weight_in_every_head_that_predicts_it() -> None:
    policy, batch = tiny_model(), ragged()
    valid = targets(batch.labels, 4) != IGNORED
    by_token: dict[tuple[int, int], set[float]] = {}
    weights, _ = trained_weights(Contrast(rescale=False), policy, batch)
    for k, row, t in valid.nonzero().tolist():
        by_token.setdefault((row, t + k + 1), set()).add(weights[k, row, t].item())
    assert all(len(found) == 1 for found in by_token.values())
    assert len(set.union(*by_token.values())) > 3, "the control: tokens have different weights"


def test_the_exponent_is_the_change_of_the_log_odds_by_bayes_rule() -> None:
    """Solutions of two tokens from known distributions: the posterior is computed by counting their probabilities."""
    prior = 0.3
    first = {True: {"a": 0.7, "b": 0.3}, False: {"a": 0.2, "b": 0.8}}
    second = {
        True: {"a": {"x": 0.9, "y": 0.1}, "b": {"x": 0.5, "y": 0.5}},
        False: {"a": {"x": 0.6, "y": 0.4}, "b": {"x": 0.3, "y": 0.7}},
    }

    def log_odds(prefix: str) -> float:
        """Return the log-odds of a correct solution after a prefix, from the joint probabilities of all solutions."""
        joint = {True: 0.0, False: 0.0}
        for is_correct, share in ((True, prior), (False, 1 - prior)):
            for one, p in first[is_correct].items():
                for two, q in second[is_correct][one].items():
                    joint[is_correct] += share * p * q * (one + two).startswith(prefix)
        return float(torch.tensor(joint[True] / joint[False]).double().log())

    algorithm = Contrast(weight_min=1e-6, weight_max=1e6)
    for one in "ab":
        for two in "xy":
            ratios = [
                first[True][one] / first[False][one],
                second[True][one][two] / second[False][one][two],
            ]
            changes = [log_odds(one) - log_odds(""), log_odds(one + two) - log_odds(one)]
            weights = weights_of(ratios, algorithm)
            assert torch.tensor(weights).log().tolist() == pytest.approx(changes, abs=1e-5)
            assert changes[0] != pytest.approx(log_odds(one), abs=0.1), "the control: log-odds without the prior"


@pytest.mark.slow
def test_the_references_are_one_model_with_two_classes(invoke: Invoke) -> None:
    run = ["max_steps=2", "num_samples=0", "log_interval=1"]
    outcome = invoke("algo=contrast", *run, "hydra.run.dir=run")
    assert outcome.code == 0, outcome.err
    assert "Stage 1, ContrastStage" in outcome.out
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(line["train/weight_std"] > 0 for line in lines if "train/weight_std" in line), "both have equal losses"
    reused = ["algo=surprisal", "pretrain.reuse=run"]
    for arguments in (reused, ["algo=shuffled", "algo.of=contrast"], ["algo=contrast", "dry_run=true"]):
        other = invoke(*arguments, *run)
        assert other.code == 0, other.err


@pytest.mark.slow
def test_surprisal_uses_the_losses_of_the_class_correct(invoke: Invoke, tmp_path: Path) -> None:
    stage = ["pretrain.max_steps=2", f"cache_dir={tmp_path}/cache", "max_steps=1", "num_samples=0"]
    for algorithm, names in (("surprisal", ["correct"]), ("contrast", ["correct", "incorrect"])):
        outcome = invoke(f"algo={algorithm}", *stage)
        assert outcome.code == 0, outcome.err
        found = {path.name.split("-losses")[0] for path in Path(f"{tmp_path}/cache").glob("*-losses-*.npy")}
        assert found == set(names)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["algo=contrast", "pretrain=none"], "pretrain=contrast"),
        (["algo=contrast", "pretrain=rho1"], "pretrain=contrast"),
        (["algo=surprisal", "pretrain=none"], "pretrain=contrast"),
        (["algo=baseline", "pretrain=contrast"], "pretrain=none"),
        (["algo=contrast", "data.correct_ratio=1"], "choose 0.5"),
    ],
)
def test_a_stage_1_without_the_two_classes_is_refused(invoke: Invoke, arguments: list[str], remedy: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.code == 2 and remedy in outcome.err
