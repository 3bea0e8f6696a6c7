"""Tests of programs that try to exceed their limits or to escape. As a control, each succeeds without a sandbox."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.sandboxes import (  # noqa: F401
    ASSERTION,
    NO_BUBBLEWRAP,
    SHORT_LIMITS,
    inside,
    outside,
    peak_memory_growth,
    pytest_generate_tests,
    verdict_of,
)
from wmtp.data.records import StdioTest
from wmtp.errors import SandboxUnavailable
from wmtp.sandbox import isolation as isolation_module
from wmtp.sandbox.grader import Verdict
from wmtp.sandbox.isolation import Choice, Isolation, NoIsolation, Unshare, _self_test_error, find_isolation
from wmtp.sandbox.limits import Limits
from wmtp.sandbox.mounts import ENVIRONMENT


def processes_with(marker: str) -> list[int]:
    """Return the process ids of other processes with a marker in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until the condition holds, at most `seconds`, and return whether it holds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def daemon(marker: str) -> str:
    """Return code that starts a daemon in its own session and waits until it runs."""
    return (
        "import os, sys\n"
        "reading, writing = os.pipe()\n"
        "if not os.fork():\n  os.setsid()\n  if os.fork(): os._exit(0)\n"
        f"  os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)  # {marker}'])\n"
        "os.close(writing)\nos.read(reading, 1)\n"
    )


@pytest.mark.slow
def test_a_fork_bomb_is_limited(isolation: Choice) -> None:
    bomb = (
        "import os, signal\nforked = 0\nfor _ in range(400):\n  try:\n    child = os.fork()\n  except OSError:\n"
        "    break\n"
        "  if not child: signal.pause()\n  forked += 1\nprint(forked, flush=True)\n"
    )
    assert 10 <= int(inside(isolation, bomb)) < SHORT_LIMITS.processes
    verdict = verdict_of(bomb + "while True: pass", isolation)
    assert (verdict.outcome, verdict.reason) == ("fail", "time")
    kill_group = "os.killpg(0, signal.SIGKILL)"
    control = subprocess.run(
        [sys.executable, "-c", bomb.replace("range(400)", "range(40)") + kill_group],
        capture_output=True, start_new_session=True, check=False,
    )  # fmt: skip
    assert int(control.stdout) == 40


def test_concurrent_sandboxes_have_separate_limits(isolation: Choice) -> None:
    start_threads = (
        "import threading, time\nstarted = 0\nfor _ in range(12):\n"
        "  threading.Thread(target=time.sleep, args=(1.0,), daemon=True).start()\n  started += 1\n"
        "time.sleep(0.8)\nprint(started)"
    )
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: inside(isolation, start_threads), range(4))) == ["12"] * 4


def test_memory_is_limited(isolation: Choice) -> None:
    large = "print(len(bytes(4 << 30)))"
    assert outside(large) == str(4 << 30)
    verdict = verdict_of(large, isolation, StdioTest(stdin="", stdout=str(4 << 30)))
    assert (verdict.outcome, verdict.reason) == ("fail", "memory")
    verdict = verdict_of("def f(x): return len(bytes(4 << 30))", isolation, f"assert f(3) == {4 << 30}")
    assert (verdict.outcome, verdict.reason) == ("fail", "memory")


