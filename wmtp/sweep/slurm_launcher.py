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
"""Settings that submitit accepts for every cluster. Other settings need the prefix of a cluster, such as `slurm_`."""
SBATCH_NAMES = {"name": "job_name", "timeout_min": "time", "tasks_per_node": "ntasks_per_node", "mem_gb": "mem"}
"""Name of the sbatch option for each submitit setting that has another name in sbatch."""
NOT_SBATCH = ("_target_", "submitit_folder", "max_num_timeout")
NO_OPTIONS = ("srun_args", "stderr_to_stdout", "signal_delay_s")
"""Settings that are no options of sbatch."""
CANCEL_TIMEOUT_S = 60.0
"""Maximum time in seconds to wait for cancelled jobs. They save a checkpoint before they end."""
POLL_INTERVALS_S = {"slurm": 10.0, "local": 0.2}


def is_submitted(launcher: Mapping[str, Any]) -> bool:
    """Return whether the launcher submits jobs through submitit. If it does not, it runs them directly on this machine.

    Raises:
        ConfigError: the launcher cannot be used for sweeps.
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
    """Submit the commands of jobs as one job array, and wait until all jobs have ended.

    If a signal interrupts this process, the jobs that have not ended are cancelled.

    Args:
        commands: command line of each job, by job number.
        launcher: Hydra's launcher config.
        folder: folder of the sweep.
        on_start: called for each job after the submission.
        on_end: called after a job has ended.

    Raises:
        InterruptedRun: a signal was received. It is raised when the jobs have ended, or after `CANCEL_TIMEOUT_S`.
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
    """Create a submitit executor with the settings of Hydra's launcher.

    Returns:
        The executor, and the name of its cluster, which is "slurm" or "local".
    """
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


def batch_script(launcher: Mapping[str, Any], command: list[str], count: int) -> str:
    """Return the options and the command of the job array that would be submitted for `count` jobs.

    This also works on a machine without Slurm, where submitit cannot write the script itself. If the launcher is not
    the Slurm launcher, the result is only the command.
    """
    if not str(launcher["_target_"]).endswith("SlurmLauncher"):
        return shlex.join(command)
    settings = {SBATCH_NAMES.get(key, key): value for key, value in launcher.items() if key not in NOT_SBATCH}
    settings |= settings.pop("additional_parameters", None) or {}
    if settings.get("mem") is not None:
        settings["mem"] = f"{settings['mem']}GB"
    concurrent = settings.pop("array_parallelism", None)
    settings["array"] = f"0-{count - 1}" + (f"%{min(concurrent, count)}" if concurrent else "")
    setup = settings.pop("setup", None) or []
    options = [
        f"#SBATCH --{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in sorted(settings.items())
        if value is not None and value is not False and key not in NO_OPTIONS
    ]
    return "\n".join([*options, "", *setup, shlex.join(command)])


def _exit_code(folder: Path, job: "submitit.Job[str]") -> int:
    """Return the exit code that is recorded in the job's status file.

    If no exit code is recorded, return 0 if the job succeeded according to submitit, and 1 if it failed.
    """
    recorded = _recorded_exit_code(folder)
    return (0 if job.exception() is None else 1) if recorded is None else recorded


def _recorded_exit_code(folder: Path) -> int | None:
    code = read_status(folder)["exit_code"] if (folder / "status.json").exists() else None
    return None if code is None else int(code)
