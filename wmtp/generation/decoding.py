"""Greedy or sampled decoding of batches, with a key-value cache and with optional self-speculation.

Each forward pass processes the last chosen token of every sequence and the draft tokens that follow it. Head 1 chooses
the next token after each of these tokens. A draft is accepted if it and all drafts before it equal head 1's choices.
Head 1's choice after the last accepted draft is one more new token. At the same position, the other heads (2 … H) draft
the tokens for the next forward pass. Sources: Stern et al. 2018, Blockwise Parallel Decoding (arXiv 1811.03115);
Gloeckle et al. 2024 (arXiv 2404.19737), section 3.2 and appendix B.

A choice depends only on the logits, the seed of the sample and the position (see `sampling.sample_tokens`). The output
is therefore the same as without speculation. It does not depend on the drafts, on the batch or on other sequences. A
draft is sampled with the same noise as head 1's choice for that position, so that both are often equal. The probability
that they are equal is at least (1 − d) / (1 + d), where d is the total variation distance between the distributions of
the two heads (Daliri, Musco, Suresh 2025, Coupling without Communication, arXiv 2408.07978). The rejection rule of
Leviathan et al. 2023 (arXiv 2211.17192) accepts drafts with the higher probability 1 − d. With that rule, the output
has the same distribution, but it depends on the drafts.

The outputs with and without speculation are equal up to rounding. The logits of forward passes with different shapes
differ slightly; in fp32, they differ by a few 1e-5. If the scores of two tokens are that close, the completions can
differ. `scripts/benchmark_decoding.py` counts the tokens that differ, and prints the smallest difference between the
two largest logits of a token. In bf16, which is less precise, such differences are expected.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wmtp.data.tokenizer import Tokenizer
from wmtp.generation.cached_model import CachedModel
from wmtp.generation.kv_cache import KVCache
from wmtp.generation.sampling import sample_tokens
from wmtp.generation.settings import Decoding
from wmtp.generation.speculation_stats import SpeculationStats
from wmtp.generation.stop_strings import StopStrings
from wmtp.models.mtp import MtpModel

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and the seed of the noise for sampling.

    The prompt must not be empty. If several requests have the same prompt, the prompt is processed only once.
    """

    prompt: list[int]
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """The completion of a prompt.

    `tokens` contains the tokens of the stop string, but not the end token. `text` ends before the stop string. `finish`
    is the reason why the completion ended: the end token (`end`), a stop string (`stop`) or a limit of the length
    (`length`). `forwards` is the number of forward passes that processed this sequence, including the one for the
    prompt. `drafted` and `accepted` contain one number for each head 2 … H: the number of the head's drafts, and the
    number of its accepted drafts. Drafts for positions after the end of the completion are not counted.
    """

    tokens: list[int]
    text: str
    finish: Literal["end", "stop", "length"]
    forwards: int
    accepted: tuple[int, ...]
    drafted: tuple[int, ...]

    @property
    def stats(self) -> SpeculationStats:
        """The numbers of tokens, forward passes and drafts of this completion."""
        num_chosen = len(self.tokens) + (self.finish == "end")
        return SpeculationStats(num_chosen, self.forwards, self.accepted, self.drafted)


