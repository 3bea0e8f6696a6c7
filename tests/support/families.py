"""Tiny models of every supported family, written by `save_pretrained`, with the tokenizer of the tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from wmtp.data.tokenizer import Tokenizer

SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=512, n_embd=32, n_layer=3, n_head=4, n_positions=512, initializer_range=0.3, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    ),
}  # fmt: skip


def write_family(path: Path, family: str, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny model of a family and the tokenizer of the tasks to a folder, and return the folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]()).to(dtype).save_pretrained(path)
    write_tokenizer(path, tokenizer)
    return path


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer of the tasks in the format of transformers."""
    tokenizer.backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
