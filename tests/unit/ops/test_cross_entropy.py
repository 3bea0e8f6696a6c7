import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.data.collate import IGNORED
from wmtp.ops import cross_entropy as losses_module
from wmtp.ops.cross_entropy import Chunk, RowFunction, cross_entropy, row_statistics, weighted_cross_entropy

DIM, VOCAB_SIZE = 8, 11
Gradients = tuple[Tensor, ...]


def plain_cross_entropy(states: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Return the losses from all logits at once, for autograd: the reference for the chunked loss."""
    logits = (states @ unembedding.T).float()
    return F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none", ignore_index=IGNORED)


def inputs(num_heads: int = 4, seed: int = 0, masked: float = 0.4, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, an unembedding and targets of which a share `masked` is ignored."""
    torch.manual_seed(seed)
    states = (scale * torch.randn(num_heads, 2, 5, DIM)).requires_grad_()
    unembedding = torch.randn(VOCAB_SIZE, DIM, requires_grad=True)
    targets = torch.randint(0, VOCAB_SIZE, (num_heads, 2, 5))
    targets[torch.rand(targets.shape) < masked] = IGNORED
    targets[:, 0, 2] = IGNORED  # a position without a target for any head
    return states, unembedding, targets


def fixed_coefficients(factors: Tensor) -> RowFunction:
    """Return coefficients that do not depend on the losses."""
    return lambda chunk: factors.flatten()[chunk.rows]


def rows_of(losses: Tensor) -> Chunk:
    """Return an object with the losses and the indices of all rows, in place of a chunk."""
    return SimpleNamespace(losses=losses.detach().flatten(), rows=torch.arange(losses.numel()))  # type: ignore[return-value]


def shifted_rows(rows: Chunk, offset: int) -> Chunk:
    """Return the same rows with indices that are larger by `offset`."""
    return SimpleNamespace(losses=rows.losses, rows=rows.rows + offset)  # type: ignore[return-value]


def plain_gradients(states: Tensor, unembedding: Tensor, targets: Tensor, coefficients: RowFunction) -> Gradients:
    """Return the gradients of Σ c·CE by autograd through all logits."""
    losses = plain_cross_entropy(states, unembedding, targets)
    factors = coefficients(rows_of(losses)).view(losses.shape)
    return torch.autograd.grad((factors * losses).sum(), (states, unembedding))


def chunked_gradients(
    states: Tensor, unembedding: Tensor, targets: Tensor, coefficients: RowFunction, chunk_rows: int | None = None
) -> Gradients:
    """Return the gradients of Σ c·CE by the chunked loss."""
    loss, _, _ = weighted_cross_entropy(states, unembedding, targets, coefficients, chunk_rows)
    return torch.autograd.grad(loss, (states, unembedding))


def largest_error(got: Gradients, expected: Gradients) -> float:
    """Return the largest relative error among the gradients."""
    return max(float((g.double() - w.double()).norm() / w.double().norm()) for g, w in zip(got, expected, strict=True))


COEFFICIENTS: dict[str, RowFunction] = {
    "constant": lambda chunk: torch.full_like(chunk.losses, 0.3),
    "fixed": fixed_coefficients(torch.randn(200, generator=torch.Generator().manual_seed(1))),
    "function of the loss": lambda chunk: chunk.losses.neg().exp().clamp(0.05, 0.5),
    "selection": lambda chunk: (chunk.losses > 2.0).float(),
    "position": lambda chunk: (chunk.rows % 7).float(),
}


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000, None])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_gradients_equal_those_of_all_logits_at_once(name: str, num_heads: int, chunk_rows: int | None) -> None:
    expected = plain_gradients(*inputs(num_heads), COEFFICIENTS[name])
    got = chunked_gradients(*inputs(num_heads), COEFFICIENTS[name], chunk_rows)
    assert largest_error(got, expected) < 1e-5
    assert largest_error(chunked_gradients(*inputs(num_heads), lambda chunk: chunk.losses), expected) > 1e-2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 30), st.sampled_from([0.01, 1.0, 100.0])
)
def test_losses_and_gradients_are_correct_for_any_mask_chunk_and_scale(
    num_heads: int, seed: int, masked: float, chunk_rows: int, scale: float
) -> None:
    # in double precision, so that rounding has no effect even for a saturated softmax
    states, unembedding, targets = inputs(num_heads, seed, masked, scale)
    states, unembedding = (x.detach().double().requires_grad_() for x in (states, unembedding))
    factors = torch.rand(targets.shape, dtype=torch.double)
    logits = (states @ unembedding.T).movedim(-1, 1)
    reference = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    loss, losses, used = weighted_cross_entropy(states, unembedding, targets, fixed_coefficients(factors), chunk_rows)
    torch.testing.assert_close(losses, reference.detach())
    torch.testing.assert_close(cross_entropy(states, unembedding, targets, chunk_rows), reference.detach())
    assert torch.equal(used, factors.where(targets != IGNORED, 0.0))
    expected = torch.autograd.grad((reference * factors).sum(), (states, unembedding))
    for got, gradient in zip(torch.autograd.grad(loss, (states, unembedding)), expected, strict=True):
        torch.testing.assert_close(got, gradient)


