"""Write trained models as files that transformers and compatible servers can load.

The tensors have the names that they have in the causal language model of transformers, whose last layer is head 1.
Additional heads are stored in the same file, under names that the causal language model does not use.
"""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from wmtp.data.tokenizer import PROBE, Tokenizer
from wmtp.errors import InputError
from wmtp.models.huggingface import modeling_mtp
from wmtp.models.huggingface.adapters import HuggingFaceArchitecture, LearnedPositions
from wmtp.models.huggingface.decoder_block import DecoderBlock
from wmtp.models.huggingface.folder import WEIGHTS, one_line
from wmtp.models.huggingface.pretrained import EXTRA_HEADS, HEAD_KIND, NUM_HEADS
from wmtp.models.llama import LlamaArchitecture
from wmtp.models.mtp import MtpModel, empty_model
from wmtp.runtime.atomic_files import encode_json
from wmtp.runtime.untrusted_files import read_own_file

CODE_FILE = "modeling_mtp.py"
CLASS_NAME = "MtpForCausalLM"
GENERATION_CONFIG = "generation_config.json"
"""Name of the file with the end and padding tokens that the method `generate` of transformers uses."""
LLAMA_LAYER = {
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj", "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.output": "mlp.down_proj",
}  # fmt: skip
"""Names of the modules of a Llama block. The keys are names in wmtp, and the values are names in transformers."""
ROTATED = ("attention.query", "attention.key")
"""Modules whose outputs are rotated by the position encoding."""


def to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key weight from Meta's layout of rotary pairs to the layout of transformers.

    Meta's code rotates the pairs (0, 1), (2, 3), … of the dimensions of an attention head. transformers rotates the
    pairs (i, i + head_dim / 2). The weight has the shape [number of attention heads · head_dim, dim].
    """
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key weight from the layout of transformers to Meta's layout of rotary pairs.

    This function is the inverse of `to_half_split`.
    """
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def layer_tensors(block: nn.Module, head_dim: int) -> dict[str, Tensor]:
    """Return the tensors of a block or of a head. The keys are the tensors' names in a layer of transformers."""
    if isinstance(block, DecoderBlock):
        return block.layer.state_dict()
    state = block.state_dict()
    if f"{ROTATED[0]}.weight" not in state:
        return state
    tensors = {}
    for ours, theirs in LLAMA_LAYER.items():
        weight = state[f"{ours}.weight"]
        tensors[f"{theirs}.weight"] = to_half_split(weight, head_dim) if ours in ROTATED else weight
    return tensors


def model_config(model: MtpModel, tokenizer: Tokenizer, max_length: int) -> PreTrainedConfig:
    """Return the config with which transformers loads the trunk and head 1 as a causal language model."""
    architecture = model.architecture
    if isinstance(architecture, HuggingFaceArchitecture):
        config = copy.deepcopy(architecture.config)
        for name in (NUM_HEADS, HEAD_KIND, "auto_map"):  # keys of an export with all heads
            if hasattr(config, name):
                delattr(config, name)
        return config
    assert isinstance(architecture, LlamaArchitecture)
    return LlamaConfig(
        vocab_size=architecture.vocab_size, hidden_size=architecture.dim, intermediate_size=architecture.hidden_dim,
        num_hidden_layers=architecture.num_layers, num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_kv_heads, rms_norm_eps=architecture.norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
        bos_token_id=tokenizer.prefix[0] if tokenizer.prefix else None, eos_token_id=tokenizer.end,
        pad_token_id=tokenizer.padding, max_position_embeddings=max_length,
    )  # fmt: skip