def test_file_sizes_are_limited_individually_and_in_total(isolation: Choice, tmp_path: Path) -> None:
    write = (
        "import os\nfor name in ('a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'):\n  try:\n"
        "    with open(f'{folder}/{name}', 'wb', buffering=0) as file:\n"
        "      for _ in range(100): file.write(bytes(1 << 20))\n  except OSError: pass\n"
        "sizes = [os.path.getsize(f'{folder}/{name}') for name in os.listdir(folder)]\nprint(max(sizes), sum(sizes))"
    )
    largest, total = map(int, inside(isolation, "folder = '/tmp'\n" + write).split())
    assert largest <= 2**20
    assert total <= SHORT_LIMITS.folder_bytes
    control = f"folder = {str(tmp_path)!r}\n{write}".replace("range(100)", "range(3)")
    assert outside(control) == f"{3 << 20} {24 << 20}"
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_is_limited(stream: str, isolation: Choice) -> None:
    endless = f"import sys\nwhile True: sys.{stream}.write('x' * 65536)"
    verdicts: list[Verdict] = []
    short = Limits(wall_seconds=1.0)
    for test in (ASSERTION, StdioTest(stdin="", stdout="x")):
        grown = peak_memory_growth(lambda test=test: verdicts.append(verdict_of(endless, isolation, test, short)))  # type: ignore[misc]
        assert grown < 10
    reasons = {"stdout": ["time", "output"], "stderr": ["time", "time"]}[stream]  # standard error is cut
    assert [(verdict.outcome, verdict.reason) for verdict in verdicts] == [("fail", reason) for reason in reasons]
    bounded = f"import sys\nfor _ in range(640): sys.{stream}.write('x' * 65536)"
    assert (
        peak_memory_growth(lambda: subprocess.run([sys.executable, "-c", bounded], capture_output=True, check=True))
        > 20
    )


def test_output_that_is_not_text_is_wrong(isolation: Choice) -> None:
    source = "import os\nos.write(1, b'\\xff\\xfe 1')"
    verdict = verdict_of(source, isolation, StdioTest(stdin="", stdout="1"))
    assert (verdict.outcome, verdict.reason) == ("fail", "wrong")
    with pytest.raises(UnicodeDecodeError):
        outside(source)


def test_a_program_has_no_network_and_no_access_to_the_loopback(isolation: Choice) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = (
            "import errno, socket\ntry:\n"
            f"  socket.create_connection(('127.0.0.1', {port}), timeout=3).close()\n  print('connected')\n"
            "except OSError as error:\n  print(errno.errorcode[error.errno])"
        )
        assert outside(connect) == "connected"
        assert inside(isolation, connect) == "ENETUNREACH"
        listening = f"print(any(':{port:04X} ' in line for line in open('/proc/net/tcp')))"
        assert (outside(listening), inside(isolation, listening)) == ("True", "False")
    interfaces = "print([line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line])"
    assert inside(isolation, interfaces) == "['lo']"


