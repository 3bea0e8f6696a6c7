"""Tests of the three kinds of value heads alone, and in a model that is trained, saved, copied and loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.conftest import tiny_model
from tests.unit.training.test_trainer import FakeData, trainer_of
from wmtp.algorithms.critic import Critic
from wmtp.checkpoint.store import load
from wmtp.models.mtp import MtpModel, empty_model, unsharded_copy
from wmtp.models.value_heads import ActionValueHead, BlockValueHead, StateValueHead, ValueHead, ValueKind
from wmtp.objectives.mtp import MtpObjective
from wmtp.training.plan import Plan

KINDS: tuple[ValueKind, ...] = ("state", "action", "block")
DIM, VOCABULARY = 6, 11


class LinearBlock(nn.Module):
    """A residual layer with the interface of a block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: object = None) -> Tensor:
        return x + torch.tanh(self.linear(x))


def create_head(kind: ValueKind, dim: int = DIM, hidden_dim: int | None = None) -> ValueHead:
    if kind == "action":
        return ActionValueHead(dim, VOCABULARY)
    if kind == "block":
        return BlockValueHead(LinearBlock(dim), dim, hidden_dim=hidden_dim)
    return StateValueHead(dim, hidden_dim=hidden_dim)


def randomize(head: ValueHead) -> ValueHead:
    """Set the weights of the last layer to random numbers, so that the outputs differ."""
    torch.manual_seed(0)
    if isinstance(head, ActionValueHead):
        nn.init.normal_(head.actions.weight)
    else:
        state = head.state if isinstance(head, BlockValueHead) else head
        assert isinstance(state, StateValueHead)
        nn.init.normal_(state.output.weight)
    return head