def generate(
    model: MtpModel,
    tokenizer: Tokenizer,
    requests: list[Request],
    settings: Decoding,
    context: int,
    on_text: OnText | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Yield the index and the completion of each request as soon as it is finished.

    A prompt and its completion together have at most `context` tokens. `on_text` is called with the index of a request
    and with new text of its completion, as soon as that text is final. The model must not change during the iteration.
    Its training mode has no effect.

    Raises:
        ValueError: a prompt is empty, or it fills the whole context.
    """
    for index, request in enumerate(requests):
        if not 0 < len(request.prompt) < context:
            length = len(request.prompt)
            raise ValueError(f"prompt {index} has {length} tokens; a context of {context} takes 1 to {context - 1}")
    return _generate(model, tokenizer, requests, settings, context, on_text)


@torch.inference_mode()
def _generate(
    model: MtpModel,
    tokenizer: Tokenizer,
    requests: list[Request],
    settings: Decoding,
    context: int,
    on_text: OnText | None,
) -> Iterator[tuple[int, Completion]]:
    num_heads = model.num_heads if settings.speculative else 1
    order = sorted(range(len(requests)), key=lambda index: (len(requests[index].prompt), requests[index].prompt))
    waiting = deque(_Sequence(index, requests[index], tokenizer, settings, context, num_heads - 1) for index in order)
    cached = CachedModel(model, num_heads, context + num_heads, compute_dtype(model))
    batch = _Batch(cached, settings, min(settings.batch_size, len(requests)))
    while waiting or batch.sequences:
        with torch.autocast(cached.device.type, enabled=False):
            if waiting and batch.should_refill:
                batch.add([waiting.popleft() for _ in range(min(batch.num_free, len(waiting)))])
            else:
                batch.step()
        if on_text is not None:
            for sequence in batch.sequences:
                if piece := sequence.new_text():
                    on_text(sequence.index, piece)
        for sequence in batch.remove_finished():
            yield sequence.index, sequence.completion()


def compute_dtype(model: MtpModel) -> torch.dtype:
    """Return the dtype of autocast if it is enabled, else the dtype of the model's weights."""
    weight = model.embedding.weight
    is_autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if is_autocast else weight.dtype


class _Sequence:
    """One request, and the part of its completion that exists so far."""

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer, settings: Decoding, context: int, num_drafts: int
    ) -> None:
        self.index, self.prompt, self.seed = index, request.prompt, request.seed
        room = context - len(request.prompt)
        self._limit = min(room, settings.max_new_tokens or room)
        self._end = tokenizer.end
        self._stop_strings = StopStrings(tokenizer.decode, settings.stop)
        self._tokens: list[int] = []
        self.drafts: list[int] = []
        self.finish: Literal["end", "stop", "length"] | None = None
        self._forwards = 0
        self._accepted, self._drafted = [0] * num_drafts, [0] * num_drafts

    @property
    def last_token(self) -> int:
        """The last chosen token. It is the only token of the sequence whose key and value are not yet in the cache."""
        return self._tokens[-1]

    @property
    def last_position(self) -> int:
        """The position of the last chosen token. Position 0 is the first token of the prompt."""
        return len(self.prompt) + len(self._tokens) - 1

    def update(self, chosen: list[int], drafts: list[int]) -> None:
        """Append the new tokens of one forward pass, and store the drafts for the next forward pass.

        `chosen` contains head 1's choices after the last token and after each earlier draft. The choices after rejected
        drafts are not appended.
        """
        self._forwards += 1
        num_accepted = 0
        while num_accepted < len(self.drafts) and self.drafts[num_accepted] == chosen[num_accepted]:
            num_accepted += 1
        num_possible = min(len(self.drafts), self._limit - len(self._tokens))
        num_new = self._append(chosen[: num_accepted + 1])
        for number in range(num_possible if self.finish is None else min(num_possible, num_new)):
            self._drafted[number] += 1
            self._accepted[number] += number < num_accepted
        self.drafts = drafts

    def _append(self, tokens: list[int]) -> int:
        """Append tokens until the completion ends, and return the number of appended tokens.

        The end token is not stored, but it is counted.
        """
        num_before = len(self._tokens)
        for token in tokens:
            if token == self._end:
                self.finish = "end"
                break
            self._tokens.append(token)
            if len(self._tokens) == self._limit:
                self.finish = "length"
                break
        if (count := self._stop_strings.stop_count(self._tokens)) is not None:
            self.finish = "stop"
            del self._tokens[count:]
        return len(self._tokens) - num_before + (self.finish == "end")

    def new_text(self) -> str:
        """Return the text that has become final since the last call of this method."""
        return self._stop_strings.new_text(self._tokens, is_finished=self.finish is not None)

    def completion(self) -> Completion:
        """Return the completion of the finished request."""
        assert self.finish is not None
        return Completion(
            self._tokens, self._stop_strings.text(self._tokens), self.finish, self._forwards,
            tuple(self._accepted), tuple(self._drafted),
        )  # fmt: skip


@dataclass(frozen=True)
class _PromptCache:
    """Prompts that are already processed, with their keys, values and logits.

    `rows` contains the row of each prompt in `cache`. The logits are those at the last position of each prompt.
    """

    rows: dict[tuple[int, ...], int]
    cache: KVCache
    next_logits: Float[Tensor, "prompt token"]
    draft_logits: Float[Tensor, "prompt draft token"]


