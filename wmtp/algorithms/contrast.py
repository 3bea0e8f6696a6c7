"""The algorithm contrast. It gives a token a small weight if it is more probable in incorrect solutions.

One class-conditional language model predicts the next token of correct and of incorrect solutions. By Bayes' rule, the
difference log p(y | prefix, correct) − log p(y | prefix, incorrect) is the amount by which the token y changes the
log-odds that the solution is correct. It is the TD error of a critic whose values are log-odds, but it is learned from
every token instead of one reward per solution.
Source: Lin et al. 2024, Critical Tokens Matter (arXiv 2411.19943), section 3.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import ExponentialAlgorithm, Observations
from wmtp.field_types import PositiveFloat


@dataclass(kw_only=True, eq=False)
class Contrast(ExponentialAlgorithm):
    """The algorithm with weights exp((log p⁺ − log p⁻) / beta).

    p⁺ and p⁻ are the probabilities of the token in a correct and in an incorrect solution.
    """

    beta: PositiveFloat = 1.0
    """The divisor of the difference. The weights differ more if it is smaller."""

    references = ("correct", "incorrect")

    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weight of the token of each target. It is the same for all heads that predict the token."""
        assert observed.reference_losses is not None
        correct, incorrect = observed.reference_losses
        return self.exponential((incorrect - correct) / self.beta)
