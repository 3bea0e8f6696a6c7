"""The weighted cross-entropy of every head at every position that has a target.

The logits and the cross-entropy of all heads are computed together, in chunks of rows. There is one row for each
target of each head. Only the logits of one chunk exist at a time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wmtp.data.collate import IGNORED

CHUNK_BYTES, GPU_CHUNK_BYTES = 56 * 2**20, 256 * 2**20
"""Default size of the logits of one chunk on CPU and on GPU.

It is small relative to the rest of the memory, but large enough for fast matrix products.
"""

LOG2_E = 1 / math.log(2)
"""log2(e)."""

RowFunction: TypeAlias = Callable[["Chunk"], Float[Tensor, " row"]]
"""A function that returns one number for each row of a chunk. It is called once per chunk, without gradient."""


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def uncompiled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Exclude a function from `torch.compile`, because its graph would be different for each batch."""
    excluded: Callable[Parameters, Result] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return excluded


@uncompiled
def cross_entropy(
    states: Float[Tensor, "head batch position dim"],
    unembedding: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, "head batch position"],
    chunk_rows: int | None = None,
) -> Float[Tensor, "head batch position"]:
    """Return −log p(target) in nats, or 0 where there is no target.

    The result has no gradient. Its dtype is fp32 or more precise. Logits exist for at most `chunk_rows` rows at a time.
    If `chunk_rows` is None, a default number of rows is used.
    """
    (losses,) = row_statistics(states, unembedding, targets, [lambda chunk: chunk.losses], chunk_rows)
    return losses


@uncompiled
def row_statistics(
    states: Float[Tensor, "head batch position dim"],
    unembedding: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, "head batch position"],
    functions: Sequence[RowFunction],
    chunk_rows: int | None = None,
) -> list[Float[Tensor, "head batch position"]]:
    """Return the results of several functions for every target, or 0 where there is no target.

    The logits of a row are computed once for all functions. The results have no gradient, and their dtype is fp32 or
    more precise. See `cross_entropy` for `chunk_rows`.
    """
    dtype = product_dtype(states, unembedding)
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        results = [states.new_zeros(targets.numel(), dtype=statistics_dtype(dtype)) for _ in functions]
        for chunk in chunks(states, unembedding.to(dtype), targets, chunk_rows):
            for result, function in zip(results, functions, strict=True):
                result.index_copy_(0, chunk.rows, function(chunk))
    return [result.view(targets.shape) for result in results]


@uncompiled
def weighted_cross_entropy(
    states: Float[Tensor, "head batch position dim"],
    unembedding: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, "head batch position"],
    coefficients: RowFunction,
    chunk_rows: int | None = None,
    *,
    by_head: bool = False,
) -> tuple[Float[Tensor, "*head"], Float[Tensor, "head batch position"], Float[Tensor, "head batch position"]]:
    """Return the sum Σ c·CE, the losses CE in nats and the coefficients c.

    If `by_head` is true, the first result contains a sum for each head instead of the sum over all heads. Only the sums
    have a gradient. The gradients are computed together with the losses and stored until `backward`, which can run only
    once. If all rows of a sum have a common factor, such as 1/Σ c, multiply the returned sum by this factor. Loss,
    coefficient and gradient are 0 where there is no target.

    Logits exist for at most `chunk_rows` rows at a time. If `chunk_rows` is None, a default number of rows is used. If
    autocast is on, the matrix products use its dtype. The softmax is computed in fp32 or a more precise dtype. This
    function is excluded from `torch.compile`.

    Raises:
        RuntimeError: `backward` is run a second time or with `create_graph=True`. The error is raised in `backward`.
    """
    needs_gradient = tuple(torch.is_grad_enabled() and x.requires_grad for x in (states, unembedding))
    out: tuple[Tensor, Tensor, Tensor] = WeightedCrossEntropy.apply(
        states, unembedding, targets, coefficients, chunk_rows, by_head, needs_gradient
    )  # type: ignore[no-untyped-call]
    return out


