"""The objective of stage 1 of contrast, which trains a class-conditional language model."""

from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import Batch
from wmtp.models.mtp import MtpModel, Outputs
from wmtp.objectives.mtp import MtpObjective, describe_shares
from wmtp.ops.targets import Shares


class ClassConditionalObjective(MtpObjective):
    """The loss of a language model that is told for each solution whether it is correct."""

    def __init__(self, *, shares: Shares = "position") -> None:
        """Create the objective. `shares` is the influence of targets in training."""
        super().__init__(Uniform(), shares=shares)

    @property
    def name(self) -> str:
        """The kind of the language model, and the kind of shares if it is not the default."""
        return f"class-conditional language model{describe_shares(self.shares)}"

    def forward(self, model: MtpModel, batch: Batch) -> Outputs:
        """Return the outputs of the model for a micro-batch and the correctness of its solutions."""
        outputs: Outputs = model(batch.tokens, classes=batch.is_correct.long())
        return outputs
