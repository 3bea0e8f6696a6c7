"""A trained model as files that transformers and the servers around it load.

The tensors are those of the family's causal language model: its last layer is head 1. Further heads are stored beside
them, under names that this model does not have.
"""

import copy
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from wmtp.data.tokenizer import PROBE, TOKENIZER_FILES, Tokenizer
from wmtp.errors import InputError
from wmtp.models.huggingface import modeling_mtp
from wmtp.models.huggingface.adapters import DecoderBlock, HuggingFaceArchitecture, LearnedPositions
from wmtp.models.huggingface.folder import WEIGHTS, one_line
from wmtp.models.huggingface.pretrained import EXTRA, HEAD_KIND, NUM_HEADS
from wmtp.models.llama import LlamaArchitecture
from wmtp.models.mtp import MtpModel, empty_model
from wmtp.runtime.atomic_files import encode_json

CODE = "modeling_mtp.py"
CLASS = "MtpForCausalLM"
GENERATION = "generation_config.json"
"""What goes with a tokenizer of transformers."""
LLAMA_LAYER = {
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj", "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.output": "mlp.down_proj",
}  # fmt: skip
"""The modules of our Llama's blocks, and what transformers calls them."""
ROTATED = ("attention.query", "attention.key")


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys whose pairs (0, 1), (2, 3), … are rotated, for code that rotates (i, i + half)."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """What `to_halves` was given."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def layer_tensors(block: nn.Module, head_dim: int) -> dict[str, Tensor]:
    """The tensors of a block or head, by the names that a layer of transformers has for them."""
    if isinstance(block, DecoderBlock):
        return block.layer.state_dict()
    state = block.state_dict()
    if f"{ROTATED[0]}.weight" not in state:
        return state
    found = {}
    for ours, theirs in LLAMA_LAYER.items():
        weight = state[f"{ours}.weight"]
        found[f"{theirs}.weight"] = to_halves(weight, head_dim) if ours in ROTATED else weight
    return found


def model_config(model: MtpModel, tokenizer: Tokenizer, max_length: int) -> PreTrainedConfig:
    """What transformers must know of a model's trunk and head 1."""
    architecture = model.architecture
    if isinstance(architecture, HuggingFaceArchitecture):
        config = copy.deepcopy(architecture.config)
        for name in (NUM_HEADS, HEAD_KIND, "auto_map"):  # of the export with all heads that it was loaded from
            if hasattr(config, name):
                delattr(config, name)
        return config
    assert isinstance(architecture, LlamaArchitecture)
    return LlamaConfig(
        vocab_size=architecture.vocab_size, hidden_size=architecture.dim, intermediate_size=architecture.hidden_dim,
        num_hidden_layers=architecture.num_layers, num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_kv_heads, rms_norm_eps=architecture.norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta}, bos_token_id=None,
        eos_token_id=tokenizer.end, pad_token_id=tokenizer.padding, max_position_embeddings=max_length,
    )  # fmt: skip