class _Batch:
    """The sequences that are decoded together. Sequence i occupies row i of the cache."""

    def __init__(self, model: CachedModel, settings: Decoding, num_rows: int) -> None:
        self.sequences: list[_Sequence] = []
        self._model, self._settings, self._num_rows = model, settings, num_rows
        self._cache = model.new_cache(num_rows, num_slots=1)
        self._prompts: _PromptCache | None = None

    @property
    def num_free(self) -> int:
        """The number of cache rows that no sequence occupies."""
        return self._num_rows - len(self.sequences)

    @property
    def should_refill(self) -> bool:
        """True if so many rows are free that decoding should pause to process new prompts."""
        return self.num_free >= max(1, self._num_rows // 4)

    def add(self, sequences: list[_Sequence]) -> None:
        """Process the prompts of new sequences, and choose the first token of each sequence.

        Sequences with the same prompt must be adjacent, so that the prompt is processed only once.
        """
        computed = self._prompts.rows if self._prompts is not None else {}
        old = [sequence for sequence in sequences if tuple(sequence.prompt) in computed]
        new = [sequence for sequence in sequences if tuple(sequence.prompt) not in computed]
        if old and self._prompts is not None:
            self._start_sequences(old, self._prompts)
        if new:
            self._prompts = self._prefill([sequence.prompt for sequence in new])
            self._start_sequences(new, self._prompts)

    def _prefill(self, prompts: list[list[int]]) -> _PromptCache:
        """Process each distinct prompt once. Shorter prompts are padded on the right."""
        rows = {tokens: row for row, tokens in enumerate(dict.fromkeys(map(tuple, prompts)))}
        width = max(map(len, rows))
        padded = [[*tokens, *[0] * (width - len(tokens))] for tokens in rows]
        tokens, device = torch.tensor(padded, device=self._model.device), self._model.device
        last = torch.tensor([len(prompt) - 1 for prompt in rows], device=device)
        cache = self._model.new_cache(len(rows), width)
        x, forward = self._model.forward_trunk(tokens, torch.zeros_like(last), width, cache)
        next_logits = self._model.next_logits(x, forward, cache, last)[:, 0]
        return _PromptCache(rows, cache, next_logits, self._model.draft_logits(x, forward, cache, last))

    def _start_sequences(self, sequences: list[_Sequence], prompts: _PromptCache) -> None:
        """Choose the first token of each sequence.

        The keys and values of its prompt are copied to the row of the sequence.
        """
        sources = [prompts.rows[tuple(sequence.prompt)] for sequence in sequences]
        rows = [len(self.sequences) + number for number in range(len(sequences))]
        length = max(len(sequence.prompt) for sequence in sequences)
        self._cache.reserve(length, self._model.num_slots)
        self._cache.copy(prompts.cache, sources, rows, length)
        numbers = [[sequence.seed, len(sequence.prompt)] for sequence in sequences]
        seeds, positions = torch.tensor(numbers, device=self._model.device).T
        chosen = sample_tokens(prompts.next_logits[sources], seeds, positions, self._settings)[:, None]
        drafts = self._drafts(prompts.draft_logits[sources], seeds, positions + 1)
        self.sequences += sequences
        self._update_sequences(sequences, chosen, drafts)

    def step(self) -> None:
        """Run one forward pass, which verifies the drafts of every sequence and makes new drafts."""
        numbers = [[s.seed, s.last_position, s.last_token, *s.drafts] for s in self.sequences]
        columns = torch.tensor(numbers, device=self._model.device)
        seeds, starts, tokens = columns[:, 0], columns[:, 1], columns[:, 2:]
        length = max(sequence.last_position for sequence in self.sequences) + tokens.shape[1]
        self._cache.reserve(length, self._model.num_slots)
        x, forward = self._model.forward_trunk(tokens, starts, length, self._cache)
        logits = self._model.next_logits(x, forward, self._cache, at=None)
        chosen = sample_tokens(logits, seeds[:, None].expand_as(tokens), forward.positions + 1, self._settings)
        num_accepted = (chosen[:, :-1] == tokens[:, 1:]).cumprod(dim=1).sum(dim=1)
        draft_logits = self._model.draft_logits(x, forward, self._cache, num_accepted)
        self._update_sequences(self.sequences, chosen, self._drafts(draft_logits, seeds, starts + num_accepted + 2))

    def _drafts(
        self, logits: Float[Tensor, "row draft token"], seeds: Int[Tensor, " row"], positions: Int[Tensor, " row"]
    ) -> Int[Tensor, "row draft"]:
        """Return the drafts of all sequences.

        `positions` contains the position of the first draft of each sequence. The other drafts are for the positions
        that follow.
        """
        if not logits.shape[1]:
            return seeds.new_empty(len(seeds), 0)
        offsets = torch.arange(logits.shape[1], device=logits.device)
        return sample_tokens(
            logits, seeds[:, None].expand(logits.shape[:2]), positions[:, None] + offsets, self._settings
        )

    def _update_sequences(
        self, sequences: list[_Sequence], chosen: Int[Tensor, "row position"], drafts: Int[Tensor, "row draft"]
    ) -> None:
        """Copy the choices and the drafts to the CPU, and update each sequence.

        Decoding waits for the device only in this method.
        """
        width = chosen.shape[1]
        for sequence, tokens in zip(sequences, torch.cat([chosen, drafts], dim=1).tolist(), strict=True):
            sequence.update(tokens[:width], tokens[width:])

    def remove_finished(self) -> list[_Sequence]:
        """Remove the finished sequences from the batch, and return them.

        Unfinished sequences in the last rows are moved into the free rows, so that the first rows stay occupied.
        """
        finished = [sequence for sequence in self.sequences if sequence.finish]
        num_left = len(self.sequences) - len(finished)
        free = [row for row in range(num_left) if self.sequences[row].finish]
        moving = [row for row in range(num_left, len(self.sequences)) if not self.sequences[row].finish]
        if free:
            length = max(self.sequences[row].last_position for row in moving)
            self._cache.copy(self._cache, moving, free, length)
        for target, source in zip(free, moving, strict=True):
            self.sequences[target] = self.sequences[source]
        del self.sequences[num_left:]
        return finished
