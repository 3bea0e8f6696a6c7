"""Tests of the environment variables that launchers of several processes set."""

import pytest

from wmtp.distributed.device import hardware_issues
from wmtp.errors import InputError
from wmtp.runtime.processes import LAUNCHER_VARIABLES, check_launcher_variables, started_together

COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def set_variables(patch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name in LAUNCHER_VARIABLES:
        patch.delenv(name, raising=False)
    for name, value in values.items():
        patch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "not set: LOCAL_RANK, MASTER_ADDR, MASTER_PORT.*unset RANK WORLD_SIZE$"),
        ({"WORLD_SIZE": "2"}, "not set: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.*unset WORLD_SIZE$"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two is no whole number"),
        (COMPLETE | {"RANK": "x"}, "RANK=x is no whole number"),
        (COMPLETE | {"RANK": "-1"}, "RANK=-1 is no whole number"),
        (COMPLETE | {"RANK": "2"}, "RANK=2 is not below it"),
        (COMPLETE | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is above 65535"),
        (COMPLETE | {"MASTER_PORT": ""}, "MASTER_PORT= is no whole number"),
        ({name: value for name, value in COMPLETE.items() if name != "LOCAL_RANK"}, "not set: LOCAL_RANK"),
    ],
)
def test_incomplete_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], problem: str
) -> None:
    set_variables(monkeypatch, values)
    with pytest.raises(InputError, match=problem):
        check_launcher_variables()


def test_variables_of_other_processes_contradict_a_run_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ((key, problem),) = hardware_issues("cpu", 1, "single")
    assert key == "num_processes"
    assert "set hardware.num_processes=2" in problem and problem.endswith("unset RANK WORLD_SIZE")
    assert hardware_issues("cpu", 2, "ddp") == []


@pytest.mark.parametrize(
    ("values", "together"), [(COMPLETE, True), ({}, False), ({"RANK": "0", "WORLD_SIZE": "1"}, False)]
)
def test_complete_variables_and_those_of_one_process_are_accepted(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], together: bool
) -> None:
    set_variables(monkeypatch, values)
    check_launcher_variables()
    assert started_together() == together
