"""Tests of the presets in conf/experiment: each of them is composed, checked, and gets the data that it asks for."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.conftest import compose_config
from wmtp.config.groups import group_options
from wmtp.config.schema import build, stage_config
from wmtp.data.selection import select
from wmtp.data.sources import DataSource, TaskSource
from wmtp.data.tokenizer import Tokenizer
from wmtp.errors import InputError
from wmtp.sweep.grid import parse_grid
from wmtp.training.validate import check_training

ASKED_FOR = {"data.path", "model.path"}
"""Keys of files that presets ask for."""
HARDWARE = {"hardware.device", "hardware.num_processes"}
"""Keys whose values this machine may not satisfy."""
BEFORE_ITS_SIZES = ("experiment=laptop", "data.num_validation=200", "data.num_test=200")
"""Overrides of a preset whose easy tasks are too few for the default sizes of the held-out splits."""


def configs(preset: str) -> Iterator[DictConfig]:
    """Yield the config of a preset, or of each job with the first seed if the preset is a sweep."""
    if not preset.startswith("sweep/"):
        yield compose_config(f"experiment={preset}")
        return
    for job in parse_grid("train", [f"experiment={preset}", "seed=0"]).jobs:
        yield compose_config(*job)


def generate(source: DataSource, already: dict[str, set[str]]) -> None:
    """Generate the records of all splits, and select the training records, unless `already` contains the settings.

    Training tasks may repeat, so 300 of them show what all of them would. Held-out tasks differ, so all are generated.
    """
    assert isinstance(source, TaskSource)
    source = replace(source, num_train=min(source.num_train, 300))
    key = repr(replace(source, tokenizer=None))
    if key not in already:
        splits = source.read()
        assert (len(splits.validation), len(splits.test)) == (2 * source.num_validation, 2 * source.num_test)
        already[key] = {record.task_id for record in select(splits.train, source.selection(source.n_samples))}
    assert already[key]


@pytest.fixture(scope="module")
def already() -> dict[str, set[str]]:
    """Return the settings whose data were generated, with the names of the selected tasks."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("preset", group_options("experiment"))
def test_a_preset_is_valid_and_its_data_are_generated(
    preset: str, tokenizer: Tokenizer, already: dict[str, set[str]]
) -> None:
    """A preset asks only for files. Presets that need a file or absent hardware are checked as far as their data."""
    for config in configs(preset):
        assert {issue.key for issue in check_training(config).issues} <= ASKED_FOR | HARDWARE
        stages = [config] if config.pretrain is None else [config, stage_config(config)]
        for data in (stage.data for stage in stages):
            if str(data["_target_"]).endswith("TaskSource"):
                generate(build(data, tokenizer=tokenizer), already)
            else:
                assert OmegaConf.is_missing(data, "path"), "a preset names no file of its own"


def test_control_sizes_that_the_tasks_of_a_preset_cannot_fill_are_found(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="of 200 validation tasks can differ"):
        generate(build(compose_config(*BEFORE_ITS_SIZES).data, tokenizer=tokenizer), {})


def test_a_misspelled_key_of_a_preset_is_found(tmp_path: Path) -> None:
    config = compose_config("experiment=smollm2/cpu", "data.max_lenght=512", f"data.path={tmp_path}")
    assert {issue.key for issue in check_training(config).issues} - HARDWARE == {"data.max_lenght"}, "control"