def inputs(dim: int = DIM, size: tuple[int, int] = (8, 16)) -> tuple[Tensor, Tensor]:
    """Return random hidden states and tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*size, dim, generator=generator), torch.randint(VOCABULARY, size, generator=generator)


@pytest.mark.parametrize("output", [0.0, -1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_has_one_output_which_can_be_set(kind: ValueKind, output: float) -> None:
    head, (states, tokens) = create_head(kind), inputs()
    if output:
        head.set_output(output)
    assert head(states, tokens).tolist() == [[output] * 16] * 8
    assert randomize(head)(states, tokens).std() > 0.1, "the control"


@pytest.mark.parametrize(("kind", "hidden_dim"), [("state", None), ("state", 16), ("action", None), ("block", None)])
def test_the_head_starts_at_zero_and_learns(kind: ValueKind, hidden_dim: int | None) -> None:
    torch.manual_seed(0)
    head, (states, tokens) = create_head(kind, hidden_dim=hidden_dim), inputs()
    assert head(states, tokens).tolist() == [[0.0] * 16] * 8
    normed = nn.functional.rms_norm(states, (DIM,))
    target = normed.sum(dim=-1).abs() if hidden_dim else normed.sum(dim=-1)
    if kind == "action":  # the token changes the sign of the sum of the state before it
        target = torch.cat([torch.zeros(8, 1), target[:, :-1] * (1 - 2 * (tokens[:, 1:] % 2))], dim=1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(200):
        loss = (head(states, tokens) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * target.var()


def test_only_the_hidden_layer_makes_values_nonlinear() -> None:
    states = torch.randn(5, 6)
    for hidden_dim, is_linear in ((None, True), (16, False)):
        head = StateValueHead(6, hidden_dim=hidden_dim)
        nn.init.ones_(head.output.weight)
        even_part = head(states) + head(-states) - 2 * head.output.bias
        assert torch.allclose(even_part, torch.zeros(5), atol=1e-5) is is_linear


@pytest.mark.parametrize("hidden_dim", [None, 16])
def test_values_do_not_depend_on_the_scale_of_the_residual_stream(hidden_dim: int | None) -> None:
    head, states = StateValueHead(64, hidden_dim=hidden_dim), torch.randn(5, 64)
    nn.init.normal_(head.output.weight)
    torch.testing.assert_close(head(30 * states), head(states), rtol=1e-4, atol=1e-4)
    inner = head.output if head.hidden is None else nn.Sequential(head.hidden, head.output)
    assert not torch.allclose(inner(30 * states), inner(states), rtol=1e-2)  # the control: without the norm


def test_action_values_do_not_depend_on_the_scale_of_the_residual_stream() -> None:
    head, (states, tokens) = randomize(create_head("action")), inputs()
    torch.testing.assert_close(head(30 * states, tokens), head(states, tokens), rtol=1e-4, atol=1e-4)


def test_an_action_value_is_that_of_a_loop_over_the_state_before_each_token() -> None:
    head, (states, tokens) = ActionValueHead(DIM, VOCABULARY), inputs(size=(2, 5))
    randomize(head).set_output(0.7)
    nn.init.normal_(head.norm.weight)
    got = head(states, tokens)
    scale, actions = head.norm.weight.tolist(), head.actions.weight.tolist()

    def by_hand(row: int, state_at: int, token_at: int) -> float:
        state = states[row, state_at].tolist()
        root = (sum(x * x for x in state) / DIM + torch.finfo(torch.float32).eps) ** 0.5
        action = actions[int(tokens[row, token_at])]
        products = [q * g * x / root for q, g, x in zip(action, scale, state, strict=True)]
        return 0.7 + float(sum(products))

    for row in range(2):
        assert got[row, 0].item() == pytest.approx(0.7)
        for t in range(1, 5):
            assert got[row, t].item() == pytest.approx(by_hand(row, t - 1, t), rel=1e-4, abs=1e-5)
            assert got[row, t].item() != pytest.approx(by_hand(row, t, t), rel=1e-2), "the control: the state after it"


@pytest.mark.parametrize("kind", ["action", "state"])
def test_only_a_state_value_reads_the_state_at_its_token(kind: ValueKind) -> None:
    """∂V_t / ∂h_s is not zero only for s = t − 1 (action) or s = t (state)."""
    head, (states, tokens) = randomize(create_head(kind)), inputs(size=(1, 5))
    for t in range(5):
        leaf = states.clone().requires_grad_()
        head(leaf, tokens)[0, t].backward()
        assert leaf.grad is not None
        reached = leaf.grad[0].abs().sum(dim=-1).nonzero().flatten().tolist()
        assert reached == ([t] if kind == "state" else [t - 1] if t else [])


def test_an_action_value_depends_on_the_token_without_a_change_of_the_states_before_it() -> None:
    t = 5
    tokens = torch.randint(2, 512, (3, 9), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[:, t] = (tokens[:, t] + 7) % 512
    model = tiny_model().eval()
    states, new_states = model.trunk_states(tokens), model.trunk_states(changed)
    assert torch.equal(states[:, :t], new_states[:, :t]) and not torch.equal(states[:, t], new_states[:, t])
    head = randomize(model.add_value_head("action"))
    values, new_values = head(states, tokens), head(new_states, changed)
    assert torch.equal(values[:, :t], new_values[:, :t])
    assert ((values - new_values)[:, t].abs() > 1e-3).all()
    assert ((values - head(states, changed))[:, t].abs() > 1e-3).all(), "the state at the token is needed"
    state_head = randomize(model.add_value_head("state"))
    assert torch.equal(state_head(states, tokens), state_head(states, changed)), "the control: a state value"


def test_a_block_head_starts_as_head_1_and_trains_independently_of_it() -> None:
    model = tiny_model()
    head = model.add_value_head("block")
    assert isinstance(head, BlockValueHead)
    copied, original = dict(head.block.named_parameters()), dict(model.heads[0].named_parameters())
    second = dict(model.heads[1].named_parameters())
    assert copied.keys() == original.keys()
    assert all(torch.equal(copied[name], original[name]) for name in copied)
    assert not all(torch.equal(copied[name], second[name]) for name in copied), "the control: the block of head 2"
    assert not {p.data_ptr() for p in copied.values()} & {p.data_ptr() for p in original.values()}

    before = {name: parameter.detach().clone() for name, parameter in original.items()}
    randomize(head)
    values = model(torch.randint(2, 512, (2, 9)), num_heads=0).values
    assert values is not None
    values.square().sum().backward()
    assert all(p.grad is None for p in original.values()), "the value loss reaches head 1"
    assert all(p.grad is not None and p.grad.any() for p in copied.values())
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    assert all(torch.equal(original[name], before[name]) for name in original)
    assert not any(torch.equal(copied[name], before[name]) for name in copied)


def test_a_frozen_block_is_copied_as_a_trained_one() -> None:
    block = LinearBlock(DIM).requires_grad_(False)
    head = BlockValueHead(block, DIM)
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert not any(parameter.requires_grad for parameter in block.parameters())


@pytest.mark.parametrize("kind", ["state", "action"])
def test_values_are_computed_in_fp32_for_every_dtype_of_states(kind: ValueKind) -> None:
    head, (states, tokens) = randomize(create_head(kind, dim=64, hidden_dim=8)), inputs(64, (3, 5))
    states = states.bfloat16()
    exact = head(states.float(), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        got = head(states, tokens)
        if isinstance(head, StateValueHead):
            assert head.hidden is not None
            naive = head.output(head.hidden(head.norm(states.float()))).squeeze(-1)
        else:
            assert isinstance(head, ActionValueHead)
            before = nn.functional.pad(head.norm(states[:, :-1].float()), (0, 0, 1, 0))
            naive = (before[..., None, :] @ head.actions(tokens)[..., None])[..., 0, 0] + head.bias.bfloat16()
    assert got.dtype == torch.float32
    assert torch.equal(got, exact)
    assert naive.dtype == torch.bfloat16 and not torch.equal(naive.float(), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_are_fp32_in_a_bf16_model(kind: ValueKind) -> None:
    """FSDP requires that all parameters of a module have the same dtype."""
    model = tiny_model().bfloat16()
    head = model.add_value_head(kind)
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    values = model(torch.arange(6)[None]).values
    assert values is not None and values.dtype == torch.float32
    values.sum().backward()


def test_the_output_of_a_block_head_is_fp32_although_its_block_runs_in_bf16() -> None:
    head, (states, tokens) = randomize(create_head("block", dim=64)), inputs(64, (3, 5))
    assert isinstance(head, BlockValueHead)
    with torch.autocast("cpu", torch.bfloat16):
        got, after_block = head(states, tokens), head.block(states)
        naive = head.state.output(head.state.norm(after_block.float())).squeeze(-1)
    assert got.dtype == torch.float32
    assert torch.equal(got, head.state(after_block)), "the layers after the block run in bf16"
    assert naive.dtype == torch.bfloat16 and not torch.equal(naive.float(), got)


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_value_head_trains_and_is_saved(tmp_path: Path, kind: ValueKind) -> None:
    model, data = tiny_model(), FakeData(16)
    without = set(model.state_dict())
    states = model(data.tokens).states
    model.add_value_head(kind)
    new = {name for name, _ in model.named_parameters()} - without
    assert {name.split(".")[0] for name in new} == {"value_head"}
    outputs = model(data.tokens)
    assert torch.equal(outputs.states, states), "a new head changed the outputs of the other heads"
    assert outputs.values is not None and outputs.values.tolist() == [[0.0] * data.tokens.shape[1]] * 16

    objective = MtpObjective(Critic(value=kind))
    trainer = trainer_of(tmp_path, data, model, Plan(16, num_epochs=2.0, batch_size=4), objective=objective)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.fit()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} does not train"
    saved = load(trainer.checkpoints.latest())
    for name in new:
        assert torch.equal(saved.model[name], model.get_parameter(name).detach())
        assert any(key.startswith(f"{name}:") for key in saved.optimizer)
    fresh = tiny_model(seed=1)
    with pytest.raises(RuntimeError, match="value_head"):
        fresh.load_state_dict(saved.model)
    fresh.add_value_head(kind)
    fresh.load_state_dict(saved.model)
    values = model(data.tokens).values
    assert values is not None and torch.equal(fresh(data.tokens).values, values) and values.std() > 0
    fresh.add_value_head("state" if kind != "state" else "action")
    with pytest.raises(RuntimeError, match="value_head"):
        fresh.load_state_dict(saved.model)


@pytest.mark.parametrize("kind", ["state", "block"])
def test_a_value_head_with_a_hidden_layer_is_saved_and_loaded(tmp_path: Path, kind: ValueKind) -> None:
    model = tiny_model()
    model.value_head_dim = 24
    head, tokens = randomize(model.add_value_head(kind)), torch.randint(2, 512, (2, 3))
    state = head.state if isinstance(head, BlockValueHead) else head
    assert isinstance(state, StateValueHead) and state.hidden is not None and state.hidden.out_features == 24
    save_file(head.state_dict(), tmp_path / "value_head.safetensors")
    other = tiny_model()
    other.value_head_dim = 24
    other.add_value_head(kind).load_state_dict(load_file(tmp_path / "value_head.safetensors"))
    assert torch.equal(other(tokens).values, model(tokens).values)


@pytest.mark.parametrize("num_heads", [0, 1, 2, None])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_requested_number_of_heads_runs(kind: ValueKind, num_heads: int | None) -> None:
    model = tiny_model().eval()
    value_head = randomize(model.add_value_head(kind))
    tokens = torch.randint(2, 512, (3, 9))
    all_outputs = model(tokens)
    calls: list[int] = []
    for head in model.heads:
        head.register_forward_hook(lambda *arguments: calls.append(1))
    outputs = model(tokens, num_heads=num_heads)
    expected = 4 if num_heads is None else num_heads
    assert len(calls) == len(outputs.states) == expected
    torch.testing.assert_close(outputs.states, all_outputs.states[:expected], rtol=0, atol=0)
    assert outputs.values is not None and all_outputs.values is not None
    assert torch.equal(outputs.values, all_outputs.values)
    states = model.trunk_states(tokens)
    context = model.positions(torch.arange(9)[None], states)
    torch.testing.assert_close(outputs.values, value_head(states, tokens, context), rtol=0, atol=0)
    assert torch.equal(model(tokens, num_heads=0, hidden_states=states).values, outputs.values), "from cached states"


@pytest.mark.parametrize("kind", KINDS)
def test_an_unsharded_copy_has_the_same_kind_of_value_head_and_the_classes(
    kind: ValueKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().eval()
    model.value_head_dim = 8
    randomize(model.add_value_head(kind))
    model.add_class_embedding()
    assert model.class_embedding is not None
    nn.init.normal_(model.class_embedding.weight)
    for parameter in model.parameters():
        parameter.full_tensor = None  # type: ignore[attr-defined]  # as if the model were sharded over processes
    monkeypatch.setattr("wmtp.models.mtp.full_tensor", lambda tensor: tensor)
    copy = unsharded_copy(model, keep=True)
    assert copy is not None and copy is not model and copy.value_kind == kind
    assert type(copy.value_head) is type(model.value_head)
    tokens, classes = torch.randint(2, 512, (2, 9)), torch.tensor([0, 1])
    got, expected = copy(tokens, classes=classes), model(tokens, classes=classes)
    assert torch.equal(got.states, expected.states) and torch.equal(got.values, expected.values)
    assert not torch.equal(copy(tokens, classes=1 - classes).states, expected.states), "the control: other classes"


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_memory_has_the_parameters_of_the_real_one(kind: ValueKind) -> None:
    architecture = tiny_model().architecture

    def with_head(model: MtpModel) -> MtpModel:
        model.add_value_head(kind)
        model.add_class_embedding()
        return model

    empty = with_head(empty_model(architecture, value_head_dim=8))
    real = with_head(MtpModel(architecture, value_head_dim=8))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert any(name.startswith("value_head.") for name, _ in empty.named_parameters())
    empty.load_state_dict(real.state_dict(), assign=True)
    tokens, classes = torch.randint(2, 512, (2, 5)), torch.tensor([0, 1])
    assert torch.equal(empty(tokens, classes=classes).states, real(tokens, classes=classes).states)
