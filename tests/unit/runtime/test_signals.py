"""Tests of the first, second and third signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launching import ONE_PROCESS, StartedCommand
from wmtp.errors import InterruptedAtOnce
from wmtp.runtime.signals import SIGNALS, DeferredSignals, _let_signals_kill, raise_on_signals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_first_signal_is_deferred_second_raises_third_kills(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with raise_on_signals():
        with DeferredSignals() as signals:
            send(signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            acknowledged = "SIGTERM: the run ends after this update; a second signal ends it at once\n"
            assert capsys.readouterr().err == acknowledged, "at once, not after the update"
            with pytest.raises(InterruptedAtOnce) as ended:
                send(signal.SIGINT)
        assert ended.value.exit_code == 130
        assert all(signal.getsignal(number) is signal.SIG_DFL for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_training_the_first_signal_raises() -> None:
    with raise_on_signals():
        for _ in range(2):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            with pytest.raises(InterruptedAtOnce, match="interrupted by SIGTERM"):
                send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_sighup_has_no_effect_and_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a terminal is closed, the system and the shell both send SIGHUP."""
    with raise_on_signals(), DeferredSignals() as signals:
        send(signal.SIGHUP)
        send(signal.SIGHUP)
        assert signals.received == signal.SIGHUP
        with pytest.raises(InterruptedAtOnce, match="interrupted by SIGTERM"):
            send(signal.SIGTERM)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_on_signals():
            with DeferredSignals() as signals:
                send(signal.SIGHUP)
            assert signals.received is None
            _let_signals_kill()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_the_exit_does_not_change_the_exit_code() -> None:
    """The control is the same program without the call, which the signal kills."""
    program = (
        "import os, signal, sys, threading; from wmtp.runtime.signals import keep_exit_code\n"
        "class Late:\n    def __del__(self, send=os.kill, pid=os.getpid()):\n        send(pid, signal.SIGTERM)\n"
        "late = Late()\n{}\nos.kill(os.getpid(), signal.SIGTERM)\nsys.exit(3)"
    )
    codes = [
        subprocess.run([sys.executable, "-c", program.format(call)]).returncode for call in ("keep_exit_code()", "")
    ]
    assert codes == [3, -signal.SIGTERM]


@pytest.mark.parametrize("is_single", [True, False])
def test_sigterm_is_ignored_after_an_error_in_one_of_several_processes(
    monkeypatch: pytest.MonkeyPatch, is_single: bool
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1" if is_single else "2"}.items():
        monkeypatch.setenv(name, value)
    with raise_on_signals():
        with pytest.raises(ValueError, match="out of luck"), DeferredSignals():
            raise ValueError("out of luck")
        if is_single:
            with pytest.raises(InterruptedAtOnce):
                send(signal.SIGTERM)
        else:
            send(signal.SIGTERM)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once_with_status_killed(tmp_path: Path) -> None:
    """The control is in test_launcher: with the default handler, a second signal leaves the status at RUNNING."""
    saving = 60.0  # seconds that the run would go on if it ended after its checkpoint only
    run = StartedCommand(tmp_path, *ONE_PROCESS, f"+tags.saving={saving}")
    run.wait_for("step-0")
    run.send(signal.SIGTERM)
    run.wait_for("saving-0")
    run.send(signal.SIGINT)
    code, out, seconds = run.end()
    assert (code, run.status()["state"]) == (130, "KILLED") and seconds < saving / 2
    assert "interrupted by SIGINT" in out and "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.3, 0.8, 1.3, 1.8])
def test_a_signal_at_any_moment_leaves_no_traceback_and_no_folder_without_status(tmp_path: Path, moment: float) -> None:
    runs = {number: StartedCommand(tmp_path / str(number), *ONE_PROCESS) for number in SIGNALS}
    time.sleep(moment)
    for number, run in runs.items():
        run.send(number)
        code, out, _ = run.end()
        assert code in (-number, 128 + number)
        assert "Traceback" not in out
        assert not run.run.exists() or run.status()["state"] == "KILLED"
