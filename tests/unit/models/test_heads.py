"""Tests of the value head alone, and in a model that is trained and saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import tiny_model
from tests.unit.training.test_trainer import FakeData, trainer_of
from wmtp.algorithms.critic import Critic
from wmtp.checkpoint.store import load
from wmtp.models.value_heads import StateValueHead
from wmtp.objectives.mtp import MtpObjective
from wmtp.training.plan import Plan


@pytest.mark.parametrize("hidden_dim", [None, 16])
def test_the_head_starts_at_zero_and_learns(hidden_dim: int | None) -> None:
    torch.manual_seed(0)
    head, states = StateValueHead(6, hidden_dim=hidden_dim), torch.randn(8, 16, 6)
    assert head(states).tolist() == [[0.0] * 16] * 8
    normed = nn.functional.rms_norm(states, (6,))
    target = normed.sum(dim=-1).abs() if hidden_dim else normed.sum(dim=-1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(200):
        loss = (head(states) - target).square().mean()
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


def test_values_are_computed_in_fp32_for_every_dtype_of_states() -> None:
    torch.manual_seed(0)
    head, states = StateValueHead(64, hidden_dim=8), torch.randn(3, 5, 64).bfloat16()
    nn.init.normal_(head.output.weight)
    assert head.hidden is not None
    exact = head(states.float())
    with torch.autocast("cpu", torch.bfloat16):
        got, naive = head(states), head.output(head.hidden(head.norm(states.float()))).squeeze(-1)
    assert got.dtype == torch.float32
    assert torch.equal(got, exact)
    assert naive.dtype == torch.bfloat16 and not torch.equal(naive.float(), exact)


def test_a_models_value_head_trains_and_is_saved(tmp_path: Path) -> None:
    model, data = tiny_model(), FakeData(16)
    without = set(model.state_dict())
    states = model(data.tokens).states
    model.add_value_head()
    new = {name for name, _ in model.named_parameters()} - without
    assert {name.split(".")[0] for name in new} == {"value_head"}
    outputs = model(data.tokens)
    assert torch.equal(outputs.states, states), "a new head changed the outputs of the other heads"
    assert outputs.values is not None and outputs.values.tolist() == [[0.0] * data.tokens.shape[1]] * 16

    objective = MtpObjective(Critic())
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
    fresh.add_value_head()
    fresh.load_state_dict(saved.model)
    values = model(data.tokens).values
    assert values is not None and torch.equal(fresh(data.tokens).values, values) and values.std() > 0


def test_a_value_head_with_a_hidden_layer_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    model.value_head_dim = 24
    model.add_value_head()
    assert model.value_head is not None and model.value_head.hidden is not None
    assert model.value_head.hidden.out_features == 24
    nn.init.normal_(model.value_head.output.weight)
    save_file(model.value_head.state_dict(), tmp_path / "value_head.safetensors")
    other = StateValueHead(64, hidden_dim=24)
    other.load_state_dict(load_file(tmp_path / "value_head.safetensors"))
    states = torch.randn(2, 3, 64)
    assert torch.equal(other(states), model.value_head(states))


@pytest.mark.parametrize("num_heads", [0, 1, 2, None])
def test_only_the_requested_number_of_heads_runs(num_heads: int | None) -> None:
    model = tiny_model().eval()
    model.add_value_head()
    assert model.value_head is not None
    nn.init.normal_(model.value_head.output.weight)
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
    torch.testing.assert_close(outputs.values, model.value_head(model.trunk_states(tokens)), rtol=0, atol=0)