def test_losses_are_finite_if_the_softmax_saturates() -> None:
    states, unembedding, targets = inputs(scale=1e4)
    losses = cross_entropy(states, unembedding, targets)
    assert losses.max() > 1e4
    torch.testing.assert_close(losses, plain_cross_entropy(states, unembedding, targets).detach())
    naive = -torch.softmax(states @ unembedding.T, dim=-1).log()
    assert naive.max() == torch.inf


def test_coefficients_are_called_once_per_row_with_a_target_and_without_gradient() -> None:
    states, unembedding, targets = inputs()
    called_rows: list[Tensor] = []
    sizes: list[int] = []

    def coefficients(chunk: Chunk) -> Tensor:
        assert not chunk.losses.requires_grad and not torch.is_grad_enabled()
        torch.testing.assert_close(chunk.losses, cross_entropy(states, unembedding, targets).flatten()[chunk.rows])
        called_rows.append(chunk.rows)
        sizes.append(len(chunk.rows))
        return torch.ones_like(chunk.losses)

    weighted_cross_entropy(states, unembedding, targets, coefficients, chunk_rows=4)
    assert torch.cat(called_rows).tolist() == (targets != IGNORED).flatten().nonzero().squeeze(1).tolist()
    assert max(sizes) == 4 and min(sizes) >= 3


def test_a_row_without_target_has_no_loss_no_coefficient_and_no_gradient() -> None:
    states, unembedding, targets = inputs()
    loss, losses, used = weighted_cross_entropy(states, unembedding, targets, lambda chunk: chunk.losses + 1)
    gradient, _ = torch.autograd.grad(loss, (states, unembedding))
    without = targets == IGNORED
    assert without.any() and without[:, 0, 2].all()
    assert not losses[without].any() and not used[without].any() and not gradient[without].any()
    assert losses[~without].all() and used[~without].all() and gradient[~without].any(dim=1).all()


def test_loss_without_targets_is_zero_and_differentiable() -> None:
    states, unembedding, targets = inputs(masked=1.1)
    loss, losses, used = weighted_cross_entropy(states, unembedding, targets, lambda chunk: 1 / chunk.losses)
    loss.backward()
    assert loss.item() == 0 and not losses.any() and not used.any()
    assert states.grad is not None and unembedding.grad is not None
    assert not states.grad.any() and not unembedding.grad.any()
    assert not cross_entropy(states, unembedding, targets).any()


