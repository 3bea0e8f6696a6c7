"""Tests of decoding against full forwards without a cache, one sequence and one token at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy.stats import chisquare, kstest
from torch import Tensor

from tests.conftest import tiny_model
from wmtp.data.dataset import Dataset
from wmtp.data.tokenizer import Tokenizer
from wmtp.generation import decoding, fused_block, kv_cache, sampling
from wmtp.generation.cached_model import CachedModel
from wmtp.generation.decoding import Completion, Request, generate
from wmtp.generation.fused_block import FusedBlock
from wmtp.generation.sampling import gumbel_noise, sample_tokens, top_p_mask
from wmtp.generation.settings import Decoding
from wmtp.generation.speculation_stats import speculation_metrics
from wmtp.generation.stop_strings import StopStrings
from wmtp.models.mtp import MtpModel

pytestmark = pytest.mark.xdist_group("decoding")  # its tests share what one fixture makes

CONTEXT = 48
MANY_SAMPLES = settings(
    max_examples=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def trained(model: MtpModel, rows: Tensor, steps: int) -> MtpModel:
    """Train the model for some steps, so that its drafts are often accepted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        states = model(rows).states
        loss = sum(
            F.cross_entropy(model.unembedding(states[k - 1, :, :-k]).flatten(0, 1), rows[:, k:].flatten())
            for k in range(1, model.num_heads + 1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def texts(tiny_data: Dataset) -> list[str]:
    return [record.prompt + "\n" + record.solution for record in tiny_data.validation.records]


@pytest.fixture(scope="session")
def models(texts: list[str], tokenizer: Tokenizer) -> dict[int, MtpModel]:
    """Return models with 1, 2 and 4 heads, briefly trained on the texts, in float64 so that rounding has no effect."""
    rows = torch.tensor([[*tokens, *[tokenizer.end] * 48][:48] for tokens in tokenizer.encode(texts)])
    four = trained(tiny_model(4, dropout=0.1), rows, 34).double()
    some = {heads: tiny_model(heads, dropout=0.1).double() for heads in (1, 2)}
    for model in some.values():
        model.load_state_dict({name: four.state_dict()[name] for name in model.state_dict()})
    return {**some, 4: four}


@pytest.fixture(scope="session")
def prompts(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return beginnings of the texts with different lengths; the first two have one token."""
    lengths = [1, 1, 5, 9, 14, 20, 25, 30]
    return [tokens[:length] for tokens, length in zip(tokenizer.encode(texts), lengths, strict=True)]


def decode_plainly(
    model: MtpModel, tokenizer: Tokenizer, request: Request, config: Decoding, context: int
) -> Completion:
    """Decode by definition: a full forward for each token."""
    tokens: list[int] = []
    while True:
        position = len(request.prompt) + len(tokens)
        token = head_choices(model, request, tokens, config)[0]
        if token == tokenizer.end:
            finish = "end"
            break
        tokens.append(token)
        if any(stop in tokenizer.decode(tokens) for stop in config.stop):
            finish = "stop"
            break
        if position + 1 == context or len(tokens) == config.max_new_tokens:
            finish = "length"
            break
    text = tokenizer.decode(tokens)
    cut = min((text.index(stop) for stop in config.stop if stop in text), default=None)
    return Completion(tokens, text[:cut], finish, len(tokens) + (finish == "end"), (), ())


def decode_speculatively(
    model: MtpModel, tokenizer: Tokenizer, request: Request, config: Decoding, context: int
) -> Completion:
    """Return the same completion with the expected counts of forwards and drafts of speculation."""
    result = decode_plainly(model, tokenizer, request, config, context)
    final = [*result.tokens, *([tokenizer.end] if result.finish == "end" else [])]
    most = min(context - len(request.prompt), config.max_new_tokens or context)
    accepted, drafted = [0] * (model.num_heads - 1), [0] * (model.num_heads - 1)
    known, forwards = 1, 1
    while known < len(final):
        drafts = head_choices(model, request, final[: known - 1], config)[1:]
        matches = [draft == token for draft, token in zip(drafts, final[known:], strict=False)]
        num_accepted = matches.index(False) if False in matches else len(matches)
        is_finished = known + num_accepted + 1 >= len(final)
        for number in range(min(len(drafts), (len(final) if is_finished else most) - known)):
            drafted[number] += 1
            accepted[number] += number < num_accepted
        known, forwards = known + num_accepted + 1, forwards + 1
    return replace(result, forwards=forwards, accepted=tuple(accepted), drafted=tuple(drafted))


def head_choices(model: MtpModel, request: Request, tokens: list[int], config: Decoding) -> list[int]:
    """Return the token of every head after a prompt and the first tokens of its completion."""
    logits = last_logits(model, (*request.prompt, *tokens))
    positions = len(request.prompt) + len(tokens) + torch.arange(model.num_heads)
    return sample_tokens(logits, torch.full_like(positions, request.seed), positions, config).tolist()


@cache
@torch.no_grad()
def last_logits(model: MtpModel, tokens: tuple[int, ...]) -> Tensor:
    """Return every head's logits at the last token, from a full forward."""
    return model.unembedding(model.eval()(torch.tensor([tokens])).states[:, 0, -1])


def completions(
    model: MtpModel, tokenizer: Tokenizer, requests: list[Request], config: Decoding, context: int = CONTEXT
) -> list[Completion]:
    """Return the completions of `generate` in the order of the requests."""
    found = dict(generate(model, tokenizer, requests, config, context))
    return [found[index] for index in range(len(requests))]


def check(
    model: MtpModel, tokenizer: Tokenizer, requests: list[Request], config: Decoding, context: int = CONTEXT
) -> list[Completion]:
    """Compare all fields of every completion with the definition."""
    got = completions(model, tokenizer, requests, config, context)
    define = decode_speculatively if config.speculative else decode_plainly
    assert got == [define(model, tokenizer, request, config, context) for request in requests]
    return got


PLAIN, SPECULATIVE = Decoding(speculative=False), Decoding()
SAMPLED = Decoding(temperature=0.9, top_p=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("num_heads", [1, pytest.param(2, marks=pytest.mark.deep), 4])
@pytest.mark.parametrize("config", [PLAIN, SPECULATIVE, SAMPLED, replace(SAMPLED, speculative=False)])
def test_completions_of_prompts_of_different_lengths_equal_those_of_full_forwards(
    models: dict[int, MtpModel], tokenizer: Tokenizer, prompts: list[list[int]], config: Decoding, num_heads: int
) -> None:
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    got = check(models[num_heads], tokenizer, requests, replace(config, batch_size=5))
    assert {"end", "length"} <= {completion.finish for completion in got}
    assert len({len(completion.tokens) for completion in got}) > 4
    if config.speculative:
        rates = speculation_metrics([completion.stats for completion in got])
        assert list(rates) == ["tokens_per_forward", *(f"head_{k}_acceptance" for k in range(2, num_heads + 1))]
        assert all(0 < rates[f"head_{k}_acceptance"] < 1 for k in range(2, num_heads + 1))
        assert rates["tokens_per_forward"] > 1 or num_heads == 1
    else:
        assert speculation_metrics([completion.stats for completion in got]) == {"tokens_per_forward": 1.0}


@pytest.mark.slow
@MANY_SAMPLES
@given(data=st.data())
def test_any_settings_and_any_batch_equal_the_definition(
    models: dict[int, MtpModel], tokenizer: Tokenizer, prompts: list[list[int]], data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=6))
    requests = [Request(prompt, data.draw(st.integers(0, 2**63 - 1))) for prompt in chosen]
    config = Decoding(
        temperature=data.draw(st.sampled_from([0.0, 0.4, 1.0, 2.0])),
        top_p=data.draw(st.sampled_from([0.5, 0.95, 1.0])),
        max_new_tokens=data.draw(st.none() | st.integers(1, 9)), batch_size=data.draw(st.integers(1, 7)),
        stop=tuple(data.draw(st.lists(st.sampled_from(["re", "e", ": ", "items", "\n    "]), max_size=2))),
        speculative=data.draw(st.booleans()),
    )  # fmt: skip
    context = data.draw(st.integers(max(map(len, chosen)) + 1, CONTEXT))
    check(models[data.draw(st.sampled_from([1, 2, 4]))], tokenizer, requests, config, context)


def accept_everything(patch: pytest.MonkeyPatch) -> None:
    update = decoding._Sequence.update
    patch.setattr(decoding._Sequence, "update", lambda self, chosen, new: update(self, [*self.drafts, chosen[-1]], new))


def output_rejected_drafts(patch: pytest.MonkeyPatch) -> None:
    mask = fused_block.causal_mask
    patch.setattr(fused_block, "causal_mask", lambda positions, *rest: mask(positions + 1, *rest))


def cache_rejected_drafts(patch: pytest.MonkeyPatch) -> None:
    position = decoding._Sequence.last_position.fget
    patch.setattr(decoding._Sequence, "last_position", property(lambda self: position(self) + (sum(self._drafted) > 3)))


def draft_after_the_first_token(patch: pytest.MonkeyPatch) -> None:
    logits = CachedModel.draft_logits
    patch.setattr(
        CachedModel, "draft_logits",
        lambda self, x, forward, cache, at: logits(self, x, forward, cache, at if forward.is_causal else at * 0),
    )  # fmt: skip


def noise_depends_on_the_row(patch: pytest.MonkeyPatch) -> None:
    def by_row(logits: Tensor, seeds: Tensor, positions: Tensor, config: Decoding) -> Tensor:
        rows = torch.arange(len(seeds)).view(-1, *[1] * (seeds.ndim - 1))
        return sample_tokens(logits, seeds * 0 + rows, positions, config)

    patch.setattr(decoding, "sample_tokens", by_row)


def same_noise_for_all_positions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        decoding,
        "sample_tokens",
        lambda logits, seeds, positions, config: sample_tokens(logits, seeds, positions * 0, config),
    )


def noise_from_a_generator(patch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    patch.setattr(
        "wmtp.generation.sampling.gumbel_noise",
        lambda seeds, positions, size: -(-torch.rand(*seeds.shape, size, generator=generator).log()).log(),
    )


def stop_within_a_token(patch: pytest.MonkeyPatch) -> None:
    def stop_count(self: StopStrings, tokens: list[int]) -> int | None:
        found = [n for n, token in enumerate(tokens) if any(stop in self._decode([token]) for stop in self._stop)]
        return found[0] + 1 if found else None

    patch.setattr(StopStrings, "stop_count", stop_count)


def stop_at_the_last_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        StopStrings, "stop_count",
        lambda self, tokens: len(tokens) if self._stop_start(self._decode(tokens)) is not None else None,
    )  # fmt: skip


STOPPING = Decoding(stop=("Return", "s = "), batch_size=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breakage", "config"),
    [
        (accept_everything, SPECULATIVE), (output_rejected_drafts, SPECULATIVE), (output_rejected_drafts, PLAIN),
        (cache_rejected_drafts, SPECULATIVE), (draft_after_the_first_token, SPECULATIVE),
        (noise_depends_on_the_row, SAMPLED), (noise_from_a_generator, SAMPLED), (same_noise_for_all_positions, SAMPLED),
        (stop_within_a_token, STOPPING), (stop_at_the_last_token, STOPPING),
    ],
)  # fmt: skip
def test_control_the_comparisons_detect_errors(
    models: dict[int, MtpModel], tokenizer: Tokenizer, prompts: list[list[int]],
    breakage: Callable[[pytest.MonkeyPatch], None], config: Decoding, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    requests = [Request(prompt, 9 - seed) for seed, prompt in enumerate(prompts[1:])]
    check(models[4], tokenizer, requests, config)
    breakage(monkeypatch)
    with pytest.raises(AssertionError):
        check(models[4], tokenizer, requests, config)


@pytest.mark.slow
def test_samples_of_one_prompt_differ_and_compute_it_once(
    models: dict[int, MtpModel], tokenizer: Tokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    prefill = decoding._Batch._prefill

    def counted(batch: decoding._Batch, new: list[list[int]]) -> decoding._PromptCache:
        lengths.extend(map(len, set(map(tuple, new))))
        return prefill(batch, new)

    monkeypatch.setattr(decoding._Batch, "_prefill", counted)
    config = Decoding(temperature=1.0, batch_size=3)
    requests = [Request(prompt, seed) for seed in range(4) for prompt in (prompts[3], prompts[5])]
    got = check(models[4], tokenizer, requests, config)
    assert sorted(lengths) == [9, 20]
    assert len({tuple(completion.tokens) for completion in got}) > 4
    lengths.clear()
    completions(models[4], tokenizer, [Request(prompts[3], seed) for seed in range(3)], replace(config, batch_size=1))
    assert lengths == [9]


@pytest.mark.slow
def test_the_context_is_filled_and_never_exceeded(
    models: dict[int, MtpModel], tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    for context in (31, 33, 36):
        got = check(models[4], tokenizer, [Request(prompt) for prompt in prompts], SPECULATIVE, context)
        ends = {context - len(prompt) for prompt, c in zip(prompts, got, strict=True) if c.finish == "length"}
        assert {len(c.tokens) for c in got if c.finish == "length"} == ends
    for prompt in ([], [5] * 31, [5] * 40):
        with pytest.raises(ValueError, match="prompt 1 has .* tokens; a context of 31 takes 1 to 30"):
            generate(models[4], tokenizer, [Request([5]), Request(prompt)], SPECULATIVE, 31)
    assert not list(generate(models[4], tokenizer, [], SPECULATIVE, 31))


def test_speculation_fills_the_same_cache_as_plain_decoding(
    models: dict[int, MtpModel], tokenizer: Tokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[kv_cache.KVCache] = []
    new_cache = CachedModel.new_cache
    monkeypatch.setattr(
        CachedModel,
        "new_cache",
        lambda *arguments, **options: made.append(new_cache(*arguments, **options)) or made[-1],
    )
    sides = []
    for config in (PLAIN, SPECULATIVE):
        made.clear()
        (completion,) = completions(models[4], tokenizer, [Request(prompts[4])], replace(config, max_new_tokens=12))
        assert completion.finish == "length"
        sides.append(made[0].kv_blocks)
    known = len(prompts[4]) + 12 - 1
    assert sum(completion.accepted) > 0
    assert len(sides[0]) == 2
    assert len(sides[1]) == 3
    for one, other in zip(*sides, strict=False):
        torch.testing.assert_close(one[:, :, :known], other[:, :, :known])
        assert one[:, :, :known].any(dim=-1).all()


def test_generation_changes_neither_the_mode_of_the_model_nor_gradients(
    models: dict[int, MtpModel], tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    model = models[4].train()
    before = completions(model.eval(), tokenizer, [Request(prompt) for prompt in prompts], SPECULATIVE)
    model.train()
    running = generate(model, tokenizer, [Request(prompt) for prompt in prompts], SPECULATIVE, CONTEXT)
    index, completion = next(running)
    assert completion == before[index]  # dropout has no effect
    assert model.training
    assert not torch.is_inference_mode_enabled()
    assert model(torch.tensor([[1, 2]])).states.requires_grad
    running.close()
    assert all(module.training for module in model.modules())
    model.eval()


def test_autocast_determines_the_dtype(
    tokenizer: Tokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    types: list[torch.dtype] = []
    call = FusedBlock.__call__
    monkeypatch.setattr(
        FusedBlock, "__call__", lambda self, x, *arguments: types.append(x.dtype) or call(self, x, *arguments)
    )
    requests = [Request(prompt) for prompt in prompts]
    with torch.autocast("cpu", torch.bfloat16):
        completions(tiny_model(), tokenizer, requests, SPECULATIVE)
    assert set(types) == {torch.bfloat16}
    types.clear()
    completions(tiny_model(), tokenizer, requests, SPECULATIVE)
    assert set(types) == {torch.float32}


def splitmix64(state: int) -> Iterator[int]:
    """Yield the numbers of the generator of Steele, Lea and Flood, with unbounded integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def uniform(seed: int, position: int, count: int) -> np.ndarray:
    """Return the uniform numbers behind the noise, computed independently."""
    first = next(splitmix64(seed))
    stream = splitmix64(next(splitmix64((first + position * 0x9E3779B97F4A7C15) % 2**64)))
    return np.array([((next(stream) >> 41) + 0.5) / 2**23 for _ in range(count)])


def test_noise_is_splitmix64_of_seed_position_and_token() -> None:
    assert next(splitmix64(1234567)) == 6457827717110365317  # published with the reference implementation
    for seed, position in [(0, 0), (1, 0), (0, 1), (2**63 - 1, 4096), (1234567, 77)]:
        got = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 300)[0]
        torch.testing.assert_close(
            got.double().numpy(), -np.log(-np.log(uniform(seed, position, 300))), rtol=1e-4, atol=1e-5
        )
    assert gumbel_noise(torch.tensor(7), torch.tensor(3), 2).tolist() == pytest.approx([0.0131054, 0.2236400], abs=1e-5)


@pytest.mark.parametrize("bits", [0, -1])
def test_the_largest_and_the_smallest_noise_are_finite(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_mix", lambda x: torch.full_like(x, bits))
    assert gumbel_noise(torch.tensor(0), torch.tensor(0), 9).isfinite().all()


def test_noise_is_uniform_and_independent_along_seeds_positions_and_tokens() -> None:
    seeds, positions = torch.meshgrid(torch.arange(60), torch.arange(60), indexing="ij")
    values = (-(-gumbel_noise(seeds, positions, 60)).exp()).exp().numpy()
    assert kstest(values.flatten(), "uniform").pvalue > 1e-3
    for axis in range(3):
        one, other = np.moveaxis(values, axis, 0)[:-1].flatten(), np.moveaxis(values, axis, 0)[1:].flatten()
        cells = np.histogram2d(one, other, bins=16, range=[[0, 1], [0, 1]])[0]
        assert chisquare(cells.flatten()).pvalue > 1e-3
    assert len(np.unique(values)) > 0.98 * values.size


def pair_probabilities(
    model: MtpModel, prompt: list[int], config: Decoding, firsts: list[int]
) -> dict[int, np.ndarray]:
    """Return, for each first token, the probability of it and each second token: softmax, then `top_p`."""

    def distribution(tokens: list[int]) -> np.ndarray:
        p = (last_logits(model, tuple(tokens))[0] / config.temperature).softmax(-1).numpy()
        order = np.argsort(-p, kind="stable")
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), config.top_p)) + 1]
        cut = np.zeros_like(p)
        cut[kept] = p[kept] / p[kept].sum()
        return cut

    first = distribution(prompt)
    return {token: first[token] * distribution([*prompt, token]) for token in firsts}


def joint_pvalue(
    model: MtpModel, tokenizer: Tokenizer, prompt: list[int], config: Decoding, num_samples: int = 1500
) -> float:
    """Return the p-value of the samples' pairs of tokens under the model's distribution."""
    requests = [Request(prompt, seed) for seed in range(num_samples)]
    config = replace(config, max_new_tokens=2, batch_size=512)
    pairs = [tuple([*c.tokens, tokenizer.end][:2]) for c in completions(model, tokenizer, requests, config)]
    firsts = sorted({pair[0] for pair in pairs if pair[0] != tokenizer.end})
    expected = {(a, b): q * num_samples for a, row in pair_probabilities(model, prompt, config, firsts).items()
                for b, q in enumerate(row)}  # fmt: skip
    assert all(expected.get(pair, 1) > 0 for pair in pairs)
    likely = [pair for pair, count in expected.items() if count >= 8]
    assert len(likely) > 4
    counts = [pairs.count(pair) for pair in likely]
    return float(chisquare(
        [*counts, num_samples - sum(counts)],
        [*(expected[pair] for pair in likely), num_samples - sum(expected[pair] for pair in likely)],
    ).pvalue)  # fmt: skip


PAIRS = Decoding(temperature=0.4)
PROMPT = [400, 269, 416]


@pytest.mark.slow
@pytest.mark.parametrize("config", [
    PAIRS, replace(PAIRS, top_p=0.8), replace(PAIRS, speculative=False),
])  # fmt: skip
def test_pairs_of_tokens_are_drawn_from_the_models_distribution(tokenizer: Tokenizer, config: Decoding) -> None:
    assert joint_pvalue(tiny_model(seed=2).double(), tokenizer, PROMPT, config) > 1e-3


def temperature_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        decoding, "sample_tokens",
        lambda logits, seeds, positions, config: sample_tokens(
            logits * config.temperature, seeds, positions, config
        ),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("breakage", [temperature_ignored, accept_everything])
def test_control_another_distribution_is_detected(
    tokenizer: Tokenizer, breakage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage(monkeypatch)
    assert joint_pvalue(tiny_model(seed=2).double(), tokenizer, PROMPT, PAIRS) < 1e-6


def test_top_p_allows_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for top_p, expected in [
        (0.01, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.74, [1, 3]),
        (0.76, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
    ]:
        assert top_p_mask(logits, top_p).nonzero().flatten().tolist() == expected
    assert top_p_mask(torch.zeros(4), 0.5).tolist() == [True, True, False, False]
    seeds, positions = torch.arange(500), torch.zeros(500, dtype=torch.int64)
    drawn = sample_tokens(logits.expand(500, 4), seeds, positions, Decoding(temperature=3.0, top_p=0.5))
    assert set(drawn.tolist()) == {1, 3}  # the temperature is applied first: it changes 0.5 to 0.33
    assert set(sample_tokens(logits.expand(500, 4), seeds, positions, Decoding(temperature=3.0)).tolist()) == {
        0,
        1,
        2,
        3,
    }


@pytest.mark.parametrize("wrong", [
    {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.1},
    {"max_new_tokens": 0}, {"stop": ("",)}, {"batch_size": 0},
])  # fmt: skip
def test_settings_out_of_range_raise_an_error(wrong: dict[str, object]) -> None:
    adapter = TypeAdapter(Decoding)
    assert adapter.validate_python({"stop": ["a"], "top_p": 1}) == Decoding(stop=("a",))
    with pytest.raises(ValidationError):
        adapter.validate_python(wrong)


@pytest.mark.parametrize(("text", "stop", "expected"), [
    ("def f():\n    return 1\n\nprint(f())", ("\n\n",), "def f():\n    return 1"),
    ("日本語 🙂 ende", ("🙂",), "日本語 "), ("日本語 🙂 ende", ("語 ", "本"), "日"), ("aabaac", ("aac",), "aab"),
    ("no stop", ("x", "stopp"), "no stop"), ("items", ("tem", "item"), ""), ("``` ``", ("```",), ""),
    ("日本", (), "日本"),
])  # fmt: skip
def test_a_stop_string_ends_the_text_for_any_split_into_tokens(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], expected: str
) -> None:
    (tokens,) = tokenizer.encode([text])
    counts = set()
    for width in (1, 2, 3, len(tokens)):
        stop_strings, count, end = StopStrings(tokenizer.decode, stop), None, 0
        while count is None and end < len(tokens):
            end = min(end + width, len(tokens))
            count = stop_strings.stop_count(tokens[:end])
        counts.add(count)
        assert stop_strings.text(tokens[:count]) == expected
        if count is not None:
            assert not any(string in tokenizer.decode(tokens[: count - 1]) for string in stop)
    assert len(counts) == 1
    assert (None in counts) == (expected == text)


@given(
    text=st.text("ab\n日🙂\ufffd", max_size=12), stop=st.lists(st.text("ab\n日🙂", min_size=1, max_size=4), max_size=2)
)
@settings(deadline=None, derandomize=True)
def test_streamed_pieces_are_final_and_concatenate_to_the_text(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    (tokens,) = tokenizer.encode([text])
    stop_strings, streamed = StopStrings(tokenizer.decode, tuple(stop)), ""
    for end in range(1, len(tokens) + 1):
        count = stop_strings.stop_count(tokens[:end])
        streamed += stop_strings.new_text(tokens[:end], is_finished=count is not None or end == len(tokens))
        final = stop_strings.text(tokens[:count])
        assert text.startswith(streamed)
        assert final.startswith(streamed)
        if count is not None:
            break
    assert not tokens or streamed == final


def test_text_is_streamed_during_generation(
    models: dict[int, MtpModel], tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    for config in (SPECULATIVE, STOPPING, Decoding(temperature=2.5)):
        given: list[tuple[int, str]] = []
        running = generate(models[4], tokenizer, requests, config, CONTEXT, lambda *piece, to=given: to.append(piece))
        for index, completion in running:
            pieces = [piece for which, piece in given if which == index]
            assert all(pieces)
            assert "".join(pieces) == completion.text
        assert len(given) > 3 * len(requests)


def test_metrics_count_end_tokens_and_every_head() -> None:
    one = Completion([5, 6, 7], "", "end", 2, (1, 0), (2, 2))
    two = Completion([5], "", "length", 1, (0, 0), (0, 0))
    metrics = speculation_metrics([one.stats, two.stats])
    assert metrics == {"tokens_per_forward": 5 / 3, "head_2_acceptance": 0.5, "head_3_acceptance": 0.0}
    assert speculation_metrics([]) == {}
