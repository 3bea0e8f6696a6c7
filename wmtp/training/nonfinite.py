"""Handling of updates whose loss or gradient is not finite."""

import logging
import math
from collections.abc import Sequence
from typing import Literal

from wmtp.data.collate import Batch
from wmtp.distributed.process_group import Processes
from wmtp.errors import TrainingError
from wmtp.ops.metric_sums import Sums

log = logging.getLogger(__name__)
Action = Literal["stop", "skip"]


class FiniteGate:
    """A check before the optimizer step that loss and gradient are finite; all ranks make the same decision."""

    def __init__(self, action: Action, limit: int, processes: Processes) -> None:
        """Create the check.

        Args:
            action: "stop" ends the run at the first update that is not finite; "skip" skips it.
            limit: maximum number of skipped updates in a run.
            processes: the process group.
        """
        self.action, self.limit, self.processes = action, limit, processes
        self.num_skipped = 0

    def passes(self, step: int, loss: float, grad_norm: float, own: Sums, batches: Sequence[Batch]) -> bool:
        """Return whether update `step` is finite and can be made.

        Args:
            step: number of the update.
            loss: global loss, over all ranks.
            grad_norm: global gradient norm.
            own: metric sums of this rank.
            batches: micro-batches of this rank.

        Raises:
            TrainingError: the update is not finite and the run must end; the message names the ranks and the records.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        report = f"update {step}: the loss is {loss} and the gradient norm {grad_norm}; the update was not made."
        report += self._find_nonfinite(own, batches)
        if self.action == "stop":
            raise TrainingError(f"{report}\nset on_nonfinite=skip to skip such updates")
        self.num_skipped += 1
        if self.num_skipped > self.limit:
            raise TrainingError(f"{report}\nMore than max_skipped_updates={self.limit} updates were not finite")
        if self.processes.is_main:
            log.warning("%s", report)
        return False

    def _find_nonfinite(self, own: Sums, batches: Sequence[Batch]) -> str:
        """Return the ranks, metrics and records that are not finite; all ranks if only the gradient is not."""
        totals = own.row()[::2].tolist()
        broken = [name for name, total in zip(own.means, totals, strict=True) if not math.isfinite(total)]
        found = self.processes.gather([broken, [record for batch in batches for record in batch.record_ids]])
        if not any(names for names, _ in found):
            found = [[["only the gradient"], records] for _, records in found]
        lines = []
        for rank, (names, records) in enumerate(found):
            if names and records:
                where = f"In process {rank}: not" if self.processes.size > 1 else "Not"
                lines.append(f"\n{where} finite: {', '.join(names)}; records: {', '.join(records)}")
        return "".join(lines)
