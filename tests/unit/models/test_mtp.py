from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import tiny_model
from wmtp.config.schema import build
from wmtp.models.mtp import MtpModel


def interleaved_to_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows of a query or key projection from Meta's pairs to Hugging Face's halves."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def as_llama(model: MtpModel) -> LlamaForCausalLM:
    """Return Hugging Face's Llama with the weights of a model's trunk and head 1."""
    blocks = [*model.trunk, model.heads[0]]
    attention = blocks[0].attention
    config = LlamaConfig(
        vocab_size=model.unembedding.out_features, hidden_size=model.unembedding.in_features,
        intermediate_size=blocks[0].feed_forward.up.out_features, num_hidden_layers=len(blocks),
        num_attention_heads=attention.num_kv_heads * attention.groups, num_key_value_heads=attention.num_kv_heads,
        rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    state = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.unembedding.weight,
    }
    for i, block in enumerate(blocks):
        a, f = block.attention, block.feed_forward
        state |= {
            f"model.layers.{i}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": block.attention_norm.weight,
                "post_attention_layernorm": block.feed_forward_norm.weight,
                "self_attn.q_proj": interleaved_to_halves(a.query.weight, a.num_kv_heads * a.groups),
                "self_attn.k_proj": interleaved_to_halves(a.key.weight, a.num_kv_heads),
                "self_attn.v_proj": a.value.weight,
                "self_attn.o_proj": a.output.weight,
                "mlp.gate_proj": f.gate.weight,
                "mlp.up_proj": f.up.weight,
                "mlp.down_proj": f.output.weight,
            }.items()
        }
    llama.load_state_dict({name: weight.detach().clone() for name, weight in state.items()}, strict=True)
    return llama.eval()


def test_trunk_and_first_head_equal_the_llama_of_hugging_face() -> None:
    model = tiny_model().eval()
    tokens = torch.randint(0, 512, (2, 17))
    with torch.no_grad():
        expected = as_llama(model)(tokens).logits
        got = model.unembedding(model(tokens).states[0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_weights_of_a_one_head_model_are_a_subset_of_those_with_four_heads() -> None:
    one, four = tiny_model(num_heads=1), tiny_model(num_heads=4)
    assert set(one.state_dict()) < set(four.state_dict())
    one.load_state_dict({name: four.state_dict()[name] for name in one.state_dict()}, strict=True)
    tokens = torch.randint(0, 512, (2, 9))
    torch.testing.assert_close(one(tokens).states[0], four(tokens).states[0])


def test_no_head_depends_on_later_tokens() -> None:
    model = tiny_model().eval()
    tokens = torch.randint(0, 512, (1, 12))
    changed = tokens.clone()
    changed[0, 8] += 1
    changed %= 512
    before, after = model(tokens).states, model(changed).states
    torch.testing.assert_close(before[:, :, :8], after[:, :, :8])
    assert not torch.allclose(before[:, :, 8], after[:, :, 8])


def test_the_micro_model_has_about_one_and_a_half_million_parameters(compose, cache: Path) -> None:
    model = build(compose("model=micro").model, cache_dir=cache).create()
    assert 1.4e6 < model.num_parameters < 1.65e6
    assert model.num_heads == 4


@pytest.mark.parametrize("num_heads", [1, 4])
def test_every_parameter_gets_a_gradient(num_heads: int) -> None:
    model = tiny_model(num_heads=num_heads)
    model.unembedding(model(torch.randint(0, 512, (2, 9))).states).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
