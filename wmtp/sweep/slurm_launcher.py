"""Submit the jobs of a sweep to Slurm through submitit, as one job array."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.config.schema import ConfigError, ConfigIssue
from wmtp.errors import InterruptedRun
from wmtp.runtime.run_dir import is_running, read_status
from wmtp.sweep.local_launcher import OnEnd, OnStart

if TYPE_CHECKING:
    import submitit

PLUGIN = "hydra_plugins.hydra_submitit_launcher.submitit_launcher."
COMMON_SETTINGS = (
    "cpus_per_task", "gpus_per_node", "mem_gb", "name", "nodes", "stderr_to_stdout", "tasks_per_node", "timeout_min",
)  # fmt: skip
"""Settings that submitit accepts for every cluster; all others take the prefix of the cluster, such as `slurm_`."""
SBATCH_NAMES = {"name": "job_name", "timeout_min": "time", "tasks_per_node": "ntasks_per_node", "mem_gb": "mem"}
"""Names of sbatch options for settings that submitit names differently."""
NOT_SBATCH = ("_target_", "submitit_folder", "max_num_timeout")
CANCEL_TIMEOUT_S = 60.0
"""Seconds to wait for cancelled jobs, which save a checkpoint first."""
POLL_INTERVALS_S = {"slurm": 10.0, "local": 0.2}


def is_submitted(launcher: Mapping[str, Any]) -> bool:
    """Return whether Hydra's launcher config submits the jobs instead of running them here.

    Raises:
        ConfigError: sweeps do not support the launcher.
    """
    target = str(launcher["_target_"])
    if target.startswith("hydra._internal.core_plugins.basic_launcher."):
        return False
    if not target.startswith(PLUGIN):
        problem = "is not supported; use basic (this machine), submitit_slurm or submitit_local"
        raise ConfigError([ConfigIssue("hydra/launcher", target, problem)])
    return True


def submit(
    commands: Mapping[int, list[str]], launcher: Mapping[str, Any], folder: Path, on_start: OnStart, on_end: OnEnd
) -> None:
    """Submit commands as one job array and wait for all jobs; an interruption cancels the jobs that still run.

    Args:
        commands: command line of each job, by job number.
        launcher: Hydra's launcher config.
        folder: folder of the sweep.
        on_start: called for each job after the submission.
        on_end: called after a job has ended.

    Raises:
        InterruptedRun: a signal was received, and the cancelled jobs have ended or `CANCEL_TIMEOUT_S` have passed.
    """
    from submitit.helpers import CommandFunction

    executor, cluster = create_executor(launcher, folder)
    with executor.batch():
        submitted = {
            number: executor.submit(CommandFunction(command, cwd=Path.cwd())) for number, command in commands.items()
        }
    for number in submitted:
        on_start(number)
    try:
        while submitted:
            for number, job in list(submitted.items()):
                if job.done():
                    del submitted[number]
                    on_end(number, _exit_code(folder / str(number), job), job.stderr() or "")
            time.sleep(POLL_INTERVALS_S[cluster])
    except InterruptedRun as error:
        for job in submitted.values():
            job.cancel(check=False)
        deadline = time.monotonic() + CANCEL_TIMEOUT_S
        while time.monotonic() < deadline and any(is_running(folder / str(number)) for number in submitted):
            time.sleep(0.2)
        for number in submitted:
            if not is_running(folder / str(number)):  # a job that still runs stays RUNNING until the sweep is resumed
                on_end(number, _recorded_exit_code(folder / str(number)) or error.exit_code, "cancelled")
        raise


def create_executor(launcher: Mapping[str, Any], folder: Path) -> "tuple[submitit.AutoExecutor, str]":
    """Return a submitit executor with the settings of Hydra's launcher, and its cluster, "slurm" or "local"."""
    import submitit

    cluster = "slurm" if str(launcher["_target_"]).endswith("SlurmLauncher") else "local"
    options = {}
    if cluster == "slurm":
        options["slurm_max_num_timeout"] = launcher["max_num_timeout"]
    executor = submitit.AutoExecutor(cluster=cluster, folder=folder / ".submitit" / "%j", **options)
    settings = {key: value for key, value in launcher.items() if key not in NOT_SBATCH}
    executor.update_parameters(
        **{key if key in COMMON_SETTINGS else f"{cluster}_{key}": value for key, value in settings.items()}
    )
    return executor, cluster


def batch_script(launcher: Mapping[str, Any], folder: Path, command: list[str], count: int) -> str:
    """Return the batch script that would be submitted for `count` jobs; this needs no Slurm.

    For a launcher other than Slurm's, return the command line.
    """
    if not str(launcher["_target_"]).endswith("SlurmLauncher"):
        return shlex.join(command)
    from submitit.slurm.slurm import _make_sbatch_string  # SlurmExecutor cannot be created on a machine without Slurm

    settings = {SBATCH_NAMES.get(key, key): value for key, value in launcher.items() if key not in NOT_SBATCH}
    if settings.get("mem") is not None:
        settings["mem"] = f"{settings['mem']}GB"
    given = {key: value for key, value in settings.items() if value is not None}
    return _make_sbatch_string(shlex.join(command), folder / ".submitit", map_count=count, **given)


def _exit_code(folder: Path, job: "submitit.Job[str]") -> int:
    """Return the exit code in the job's status file; without one, 0 or 1 as submitit reports success or failure."""
    recorded = _recorded_exit_code(folder)
    return (0 if job.exception() is None else 1) if recorded is None else recorded


def _recorded_exit_code(folder: Path) -> int | None:
    code = read_status(folder)["exit_code"] if (folder / "status.json").exists() else None
    return None if code is None else int(code)
