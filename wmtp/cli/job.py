"""The job of a command, and its execution in one process or in several ranks."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from wmtp.errors import InterruptedRun
from wmtp.runtime.processes import limit_threads, module_arguments, started_together
from wmtp.runtime.run_dir import JobProgress
from wmtp.runtime.signals import raise_on_signals
from wmtp.runtime.standard_streams import write_error


@dataclass(frozen=True)
class JobContext:
    """The input of a job. It also contains the object in which the job records its progress."""

    config: DictConfig
    """The complete config, which has been checked."""
    folder: Path
    overrides: list[str]
    """Overrides in Hydra's syntax from which the config was composed, without those of Hydra's own settings."""
    progress: JobProgress = field(default_factory=JobProgress)
    """Progress of the job, such as the last step. The job updates this object while it runs."""
    inputs: Any = None
    """Objects that the check of the config has built. None in a process that received the config from another one."""


Job = Callable[[JobContext], None]


def run_job(job: Job, context: JobContext, size: int, on_hang: Callable[[BaseException], None]) -> None:
    """Run a job in `size` processes, of which this process is rank 0.

    The other ranks are started here, unless torchrun has started them.

    Args:
        job: the job that every rank runs.
        context: input of the job, which is also sent to the other ranks.
        size: number of processes. Under torchrun, it is not used.
        on_hang: called if another rank failed and this process hangs. It receives the error that ended the run.
    """
    if started_together():
        _run_ranks(job, context, on_hang=on_hang)
    elif size == 1:
        limit_threads()
        job(context)
    else:
        from wmtp.distributed.launcher import start_workers  # imports torch, which --help does not need

        module = sys.modules["__main__"].__spec__ if job.__module__ == "__main__" else None
        with start_workers(module_arguments(module.name if module else job.__module__), size) as workers:
            _run_ranks(job, context, exit_codes=workers.exit_codes, on_hang=on_hang)


def _run_ranks(job: Job, context: JobContext, **options: Any) -> None:
    """Send the input of a job to the other ranks, and run the job on rank 0. The options are for `process_group`."""
    from wmtp.distributed.store import send_input

    # interpolations are not resolved, because a training stage may change the keys to which they refer
    config = OmegaConf.to_yaml(context.config)
    send_input({"config": config, "folder": str(context.folder), "overrides": context.overrides})
    _run_in_group(job, context, **options)


def _run_in_group(job: Job, context: JobContext, **options: Any) -> None:
    from wmtp.distributed.device import resolve_device
    from wmtp.distributed.membership import process_group

    hardware = context.config.hardware
    with process_group(resolve_device(hardware.device), float(hardware.get("timeout", 1800)), **options):
        job(context)


def run_worker(job: Job) -> NoReturn:
    """Wait until rank 0 sends the input of a job, run the job in this process, which has a rank above 0, and exit.

    The exit code is that of the error that the job raised. After a failure, the interpreter does not exit normally,
    because it might wait for the other ranks forever.
    """
    from wmtp.distributed.store import receive_input

    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - used until this process ends
    with raise_on_signals():
        try:
            try:
                values = receive_input()
            except Exception as error:
                write_error(f"process {os.environ['RANK']}: no connection to process 0: {error}")
                raise
            code = values.get("exit_code", 0)
            if "config" in values:
                _run_in_group(job, decode_context(values))
        except (Exception, InterruptedRun) as error:  # noqa: BLE001 - rank 0 reads it from the exit report
            code = getattr(error, "exit_code", 1)
        if code:
            os._exit(code)
    sys.exit()


def decode_context(values: Mapping[str, Any]) -> JobContext:
    """Create a job context from the values that another process has sent."""
    setup_globals()
    config = OmegaConf.create(values["config"])
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    return JobContext(config, Path(values["folder"]), list(values["overrides"]))
