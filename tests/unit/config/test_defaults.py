"""Tests of the differences between a config and the defaults, and of classes of torch that replace the default ones."""

from collections.abc import Callable

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.conftest import compose_config
from wmtp.cli.resolve import compose as compose_job
from wmtp.config.defaults import changed_keys
from wmtp.config.moved_targets import update_config
from wmtp.train import COMMAND as TRAIN
from wmtp.training.validate import check_training


def test_changed_keys_contain_default_and_value(compose: Callable[..., DictConfig]) -> None:
    assert changed_keys(compose(), "train") == {}
    found = changed_keys(compose("algo=critic", "seed=3", "+tags.note=first", "early_stopping=none"), "train")
    assert found["seed"] == [0, 3] and found["early_stopping.patience"] == [5, None]
    assert found["algo.beta"] == [None, 0.9] and found["data.correct_ratio"] == [1.0, 0.5]
    assert found["tags.note"] == [None, "first"] and "model.dim" not in found


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["optimizer._target_=torch.optim.SGD", "optimizer.momentum=0.9"], None, ""),
        (["optimizer._target_=torch.optim.Rprop", "algo=critic"], None, ""),
        (["optimizer._target_=torch.optim.SGD", "optimizer.betas=[0.9,0.95]"], "optimizer.betas", "unknown key"),
        (["optimizer._target_=torch.optim.LBFGS"], "optimizer", "doesn't support per-parameter options"),
        (["optimizer._target_=torch.optim.Nothing"], "optimizer._target_", "cannot be imported"),
        (["scheduler._target_=torch.optim.lr_scheduler.ExponentialLR", "scheduler.gamma=0.99"], None, ""),
        (["scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "scheduler.max_lr=1"], "scheduler", "fixed number"),
        (["scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"], "scheduler", "metrics"),
    ],
    ids=lambda value: value[0].rpartition(".")[2] if isinstance(value, list) else "",
)  # fmt: skip
def test_another_class_of_torch_needs_no_removal_of_keys(overrides: list[str], key: str | None, message: str) -> None:
    issues = compose_job(TRAIN, overrides).checked.issues
    assert [issue.key for issue in issues] == ([] if key is None else [key])
    assert message in "".join(issue.problem for issue in issues)


def test_control_without_the_removal_the_keys_of_the_default_class_are_unknown() -> None:
    issues = check_training(compose_config("optimizer._target_=torch.optim.SGD")).issues
    assert [issue.key for issue in issues] == ["optimizer.betas", "optimizer.eps"]


def test_the_config_of_a_new_run_is_not_taken_for_one_of_an_earlier_version() -> None:
    """Earlier versions had no key `add_bos_token`, and added no token. The control is a config without it."""
    override = "++model.tokenizer._target_=wmtp.data.tokenizer.pretrained_tokenizer"
    configs = compose_job(TRAIN, [override]).checked.config, compose_config(override)
    tokenizers = [update_config(OmegaConf.to_container(config))["model"]["tokenizer"] for config in configs]
    assert [tokenizer["add_bos_token"] for tokenizer in tokenizers] == [None, False]