def test_user_files_are_not_visible(isolation: Choice, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("4711")
    paths = [
        str(secret),
        __file__,
        str(Path(__file__).parents[2]),
        str(Path.cwd() / "pyproject.toml"),
        "/etc/passwd",
    ]
    look = f"import os\nprint([os.path.exists(path) for path in {paths!r}])"
    assert outside(look) == str([True] * 5)
    assert inside(isolation, look) == str([False] * 5)
    read = f"try: open({str(secret)!r})\nexcept OSError as error: print(type(error).__name__)"
    assert inside(isolation, read) == "FileNotFoundError"
    packages = "import sys, glob\nprint(glob.glob(sys.prefix + '/lib/python3*/*-packages/*'))"
    assert inside(isolation, packages) == "[]"


def test_the_environment_contains_no_secrets(isolation: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "4711")
    look = "import os\nprint(dict(os.environ))"
    assert "4711" in outside(look)
    assert eval(inside(isolation, look)) == ENVIRONMENT


@pytest.mark.slow
def test_written_files_are_removed_and_all_other_folders_are_read_only(isolation: Choice) -> None:
    name = f"/tmp/{uuid.uuid4()}"
    write = (
        f"import os\nprint(os.path.exists({name!r}))\nopen({name!r}, 'w').write('x')\nprint(os.path.exists({name!r}))"
    )
    assert inside(isolation, write).split() == ["False", "True"]
    assert inside(isolation, write).split() == ["False", "True"]
    assert not Path(name).exists()
    probe = (
        "import os\nfor folder, _, _ in os.walk('/'):\n  if folder.startswith('/proc/'): continue\n"
        "  try: open(folder + '/written', 'w'); print(folder)\n  except OSError: pass"
    )
    assert inside(isolation, probe, Limits(wall_seconds=20.0, cpu_seconds=20)).split() == ["/tmp"]
    outside(f"open({name!r}, 'w')")
    assert Path(name).exists()
    Path(name).unlink()


def test_a_program_has_no_capabilities_and_cannot_gain_any(isolation: Choice) -> None:
    names = ("CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs")
    look = f"print([line.split()[1] for line in open('/proc/self/status') if line.startswith({names!r})])"
    *capabilities, no_new_privileges = eval(inside(isolation, look))
    assert {int(capability, 16) for capability in capabilities} == {0}
    assert no_new_privileges == "1"
    namespace = (
        "import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
        "mounted = library.mount(b'x', b'/tmp', b'tmpfs', 0, None)\n"
        "print(library.unshare(0x10000000), mounted, library.shmget(0, 4096, 0o1600))"
    )
    assert inside(isolation, namespace) == "-1 -1 -1"


def test_extended_attributes_cannot_be_set(isolation: Choice) -> None:
    """Extended attributes of files in a tmpfs are stored in memory without a limit."""
    attempt = (
        "import errno, os\nopen('/tmp/a', 'w').close()\nfor place in ('/tmp/a', os.open('/tmp/a', 0)):\n"
        "  try: os.setxattr(place, 'user.x', b'x' * 60_000)\n"
        "  except OSError as error: print(errno.errorcode[error.errno], end=' ')"
    )
    assert inside(isolation, attempt) == "EPERM EPERM"


def test_a_program_sees_only_its_own_processes(isolation: Choice) -> None:
    look = "import os\nprint(len([name for name in os.listdir('/proc') if name.isdigit()]))"
    assert int(outside(look)) > 5
    assert int(inside(isolation, look)) <= 3


@pytest.mark.parametrize("target", ["os.getppid()", "-1", "1", "0"])
def test_signals_reach_no_process_outside(target: str, isolation: Choice) -> None:
    marker = f"bystander-{uuid.uuid4()}"
    bystander = subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep(60)  # {marker}"], start_new_session=True
    )
    try:
        kill = f"import os, signal\nfor number in (15, 9):\n  try: os.kill({target}, number)\n  except OSError: pass\n"
        assert verdict_of(kill, isolation).outcome == "fail"
        assert bystander.poll() is None
        if target == "os.getppid()":
            control = "import os, subprocess, sys\n" + kill.replace("os.getppid()", str(bystander.pid))
            outside(control)
            assert wait_for(lambda: bystander.poll() is not None, 5)
    finally:
        bystander.kill()
        bystander.wait()


ENDLESS = pytest.param("while True: pass", marks=pytest.mark.slow)


@pytest.mark.parametrize("ending", ["def f(x): return 4711", ENDLESS, "os._exit(1)"])
def test_no_process_survives_its_program(ending: str, isolation: Choice) -> None:
    marker = f"daemon-{uuid.uuid4()}"
    verdict = verdict_of(daemon(marker) + ending, isolation, limits=Limits(wall_seconds=2.0))
    assert (verdict.outcome == "pass") == ending.startswith("def")
    assert processes_with(marker) == []


def test_without_isolation_a_daemon_survives() -> None:
    marker = f"daemon-{uuid.uuid4()}"
    verdict_of(daemon(marker) + "def f(x): return 4711", find_isolation("none"))
    survivors = processes_with(marker)
    for number in survivors:
        os.kill(number, signal.SIGKILL)
    assert len(survivors) == 1


@pytest.mark.slow
def test_a_loop_that_ignores_signals_is_killed_in_time(isolation: Choice) -> None:
    ignore_signals = (
        "import signal\nfor number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "  signal.signal(number, signal.SIG_IGN)\nwhile True:\n  try:\n    while True: pass\n"
        "  except BaseException: pass"
    )
    limits = Limits(wall_seconds=1.0)
    started = time.monotonic()
    inside(isolation, "")
    start_seconds = time.monotonic() - started
    for test in (ASSERTION, StdioTest(stdin="", stdout="x")):
        verdict = verdict_of(ignore_signals, isolation, test, limits)
        assert (verdict.outcome, verdict.reason) == ("fail", "time")
        assert verdict.seconds <= 1.5 + start_seconds
    sleeper = verdict_of("import time\ntime.sleep(60)", isolation, limits=limits)
    assert (sleeper.outcome, sleeper.reason) == ("fail", "time")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-c", f"import signal\nsignal.alarm(1)\n{ignore_signals}"], timeout=2, check=False
        )


