"""Tests that commands use the data with which a run was trained, and report data that have changed since."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Invoke, run_command
from wmtp.cli.resolve import compose
from wmtp.data.sources import FileSource
from wmtp.sandbox.grader import Program, Verdict
from wmtp.sweep.state import Job, SweepState
from wmtp.train import COMMAND

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("projects")]

SMALL = ["model=nano", "max_steps=1", "num_validation_samples=0", "num_samples=1", "sandbox=none", "report=false"]
EVALUATE = ["checkpoint=../a/run", "generation.max_new_tokens=4", "evaluation.sandbox=none"]


def write_project(folder: Path, name: str) -> None:
    """Write data to the folder `d` of a project, with task ids that begin with the name of the project."""
    (folder / "d").mkdir(parents=True)
    for split, count in (("train", 20), ("validation", 4), ("test", 4)):
        rows = [
            {"task_id": f"{name}/{split}/{i}", "prompt": f"Add {i}.", "solution": f"{name} + {i}\n", "tests": ["pass"]}
            for i in range(count)
        ]
        (folder / f"d/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Return a folder with the projects a and b, where a run in a was trained on the relative path `d`."""
    root = tmp_path_factory.mktemp("projects")
    for name in ("a", "b"):
        write_project(root / name, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "a")
        overrides = ["tracking=none", f"cache_dir={cache}", "data=jsonl", "data.path=d", "hydra.run.dir=run"]
        assert run_command([*overrides, *SMALL], patch) == 0
    return root


@pytest.fixture
def projects(
    trained: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Return a function that evaluates the run from project b, and returns the summary of the evaluation."""
    monkeypatch.setattr("wmtp.evaluation.evaluator.grade", always_pass)
    shutil.copytree(trained, tmp_path / "projects")
    monkeypatch.chdir(tmp_path / "projects/b")
    for path in (tmp_path / "projects/a/run/config.yaml", tmp_path / "projects/a/run/provenance.json"):
        path.write_text(path.read_text().replace(str(trained), str(tmp_path / "projects")))

    def evaluate(*overrides: str) -> dict[str, Any]:
        """Evaluate the run, and return the summary with the project to which the evaluated problems belong."""
        done = invoke(*EVALUATE, *overrides, command="evaluate")
        (folder,) = Path("../a/run").glob("evaluations/jsonl-*")
        result: dict[str, Any] = {"code": done.code, "err": done.err}
        if done.code == 0:
            result |= json.loads((folder / "summary.json").read_text())
            result["project"] = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])["task_id"][0]
            shutil.rmtree(folder)
        return result

    return evaluate


def always_pass(program: Program, **options: object) -> Verdict:
    """Return the verdict that a program passes, without running it."""
    return Verdict("pass", "", "", 0.1)


def test_a_run_keeps_absolute_paths(trained: Path) -> None:
    run = trained / "a/run"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["path"] == str(trained / "a/d")
    (saved,) = (o for o in json.loads((run / ".hydra/accepted.json").read_text()) if "data.path" in o)
    assert str(trained / "a/d") in saved


def test_the_data_of_the_run_are_evaluated_from_a_folder_with_other_data(
    projects: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark is evaluated as a whole, but only its test split if the model was trained on it."""
    monkeypatch.setattr(FileSource, "is_test_set", True)
    own = projects()
    assert (own["project"], own["is_run_data"], own["split"]) == ("a", True, "test"), own
    other = projects("data=jsonl", "data.path=d")
    assert (other["project"], other["is_run_data"], other["source"]) == ("b", False, str(Path("d").absolute())), other
    lines = Path("../a/run/evaluations/metrics.jsonl").read_text().splitlines()
    names = [re.findall(r"evaluation/(\w+-\w+)-greedy", line) for line in lines]
    assert [set(each) for each in names] == [{"jsonl-test"}, {"other_jsonl-all"}]


def test_an_earlier_run_with_a_relative_path_uses_the_folder_in_which_it_was_started(
    projects: Callable[..., dict[str, Any]],
) -> None:
    run = Path("../a/run").resolve()
    for name, start in (("config.yaml", "path: d"), (".hydra/hydra.yaml", f"cwd: {run.parent}")):
        key = start.partition(" ")[0]
        text = re.sub(rf"^( +){key} \S+(/d|/a)$", rf"\1{start}", (run / name).read_text(), flags=re.MULTILINE)
        (run / name).write_text(text)
    assert "path: d\n" in (run / "config.yaml").read_text()
    assert projects()["project"] == "a"
    (run / ".hydra/hydra.yaml").unlink()
    refused = projects()
    assert refused["code"] == 2 and f"{Path('d').absolute()}/test.jsonl differs from" in refused["err"], refused
    (run / "provenance.json").unlink()
    assert "does not record its data" in projects()["err"]


def test_a_file_that_was_edited_since_is_named(projects: Callable[..., dict[str, Any]], invoke: Invoke) -> None:
    file = Path("../a/d/test.jsonl").resolve()
    file.write_text(file.read_text().replace("pass", "assert True"))
    refused = projects()
    assert (refused["code"], f"{file} has changed" in refused["err"]) == (2, True), refused
    assert projects("data=jsonl", f"data.path={file.parent}")["is_run_data"] is False
    resume = ["resume=../a/run", "max_steps=2", "sandbox=none", f"data.path={file.parent}"]
    done = invoke(*resume, tiny=False)
    assert (done.code, f"data: {file} has changed" in done.err) == (2, True), done.err
    tried = invoke(*resume, "dry_run=true", tiny=False)
    assert (tried.code, tried.err) == (2, done.err.replace(done.err.splitlines()[-1] + "\n", "")), tried.err
    assert invoke(*resume, "resume_override=[data]", tiny=False).code == 0
    assert projects()["is_run_data"] is True


def test_the_jobs_of_a_resumed_sweep_use_the_folder_in_which_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ["data=jsonl", "data.path=d"]
    for name in ("a", "b"):
        (tmp_path / name / "d").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a" / "sweep").mkdir()
    SweepState(Path("sweep"), [Job(0, job)]).write()
    monkeypatch.chdir(tmp_path / "b")
    sweep = Path("../a/sweep")
    SweepState.read(sweep).write()  # as a resumed sweep does
    config = compose(COMMAND, job, sweep, []).checked.config
    assert config.data.path == str(tmp_path / "a" / "d")
    assert compose(COMMAND, job).checked.config.data.path == str(tmp_path / "b" / "d"), "the control"
