"""Shared fixtures and helpers: commands that run in this process, a tiny model and a tiny dataset."""

import gc
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
import jaxtyping
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from tests.support.forking import ForkServer
from tests.support.ranks import Ranks, RanksByStrategy
from tests.support.servers import (  # noqa: F401
    ObjectStore,
    TrackingServer,
    object_store,
    object_store_server,
    proxy,
    s3_credentials,
    tracking_server,
    tracking_server_process,
)
from wmtp.cli.runner import run as main
from wmtp.config.overrides import to_hydra_override
from wmtp.config.schema import CONFIG_FOLDER
from wmtp.data.dataset import Dataset, read_dataset
from wmtp.data.sources import TaskSource
from wmtp.data.tokenizer import Tokenizer, task_tokenizer
from wmtp.models.llama import LlamaArchitecture, create_llama
from wmtp.models.mtp import MtpModel

if TYPE_CHECKING:
    from tests.support.world import World

TINY = ["model=nano", "data.num_train=40", "data.num_validation=8", "data.num_test=8", "num_samples=2",
        "num_validation_samples=0", "report=false"]  # fmt: skip
"""Overrides with which a training run takes about one second."""
UNIT_TESTS = Path(__file__).parent / "unit"


@dataclass
class Outcome:
    """The result of a command: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str


os.environ["PYTHON_DOTENV_DISABLED"] = "1"
for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
    del os.environ[name]  # tests must not send data to the developer's own servers
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="wmtp-state-")  # not the developer's own known destinations
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, also in started processes
os.environ["OMP_NUM_THREADS"] = "1"  # also in started processes: on busy cores, torch's threads waste time
torch.set_num_threads(1)  # a second thread does not speed up models this small
Invoke = Callable[..., Outcome]


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collections, which would take a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check the shapes in signatures during the unit tests only, because this slows training down."""
    jaxtyping.config.update("jaxtyping_disable", not item.path.is_relative_to(UNIT_TESTS))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the token cache that all tests share."""
    return tmp_path_factory.mktemp("cache")


def run_command(arguments: list[str], patch: pytest.MonkeyPatch, name: str = "train") -> int:
    """Run `python -m wmtp.<name> …` in this process and in the current folder, and return its exit code."""
    command = importlib.import_module(f"wmtp.{name}").COMMAND
    patch.setattr(sys, "argv", [f"wmtp.{name}", *arguments])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as exit_info:
        main(command)
    return int(exit_info.value.code or 0)


@pytest.fixture
def invoke(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Return a function that runs `python -m wmtp.<command> …` in this process and in an empty folder.

    Training runs are not tracked in MLflow unless an override enables it.
    """
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, tiny: bool = True, command: str = "train") -> Outcome:
        capsys.readouterr()
        defaults = ["tracking=none", *(TINY if tiny else [])] if command == "train" else []
        code = run_command([f"cache_dir={cache}", *defaults, *overrides], monkeypatch, command)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Yield two processes that run functions as ranks, and two other ones for FSDP.

    Mark tests that use it `xdist_group("ranks")`, so that they share the processes.
    """
    pairs = RanksByStrategy()
    yield pairs
    pairs.stop()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Yield the server that forks commands from a process in which all modules are imported.

    Mark tests that use it `xdist_group("servers")`, so that they share the process.
    """
    with ForkServer() as server:
        yield server


@pytest.fixture
def world(
    fork_server: ForkServer, object_store: ObjectStore, tracking_server: TrackingServer, cache: Path, tmp_path: Path
) -> "World":
    """Return the environment of one test user: an empty folder, an empty bucket and a new experiment."""
    from tests.support.world import World  # imports mlflow, which takes seconds

    return World(fork_server, object_store, tracking_server, cache, tmp_path / "home")


@pytest.fixture(scope="session")
def tokenizer(cache: Path) -> Tokenizer:
    """Return the tokenizer of the embedded tasks."""
    return task_tokenizer(cache)


@pytest.fixture(scope="session")
def tiny_data(tokenizer: Tokenizer, cache: Path) -> Dataset:
    """Return a dataset with 40 training and 8 validation samples of the embedded tasks."""
    source = TaskSource(
        tokenizer=tokenizer, num_train=40, num_validation=8, num_test=8, difficulties={1: 1, 2: 1}, correct_ratio=1.0
    )
    return read_dataset(source, cache, seed=0)


def tiny_model(num_heads: int = 4, dropout: float = 0.0, seed: int = 0) -> MtpModel:
    """Return a model with 0.2 million parameters."""
    torch.manual_seed(seed)
    return create_llama(LlamaArchitecture(
        vocab_size=512, dim=64, num_layers=2, num_heads=num_heads, num_attention_heads=4, num_kv_heads=2,
        hidden_dim=128, dropout=dropout,
    ))  # fmt: skip


def compose_config(*overrides: str) -> DictConfig:
    """Return the config of train.yaml with overrides."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose("train", [to_hydra_override(override) for override in overrides])


@pytest.fixture
def compose() -> Callable[..., DictConfig]:
    """Return the function `compose_config`."""
    return compose_config