def test_no_process_survives_when_the_parent_is_killed(isolation: Choice) -> None:
    marker = f"orphan-{uuid.uuid4()}"
    script = (
        "import sys\nfrom wmtp.sandbox.isolation import find_isolation\n"
        "from wmtp.sandbox.grader import Program, grade\n"
        "from wmtp.sandbox.limits import Limits\nprogram = Program(sys.stdin.read(), ('f()',))\n"
        f"print(grade(program, find_isolation({isolation!r}), Limits(wall_seconds=30.0, cpu_seconds=30)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin
        assert parent.stdout
        parent.stdin.write(daemon(marker) + "while True: pass")
        parent.stdin.close()
        was_started = wait_for(lambda: processes_with(marker) != [] or parent.poll() is not None, 20)
        parent.kill()
        assert parent.stdout.read() == ""
    assert was_started
    assert wait_for(lambda: processes_with(marker) == [], 2)


def test_without_bubblewrap_or_namespaces_no_program_runs() -> None:
    """The sandbox's own filter of system calls simulates a machine without namespaces."""
    script = (
        "from wmtp.sandbox.seccomp import system_call_filter\nfrom wmtp.sandbox.init import filter_system_calls\n"
        "from wmtp.sandbox.isolation import find_isolation\nimport sys\nfilter_system_calls(system_call_filter())\n"
        "try:\n  isolation = find_isolation(sys.argv[1])\n"
        "  from wmtp.sandbox.grader import Limits, Program, grade\n"
        "  print(grade(Program('f = 1', ('assert f == 1',)), isolation, Limits()).outcome)\n"
        "except Exception as error: print(type(error).__name__, error.exit_code, error)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    for choice in ("auto", "bubblewrap", "unshare", "none"):
        result = subprocess.run(
            [sys.executable, "-c", script, choice], env=environment, capture_output=True, text=True, check=True
        )
        if choice == "none":
            assert result.stdout == "pass\n", "control: a fallback to no isolation runs the program"
            continue
        assert result.stdout.startswith("SandboxUnavailable 4 "), result
        assert "none was run" in result.stdout
        assert "install bubblewrap" in result.stdout
        assert (
            "bubblewrap with" in result.stdout or "bubblewrap in" in result.stdout or "not installed" in result.stdout
        ) == (choice != "unshare")
        assert bool(re.search(r"^  unshare .*not permitted", result.stdout, re.MULTILINE)) == (choice != "bubblewrap")


def test_missing_bubblewrap_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    find_isolation.cache_clear()
    try:
        with pytest.raises(SandboxUnavailable, match="bubblewrap: not installed"):
            find_isolation("bubblewrap")
        assert find_isolation("auto").name == "unshare"
    finally:
        find_isolation.cache_clear()


@NO_BUBBLEWRAP
def test_bubblewrap_is_used_where_only_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(isolation: Isolation) -> str | None:
        return "not permitted" if isolation.name == "unshare" else None

    chosen = []
    for self_test_error in (_self_test_error, problem):
        monkeypatch.setattr(isolation_module, "_self_test_error", self_test_error)
        find_isolation.cache_clear()
        chosen.append(find_isolation("auto").name)
    find_isolation.cache_clear()
    assert chosen == ["unshare", "bubblewrap"]


class UnfilteredUnshare(Unshare):
    """Namespaces without the filter of system calls."""

    is_filtered = False


def test_the_self_test_finds_incomplete_isolation() -> None:
    problem = _self_test_error(UnfilteredUnshare(as_root=os.geteuid() == 0))
    assert problem == "sockets can be created"
    problem = _self_test_error(NoIsolation())
    assert problem is not None
    for part in ("isolation.py is visible", "sockets can be created", "can start more than 16"):
        assert part in problem