def empty_causal_model(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[HuggingFaceArchitecture, PreTrainedModel]:
    """Build the architecture that a config describes, and its causal language model on the meta device."""
    architecture = HuggingFaceArchitecture(config, num_heads=1, dtype=dtype)
    with torch.device("meta"):
        return architecture, architecture.build_causal_model()


def causal_tensors(
    model: MtpModel, architecture: HuggingFaceArchitecture, causal: PreTrainedModel
) -> dict[str, Tensor]:
    """Return all tensors of the model except heads 2 … H. The keys are the tensors' names in `causal`.

    `causal` is the causal language model of transformers, and `architecture` is its architecture.
    """
    adapter, head_dim = architecture.adapter, _head_dim(model)
    names = {id(module): name for name, module in causal.named_modules()}
    groups = {names[id(causal.get_input_embeddings())]: model.embedding.state_dict()}
    for index, block in enumerate([*model.trunk, model.heads[0]]):
        groups[f"{adapter.body}.{adapter.layers}.{index}"] = layer_tensors(block, head_dim)
    groups[f"{adapter.body}.{adapter.norm}"] = model.norm.state_dict()
    if isinstance(model.positions, LearnedPositions):
        groups[f"{adapter.body}.wpe"] = model.positions.vectors.state_dict()
    if model.unembedding is not None:
        output = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        groups[names[id(output)]] = model.unembedding.state_dict()
    return {f"{module}.{name}": tensor for module, tensors in groups.items() for name, tensor in tensors.items()}


def _head_dim(model: MtpModel) -> int:
    architecture = model.architecture
    return architecture.dim // architecture.num_attention_heads if isinstance(architecture, LlamaArchitecture) else 0


def write_causal(model: MtpModel, tokenizer: Tokenizer, max_length: int, folder: Path, *, all_heads: bool) -> None:
    """Write the config and the tensors of a model to a folder.

    If `all_heads` is false, heads 2 … H are left out. If it is true, the code that loads all heads is written too.

    Raises:
        InputError: the written tensors do not match the config.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    config = model_config(model, tokenizer, max_length)
    dtype = model.embedding.weight.dtype
    if all_heads:
        setattr(config, NUM_HEADS, model.num_heads)
        setattr(config, HEAD_KIND, model.architecture.head_kind)
        config.auto_map = {"AutoModelForCausalLM": f"{Path(CODE_FILE).stem}.{CLASS_NAME}"}
    architecture, causal = empty_causal_model(config, dtype)
    tensors = causal_tensors(model, architecture, causal)
    if all_heads:
        for index, head in enumerate(model.heads[1:]):
            stored = layer_tensors(head, _head_dim(model))
            tensors |= {f"{EXTRA_HEADS}{index}.{name}": tensor for name, tensor in stored.items()}
        base_class = type(causal).__name__
        docstring = f'"""{base_class} with all heads of a multi-token model."""'
        class_source = f"class {CLASS_NAME}(MtpHeads, transformers.{base_class}):\n    {docstring}\n"
        (folder / CODE_FILE).write_text(f"{inspect.getsource(modeling_mtp)}\n\n{class_source}", encoding="utf-8")
    causal.save_pretrained(folder, state_dict={name: tensor.contiguous() for name, tensor in tensors.items()})
    check_causal(folder)


def check_causal(folder: Path) -> None:
    """Check that the tensors in a folder match the model that the config in the folder describes.

    Raises:
        InputError: tensors are missing or unexpected, or have a wrong shape or dtype; each has a line in the message.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    _, causal = empty_causal_model(config, config.dtype)
    model: Any = causal
    if hasattr(config, NUM_HEADS):
        with torch.device("meta"):
            model = type(CLASS_NAME, (modeling_mtp.MtpHeads, type(causal)), {})(config).to(config.dtype)
    expected = {n: tensor for n, tensor in model.state_dict().items() if n not in model.all_tied_weights_keys}
    check_tensors(folder, read_headers(folder), {n: (list(x.shape), safetensors_dtype(x)) for n, x in expected.items()})


TensorHeaders = dict[str, tuple[list[int], str]]
"""The shape and the dtype of tensors, by the names of the tensors."""


def read_headers(folder: Path) -> TensorHeaders:
    """Return the shapes and dtypes of all tensors in the safetensors files of a folder."""
    headers: TensorHeaders = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                headers[name] = tensor.get_shape(), tensor.get_dtype()
    return headers


def safetensors_dtype(tensor: Tensor) -> str:
    """Return the name that the safetensors format uses for the dtype of a floating-point tensor."""
    return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]


