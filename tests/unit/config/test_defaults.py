"""What a config says besides the defaults."""

from collections.abc import Callable

from omegaconf import DictConfig

from wmtp.config.defaults import changes


def test_changes_are_what_differs_with_what_it_was(compose: Callable[..., DictConfig]) -> None:
    assert changes(compose(), "train") == {}
    found = changes(compose("algo=critic", "seed=3", "+tags.note=first", "early_stopping=none"), "train")
    assert found["seed"] == [0, 3] and found["early_stopping.patience"] == [5, None]
    assert found["algo.beta"] == [None, 0.9] and found["data.correct_ratio"] == [1.0, 0.5]
    assert found["tags.note"] == [None, "first"] and "model.dim" not in found
