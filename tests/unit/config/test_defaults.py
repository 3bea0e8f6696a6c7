"""Tests of the differences between a config and the defaults."""

from collections.abc import Callable

from omegaconf import DictConfig

from wmtp.config.defaults import changed_keys


def test_changed_keys_contain_default_and_value(compose: Callable[..., DictConfig]) -> None:
    assert changed_keys(compose(), "train") == {}
    found = changed_keys(compose("algo=critic", "seed=3", "+tags.note=first", "early_stopping=none"), "train")
    assert found["seed"] == [0, 3] and found["early_stopping.patience"] == [5, None]
    assert found["algo.beta"] == [None, 0.9] and found["data.correct_ratio"] == [1.0, 0.5]
    assert found["tags.note"] == [None, "first"] and "model.dim" not in found
