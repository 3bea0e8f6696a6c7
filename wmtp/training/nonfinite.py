"""What becomes of an update whose loss or gradient is not finite."""

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
    """Lets an update pass to the optimizer if its loss and its gradient are finite; all processes decide alike."""

    def __init__(self, action: Action, limit: int, processes: Processes) -> None:
        """`action` "stop" ends the run at the first such update; "skip" leaves out up to `limit` of them."""
        self.action, self.limit, self.processes = action, limit, processes
        self.num_skipped = 0

    def passes(self, step: int, loss: float, grad_norm: float, own: Sums, batches: Sequence[Batch]) -> bool:
        """Whether to make update `step`. Loss and norm are those of all processes, `own` and `batches` of this one.

        Raises:
            TrainingError: not, and the run must end; it names the processes and the records.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        report = f"update {step}: the loss is {loss} and the gradient norm {grad_norm}; the update was not made."
        report += self._whereabouts(own, batches)
        if self.action == "stop":
            raise TrainingError(f"{report}\non_nonfinite=skip leaves such updates out")
        self.num_skipped += 1
        if self.num_skipped > self.limit:
            raise TrainingError(f"{report}\nMore than max_skipped_updates={self.limit} updates were not finite")
        if self.processes.is_main:
            log.warning("%s", report)
        return False

    def _whereabouts(self, own: Sums, batches: Sequence[Batch]) -> str:
        """Which processes measured what is not finite, and in which records; all of them if none did."""
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