def test_the_weighted_sum_can_be_scaled_afterwards() -> None:
    coefficients = COEFFICIENTS["function of the loss"]
    states, unembedding, targets = inputs()
    loss, _, used = weighted_cross_entropy(states, unembedding, targets, coefficients, chunk_rows=3)
    scale = 1 / used.sum()
    after = torch.autograd.grad(loss * scale, (states, unembedding))
    within = chunked_gradients(*inputs(), lambda chunk: coefficients(chunk) * scale)
    assert largest_error(after, within) < 1e-6
    assert largest_error(chunked_gradients(*inputs(), coefficients), within) > 1e-2


@pytest.mark.parametrize("trained", ["states", "unembedding", "neither"])
def test_frozen_inputs_get_no_gradient_and_cost_no_matrix_products(trained: str) -> None:
    expected = dict(zip(("states", "unembedding"), plain_gradients(*inputs(), COEFFICIENTS["fixed"]), strict=True))
    states, unembedding, targets = inputs()
    states.requires_grad_(trained == "states")
    unembedding.requires_grad_(trained == "unembedding")
    with CountedProducts() as products:
        loss, _, _ = weighted_cross_entropy(states, unembedding, targets, COEFFICIENTS["fixed"])
    assert products.count == (1 if trained == "neither" else 2)
    assert loss.requires_grad == (trained != "neither")
    if trained != "neither":
        loss.backward()
        leaf = states if trained == "states" else unembedding
        assert leaf.grad is not None
        assert largest_error((leaf.grad,), (expected[trained],)) < 1e-5
    with CountedProducts() as products:
        weighted_cross_entropy(*inputs(), COEFFICIENTS["fixed"])
    assert products.count == 3


class CountedProducts(TorchDispatchMode):
    """Mode that counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


def test_losses_are_the_same_without_gradients() -> None:
    states, unembedding, targets = inputs()
    with torch.no_grad(), CountedProducts() as products:
        loss, losses, _ = weighted_cross_entropy(states, unembedding, targets, COEFFICIENTS["fixed"])
    assert not loss.requires_grad and products.count == 1
    trained, trained_losses, _ = weighted_cross_entropy(states, unembedding, targets, COEFFICIENTS["fixed"])
    assert torch.equal(loss, trained.detach()) and torch.equal(losses, trained_losses)
    assert not trained_losses.requires_grad
    assert not cross_entropy(states, unembedding, targets).requires_grad


class TiedModel(nn.Module):
    """A model whose states depend on the rows of its unembedding, which is also its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB_SIZE, DIM))
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the states of two heads."""
        states = torch.tanh(self.linear(self.embedding[tokens]))
        return torch.stack([states, states.flip(0)])


def model_gradients(chunked: bool, compiled: bool = False) -> Gradients:
    """Return the gradients of a tied model's parameters."""
    model = TiedModel()
    tokens = torch.randint(VOCAB_SIZE, (3, 4), generator=torch.Generator().manual_seed(1))
    targets = torch.stack([tokens, tokens.flip(1)])

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        states = model(tokens)
        if chunked:
            total, _, _ = weighted_cross_entropy(
                states, model.embedding, targets, lambda chunk: chunk.losses.clamp(max=1), 5
            )
            return total / 7
        losses = plain_cross_entropy(states, model.embedding, targets)
        return (losses.detach().clamp(max=1) * losses).sum() / 7

    (torch.compile(loss, backend="aot_eager") if compiled else loss)(tokens, targets).backward()
    return tuple(parameter.grad for parameter in model.parameters())


def test_a_tied_unembedding_gets_the_gradients_of_both_uses() -> None:
    assert largest_error(model_gradients(chunked=True), model_gradients(chunked=False)) < 1e-5


def test_unembedding_gets_one_gradient_for_all_heads_and_chunks() -> None:
    states, unembedding, targets = inputs()
    hook_calls: list[Tensor] = []
    unembedding.register_hook(hook_calls.append)
    weighted_cross_entropy(states, unembedding, targets, COEFFICIENTS["fixed"], chunk_rows=1)[0].backward()
    assert len(hook_calls) == 1


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients() -> None:
    torch._dynamo.reset()
    assert largest_error(model_gradients(chunked=True, compiled=True), model_gradients(chunked=False)) < 1e-5


