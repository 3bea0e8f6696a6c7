"""A sequence classifier that computes the rewards of samples."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from wmtp.data.collate import collate
from wmtp.data.sampler import batches_by_length
from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenizer import Tokenizer, read_backend, tokenizer_difference
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError
from wmtp.models.huggingface.folder import one_line, read_model_config
from wmtp.models.source import weights_fingerprint

BATCH_SIZE = 32
KEY = "data.reward_model"


class RewardModel:
    """A sequence classifier that computes the rewards of complete samples (prompt, solution and end token).

    If the classifier has one label, the reward is the score of the classifier. If it has two labels, the reward is the
    probability of label 1. The folder must contain config.json, tokenizer.json and weights as safetensors, as written
    by `save_pretrained`. Code in the folder is never run.

    Raises:
        InputError: the folder is incomplete or damaged, it contains another kind of model, or its tokenizer differs
            from the policy's tokenizer. Damaged weights are detected when the weights are loaded, and all other
            problems are detected before.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, hardware: Hardware) -> None:
        self.path, self.tokenizer, self.hardware = path, tokenizer, hardware
        config = _classifier_config(path)
        _check_tokenizer(path, config, tokenizer)
        self.max_length = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.model = _load(path, config).to(hardware.device).eval()  # type: ignore[arg-type]
        # a decoder computes the score at the last token that is not padding
        self.model.config.get_text_config().pad_token_id = tokenizer.padding

    def rewards(self, split: TokenizedSplit) -> np.ndarray:
        """Return the rewards of all samples of a split, in the order of the split.

        Raises:
            InputError: a sample is longer than the model's maximum length, or a score is not finite.
        """
        lengths = split.samples.lengths
        if self.max_length is not None and len(split) and lengths.max() > self.max_length:
            problem = f"reads {self.max_length} tokens, but a sample of {split.name} has {lengths.max()}"
            raise _error(self.path, f"{problem}; set data.max_length={self.max_length}")
        rewards = np.zeros(len(split), np.float32)
        for chosen in batches_by_length(lengths, BATCH_SIZE):
            batch = collate(split, chosen, self.tokenizer.padding)
            scores = self._scores(batch.tokens, torch.from_numpy(lengths[chosen]))
            if not scores.isfinite().all():
                record_id = batch.record_ids[int(scores.isfinite().int().argmin())]
                raise _error(self.path, f"its score of sample {record_id} is not finite; check its weights")
            rewards[chosen] = scores.numpy()
        return rewards

    @property
    def fingerprint(self) -> str:
        """Hash of the names and values of the classifier's weights."""
        return weights_fingerprint(self.model)

    @torch.inference_mode()
    def _scores(self, tokens: Int[Tensor, "batch position"], lengths: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        device = self.hardware.device
        with self.hardware.autocast():
            outputs = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device))
        logits: Tensor = outputs.logits.float().cpu()
        return logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, 1]


def _classifier_config(path: Path) -> PreTrainedConfig:
    """Load the config of a folder and check that it is a complete sequence classifier with one or two labels."""
    config = read_model_config(KEY, path)
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        found = ", ".join(kinds) or "a model without a named architecture"
        raise _error(path, f"contains {found}; a …ForSequenceClassification is needed")
    if config.num_labels not in (1, 2):
        needed = "1 (the score is the reward) or 2 (the probability of label 1 is the reward)"
        raise _error(path, f"has {config.num_labels} labels; the number must be {needed}")
    return config


def _check_tokenizer(path: Path, config: PreTrainedConfig, tokenizer: Tokenizer) -> None:
    difference = tokenizer_difference(tokenizer, read_backend(path / "tokenizer.json"))
    if difference is not None:
        raise _error(path, f"its tokenizer is not that of the policy: {difference}; use a model with the same one")
    size = config.get_text_config().vocab_size
    if size < tokenizer.vocab_size:
        raise _error(path, f"has embeddings for {size} tokens, its tokenizer has {tokenizer.vocab_size}; retrain it")
    if tokenizer.end == tokenizer.padding:
        raise _error(path, "cannot tell the end of a sample from padding; set model.tokenizer.padding to another token")


def _load(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Load a sequence classifier, and convert its weights to fp32."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model: PreTrainedModel
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=torch.float32, use_safetensors=True,
            local_files_only=True, trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _error(path, f"its weights cannot be loaded: {one_line(error)}; save the model again") from error
    if info["missing_keys"]:  # transformers would initialize them
        missing = sorted(info["missing_keys"])
        raise _error(path, f"its weights lack {len(missing)} tensors, such as {missing[0]}; save the model again")
    return model


def _error(path: Path, problem: str) -> InputError:
    return InputError(f"{KEY}={path}: {problem}")