class WeightedCrossEntropy(torch.autograd.Function):
    """The autograd function of `weighted_cross_entropy`.

    It sums the unembedding's gradient over the chunks of each sum, in fp32 or a more precise dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        unembedding: Tensor,
        targets: Tensor,
        coefficients: RowFunction,
        chunk_rows: int | None,
        by_head: bool,
        needs_gradient: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums, the losses and the coefficients. Store the gradients of the sums in `ctx`."""
        dtype = product_dtype(states, unembedding)
        weight = unembedding.to(dtype)
        num_groups = len(targets) if by_head else 1
        # not zeros_like, which would keep the strides of an expanded or transposed input
        states_gradient = states.new_zeros(targets.numel(), states.shape[-1]) if needs_gradient[0] else None
        unembedding_gradients = None
        if needs_gradient[1]:
            shape, sum_dtype = (num_groups, *unembedding.shape), statistics_dtype(unembedding.dtype)
            unembedding_gradients = unembedding.new_zeros(shape, dtype=sum_dtype)
        losses = states.new_zeros(targets.numel(), dtype=statistics_dtype(dtype))
        all_factors = torch.zeros_like(losses)
        with torch.autocast(states.device.type, enabled=False):
            for chunk in chunks(states, weight, targets, chunk_rows, by_head=by_head):
                factors = coefficients(chunk).to(losses.dtype)
                losses.index_copy_(0, chunk.rows, chunk.losses)
                all_factors.index_copy_(0, chunk.rows, factors)
                if not any(needs_gradient):
                    continue
                errors, factors = chunk.errors(factors)
                if states_gradient is not None:
                    rows = (errors @ weight).mul_(factors)
                    states_gradient.index_copy_(0, chunk.rows, rows.to(states.dtype))
                if unembedding_gradients is not None:
                    rows, gradient = (chunk.states * factors).to(dtype), unembedding_gradients[chunk.group]
                    if dtype == gradient.dtype:
                        gradient.addmm_(errors.T, rows)
                    else:
                        gradient.add_(errors.T @ rows)
        ctx.gradients = (
            None if states_gradient is None else states_gradient.view(states.shape),
            unembedding_gradients,
        )
        ctx.unembedding_dtype = unembedding.dtype
        losses, all_factors = losses.view(targets.shape), all_factors.view(targets.shape)
        ctx.mark_non_differentiable(losses, all_factors)
        products = losses * all_factors
        return products.flatten(1).sum(dim=1) if by_head else products.sum(), losses, all_factors

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the stored gradients, multiplied by the gradients of the sums."""
        if torch.is_grad_enabled():
            raise RuntimeError("weighted_cross_entropy has no second derivative: remove create_graph=True")
        if ctx.gradients is None:
            raise RuntimeError("weighted_cross_entropy was already differentiated: backward can run only once")
        # scale in place and drop the reference, to avoid a copy
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(output_gradients[0].view(-1, *[1] * (gradient.ndim - 1)))
        states_gradient, unembedding_gradients = gradients
        unembedding_gradient = None
        if unembedding_gradients is not None:
            unembedding_gradient = unembedding_gradients[0]
            for other in unembedding_gradients[1:]:
                unembedding_gradient += other
            unembedding_gradient = unembedding_gradient.to(ctx.unembedding_dtype)
        return states_gradient, unembedding_gradient, None, None, None, None, None


class Chunk:
    """Some of the rows with a target, their losses, and the tensors from which their gradients are computed.

    All chunks share two buffers of [row, vocabulary], and every step overwrites the result of the previous one. So a
    chunk must be used before the next one is created, and `errors` can be called only once.

    - `products` has the dtype of the matrix products. It contains the logits, and later the errors.
    - `exponentials` has fp32 or a more precise dtype. It contains the logits to the base 2, and later
      their exponentials relative to the largest logit of the row.

    If these dtypes are equal, both are the same tensor, and the conversions between them are left out.
    """

    def __init__(
        self,
        rows: Int[Tensor, " row"],
        targets: Int[Tensor, " row"],
        states: Float[Tensor, "row dim"],
        unembedding: Float[Tensor, "vocabulary dim"],
        buffers: tuple[Float[Tensor, "buffer vocabulary"], Float[Tensor, "buffer vocabulary"]],
        group: int,
    ) -> None:
        """Compute the losses of the rows.

        Args:
            rows: the flat indices of the rows into [head, batch, position].
            targets: the target of each row.
            states: the hidden state of each row.
            unembedding: the matrix that maps hidden states to logits.
            buffers: `products` and `exponentials`, which may have more rows.
            group: the index of the sum to which the rows belong.
        """
        self.rows, self.targets, self.states, self.group = rows, targets, states, group
        products, exponentials = buffers
        self.has_one_buffer = products is exponentials
        self.exponentials = exponentials[: len(rows)]
        self.products = self.exponentials if self.has_one_buffer else products[: len(rows)]
        # logits to the base 2, because some processors compute powers of 2 several times faster than powers of e
        if self.has_one_buffer:
            torch.mm(states * LOG2_E, unembedding.T, out=self.exponentials)
        else:
            torch.mm(states, unembedding.T, out=self.products)
            # convert before the multiplication, which would otherwise be rounded to the dtype of the products
            self.exponentials.copy_(self.products).mul_(LOG2_E)
        target_logits = self.exponentials.gather(1, targets.unsqueeze(1))
        largest = self.exponentials.amax(dim=1, keepdim=True)
        self.sums = self.exponentials.sub_(largest).exp2_().sum(dim=1)
        self.losses = (self.sums.log2() + (largest - target_logits).squeeze(1)) / LOG2_E

    def top_entropies(self, count: int) -> Float[Tensor, " row"]:
        """Return the entropy in nats of the `count` most probable tokens of each row.

        The probabilities of these tokens are scaled to sum 1. If the vocabulary is smaller, all tokens are used. This
        method must be called before `errors`.
        """
        top = self.exponentials.topk(min(count, self.exponentials.shape[1]), dim=1, sorted=False).values
        total = top.sum(dim=1)
        entropies: Tensor = total.log() + torch.special.entr(top).sum(dim=1) / total  # entr(x) = −x·log x
        return entropies

    def errors(self, factors: Float[Tensor, " row"]) -> tuple[Float[Tensor, "row vocabulary"], Float[Tensor, "row 1"]]:
        """Return two tensors whose product is the gradient of Σ factor·loss with respect to the logits."""
        self.exponentials.scatter_add_(1, self.targets.unsqueeze(1), -self.sums.unsqueeze(1))
        if self.has_one_buffer:
            # the small operand of each product includes the division by the sum
            return self.products, (factors / self.sums).unsqueeze(1)
        torch.div(self.exponentials, self.sums.unsqueeze(1), out=self.products)
        return self.products, factors.unsqueeze(1)


def chunks(
    states: Float[Tensor, "head batch position dim"],
    unembedding: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, "head batch position"],
    chunk_rows: int | None,
    *,
    by_head: bool = False,
) -> Iterator[Chunk]:
    """Yield the rows with a target in chunks of nearly equal size, which share their buffers.

    If `by_head` is true, each chunk contains rows of only one head, and its group is the index of this head.
    """
    rows = (targets != IGNORED).flatten().nonzero().squeeze(1)
    if not len(rows):
        return
    flat_states, flat_targets = states.detach().flatten(0, 2), targets.flatten()
    vocab_size, dtype = len(unembedding), statistics_dtype(unembedding.dtype)
    size = GPU_CHUNK_BYTES if states.device.type == "cuda" else CHUNK_BYTES
    chunk_rows = chunk_rows or max(1, size // (vocab_size * dtype.itemsize))
    groups = [rows]
    if by_head:
        counts = (targets != IGNORED).flatten(1).sum(dim=1)
        groups = list(torch.split(rows, counts.tolist()))
    parts = [
        (i, part) for i, group in enumerate(groups) for part in group.tensor_split(-(-len(group) // chunk_rows) or 1)
    ]
    exponentials = states.new_empty(max(len(part) for _, part in parts), vocab_size, dtype=dtype)
    products = exponentials
    if unembedding.dtype != dtype:
        products = states.new_empty(exponentials.shape, dtype=unembedding.dtype)
    for group_index, part in parts:
        if len(part):
            part_states = flat_states[part].to(unembedding.dtype)
            yield Chunk(part, flat_targets[part], part_states, unembedding, (products, exponentials), group_index)


def product_dtype(states: Tensor, unembedding: Tensor) -> torch.dtype:
    """Return the dtype of the product `states @ unembedding.T` under the current autocast setting."""
    device = states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(states.dtype, unembedding.dtype)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of losses and softmax sums. It is fp32, or `dtype` if that is more precise."""
    return torch.promote_types(dtype, torch.float32)