def with_dtypes(states_dtype: torch.dtype, unembedding_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs of the given precisions, with states so small that the softmax does not saturate."""
    states, unembedding, targets = inputs(scale=0.5)
    return (
        states.detach().to(states_dtype).requires_grad_(),
        unembedding.detach().to(unembedding_dtype).requires_grad_(),
        targets,
    )


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("states_dtype", "unembedding_dtype", "autocast"),
    [(FP32, FP32, True), (BF16, FP32, True), (BF16, BF16, True), (BF16, BF16, False)],
)
def test_bf16_is_as_close_to_fp32_as_all_logits_at_once(
    states_dtype: torch.dtype, unembedding_dtype: torch.dtype, autocast: bool
) -> None:
    arguments = with_dtypes(states_dtype, unembedding_dtype)
    exact = plain_gradients(
        *(x.detach().double().requires_grad_() for x in arguments[:2]), arguments[2], RANDOM_FACTORS
    )
    with torch.autocast("cpu", BF16, enabled=autocast):
        plain = plain_gradients(*arguments, RANDOM_FACTORS)
        loss, losses, _ = weighted_cross_entropy(*arguments, checked_factors, chunk_rows=7)
        assert torch.is_autocast_enabled("cpu") == autocast
    assert losses.dtype == loss.dtype == FP32
    got = torch.autograd.grad(loss, arguments[:2])
    assert [gradient.dtype for gradient in got] == [states_dtype, unembedding_dtype]
    assert largest_error(got, exact) < 1.3 * largest_error(plain, exact) < 0.02
    # the products are computed in bf16: in fp32 the error would be far smaller
    assert largest_error(got, exact) > 1e-3


def checked_factors(chunk: Chunk) -> Tensor:
    """Return RANDOM_FACTORS of the rows, and check that losses are in fp32 and autocast is off."""
    assert chunk.losses.dtype == FP32 and not torch.is_autocast_enabled("cpu")
    return RANDOM_FACTORS(chunk)


RANDOM_FACTORS: RowFunction = fixed_coefficients(torch.rand(200, generator=torch.Generator().manual_seed(2)))


def test_the_softmax_of_bf16_products_is_summed_in_fp32() -> None:
    # 4096 equal logits: a sum of ones in bf16 stays at 256
    states, unembedding = torch.ones(1, 1, 3, 4, dtype=BF16), torch.ones(4096, 4, dtype=BF16)
    losses = cross_entropy(states, unembedding, torch.zeros(1, 1, 3, dtype=torch.long))
    torch.testing.assert_close(losses, torch.full((1, 1, 3), 4096.0).log())


@pytest.mark.parametrize("scale", [3.0, 10.0, 30.0])
def test_losses_of_bf16_logits_are_those_of_the_same_logits_in_fp32(scale: float) -> None:
    torch.manual_seed(0)
    states, unembedding = (scale / 8 * torch.randn(1, 1, 128, 64)).to(BF16), torch.randn(512, 64).to(BF16)
    targets = torch.randint(512, (1, 1, 128))
    expected = plain_cross_entropy(states, unembedding, targets)
    torch.testing.assert_close(cross_entropy(states, unembedding, targets), expected, rtol=2e-6, atol=2e-6)
    _, losses, _ = weighted_cross_entropy(states, unembedding, targets, COEFFICIENTS["constant"])
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=2e-6)
    # the control: torch multiplies in bf16, although the result is in fp32
    logits = (states @ unembedding.T).flatten(0, 2)
    scaled = torch.mul(logits, losses_module.LOG2_E, out=torch.empty_like(logits, dtype=FP32))
    naive = F.cross_entropy(scaled / losses_module.LOG2_E, targets.flatten(), reduction="none")
    assert (naive - expected.flatten()).abs().max() > 0.005 * scale


def test_a_bf16_unembedding_has_as_precise_a_gradient_in_many_chunks_as_in_one_product() -> None:
    torch.manual_seed(0)
    states, unembedding = 0.3 * torch.randn(1, 1, 2048, 32), torch.randn(64, 32)
    targets, factors = torch.randint(64, (1, 1, 2048)), fixed_coefficients(torch.rand(2048))

    def errors(*gradients: Gradients) -> list[float]:
        return [largest_error(gradient, exact) for gradient in gradients]

    def arguments(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, RowFunction]:
        rounded = (x.to(BF16).to(dtype).requires_grad_() for x in (states, unembedding))
        return *rounded, targets, factors  # type: ignore[return-value]

    exact = plain_gradients(*arguments(torch.double))
    (one_product,) = errors(plain_gradients(*arguments(BF16)))
    for num_chunks in (1, 32, 512, 2048):
        gradients = chunked_gradients(*arguments(BF16), chunk_rows=2048 // num_chunks)
        assert [gradient.dtype for gradient in gradients] == [BF16, BF16]
        assert errors(gradients)[0] < 2 * one_product
    # the control: a sum in bf16 over the gradients of the chunks
    full_states, full_unembedding, _, _ = arguments(BF16)
    total = torch.zeros_like(full_unembedding)
    for i in range(0, 2048, 64):
        rows = slice(i, i + 64)
        chunk = full_states[:, :, rows], full_unembedding, targets[:, :, rows]
        total += plain_gradients(*chunk, lambda all_rows, i=i: factors(shifted_rows(all_rows, i)))[1]  # type: ignore[misc]
    assert largest_error((total,), exact[1:]) > 2 * one_product


def test_states_may_have_a_different_precision_than_the_unembedding() -> None:
    states, unembedding, targets = with_dtypes(FP32, BF16)
    got = cross_entropy(states, unembedding, targets)
    torch.testing.assert_close(got, plain_cross_entropy(states, unembedding.float(), targets).detach())


def test_a_second_backward_is_refused() -> None:
    states, unembedding, targets = inputs()
    loss, _, _ = weighted_cross_entropy(states, unembedding, targets, RANDOM_FACTORS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_a_second_derivative_is_refused() -> None:
    states, unembedding, targets = inputs()
    loss, _, _ = weighted_cross_entropy(states, unembedding, targets, RANDOM_FACTORS)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, states, create_graph=True)


def test_gradients_are_returned_without_a_copy() -> None:
    states, unembedding, targets = inputs()
    loss, _, _ = weighted_cross_entropy(states, unembedding, targets, RANDOM_FACTORS)
    computed = [gradient.data_ptr() for gradient in loss.grad_fn.gradients]
    (loss * 3).backward()
    assert states.grad is not None and unembedding.grad is not None
    assert [states.grad.data_ptr(), unembedding.grad.data_ptr()] == computed


class LiveBytes(TorchDispatchMode):
    """Mode that measures the peak bytes of all storages allocated within it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in [*args, *(kwargs or {}).values()] if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, partial(self.sizes.pop, key, None))
                    self.largest = max(self.largest, storage.nbytes())
                    self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def large_vocabulary_inputs(num_rows: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs whose vocabulary is much larger than the dimension of the states."""
    torch.manual_seed(0)
    states, unembedding = torch.randn(1, 1, num_rows, 4), torch.randn(1000, 4)
    return states.requires_grad_(), unembedding.requires_grad_(), torch.randint(1000, (1, 1, num_rows))


def allocated_by(run: Callable[[], object]) -> LiveBytes:
    """Return the allocations of `run`."""
    with LiveBytes() as live:
        run()
    return live


def test_only_the_logits_of_one_chunk_are_allocated() -> None:
    states, unembedding, targets = large_vocabulary_inputs()
    chunk_rows = 8
    chunk = chunk_rows * len(unembedding) * 4
    gradients = 4 * (states.numel() + unembedding.numel())
    row_bytes = chunk / 4  # row numbers, losses and a chunk's states

    chunked = allocated_by(
        lambda: weighted_cross_entropy(states, unembedding, targets, RANDOM_FACTORS, chunk_rows)[0].backward()
    )
    assert chunked.largest == chunk
    assert chunked.peak <= chunk + gradients + row_bytes
    assert allocated_by(lambda: cross_entropy(states, unembedding, targets, chunk_rows)).largest == chunk
    # the controls: all logits at once, and a chunk larger by one row
    plain = allocated_by(lambda: plain_cross_entropy(states, unembedding, targets).sum().backward())
    assert plain.largest == 12 * chunk and plain.peak >= 3 * plain.largest
    assert allocated_by(lambda: cross_entropy(states, unembedding, targets, chunk_rows + 1)).largest > chunk


def test_the_default_chunk_size_has_a_limit_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = large_vocabulary_inputs()
    monkeypatch.setattr(losses_module, "CHUNK_BYTES", 10 * 1000 * 4)
    assert 0.9 * 40_000 <= allocated_by(lambda: cross_entropy(*arguments)).largest <= 40_000
    monkeypatch.setattr(losses_module, "CHUNK_BYTES", 1)
    assert allocated_by(lambda: cross_entropy(*arguments)).largest <= len(arguments[1]) * 4 * 4


def plain_entropies(logits: Tensor, count: int) -> Tensor:
    """Return the entropies of the `count` most probable tokens, from all logits in double precision."""
    ordered = logits.double().sort(dim=-1, descending=True).values[..., :count]
    p = ordered.exp() / ordered.exp().sum(dim=-1, keepdim=True)
    return -(p * p.log()).where(p > 0, 0.0).sum(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("count", [3, VOCAB_SIZE, 2 * VOCAB_SIZE])
def test_entropies_are_those_of_the_most_probable_tokens(count: int, scale: float, dtype: torch.dtype) -> None:
    """Entropies and losses are computed in one pass, from the same logits."""
    states, unembedding, targets = inputs(scale=scale)
    states, unembedding = states.to(dtype), unembedding.to(dtype)
    logits = (states @ unembedding.T).detach()
    expected = plain_entropies(logits, count).where(targets != IGNORED, 0.0)
    functions: list[RowFunction] = [lambda chunk: chunk.top_entropies(count), lambda chunk: chunk.losses]
    for chunk_rows in (1, 3, None):
        entropies, losses = row_statistics(states, unembedding, targets, functions, chunk_rows)
        torch.testing.assert_close(entropies.double(), expected, atol=1e-5, rtol=0)
        assert torch.equal(losses, cross_entropy(states, unembedding, targets, chunk_rows))
    assert entropies.min() >= 0
    if count < VOCAB_SIZE:
        of_all = plain_entropies(logits, VOCAB_SIZE).where(targets != IGNORED, 0.0)
        assert not torch.allclose(entropies.double(), of_all), "the control: the entropy of all tokens"


def test_coefficients_from_entropies_do_not_change_the_gradient() -> None:
    """The entropies are computed from the buffers that later contain the gradient of the logits."""
    states, unembedding, targets = inputs()
    entropies = plain_entropies((states @ unembedding.T).detach(), 5).float()
    expected = plain_gradients(states, unembedding, targets, fixed_coefficients(entropies))
    found = chunked_gradients(states, unembedding, targets, lambda chunk: chunk.top_entropies(5), chunk_rows=3)
    assert largest_error(found, expected) <= 1e-5
    constant = plain_gradients(states, unembedding, targets, fixed_coefficients(torch.ones_like(entropies)))
    assert largest_error(found, constant) > 1e-2