def check_tensors(folder: Path, stored: TensorHeaders, expected: TensorHeaders) -> None:
    """Check that the stored tensors have the expected names, shapes and dtypes.

    Raises:
        InputError: tensors are missing or unexpected, or have a wrong shape or dtype; each has a line in the message.
    """
    issues = [f"missing: {name}" for name in sorted(expected.keys() - stored.keys())]
    issues += [f"unexpected: {name}" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(stored.keys() & expected.keys()):
        if stored[name] != expected[name]:
            issues.append(f"mis-shaped: {name} is {stored[name]}, the config needs {expected[name]}")
    if issues:
        listed = "\n  ".join(issues)
        raise InputError(f"{folder}: the tensors do not match its config:\n  {listed}")


def write_medusa(model: MtpModel, folder: Path) -> None:
    """Write heads 2 … H as a Medusa draft model for vLLM, with a copy of the unembedding that all heads share.

    The format follows vLLM's model_executor/models/medusa.py (at 09cddad8) and transformers_utils/configs/medusa.py
    (at 4bb77b32). vLLM interprets every config key that contains "num" and "heads" as the number of heads, so the
    config has only one such key. The export was not tested on a server.

    Raises:
        InputError: the written tensors do not match the config.
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
    expected: TensorHeaders = {f"blocks.{i}.layers.0.weight": ([dim, dim], dtype) for i in range(model.num_heads - 1)}
    check_tensors(folder, read_headers(folder), expected | {"lm_head.weight": ([size, dim], dtype)})


def meta_format_issues(architecture: HuggingFaceArchitecture) -> list[str]:
    """Return the reasons why a model of this architecture cannot be written in Meta's layout.

    The list is empty if Meta's layout supports the model.
    """
    config = architecture.config
    if config.model_type != "llama":
        return [f"its model type is {config.model_type}, and Meta's layout supports only llama"]
    rope = config.rope_parameters or {}
    heads = config.num_attention_heads
    checks = {
        "its heads are residual layers (model.head_kind=medusa)": architecture.head_kind != "transformer",
        "its attention has biases": config.attention_bias,
        "its feed-forward layers have biases": config.mlp_bias,
        f"its positions are scaled ({rope.get('rope_type')})": rope.get("rope_type", "default") != "default",
        f"its activation is {config.hidden_act}": config.hidden_act not in ("silu", "swish"),
        f"{heads} attention heads of width {config.head_dim} do not add up to its width {config.hidden_size}": (
            heads * config.head_dim != config.hidden_size
        ),
    }
    return [problem for problem, is_present in checks.items() if is_present]


def to_llama_model(model: MtpModel) -> MtpModel:
    """Convert a model of transformers to an equivalent model with wmtp's `LlamaArchitecture`.

    `meta_format_issues` must return an empty list for the architecture of the model.
    """
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
    for prefix, block in blocks + [(f"heads.{index}", head) for index, head in enumerate(model.heads)]:
        tensors = layer_tensors(block, config.head_dim)
        for ours, name in LLAMA_LAYER.items():
            weight = tensors[f"{name}.weight"]
            state[f"{prefix}.{ours}.weight"] = to_interleaved(weight, config.head_dim) if ours in ROTATED else weight
    converted = empty_model(architecture)
    converted.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, strict=True, assign=True)
    return converted.eval()


def write_generation_config(tokenizer: Tokenizer, source_folder: Path | None, folder: Path) -> None:
    """Write generation_config.json so that the method `generate` of transformers stops at the end token of training.

    The content is copied from the file in `source_folder` if there is one, otherwise from the file in `folder`. The end
    token is added to the end tokens in the content. The padding token is set only if the content has none.
    """
    original = None if source_folder is None else source_folder / GENERATION_CONFIG
    content = _read_json(original if original is not None and original.is_file() else folder / GENERATION_CONFIG)
    ends = content.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if tokenizer.end not in ends:
        content["eos_token_id"] = [tokenizer.end, *ends] if ends else tokenizer.end
    if content.get("pad_token_id") is None:
        content["pad_token_id"] = tokenizer.padding
    (folder / GENERATION_CONFIG).write_bytes(encode_json(content))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(read_own_file(path))
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from error
    return content


def tokenizer_notes(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Return a warning if transformers cannot load the written tokenizer or encodes text differently with it.

    The encoding is compared with that of `tokenizer`, which was used in training.
    """
    remedy = "load it with transformers.PreTrainedTokenizerFast.from_pretrained"
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - tokenizer classes raise any type; the files are valid
        return [f"AutoTokenizer cannot read tokenizer.json of this model type ({one_line(error)}); {remedy}"]
    plain_ids = loaded(PROBE, add_special_tokens=False)["input_ids"]
    if plain_ids != tokenizer.encode([PROBE])[0]:
        return [f"AutoTokenizer creates a different tokenizer for this type than tokenizer.json describes; {remedy}"]
    if loaded(PROBE)["input_ids"] != [*tokenizer.prefix, *plain_ids]:
        return ["the tokenizer adds special tokens around texts, unlike training; use add_special_tokens=False"]
    return []
