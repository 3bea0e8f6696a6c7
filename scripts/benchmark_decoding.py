"""Measure the speed-up of self-speculative decoding: `scripts/benchmark_decoding.py RUN_OR_CHECKPOINT [--prompts 200]`.

The script generates greedy completions for held-out tasks of the run's data, with all heads (speculative) and with
head 1 alone (plain). It compares the completions token by token, and the time with one thread. After a warm-up, the
variants are timed in alternation in one process; the ratios are medians over the rounds.

Efficiency is the speed-up divided by the tokens per forward. It is below 1 if a forward with drafts takes longer than
one without. Published for code, 7B parameters, 4 heads and batch 42 on a GPU, where reading the weights dominates the
time: a speed-up of 3.05 at 3.50 tokens per forward, an efficiency of 0.87 (Gloeckle et al. 2024, arXiv 2404.19737,
table S2).

The margin is the smallest difference between the two largest logits of any generated token. The error is the largest
difference between a logit and its value in float64. If the margin is not larger than the error, rounding can change a
token.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch

from wmtp.config.schema import build
from wmtp.data.sources import DataSource
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.generation.decoding import Completion, Request, generate
from wmtp.generation.settings import Decoding
from wmtp.generation.speculation_stats import speculation_metrics
from wmtp.models.loading import find_trained_checkpoint
from wmtp.models.mtp import MtpModel

NUM_TURNS = 5
BATCH_SIZES = (1, 32)
PUBLISHED_SPEED_UP, PUBLISHED_TOKENS_PER_FORWARD = 3.05, 3.50
Arm = tuple[bool, int]


class Benchmark:
    """A trained model, and the requests whose decoding is measured."""

    def __init__(self, path: Path, num_prompts: int, cache_dir: Path) -> None:
        checkpoint = find_trained_checkpoint(path)
        config = checkpoint.config
        self.tokenizer: Tokenizer = checkpoint.tokenizer(cache_dir)
        source: DataSource = build(config.data, tokenizer=self.tokenizer)
        splits = source.read()
        prompts = list(dict.fromkeys(record.prompt for record in splits.test or splits.validation))[:num_prompts]
        self.context = source.max_length
        hardware: Hardware = build(config.hardware)
        self.model: MtpModel = checkpoint.load_model(self.tokenizer, hardware, cache_dir).eval()
        self.requests = [Request(tokens) for tokens in self.tokenizer.encode_prompts(source.template, prompts)]

    def completions(self, arm: Arm, count: int | None = None) -> list[Completion]:
        """Return the completions of the first `count` requests (None: of all), in order."""
        speculative, batch_size = arm
        how = Decoding(speculative=speculative, batch_size=batch_size)
        requests = self.requests[:count]
        found = dict(generate(self.model, self.tokenizer, requests, how, self.context))
        return [found[index] for index in range(len(requests))]

    def seconds(self, arm: Arm) -> float:
        """Return the seconds for all completions."""
        started = time.perf_counter()
        self.completions(arm)
        return time.perf_counter() - started

    @torch.inference_mode()
    def margin_and_error(self, completions: list[Completion]) -> tuple[float, float]:
        """Return the smallest difference of the two largest logits of a token, and the largest error of a logit."""
        margins, errors = [], []
        precise = copy.deepcopy(self.model).double()
        for request, completion in zip(self.requests, completions, strict=True):
            tokens = torch.tensor([request.prompt + completion.tokens], device=self.model.embedding.weight.device)
            start = len(request.prompt) - 1
            logits, exact = (
                model(tokens, num_heads=1).states[0, 0, start : start + completion.stats.num_chosen]
                @ model.unembedding_weight.T
                for model in (self.model, precise)
            )
            largest = exact.topk(2).values
            margins.append(float((largest[:, 0] - largest[:, 1]).min()))
            errors.append(float((logits - exact).abs().max()))
        return min(margins), max(errors)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="folder of a run or of a checkpoint")
    parser.add_argument("--prompts", type=int, default=200, help="number of prompts")
    parser.add_argument("--cache-dir", type=Path, default=Path("outputs/cache"), help="folder of cached tokenizers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = Benchmark(options.path, options.prompts, options.cache_dir)
    report(benchmark)


def report(benchmark: Benchmark) -> None:
    """Print the comparison of the completions, then the table of times."""
    arms: list[Arm] = [(speculative, size) for size in BATCH_SIZES for speculative in (False, True)]
    answers = {arm: benchmark.completions(arm) for arm in arms}
    plain = answers[arms[0]]
    num_tokens = sum(completion.stats.num_chosen for completion in plain)
    differing = sum(
        one != other
        for arm in arms
        for a, b in zip(plain, answers[arm], strict=True)
        for one, other in zip([*a.tokens, None], [*b.tokens, None], strict=False)
    )
    metrics = speculation_metrics([completion.stats for completion in answers[arms[1]]])
    margin, error = benchmark.margin_and_error(plain)
    model = benchmark.model
    print(f"{len(plain)} prompts, {num_tokens} tokens, {model.num_parameters / 1e6:.1f} million parameters")
    print(f"{model.num_heads} heads, {model.embedding.weight.device}, one thread, torch {torch.__version__}\n")
    print(f"{'tokens that differ from plain decoding, all arms':50} {differing}")
    print(f"{'smallest margin, largest error of a logit':50} {margin:.1e}, {error:.1e}")
    for name, value in metrics.items():
        print(f"{name:50} {value:.3f}")
    seconds: dict[Arm, list[float]] = {arm: [] for arm in arms}
    for _ in range(NUM_TURNS):
        for arm in arms:
            seconds[arm].append(benchmark.seconds(arm))
    print(f"\n{'':12} {'plain':>9} {'speculative':>12} {'speed-up':>9} {'efficiency':>11}")
    for size in BATCH_SIZES:
        without, with_ = (statistics.median(seconds[speculative, size]) for speculative in (False, True))
        ratio = statistics.median(
            one / other for one, other in zip(seconds[False, size], seconds[True, size], strict=True)
        )
        print(
            f"batch {size:<6} {without:8.2f}s {with_:11.2f}s {ratio:9.2f} {ratio / metrics['tokens_per_forward']:11.2f}"
        )
    published = PUBLISHED_SPEED_UP / PUBLISHED_TOKENS_PER_FORWARD
    print(f"published    {'':9} {'':12} {PUBLISHED_SPEED_UP:9.2f} {published:11.2f}  (7B, GPU, batch 42)")


if __name__ == "__main__":
    main()
