"""What the tests share: the command in this process, a tiny model and a tiny data set."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from tests.support.forking import ForkServer
from tests.support.ranks import Ranks
from tests.support.servers import (  # noqa: F401
    ObjectStore,
    TrackingServer,
    keys,
    object_store,
    object_store_server,
    proxy,
    tracking_server,
    tracking_server_process,
)
from wmtp.cli.runner import run as main
from wmtp.config.overrides import to_hydra_override
from wmtp.config.schema import CONFIG_FOLDER
from wmtp.data.dataset import Dataset
from wmtp.data.sources import TaskSource
from wmtp.data.tokenizer import Tokenizer, task_tokenizer
from wmtp.models.llama import LlamaArchitecture, create_llama
from wmtp.models.mtp import MtpModel

if TYPE_CHECKING:
    from tests.support.world import World

TINY = ["model=nano", "data.num_train=40", "data.num_validation=8", "data.num_test=8", "num_samples=2",
        "num_validation_samples=0", "report=false"]  # fmt: skip
"""Overrides that make a training take a second."""


@dataclass
class Outcome:
    """What a command gave."""

    code: int
    out: str
    err: str


os.environ["PYTHON_DOTENV_DISABLED"] = "1"
for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
    del os.environ[name]  # tests send nothing to the servers of whoever runs them
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start, too: on cores that others keep busy, torch's threads spin
torch.set_num_threads(1)  # of models this small, a second thread makes none faster
Invoke = Callable[..., Outcome]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token cache for all tests."""
    return tmp_path_factory.mktemp("cache")


def run_command(arguments: list[str], patch: pytest.MonkeyPatch, name: str = "train") -> int:
    """`python -m wmtp.<name> …` in this process and in the current folder; its exit code."""
    command = importlib.import_module(f"wmtp.{name}").COMMAND
    patch.setattr(sys, "argv", [f"wmtp.{name}", *arguments])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        main(command)
    return int(ended.value.code or 0)


@pytest.fixture
def invoke(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Runs `python -m wmtp.<command> …` in this process, in an empty folder, without MLflow unless asked for."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, tiny: bool = True, command: str = "train") -> Outcome:
        capsys.readouterr()
        own = ["tracking=none", *(TINY if tiny else [])] if command == "train" else []
        code = run_command([f"cache_dir={cache}", *own, *overrides], monkeypatch, command)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes to run functions in. Mark tests that use it `xdist_group("ranks")`: they share the two."""
    both = Ranks()
    yield both
    both.stop()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Where commands are forked from a process that has imported everything."""
    with ForkServer() as each:
        yield each


@pytest.fixture
def world(
    fork_server: ForkServer, object_store: ObjectStore, tracking_server: TrackingServer, cache: Path, tmp_path: Path
) -> "World":
    """A user's folder, with both servers in its `.env`."""
    from tests.support.world import World  # imports mlflow, which takes seconds

    return World(fork_server, object_store, tracking_server, cache, tmp_path / "home")


def start_training(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    """`python -m wmtp.train …` as a process of its own, in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "wmtp.train", *overrides],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer(cache: Path) -> Tokenizer:
    """The tokenizer of the embedded tasks."""
    return task_tokenizer(cache)


@pytest.fixture(scope="session")
def tiny_data(tokenizer: Tokenizer, cache: Path) -> Dataset:
    """Forty training and eight validation samples of the embedded tasks."""
    source = TaskSource(
        tokenizer=tokenizer, num_train=40, num_validation=8, num_test=8, difficulties={1: 1, 2: 1}, correct_ratio=1.0
    )
    return Dataset(source, cache, seed=0)


def tiny_model(num_heads: int = 4, dropout: float = 0.0, seed: int = 0) -> MtpModel:
    """A model of 0.2 million parameters."""
    torch.manual_seed(seed)
    return create_llama(LlamaArchitecture(
        vocab_size=512, dim=64, num_layers=2, num_heads=num_heads, num_attention_heads=4, num_kv_heads=2,
        hidden_dim=128, dropout=dropout,
    ))  # fmt: skip


def composed(*overrides: str) -> DictConfig:
    """train.yaml with overrides."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose("train", [to_hydra_override(override) for override in overrides])


@pytest.fixture
def compose() -> Callable[..., DictConfig]:
    """Composes train.yaml with overrides."""
    return composed
