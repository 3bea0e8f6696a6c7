"""The losses of the training targets in the previous epoch, on which the weights of `history` depend."""

import logging
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.data.split import TokenizedSplit
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError

log = logging.getLogger(__name__)


class LossHistory:
    """The loss of each training target when the policy was last trained on it, for every head.

    An epoch contains each sample once, so these are the losses of the previous epoch until the sample is trained again.
    A rank records the losses of its own samples. When the next epoch begins, all ranks receive the losses of all
    samples, because each epoch distributes the samples anew. The losses take 4 bytes for each head and token of the
    training split in the memory of each rank, and as many in every checkpoint.
    """

    def __init__(self, split: TokenizedSplit, processes: Processes) -> None:
        """Create a history without losses. `split` is the training split."""
        self.processes, self._fingerprint = processes, split.fingerprint
        self._rows = {split.record_ids[record]: row for row, record in enumerate(split.samples.kept.tolist())}
        self._offsets = split.samples.offsets
        self._lengths = torch.from_numpy(split.samples.lengths)
        self._losses: Float[Tensor, "token head"] | None = None
        self._is_new = torch.zeros(len(split))
        self._epoch: int | None = None

    def begin_update(self, batch: Batch) -> None:
        """If an update is the first of an epoch, give all ranks the losses of all samples. All ranks must call this.

        `batch` is a micro-batch of the update.
        """
        if batch.epoch != self._epoch:
            self._share()
        self._epoch = batch.epoch

    def previous(self, batch: Batch, num_heads: int) -> Float[Tensor, "head batch position"]:
        """Return the recorded loss of each target, and NaN where none is recorded."""
        found = torch.full((num_heads, *batch.tokens.shape), torch.nan)
        for place, tokens in self._places(batch):
            if self._losses is not None:
                found[:, place, : tokens.stop - tokens.start] = self._losses[tokens].T
        return found.to(batch.tokens.device)

    def record(self, batch: Batch, losses: Float[Tensor, "head batch position"]) -> None:
        """Record the losses of a batch. Losses that are not finite are not recorded."""
        losses = losses.detach().float().cpu()
        table = self._table(len(losses))
        for place, tokens in self._places(batch):
            new = losses[:, place, : tokens.stop - tokens.start].T
            table[tokens] = new.where(new.isfinite(), torch.nan)
            self._is_new[self._rows[batch.record_ids[place]]] = 1

    def _places(self, batch: Batch) -> list[tuple[int, slice]]:
        """Return the index of each training sample in a batch, and the indices of its tokens in the split."""
        rows = [(place, self._rows.get(name)) for place, name in enumerate(batch.record_ids)]
        return [(place, slice(*self._offsets[row : row + 2].tolist())) for place, row in rows if row is not None]

    def _table(self, num_heads: int) -> Float[Tensor, "token head"]:
        if self._losses is None:
            self._losses = torch.full((int(self._offsets[-1]), num_heads), torch.nan)
        return self._losses

    def _share(self) -> None:
        """Give all ranks the losses that a rank has recorded since the last call. Each sample was on one rank."""
        if self.processes.size == 1:
            return
        num_heads = int(self.processes.max(0 if self._losses is None else self._losses.shape[1])[0])
        if num_heads == 0:
            return
        table, is_new = self._table(num_heads), self._is_new.repeat_interleave(self._lengths).bool()[:, None]
        received = self.processes.sum(table.where(is_new, 0.0))
        was_recorded = self.processes.sum(self._is_new).repeat_interleave(self._lengths).bool()[:, None]
        self._losses = received.where(was_recorded, table)
        self._is_new.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the losses of all ranks and the fingerprint of their data. All ranks must call this method."""
        self._share()
        return {} if self._losses is None else {"previous_losses": self._losses, "previous_data": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the losses that `state_dict` returned. Losses of other training data are left out.

        Raises:
            InputError: the checkpoint is of an earlier version, which stored the losses in another form.
        """
        if state.get("history"):
            raise InputError("the checkpoint has the losses of the previous epoch in an earlier form; train again")
        if "previous_losses" not in state:
            return
        if state["previous_data"] == self._fingerprint:
            self._losses = state["previous_losses"].clone()
        else:
            log.warning("the training data have changed, so the losses of the previous epoch are not known")
