import ast
import gc
import subprocess
import sys

import pytest

from wmtp.data import tasks
from wmtp.data.records import Record
from wmtp.errors import InputError

ALL = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return tasks.generate("train", 150, ALL, noise=0.5, seed=3)


def verdicts(records: list[Record]) -> list[bool]:
    """Return whether each solution passes its tests, run in a Python process without the generator's executor."""
    program = "import sys, json\nfor source in json.load(sys.stdin):\n    try:\n        exec(source, {})\n        "
    program += "print(True)\n    except Exception:\n        print(False)\n"
    sources = ["\n".join([record.solution, *map(str, record.tests)]) for record in records]
    import json

    done = subprocess.run([sys.executable, "-c", program], input=json.dumps(sources), capture_output=True, text=True)
    return [line == "True" for line in done.stdout.splitlines()]


def test_correct_solutions_pass_every_test_and_incorrect_ones_fail_one(records: list[Record]) -> None:
    assert verdicts(records) == [record.is_correct for record in records]
    assert sum(record.is_correct for record in records) * 2 == len(records)


def test_the_same_seed_gives_the_same_records(records: list[Record]) -> None:
    assert tasks.generate("train", 150, ALL, noise=0.5, seed=3) == records
    assert tasks.generate("train", 150, ALL, noise=0.5, seed=4) != records


def test_an_incorrect_solution_differs_exactly_in_its_decisive_span() -> None:
    pairs = tasks.generate("train", 200, ALL, noise=0.0, seed=0)
    for right, wrong in zip(pairs[::2], pairs[1::2], strict=True):
        ((start, end),) = wrong.decisive
        tail = len(wrong.solution) - end
        assert wrong.solution[:start] == right.solution[:start]
        assert wrong.solution[end:] == right.solution[len(right.solution) - tail :]
        assert wrong.solution != right.solution
        if end - start > 12:  # the span of a replaced step excludes the common text
            assert wrong.solution[start] != right.solution[start]
            assert wrong.solution[end - 1] != right.solution[len(right.solution) - tail - 1]


def test_noise_is_a_comment_without_effect(records: list[Record]) -> None:
    noisy = [record for record in records if record.noise]
    assert 0.35 < len(noisy) / len(records) < 0.65
    for record in noisy:
        ((start, end),) = record.noise
        assert record.solution.splitlines()[-1].startswith("# ")
        assert record.solution[start:end] in record.solution.splitlines()[-1]
        without = record.solution[: record.solution.rindex("#")]
        assert ast.dump(ast.parse(without)) == ast.dump(ast.parse(record.solution))


def test_tests_are_literal_calls(records: list[Record]) -> None:
    for record in records[:40]:
        for test in record.tests:
            comparison = ast.parse(str(test)).body[0]
            assert isinstance(comparison, ast.Assert) and isinstance(comparison.test, ast.Compare)
            call = comparison.test.left
            assert isinstance(call, ast.Call)
            assert [ast.literal_eval(argument) for argument in call.args]
            ast.literal_eval(comparison.test.comparators[0])


def test_splits_share_no_task() -> None:
    def _programs(split: str) -> set[str]:
        """Return the syntax trees of the correct programs with function and variable renamed."""
        programs = set()
        for record in tasks.generate(split, 150, ALL, noise=0.0, seed=0)[::2]:
            tree = ast.parse(record.solution)
            names = {}
            for node in ast.walk(tree):
                for field in ("name", "id", "arg"):
                    name = getattr(node, field, None)
                    if isinstance(name, str) and name not in dir(__builtins__) and name not in __builtins__:
                        setattr(node, field, names.setdefault(name, f"name{len(names)}"))
            programs.add(ast.dump(tree))
        return programs

    train, validation, test = _programs("train"), _programs("validation"), _programs("test")
    assert not train & validation and not train & test and not validation & test
    assert len(validation) == len(test) == 150
    assert train & _programs("train"), "the control: equal tasks are not detected"


def test_too_many_different_tasks_raise_an_error() -> None:
    with pytest.raises(InputError, match="data.num_test"):
        tasks.generate("test", 5_000, {1: 1.0}, noise=0.0, seed=0)


def test_an_endless_program_is_stopped_at_the_step_limit() -> None:
    with pytest.raises(tasks.StepLimitError):
        tasks.execute("def f():\n    while True:\n        pass\n", ["f()"])


def test_garbage_collector_callbacks_do_not_affect_the_step_limit() -> None:
    collections = 0

    def run_many_steps(*about: object) -> None:
        nonlocal collections
        collections += 1
        for _ in range(3 * tasks.STEP_LIMIT):
            pass

    threshold = gc.get_threshold()
    gc.callbacks.append(run_many_steps)
    gc.set_threshold(100)
    try:
        assert tasks.execute("def f():\n    return len([[i] for i in range(1000)])\n", ["f()"]) == ["1000"]
        assert collections > 0
        with pytest.raises(tasks.StepLimitError):  # Python ignores errors in callbacks
            tasks.execute("def f():\n    kept = []\n    for _ in range(9000):\n        kept.append([])\n", ["f()"])
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(run_many_steps)
