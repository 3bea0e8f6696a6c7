"""What the first, the second and the third signal do."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.launching import ONE, Started
from wmtp.errors import InterruptedAtOnce
from wmtp.runtime.signals import SIGNALS, DeferredSignals, raised_signals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_the_first_signal_is_noted_the_second_raised_and_the_third_kills() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with raised_signals():
        with DeferredSignals() as signals:
            send(signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            with pytest.raises(InterruptedAtOnce) as ended:
                send(signal.SIGINT)
        assert ended.value.exit_code == 130
        assert all(signal.getsignal(number) is signal.SIG_DFL for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_where_nothing_is_trained_the_first_signal_is_raised() -> None:
    with raised_signals():
        for _ in range(2):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            with pytest.raises(InterruptedAtOnce, match="interrupted by SIGTERM"):
                send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("alone", [True, False])
def test_after_an_error_beside_others_sigterm_lets_this_process_close(
    monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1" if alone else "2"}.items():
        monkeypatch.setenv(name, value)
    with raised_signals():
        with pytest.raises(ValueError, match="out of luck"), DeferredSignals():
            raise ValueError("out of luck")
        if alone:
            with pytest.raises(InterruptedAtOnce):
                send(signal.SIGTERM)
        else:
            send(signal.SIGTERM)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once_and_its_status_says_so(tmp_path: Path) -> None:
    """The control is in test_launch: a second signal that is left to the system leaves the status at RUNNING."""
    run = Started(tmp_path, *ONE, "+tags.saving=30.0")
    run.wait_for("step-0")
    run.send(signal.SIGTERM)
    run.wait_for("saving-0")
    run.send(signal.SIGINT)
    code, out, seconds = run.end()
    assert (code, run.status()["state"]) == (130, "KILLED") and seconds < 5
    assert "interrupted by SIGINT" in out and "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.3, 0.8, 1.3, 1.8])
def test_a_signal_at_any_moment_leaves_no_traceback_and_no_folder_without_a_status(
    tmp_path: Path, moment: float
) -> None:
    runs = {number: Started(tmp_path / str(number), *ONE) for number in SIGNALS}
    time.sleep(moment)
    for number, run in runs.items():
        run.send(number)
        code, out, _ = run.end()
        assert code in (-number, 128 + number)
        assert "Traceback" not in out
        assert not run.run.exists() or run.status()["state"] == "KILLED"
