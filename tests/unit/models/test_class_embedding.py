"""Tests of class-conditional models: new class embeddings, trained ones, and those in checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import tiny_model
from tests.support.families import write_family
from tests.unit.training.test_trainer import FakeData, trainer_of
from wmtp.checkpoint.store import load
from wmtp.data.collate import IGNORED, Batch
from wmtp.data.tokenizer import Tokenizer
from wmtp.models.huggingface.pretrained import Pretrained
from wmtp.models.lora import ADAPTER_SUBSTRING, Lora
from wmtp.models.mtp import MtpModel
from wmtp.objectives.class_conditional import ClassConditionalObjective
from wmtp.training.plan import Plan
from wmtp.training.stages import ContrastStage

CLASSES = torch.tensor([0, 1, 0, 1])
NAME = "class_embedding.weight"


def conditional(model: MtpModel) -> MtpModel:
    """Add the modules of stage 1 to a model."""
    ContrastStage().add_modules(model)
    return model


class LabeledData(FakeData):
    """Samples whose second token is 5 in correct solutions and 9 in incorrect ones. Every second sample is correct."""

    def batch(self, start: int, stop: int) -> Batch:
        batch = super().batch(start, stop)
        is_correct = torch.arange(start, stop) % 2 == 0
        tokens, labels = batch.tokens.clone(), torch.full_like(batch.tokens, IGNORED)
        tokens[:, 0], tokens[:, 1] = 3, torch.where(is_correct, 5, 9)
        labels[:, 1] = tokens[:, 1]
        return replace(batch, tokens=tokens, labels=labels, is_correct=is_correct)


def random_tokens() -> Tensor:
    return torch.randint(2, 512, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_class_embedding_changes_nothing(dtype: torch.dtype) -> None:
    model, tokens = tiny_model().to(dtype), random_tokens()
    model.add_value_head("action")
    nn.init.normal_(model.get_parameter("value_head.actions.weight"))
    expected = model(tokens)
    conditional(model)
    got = model(tokens, classes=CLASSES)
    assert torch.equal(got.states, expected.states) and torch.equal(got.values, expected.values)
    assert model.class_embedding is not None and model.class_embedding.weight.dtype == dtype
    nn.init.normal_(model.class_embedding.weight)
    assert not torch.equal(model(tokens, classes=CLASSES).states, expected.states), "the control: a random one"


def test_the_vector_of_a_class_is_added_to_the_embeddings_of_its_samples() -> None:
    model, tokens = conditional(tiny_model()), random_tokens()
    assert model.class_embedding is not None
    vectors = nn.init.normal_(model.class_embedding.weight).detach()
    states = model(tokens, classes=CLASSES).states
    for row, label in enumerate(CLASSES.tolist()):
        plain = tiny_model()
        with torch.no_grad():
            plain.embedding.weight.add_(vectors[label])
        torch.testing.assert_close(plain(tokens).states[:, row], states[:, row], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            plain.embedding.weight.add_(vectors[1 - label] - vectors[label])
        assert not torch.allclose(plain(tokens).states[:, row], states[:, row], atol=0.01), "the control"


def test_a_model_with_classes_needs_them() -> None:
    model, tokens = conditional(tiny_model()), random_tokens()
    with pytest.raises(AssertionError):
        model(tokens)
    with pytest.raises(AssertionError):
        model.trunk_states(tokens)


def mean_loss(model: MtpModel, tokens: Tensor, label: int) -> float:
    """Return the mean loss of head 1 at the token that depends on the class, as if all samples had the same class."""
    states = model(tokens, num_heads=1, classes=torch.full((len(tokens),), label)).states[0, :, 0]
    return nn.functional.cross_entropy(states @ model.unembedding_weight.T, tokens[:, 1]).item()


@pytest.mark.slow
def test_a_trained_model_gives_each_class_its_own_losses_and_is_saved(tmp_path: Path) -> None:
    model, data = conditional(tiny_model(num_heads=1)), LabeledData(32)
    tokens = data.batch(0, 32).tokens
    correct, incorrect = tokens[::2], tokens[1::2]
    assert mean_loss(model, correct, 1) == mean_loss(model, correct, 0), "the control: before training"
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = Plan(32, num_epochs=24.0, batch_size=8)
    trainer = trainer_of(tmp_path, data, model, plan, objective=ClassConditionalObjective())
    trainer.fit()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    for solutions, label in ((correct, 1), (incorrect, 0)):
        assert mean_loss(model, solutions, label) < mean_loss(model, solutions, 1 - label) - 0.5

    saved = load(trainer.checkpoints.latest())
    assert torch.equal(saved.model[NAME], model.get_parameter(NAME).detach()) and saved.model[NAME].any()
    assert any(key.startswith(f"{NAME}:") for key in saved.optimizer)
    fresh = tiny_model(num_heads=1, seed=1)
    with pytest.raises(RuntimeError, match="class_embedding"):
        fresh.load_state_dict(saved.model)
    conditional(fresh).load_state_dict(saved.model)
    assert mean_loss(fresh, correct, 0) == mean_loss(model, correct, 0) != mean_loss(fresh, correct, 1)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", ["own", "llama", "gpt2"])
def test_pretrained_models_and_adapters_train_the_class_embedding(
    family: str, rank: int | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    if family == "own":
        plain = tiny_model()
        model = MtpModel(plain.architecture, plain.top_modules(), lora=None if rank is None else Lora(rank=rank))
    else:
        path = write_family(tmp_path / family, family, tokenizer)
        model = Pretrained(tokenizer=tokenizer, path=path, num_heads=2, lora=Lora(rank=rank)).create()
    tokens = random_tokens()
    expected = model.eval()(tokens).states
    conditional(model)
    assert torch.equal(model(tokens, classes=CLASSES).states, expected)
    stage = ContrastStage()
    stage.freeze(model)
    assert NAME not in model.base_names and NAME in model.checkpoint_tensors()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert NAME in trained
    if rank is not None:
        assert all(name.startswith(("heads.", "class_embedding.")) or ADAPTER_SUBSTRING in name for name in trained)
        assert "embedding.weight" in model.base_names
    model(tokens, classes=CLASSES).states.square().sum().backward()
    gradient = model.get_parameter(NAME).grad
    assert gradient is not None and gradient.any(dim=1).all(), "a class has no gradient"
