"""Show metrics on the console during training.

A terminal shows a progress bar and the last metrics. If the output is not a terminal, plain lines are printed.
"""

import math
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from wmtp.tracking.base import State


class ConsoleTracker:
    """Tracker that shows the metrics of a run, its progress and the remaining time on the console."""

    def __init__(self, console: Console, num_updates: int, updates_per_epoch: int, first_step: int) -> None:
        self.console, self.num_updates, self.first_step = console, num_updates, first_step
        self.updates_per_epoch = updates_per_epoch
        self.started = time.monotonic()
        self.training, self.validation = Text(""), Text("")
        self.live: Live | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(compact=True), console=console,
            )  # fmt: skip
            self.task = self.bar.add_task(self._position(first_step), total=num_updates, completed=first_step)
            self.live = Live(Group(self.bar, self.training, self.validation), console=console, refresh_per_second=4)
            self.live.start()

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Show the metrics of a training update or of a validation."""
        position, line = self._position(step), format_metrics(metrics)
        if self.live is None:
            self.console.print(f"{position}  {line}{self._times(step, metrics)}", soft_wrap=True, highlight=False)
            return
        self.bar.update(self.task, completed=step, description=position)
        text = self.training if "train/loss" in metrics else self.validation
        text.plain = line
        self.live.refresh()

    def close(self, state: State) -> None:
        """Stop the live display. The last metrics stay on the screen."""
        if self.live is not None:
            self.live.stop()

    def _position(self, step: int) -> str:
        this_epoch, epochs = (math.ceil(n / self.updates_per_epoch) for n in (step, self.num_updates))
        return f"epoch {max(1, this_epoch)}/{epochs}  update {step}/{self.num_updates}"

    def _times(self, step: int, metrics: dict[str, float]) -> str:
        done = step - self.first_step
        if "train/loss" not in metrics or not done:
            return ""
        elapsed = time.monotonic() - self.started
        left = elapsed / done * (self.num_updates - step)
        return f"  elapsed {format_time(elapsed)}  left {format_time(left)}"


def format_time(seconds: float) -> str:
    """Return a time as minutes and seconds, after the hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_metrics(metrics: dict[str, float]) -> str:
    """Return one line of text with the loss and other metrics.

    The other metrics are the loss of each head, the pass rate, the value loss and the tokens per second. A metric that
    is not in `metrics` is left out.
    """
    split = "train" if "train/loss" in metrics else "val"
    heads: list[str] = []
    while (name := f"{split}/head_{len(heads) + 1}_loss") in metrics:
        heads.append(f"{metrics[name]:.3f}")
    line = f"{split:5} loss {metrics[f'{split}/loss']:.4f}"
    line += f"  heads {' '.join(heads)}" if heads else ""
    pass_rate = metrics.get(f"{split}/pass_rate")
    line += f"  pass {pass_rate:.2f}" if pass_rate is not None else ""
    value_loss = metrics.get(f"{split}/value_loss")
    line += f"  value {value_loss:.3f}" if value_loss is not None and heads else ""
    speed = metrics.get("train/tokens_per_second")
    return line + (f"  {speed:,.0f} tokens/s" if speed else "")
