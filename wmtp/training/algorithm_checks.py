"""Checks that an algorithm, its stage 1, the data and the model of a training config fit together."""

import math
from collections.abc import Iterator

from omegaconf import DictConfig

from wmtp.algorithms.base import INITIAL, Algorithm, ReferenceName
from wmtp.config.schema import ConfigIssue, build, stage_config
from wmtp.models.source import ModelSource
from wmtp.training.stages import ImplicitRewardStage, Stage, ValueStage

UNLIMITED_REWARDS = "needs rewards from 0 to 1, but the scores of data.reward_model are not limited to this range"


def algorithm_issues(config: DictConfig, algorithm: Algorithm, source: ModelSource) -> Iterator[ConfigIssue]:
    """Yield an issue for each setting of stage 1, the data or the model that the algorithm does not support."""
    stage: Stage | None = None if config.pretrain is None else build(config.pretrain)
    available = () if stage is None else stage.references
    if algorithm.reference is None and not set(algorithm.references) <= set(available):
        yield ConfigIssue("pretrain", "", MISSING_REFERENCES[algorithm.references[0]])
    elif stage is not None and algorithm.reference is not None and not set(algorithm.references) <= set(available):
        problem = "would be left out, because algo.reference selects the reference; set pretrain=none"
        yield ConfigIssue("pretrain", "", problem)
    elif available and not algorithm.needs_reference:
        yield ConfigIssue("pretrain", "", "trains a reference that the algorithm does not use; set pretrain=none")
    if isinstance(stage, ValueStage) and not algorithm.needs_values and stage.trains == "head":
        yield ConfigIssue(
            "pretrain.trains",
            "head",
            "trains a value head that the algorithm does not use; set pretrain.trains=all or pretrain=none",
        )
    if isinstance(stage, ValueStage) and algorithm.needs_values and stage.value != algorithm.value:
        problem = f"stage 2 has another kind of value head: algo.value={algorithm.value}; set only algo.value"
        yield ConfigIssue("pretrain.value", stage.value, problem)
    if source.num_heads < algorithm.min_heads:
        problem = f"{algorithm.name} has no effect with fewer than {algorithm.min_heads} heads"
        yield ConfigIssue("model.num_heads", str(source.num_heads), problem)
    if algorithm.reference == INITIAL and not source.is_pretrained:
        key = "algo.of.reference" if "of" in config.algo else "algo.reference"
        remedy = f"name a run with {key}=PATH, or train a reference with {key}=null pretrain=rho1"
        yield ConfigIssue(key, INITIAL, f"is for pretrained models, but this model is new; {remedy}")
    if isinstance(stage, ImplicitRewardStage) and stage.start is None and not source.is_pretrained:
        problem = "is needed, because this model is new; name a run of a language model: pretrain.start=PATH"
        yield ConfigIssue("pretrain.start", "null", problem)
    if algorithm.needs_rewards:
        yield from reward_issues(config.data, "data")
    if stage is not None:
        yield from stage_issues(config, stage, algorithm)
    elif algorithm.needs_values and config.data.reward_model is not None:
        problem = f"the value loss is then the cross-entropy, which {UNLIMITED_REWARDS}"
        yield ConfigIssue("pretrain", "none", f"{problem}; train with pretrain.loss=reward")


MISSING_REFERENCES: dict[ReferenceName, str] = {
    "reference": "the algorithm needs a reference: train one with pretrain=rho1, or name one with algo.reference=PATH",
    "reward_model": "the algorithm needs a reward model; train one with pretrain=implicit_reward",
    "correct": "the algorithm needs a class-conditional model; train one with pretrain=contrast",
}
"""The problem and the remedy if stage 1 does not provide the first reference of an algorithm."""


def stage_issues(config: DictConfig, stage: Stage, algorithm: Algorithm) -> Iterator[ConfigIssue]:
    """Yield an issue for each setting that stage 1 must not override or that the loss of stage 1 does not support."""
    changed = stage_config(config)
    if not (isinstance(changed.data, DictConfig) and isinstance(changed.model, DictConfig)):
        return
    if changed.model.get("tokenizer") != config.model.get("tokenizer"):
        yield ConfigIssue(
            "pretrain.model.tokenizer", "", "must be the same as in stage 2; change model.tokenizer instead"
        )
    if stage.trains_policy and changed.model != config.model:
        yield ConfigIssue(
            "pretrain.model",
            "",
            "must be the same as in stage 2, which trains this model further; change model instead",
        )
    uses_rewards = isinstance(stage, (ValueStage, ImplicitRewardStage)) or "correct" in stage.references
    if uses_rewards and not (algorithm.needs_rewards and changed.data == config.data):  # these are already checked
        yield from reward_issues(changed.data, "pretrain.data")
    if isinstance(stage, ImplicitRewardStage) and changed.data.reward_model is not None:
        problem = f"the loss of stage 1 {UNLIMITED_REWARDS}"
        yield ConfigIssue("pretrain.data.reward_model", str(changed.data.reward_model), problem)
    if isinstance(stage, ImplicitRewardStage) and changed.model.get("num_heads") != 1:
        problem = "must be 1, because the stage trains only head 1"
        yield ConfigIssue("pretrain.model.num_heads", str(changed.model.get("num_heads")), problem)
    if not isinstance(stage, ValueStage):
        return
    if stage.value_loss.kind == "cross_entropy" and changed.data.reward_model is not None:
        problem = f"{UNLIMITED_REWARDS}; choose pretrain.loss=reward"
        yield ConfigIssue("pretrain.loss", "cross_entropy", problem)
    if stage.value_loss.kind != "ranking":
        return
    issues = list(pair_issues(changed, config.hardware.num_processes, "pretrain."))
    if algorithm.needs_values and not issues:
        issues = list(pair_issues(config, config.hardware.num_processes, ""))  # stage 2 continues with this loss
    yield from issues
    if changed.data.reward_model is not None:
        yield ConfigIssue(
            "pretrain.loss", "ranking", "ranks by is_correct, not by data.reward_model; choose pretrain.loss=reward"
        )


def reward_issues(data: DictConfig, key: str) -> Iterator[ConfigIssue]:
    """Yield an issue if all training solutions have the same reward. `key` is the config key of the data."""
    if data.get("correct_ratio") in (0, 1) and data.reward_model is None:
        problem = "gives every solution the same reward, so rewards contain no information; choose 0.5"
        yield ConfigIssue(f"{key}.correct_ratio", str(data.correct_ratio), problem)


def pair_issues(config: DictConfig, num_processes: int, prefix: str) -> Iterator[ConfigIssue]:
    """Yield an issue for each setting with which the value loss `ranking` finds no pairs in a micro-batch.

    `config` contains the settings of a stage, and `prefix` is the prefix of their config keys.
    """
    if not config.data.group_tasks:
        problem = f"compares solutions to the same task within a batch; set {prefix}data.group_tasks=true"
        yield ConfigIssue("pretrain.loss", "ranking", problem)
    micro_batch_size = config.micro_batch_size or math.ceil(config.batch_size / num_processes)
    if micro_batch_size % 2 or config.batch_size % 2:
        problem = f"compares pairs, so {prefix}batch_size and {prefix}micro_batch_size must be even"
        yield ConfigIssue("pretrain.loss", "ranking", problem)