def described(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[HuggingFaceArchitecture, PreTrainedModel]:
    """The one-head model of a config, without memory for its parameters."""
    architecture = HuggingFaceArchitecture(config, num_heads=1, dtype=dtype)
    with torch.device("meta"):
        return architecture, architecture.causal_model()


def trunk_tensors(model: MtpModel, architecture: HuggingFaceArchitecture, causal: PreTrainedModel) -> dict[str, Tensor]:
    """All of trunk and head 1, by the names of the causal language model."""
    family, head_dim = architecture.family, _head_dim(model)
    names = {id(module): name for name, module in causal.named_modules()}
    parts = {names[id(causal.get_input_embeddings())]: model.embedding.state_dict()}
    for index, block in enumerate([*model.trunk, model.heads[0]]):
        parts[f"{family.body}.{family.layers}.{index}"] = layer_tensors(block, head_dim)
    parts[f"{family.body}.{family.norm}"] = model.norm.state_dict()
    if isinstance(model.positions, LearnedPositions):
        parts[f"{family.body}.wpe"] = model.positions.vectors.state_dict()
    if model.unembedding is not None:
        output = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        parts[names[id(output)]] = model.unembedding.state_dict()
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _head_dim(model: MtpModel) -> int:
    architecture = model.architecture
    return architecture.dim // architecture.num_attention_heads if isinstance(architecture, LlamaArchitecture) else 0


def write_causal(model: MtpModel, tokenizer: Tokenizer, max_length: int, folder: Path, *, all_heads: bool) -> None:
    """Write config and tensors, and with `all_heads` the code that reads these.

    Raises:
        InputError: what was written does not agree with its config.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    config = model_config(model, tokenizer, max_length)
    dtype = model.embedding.weight.dtype
    if all_heads:
        setattr(config, NUM_HEADS, model.num_heads)
        setattr(config, HEAD_KIND, model.architecture.head_kind)
        config.auto_map = {"AutoModelForCausalLM": f"{Path(CODE).stem}.{CLASS}"}
    architecture, causal = described(config, dtype)
    tensors = trunk_tensors(model, architecture, causal)
    if all_heads:
        for index, head in enumerate(model.heads[1:]):
            stored = layer_tensors(head, _head_dim(model))
            tensors |= {f"{EXTRA}{index}.{name}": tensor for name, tensor in stored.items()}
        family = type(causal).__name__
        docstring = f'"""{family} with all heads of a multi-token model."""'
        added = f"class {CLASS}(MtpHeads, transformers.{family}):\n    {docstring}\n"
        (folder / CODE).write_text(f"{inspect.getsource(modeling_mtp)}\n\n{added}", encoding="utf-8")
    causal.save_pretrained(folder, state_dict={name: tensor.contiguous() for name, tensor in tensors.items()})
    check_causal(folder)


def check_causal(folder: Path) -> None:
    """Compare the stored tensors with the model that the written config describes.

    Raises:
        InputError: some are missing, unexpected, or of another shape or type; each has a line.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    _, causal = described(config, config.dtype)
    model: Any = causal
    if hasattr(config, NUM_HEADS):
        with torch.device("meta"):
            model = type(CLASS, (modeling_mtp.MtpHeads, type(causal)), {})(config).to(config.dtype)
    expected = {n: tensor for n, tensor in model.state_dict().items() if n not in model.all_tied_weights_keys}
    compare(folder, stored_tensors(folder), {n: (list(x.shape), safetensors_dtype(x)) for n, x in expected.items()})


Described = dict[str, tuple[list[int], str]]
"""Of each tensor, by name: its shape and its type."""


def stored_tensors(folder: Path) -> Described:
    """What the headers of a folder's safetensors files say."""
    found: Described = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = part.get_shape(), part.get_dtype()
    return found


def safetensors_dtype(tensor: Tensor) -> str:
    """What safetensors calls the type of a tensor of floats."""
    return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]


