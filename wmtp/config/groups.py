"""The options of the config groups in conf/."""

from wmtp.config.schema import CONFIG_FOLDER

STAGE_GROUPS = ("model", "data", "optimizer", "scheduler", "early_stopping", "checkpoint")
"""Config groups for which training stage 1 may have another option than stage 2."""


def run_groups() -> list[str]:
    """Return the names of the config groups of a training run."""
    return sorted(path.name for path in CONFIG_FOLDER.iterdir() if path.is_dir() and path.name != "study")


def is_group(key: str) -> bool:
    """Return whether a key is the name of a config group."""
    return bool(key) and (CONFIG_FOLDER / key).is_dir()


def group_options(group: str) -> list[str]:
    """Return the options of a config group. The options of the group `experiment` may be in subfolders."""
    folder = CONFIG_FOLDER / group
    found = folder.glob("**/*.yaml" if group == "experiment" else "*.yaml")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def selectable_options(group: str) -> list[str]:
    """Return the options of a config group that users may choose. Options named `base` are excluded."""
    return [option for option in group_options(group) if option.rpartition("/")[2] != "base"]
