"""A sweep's jobs in Slurm, through submitit: each is one entry of a job array."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.config.schema import ConfigError, Fault
from wmtp.errors import InterruptedRun
from wmtp.runtime.run_dir import is_running, read_status
from wmtp.sweep.local_launcher import Ended, Started

if TYPE_CHECKING:
    import submitit

PLUGIN = "hydra_plugins.hydra_submitit_launcher.submitit_launcher."
GENERAL = (
    "cpus_per_task", "gpus_per_node", "mem_gb", "name", "nodes", "stderr_to_stdout", "tasks_per_node", "timeout_min",
)  # fmt: skip
"""Settings that submitit knows for every kind of cluster; others are Slurm's own."""
IN_SBATCH = {"name": "job_name", "timeout_min": "time", "tasks_per_node": "ntasks_per_node", "mem_gb": "mem"}
NOT_SBATCH = ("_target_", "submitit_folder", "max_num_timeout")
CANCEL_SECONDS = 60.0
"""How long jobs that were cancelled are waited for, while they save."""
LOOK_EVERY = {"slurm": 10.0, "local": 0.2}


def is_submitted(launcher: Mapping[str, Any]) -> bool:
    """Whether Hydra's launcher submits jobs, rather than running them here.

    Raises:
        ConfigError: it is another one that sweeps do not know.
    """
    target = str(launcher["_target_"])
    if target.startswith("hydra._internal.core_plugins.basic_launcher."):
        return False
    if not target.startswith(PLUGIN):
        problem = "sweeps know basic (this machine), submitit_slurm and submitit_local"
        raise ConfigError([Fault("hydra/launcher", target, problem)])
    return True


def submit(
    commands: Mapping[int, list[str]], launcher: Mapping[str, Any], folder: Path, started: Started, ended: Ended
) -> None:
    """Submit commands as one array, and wait for them; an interruption cancels what has not ended, and waits for it.

    Raises:
        InterruptedRun: a signal came.
    """
    from submitit.helpers import CommandFunction

    executor, cluster = executor_of(launcher, folder)
    with executor.batch():
        submitted = {
            number: executor.submit(CommandFunction(command, cwd=Path.cwd())) for number, command in commands.items()
        }
    for number in submitted:
        started(number)
    try:
        while submitted:
            for number, job in list(submitted.items()):
                if job.done():
                    del submitted[number]
                    ended(number, _exit_code(folder / str(number), job), job.stderr() or "")
            time.sleep(LOOK_EVERY[cluster])
    except InterruptedRun as error:
        for job in submitted.values():
            job.cancel(check=False)
        deadline = time.monotonic() + CANCEL_SECONDS
        while time.monotonic() < deadline and any(is_running(folder / str(number)) for number in submitted):
            time.sleep(0.2)
        for number in submitted:
            if not is_running(folder / str(number)):  # or else it counts as running, until the sweep is resumed
                ended(number, _recorded(folder / str(number)) or error.exit_code, "cancelled")
        raise


def executor_of(launcher: Mapping[str, Any], folder: Path) -> "tuple[submitit.AutoExecutor, str]":
    """What submits, set up as Hydra's launcher of the same name would, and the kind of its cluster."""
    import submitit

    cluster = "slurm" if str(launcher["_target_"]).endswith("SlurmLauncher") else "local"
    options = {}
    if cluster == "slurm":
        options["slurm_max_num_timeout"] = launcher["max_num_timeout"]
    executor = submitit.AutoExecutor(cluster=cluster, folder=folder / ".submitit" / "%j", **options)
    settings = {key: value for key, value in launcher.items() if key not in NOT_SBATCH}
    executor.update_parameters(
        **{key if key in GENERAL else f"{cluster}_{key}": value for key, value in settings.items()}
    )
    return executor, cluster


def described(launcher: Mapping[str, Any], folder: Path, command: list[str], count: int) -> str:
    """The batch script that Slurm would be given for such a command, here where there is no Slurm."""
    if not str(launcher["_target_"]).endswith("SlurmLauncher"):
        return shlex.join(command)
    from submitit.slurm.slurm import _make_sbatch_string  # the class refuses to be made where there is no Slurm

    settings = {IN_SBATCH.get(key, key): value for key, value in launcher.items() if key not in NOT_SBATCH}
    if settings.get("mem") is not None:
        settings["mem"] = f"{settings['mem']}GB"
    given = {key: value for key, value in settings.items() if value is not None}
    return _make_sbatch_string(shlex.join(command), folder / ".submitit", map_count=count, **given)


def _exit_code(folder: Path, job: "submitit.Job[str]") -> int:
    """That which the job's folder records, unless it ended without a word."""
    recorded = _recorded(folder)
    return (0 if job.exception() is None else 1) if recorded is None else recorded


def _recorded(folder: Path) -> int | None:
    code = read_status(folder)["exit_code"] if (folder / "status.json").exists() else None
    return None if code is None else int(code)