def compare(folder: Path, stored: Described, expected: Described) -> None:
    """Raises `InputError` where tensors are not those that are expected."""
    faults = [f"missing: {name}" for name in sorted(expected.keys() - stored.keys())]
    faults += [f"unexpected: {name}" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(stored.keys() & expected.keys()):
        if stored[name] != expected[name]:
            faults.append(f"mis-shaped: {name} is {stored[name]}, the config says {expected[name]}")
    if faults:
        listed = "\n  ".join(faults)
        raise InputError(f"{folder}: the tensors are not those of its config:\n  {listed}")


def write_medusa(model: MtpModel, folder: Path) -> None:
    """Write heads 2 … H as the Medusa draft model that vLLM reads, with a copy of the unembedding, which they share.

    Read for it: vLLM's model_executor/models/medusa.py (at 09cddad8) and transformers_utils/configs/medusa.py (at
    4bb77b32), which takes every key with "num" and "heads" for the number of heads. No server ran it here.

    Raises:
        InputError: what was written does not agree with its config.
    """
    weight = model.unembedding_weight.detach()
    size, dim = weight.shape
    config = {
        "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": dim, "vocab_size": size,
        "truncated_vocab_size": size, "num_heads": model.num_heads - 1, "num_hidden_layers": 1,
        "medusa_fc_bias": False, "original_lm_head": True, "tie_word_embeddings": False,
        "torch_dtype": str(weight.dtype).removeprefix("torch."),
    }  # fmt: skip
    heads = {f"blocks.{i}.layers.0.weight": x.state_dict()["linear.weight"] for i, x in enumerate(model.heads[1:])}
    (folder / "config.json").write_bytes(encode_json(config))
    save_file({"lm_head.weight": weight.contiguous()} | heads, folder / WEIGHTS[0], {"format": "pt"})
    dtype = safetensors_dtype(weight)
    expected: Described = {f"blocks.{i}.layers.0.weight": ([dim, dim], dtype) for i in range(model.num_heads - 1)}
    compare(folder, stored_tensors(folder), expected | {"lm_head.weight": ([size, dim], dtype)})


def meta_obstacles(architecture: HuggingFaceArchitecture) -> list[str]:
    """Why a model cannot be written in Meta's layout, which has room for one kind of Llama only."""
    config = architecture.config
    if config.model_type != "llama":
        return [f"it is of the family {config.model_type}, and Meta's layout is Llama's"]
    rope = config.rope_parameters or {}
    heads = config.num_attention_heads
    found = {
        "its heads are residual layers (model.head_kind=medusa)": architecture.head_kind != "transformer",
        "its attention has biases": config.attention_bias,
        "its feed-forward layers have biases": config.mlp_bias,
        f"its positions are scaled ({rope.get('rope_type')})": rope.get("rope_type", "default") != "default",
        f"its activation is {config.hidden_act}": config.hidden_act not in ("silu", "swish"),
        f"{heads} heads of {config.head_dim} are not its width {config.hidden_size}": (
            heads * config.head_dim != config.hidden_size
        ),
    }
    return [problem for problem, is_so in found.items() if is_so]


def as_own_llama(model: MtpModel) -> MtpModel:
    """An equal model of our own Llama architecture; `meta_obstacles` says whether there is one."""
    assert isinstance(model.architecture, HuggingFaceArchitecture)
    config = model.architecture.config
    architecture = LlamaArchitecture(
        vocab_size=config.vocab_size, dim=config.hidden_size, num_layers=config.num_hidden_layers,
        num_heads=model.num_heads, num_attention_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads, hidden_dim=config.intermediate_size,
        rope_theta=config.rope_parameters["rope_theta"], norm_eps=config.rms_norm_eps,
    )  # fmt: skip
    norm = model.norm.state_dict()["weight"]
    state = {
        "embedding.weight": model.embedding.weight, "norm.weight": norm, "unembedding.weight": model.unembedding_weight,
    }  # fmt: skip
    blocks = [(f"trunk.{index}", block) for index, block in enumerate(model.trunk)]
    for place, block in blocks + [(f"heads.{index}", head) for index, head in enumerate(model.heads)]:
        theirs = layer_tensors(block, config.head_dim)
        for ours, name in LLAMA_LAYER.items():
            weight = theirs[f"{name}.weight"]
            state[f"{place}.{ours}.weight"] = to_pairs(weight, config.head_dim) if ours in ROTATED else weight
    twin = empty_model(architecture)
    twin.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, strict=True, assign=True)
    return twin.eval()


def write_tokenizer(tokenizer: Tokenizer, files: Path | None, folder: Path) -> None:
    """Write the tokenizer: the files that it came with, or its content, with the names of its end and padding."""
    if files is None:
        tokenizer.backend.save(str(folder / "tokenizer.json"))
    else:
        for name in TOKENIZER_FILES:
            if (files / name).is_file():
                shutil.copyfile(files / name, folder / name)
    path = folder / "tokenizer_config.json"
    config = _read_json(path) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    map_path = folder / "special_tokens_map.json"
    known = (_read_json(map_path) if map_path.is_file() else {}) | config
    tokens = {"eos_token": tokenizer.end, "pad_token": tokenizer.padding}
    named = {key: tokenizer.backend.id_to_token(token) for key, token in tokens.items() if known.get(key) is None}
    if named:
        path.write_bytes(encode_json(config | named))


def write_generation(tokenizer: Tokenizer, files: Path | None, folder: Path) -> None:
    """Have texts end where training had them end, besides where the original model did."""
    kept = None if files is None else files / GENERATION
    content = _read_json(kept if kept is not None and kept.is_file() else folder / GENERATION)
    ends = content.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if tokenizer.end not in ends:
        content["eos_token_id"] = [tokenizer.end, *ends] if ends else tokenizer.end
    if content.get("pad_token_id") is None:
        content["pad_token_id"] = tokenizer.padding
    (folder / GENERATION).write_bytes(encode_json(content))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: is no JSON: {error}") from error
    return content


def tokenizer_notes(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Where a text becomes other ids than in training, as transformers reads the written tokenizer."""
    other = "load it with transformers.PreTrainedTokenizerFast.from_pretrained"
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - each family's code raises what it likes; the files are sound
        return [f"AutoTokenizer does not read this family's tokenizer.json ({one_line(error)}); {other}"]
    bare = loaded(PROBE, add_special_tokens=False)["input_ids"]
    if bare != tokenizer.encode([PROBE])[0]:
        return [f"AutoTokenizer makes another tokenizer for this family than tokenizer.json describes; {other}"]
    if loaded(PROBE)["input_ids"] != bare:
        return ["the tokenizer puts special tokens around texts, which training did not; add_special_tokens=False"]
    return []
