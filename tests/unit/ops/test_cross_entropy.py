import weakref
from collections.abc import Callable
from functools import partial
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
from wmtp.ops.cross_entropy import Coefficients, cross_entropy, weighted_cross_entropy

DIM, VOCAB_SIZE = 8, 11
Gradients = tuple[Tensor, ...]


def plain_cross_entropy(states: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, differentiated by autograd: the reference for the chunked loss."""
    logits = (states @ unembedding.T).float()
    return F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none", ignore_index=IGNORED)


def inputs(num_heads: int = 4, seed: int = 0, masked: float = 0.4, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """States, an unembedding and ragged targets."""
    torch.manual_seed(seed)
    states = (scale * torch.randn(num_heads, 2, 5, DIM)).requires_grad_()
    unembedding = torch.randn(VOCAB_SIZE, DIM, requires_grad=True)
    targets = torch.randint(0, VOCAB_SIZE, (num_heads, 2, 5))
    targets[torch.rand(targets.shape) < masked] = IGNORED
    targets[:, 0, 2] = IGNORED  # a position without any head
    return states, unembedding, targets


def known(factors: Tensor) -> Coefficients:
    """Coefficients that do not depend on the losses."""
    return lambda losses, rows: factors.flatten()[rows]


def plain_gradients(states: Tensor, unembedding: Tensor, targets: Tensor, coefficients: Coefficients) -> Gradients:
    """The gradients of Σ c·CE by autograd through all logits."""
    losses = plain_cross_entropy(states, unembedding, targets)
    factors = coefficients(losses.detach().flatten(), torch.arange(losses.numel())).view(losses.shape)
    return torch.autograd.grad((factors * losses).sum(), (states, unembedding))


def chunked_gradients(
    states: Tensor, unembedding: Tensor, targets: Tensor, coefficients: Coefficients, chunk_rows: int | None = None
) -> Gradients:
    """The same by the chunked loss."""
    loss, _, _ = weighted_cross_entropy(states, unembedding, targets, coefficients, chunk_rows)
    return torch.autograd.grad(loss, (states, unembedding))


def error(got: Gradients, wanted: Gradients) -> float:
    """The largest relative error of a gradient."""
    return max(float((g.double() - w.double()).norm() / w.double().norm()) for g, w in zip(got, wanted, strict=True))


COEFFICIENTS: dict[str, Coefficients] = {
    "constant": lambda losses, rows: torch.full_like(losses, 0.3),
    "known": known(torch.randn(200, generator=torch.Generator().manual_seed(1))),
    "function of the loss": lambda losses, rows: losses.neg().exp().clamp(0.05, 0.5),
    "selection": lambda losses, rows: (losses > 2.0).float(),
    "position": lambda losses, rows: (rows % 7).float(),
}


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000, None])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_gradients_are_those_of_all_logits_at_once(name: str, num_heads: int, chunk_rows: int | None) -> None:
    wanted = plain_gradients(*inputs(num_heads), COEFFICIENTS[name])
    got = chunked_gradients(*inputs(num_heads), COEFFICIENTS[name], chunk_rows)
    assert error(got, wanted) < 1e-5
    assert error(chunked_gradients(*inputs(num_heads), lambda losses, rows: losses), wanted) > 1e-2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 30), st.sampled_from([0.01, 1.0, 100.0])
)
def test_losses_and_gradients_hold_for_any_mask_chunk_and_scale(
    num_heads: int, seed: int, masked: float, chunk_rows: int, scale: float
) -> None:
    # in double precision, so that the comparison is one of formulas, also where a softmax saturates
    states, unembedding, targets = inputs(num_heads, seed, masked, scale)
    states, unembedding = (x.detach().double().requires_grad_() for x in (states, unembedding))
    factors = torch.rand(targets.shape, dtype=torch.double)
    logits = (states @ unembedding.T).movedim(-1, 1)
    dense = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    loss, losses, used = weighted_cross_entropy(states, unembedding, targets, known(factors), chunk_rows)
    torch.testing.assert_close(losses, dense.detach())
    torch.testing.assert_close(cross_entropy(states, unembedding, targets, chunk_rows), dense.detach())
    assert torch.equal(used, factors.where(targets != IGNORED, 0.0))
    wanted = torch.autograd.grad((dense * factors).sum(), (states, unembedding))
    for got, gradient in zip(torch.autograd.grad(loss, (states, unembedding)), wanted, strict=True):
        torch.testing.assert_close(got, gradient)


def test_losses_are_finite_where_the_softmax_saturates() -> None:
    states, unembedding, targets = inputs(scale=1e4)
    losses = cross_entropy(states, unembedding, targets)
    assert losses.max() > 1e4
    torch.testing.assert_close(losses, plain_cross_entropy(states, unembedding, targets).detach())
    naive = -torch.softmax(states @ unembedding.T, dim=-1).log()
    assert naive.max() == torch.inf


def test_coefficients_are_called_once_per_row_with_a_target_and_without_gradient() -> None:
    states, unembedding, targets = inputs()
    seen: list[Tensor] = []
    sizes: list[int] = []

    def coefficients(losses: Tensor, rows: Tensor) -> Tensor:
        assert not losses.requires_grad and not torch.is_grad_enabled()
        torch.testing.assert_close(losses, cross_entropy(states, unembedding, targets).flatten()[rows])
        seen.append(rows)
        sizes.append(len(rows))
        return torch.ones_like(losses)

    weighted_cross_entropy(states, unembedding, targets, coefficients, chunk_rows=4)
    assert torch.cat(seen).tolist() == (targets != IGNORED).flatten().nonzero().squeeze(1).tolist()
    assert max(sizes) == 4 and min(sizes) >= 3


def test_a_row_without_target_has_no_loss_no_coefficient_and_no_gradient() -> None:
    states, unembedding, targets = inputs()
    loss, losses, used = weighted_cross_entropy(states, unembedding, targets, lambda losses, rows: losses + 1)
    gradient, _ = torch.autograd.grad(loss, (states, unembedding))
    without = targets == IGNORED
    assert without.any() and without[:, 0, 2].all()
    assert not losses[without].any() and not used[without].any() and not gradient[without].any()
    assert losses[~without].all() and used[~without].all() and gradient[~without].any(dim=1).all()


def test_loss_without_targets_is_zero_and_differentiable() -> None:
    states, unembedding, targets = inputs(masked=1.1)
    loss, losses, used = weighted_cross_entropy(states, unembedding, targets, lambda losses, rows: 1 / losses)
    loss.backward()
    assert loss.item() == 0 and not losses.any() and not used.any()
    assert states.grad is not None and unembedding.grad is not None
    assert not states.grad.any() and not unembedding.grad.any()
    assert not cross_entropy(states, unembedding, targets).any()


def test_sum_can_be_scaled() -> None:
    coefficients = COEFFICIENTS["function of the loss"]
    states, unembedding, targets = inputs()
    loss, _, used = weighted_cross_entropy(states, unembedding, targets, coefficients, chunk_rows=3)
    scale = 1 / used.sum()
    after = torch.autograd.grad(loss * scale, (states, unembedding))
    within = chunked_gradients(*inputs(), lambda losses, rows: coefficients(losses, rows) * scale)
    assert error(after, within) < 1e-6
    assert error(chunked_gradients(*inputs(), coefficients), within) > 1e-2


@pytest.mark.parametrize("trained", ["states", "unembedding", "neither"])
def test_frozen_inputs_get_no_gradient_and_need_no_products(trained: str) -> None:
    wanted = dict(zip(("states", "unembedding"), plain_gradients(*inputs(), COEFFICIENTS["known"]), strict=True))
    states, unembedding, targets = inputs()
    states.requires_grad_(trained == "states")
    unembedding.requires_grad_(trained == "unembedding")
    with Products() as products:
        loss, _, _ = weighted_cross_entropy(states, unembedding, targets, COEFFICIENTS["known"])
    assert products.count == (1 if trained == "neither" else 2)
    assert loss.requires_grad == (trained != "neither")
    if trained != "neither":
        loss.backward()
        leaf = states if trained == "states" else unembedding
        assert leaf.grad is not None
        assert error((leaf.grad,), (wanted[trained],)) < 1e-5
    with Products() as products:
        weighted_cross_entropy(*inputs(), COEFFICIENTS["known"])
    assert products.count == 3


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


def test_without_gradient_the_losses_are_the_same() -> None:
    states, unembedding, targets = inputs()
    with torch.no_grad(), Products() as products:
        loss, losses, _ = weighted_cross_entropy(states, unembedding, targets, COEFFICIENTS["known"])
    assert not loss.requires_grad and products.count == 1
    trained, trained_losses, _ = weighted_cross_entropy(states, unembedding, targets, COEFFICIENTS["known"])
    assert torch.equal(loss, trained.detach()) and torch.equal(losses, trained_losses)
    assert not trained_losses.requires_grad
    assert not cross_entropy(states, unembedding, targets).requires_grad


class TiedModel(nn.Module):
    """States made of the unembedding's own rows; counts how often that is given a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB_SIZE, DIM))
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        """States of two heads."""
        states = torch.tanh(self.linear(self.embedding[tokens]))
        return torch.stack([states, states.flip(0)])


def model_gradients(chunked: bool, compiled: bool = False) -> Gradients:
    """The gradients of a tied model's parameters."""
    model = TiedModel()
    tokens = torch.randint(VOCAB_SIZE, (3, 4), generator=torch.Generator().manual_seed(1))
    targets = torch.stack([tokens, tokens.flip(1)])

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        states = model(tokens)
        if chunked:
            total, _, _ = weighted_cross_entropy(
                states, model.embedding, targets, lambda losses, rows: losses.clamp(max=1), 5
            )
            return total / 7
        losses = plain_cross_entropy(states, model.embedding, targets)
        return (losses.detach().clamp(max=1) * losses).sum() / 7

    (torch.compile(loss, backend="aot_eager") if compiled else loss)(tokens, targets).backward()
    return tuple(parameter.grad for parameter in model.parameters())


def test_a_tied_unembedding_gets_the_gradients_of_both_uses() -> None:
    assert error(model_gradients(chunked=True), model_gradients(chunked=False)) < 1e-5


def test_unembedding_gets_one_gradient_for_all_heads_and_chunks() -> None:
    states, unembedding, targets = inputs()
    seen: list[Tensor] = []
    unembedding.register_hook(seen.append)
    weighted_cross_entropy(states, unembedding, targets, COEFFICIENTS["known"], chunk_rows=1)[0].backward()
    assert len(seen) == 1


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients() -> None:
    torch._dynamo.reset()
    assert error(model_gradients(chunked=True, compiled=True), model_gradients(chunked=False)) < 1e-5


def with_dtypes(states_dtype: torch.dtype, unembedding_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of other precisions, the states small enough for a spread-out softmax."""
    states, unembedding, targets = inputs(scale=0.5)
    return (
        states.detach().to(states_dtype).requires_grad_(),
        unembedding.detach().to(unembedding_dtype).requires_grad_(),
        targets,
    )


FLOAT, BRAIN = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("states_dtype", "unembedding_dtype", "autocast"),
    [(FLOAT, FLOAT, True), (BRAIN, FLOAT, True), (BRAIN, BRAIN, True), (BRAIN, BRAIN, False)],
)
def test_bf16_is_as_close_to_fp32_as_all_logits_at_once(
    states_dtype: torch.dtype, unembedding_dtype: torch.dtype, autocast: bool
) -> None:
    arguments = with_dtypes(states_dtype, unembedding_dtype)
    exact = plain_gradients(*(x.detach().double().requires_grad_() for x in arguments[:2]), arguments[2], PICK)
    with torch.autocast("cpu", BRAIN, enabled=autocast):
        plain = plain_gradients(*arguments, PICK)
        loss, losses, _ = weighted_cross_entropy(*arguments, pick_without_autocast, chunk_rows=7)
        assert torch.is_autocast_enabled("cpu") == autocast
    assert losses.dtype == loss.dtype == FLOAT
    got = torch.autograd.grad(loss, arguments[:2])
    assert [gradient.dtype for gradient in got] == [states_dtype, unembedding_dtype]
    # a bf16 parameter's gradient is rounded once for every chunk that is added
    limit = 2.0 if unembedding_dtype == BRAIN else 1.3
    assert error(got, exact) < limit * error(plain, exact) < 0.02
    # products were made in bf16: in fp32 the error would be far smaller
    assert error(got, exact) > 1e-3


def pick_without_autocast(losses: Tensor, rows: Tensor) -> Tensor:
    """Coefficients of rows, in the precision of the losses."""
    assert losses.dtype == FLOAT and not torch.is_autocast_enabled("cpu")
    return PICK(losses, rows)


PICK: Coefficients = known(torch.rand(200, generator=torch.Generator().manual_seed(2)))


def test_softmax_sums_of_bf16_products_are_taken_in_fp32() -> None:
    # 4096 equal logits: bf16 can count to 256 only
    states, unembedding = torch.ones(1, 1, 3, 4, dtype=BRAIN), torch.ones(4096, 4, dtype=BRAIN)
    losses = cross_entropy(states, unembedding, torch.zeros(1, 1, 3, dtype=torch.long))
    torch.testing.assert_close(losses, torch.full((1, 1, 3), 4096.0).log())


def test_states_may_have_a_different_precision_than_the_unembedding() -> None:
    states, unembedding, targets = with_dtypes(FLOAT, BRAIN)
    got = cross_entropy(states, unembedding, targets)
    torch.testing.assert_close(got, plain_cross_entropy(states, unembedding.float(), targets).detach())


def test_backward_runs_once() -> None:
    states, unembedding, targets = inputs()
    loss, _, _ = weighted_cross_entropy(states, unembedding, targets, PICK)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_a_second_derivative_is_refused() -> None:
    states, unembedding, targets = inputs()
    loss, _, _ = weighted_cross_entropy(states, unembedding, targets, PICK)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, states, create_graph=True)


def test_gradients_are_returned_without_a_copy() -> None:
    states, unembedding, targets = inputs()
    loss, _, _ = weighted_cross_entropy(states, unembedding, targets, PICK)
    made = [gradient.data_ptr() for gradient in loss.grad_fn.gradients]
    (loss * 3).backward()
    assert states.grad is not None and unembedding.grad is not None
    assert [states.grad.data_ptr(), unembedding.grad.data_ptr()] == made


class LiveBytes(TorchDispatchMode):
    """The peak bytes of all storages allocated within this mode."""

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


def wide(num_rows: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """A vocabulary much larger than the states are wide."""
    torch.manual_seed(0)
    states, unembedding = torch.randn(1, 1, num_rows, 4), torch.randn(1000, 4)
    return states.requires_grad_(), unembedding.requires_grad_(), torch.randint(1000, (1, 1, num_rows))


def bytes_of(run: Callable[[], object]) -> LiveBytes:
    """The bytes that `run` allocates."""
    with LiveBytes() as live:
        run()
    return live


def test_only_the_logits_of_one_chunk_are_allocated() -> None:
    states, unembedding, targets = wide()
    chunk_rows = 8
    chunk = chunk_rows * len(unembedding) * 4
    gradients = 4 * (states.numel() + unembedding.numel())
    of_rows = chunk / 4  # row numbers, losses and a chunk's states

    ours = bytes_of(lambda: weighted_cross_entropy(states, unembedding, targets, PICK, chunk_rows)[0].backward())
    assert ours.largest == chunk
    assert ours.peak <= chunk + gradients + of_rows
    assert bytes_of(lambda: cross_entropy(states, unembedding, targets, chunk_rows)).largest == chunk
    # the controls: all logits at once, and a chunk larger by one row
    plain = bytes_of(lambda: plain_cross_entropy(states, unembedding, targets).sum().backward())
    assert plain.largest == 12 * chunk and plain.peak >= 3 * plain.largest
    assert bytes_of(lambda: cross_entropy(states, unembedding, targets, chunk_rows + 1)).largest > chunk


def test_default_chunk_size_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = wide()
    monkeypatch.setattr(losses_module, "CHUNK_BYTES", 10 * 1000 * 4)
    assert 0.9 * 40_000 <= bytes_of(lambda: cross_entropy(*arguments)).largest <= 40_000
    monkeypatch.setattr(losses_module, "CHUNK_BYTES", 1)
    assert bytes_of(lambda: cross_entropy(*arguments)).largest <= len(arguments[1]) * 4 * 4
