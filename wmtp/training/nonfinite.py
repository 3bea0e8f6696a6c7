"""Check before each optimizer step that the loss and the gradient are finite."""

import logging
import math
from collections.abc import Sequence
from typing import Literal

from wmtp.data.collate import Batch
from wmtp.distributed.process_group import Processes
from wmtp.errors import TrainingError
from wmtp.ops.metric_sums import MetricSums

log = logging.getLogger(__name__)
Action = Literal["stop", "skip"]


class FiniteCheck:
    """A check that the loss and the gradient of an update are finite. All ranks make the same decision."""

    def __init__(self, action: Action, limit: int, processes: Processes) -> None:
        """Create the check.

        Args:
            action: "stop" ends the run if the loss or gradient of an update is not finite; "skip" skips such updates.
            limit: maximum number of updates that a run may skip.
            processes: the process group.
        """
        self.action, self.limit, self.processes = action, limit, processes
        self.num_skipped = 0

    def passes(
        self, step: int, loss: float, grad_norm: float, local_sums: MetricSums, batches: Sequence[Batch]
    ) -> bool:
        """Return whether the loss and the gradient of an update are finite, so that the optimizer may make its step.

        Args:
            step: number of the update.
            loss: global loss, over all ranks.
            grad_norm: global gradient norm, before clipping.
            local_sums: metric sums of this rank's micro-batches.
            batches: this rank's micro-batches.

        Raises:
            TrainingError: the loss or the gradient is not finite, and either `action` is "stop" or more than `limit`
                updates were skipped. The message names the ranks and the records.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        report = f"update {step}: the loss is {loss} and the gradient norm {grad_norm}; the update was not made."
        report += self._find_nonfinite(local_sums, batches)
        if self.action == "stop":
            raise TrainingError(f"{report}\nset on_nonfinite=skip to skip such updates")
        self.num_skipped += 1
        if self.num_skipped > self.limit:
            raise TrainingError(f"{report}\nMore than max_skipped_updates={self.limit} updates were not finite")
        if self.processes.is_main:
            log.warning("%s", report)
        return False

    def _find_nonfinite(self, local_sums: MetricSums, batches: Sequence[Batch]) -> str:
        """Return a text that names the metrics that are not finite, with the ranks and the records of their batches.

        If all metrics are finite, the gradient is not finite. In this case, the text names all ranks and records.
        """
        totals = local_sums.to_vector()[::2].tolist()
        nonfinite = [name for name, total in zip(local_sums.means, totals, strict=True) if not math.isfinite(total)]
        by_rank = self.processes.gather([nonfinite, [record for batch in batches for record in batch.record_ids]])
        if not any(names for names, _ in by_rank):
            by_rank = [[["only the gradient"], records] for _, records in by_rank]
        lines = []
        for rank, (names, records) in enumerate(by_rank):
            if names and records:
                place = f"In process {rank}: not" if self.processes.size > 1 else "Not"
                lines.append(f"\n{place} finite: {', '.join(names)}; records: {', '.join(records)}")
        return "".join(lines)
