"""Generate answers to a prompt: `python -m wmtp.generate checkpoint=RUN prompt="…"`; `--help` lists all keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import CHECKPOINT_KEY, Command, run_command
from wmtp.errors import InputError
from wmtp.runtime.standard_streams import require_written_output

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import JobContext
    from wmtp.config.schema import CheckedConfig

STANDARD_INPUT = "-"


def generate(context: JobContext) -> None:
    """Generate answers and write them to standard output. Write the decoding statistics to standard error."""
    from wmtp.config.schema import build  # these import torch, which --help does not need
    from wmtp.evaluation.sampling import sample_seed
    from wmtp.generation.decoding import Completion, Request
    from wmtp.generation.decoding import generate as completions
    from wmtp.generation.speculation_stats import speculation_metrics
    from wmtp.models.loading import TrainedCheckpoint, check_max_positions

    config = context.config
    checkpoint: TrainedCheckpoint = context.inputs
    trained = checkpoint.config
    text = read_prompt(config.prompt)
    cache_dir = Path(config.cache_dir)
    tokenizer = checkpoint.tokenizer(cache_dir)
    (prompt,) = tokenizer.encode_prompts(trained.data.template, [text])
    max_tokens = config.context or trained.data.max_length
    if len(prompt) >= max_tokens:
        raise InputError(
            f"prompt: has {len(prompt)} tokens, which leaves no room for an answer in a context of {max_tokens}; "
            "shorten it, or set context=… to more tokens than in training"
        )
    hardware = build(config.hardware)
    model = checkpoint.load_model(tokenizer, hardware, cache_dir)
    check_max_positions(model, max_tokens, "context")
    requests = [Request(prompt, sample_seed(config.seed, text, index)) for index in range(config.n)]

    def _show(index: int, piece: str) -> None:
        """Print a piece of text as soon as it is generated, if there is only one sample."""
        if config.n == 1:
            print(piece, end="", flush=True)

    found: dict[int, Completion] = {}
    num_shown = 0
    with hardware.autocast():
        for index, completion in completions(model, tokenizer, requests, build(config.generation), max_tokens, _show):
            found[index] = completion
            while num_shown in found:  # print the completions in the order of their indices
                header = f"--- answer {num_shown + 1} of {config.n}\n"
                print("" if config.n == 1 else f"{header}{found[num_shown].text}", flush=True)
                num_shown += 1
    metrics = speculation_metrics([completion.stats for completion in found.values()])
    statistics = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    tokens = sum(len(completion.tokens) for completion in found.values())
    ends = ", ".join(sorted({completion.finish for completion in found.values()}))
    print(f"[{tokens} tokens, ended by {ends}; {statistics}]", file=sys.stderr)
    require_written_output()


def read_prompt(value: str) -> str:
    """Return the prompt that a value of the config key `prompt` stands for.

    If the value is "-", the prompt is read from standard input. A byte order mark at its start and one final newline
    are removed. Otherwise, the value itself is the prompt.

    Raises:
        InputError: the prompt is empty or not UTF-8 text.
    """
    try:
        text = sys.stdin.read().removeprefix("\ufeff").removesuffix("\n") if value == STANDARD_INPUT else value
        text.encode()
    except UnicodeError as error:
        raise InputError(f"prompt: is not UTF-8 text: {error}") from error
    if not text:
        raise InputError("prompt: is empty; pass prompt=TEXT, or the text on standard input with prompt=-")
    return text


def check(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Check a config. If the user set no sampling temperature, add a default one."""
    from wmtp.evaluation.validate import check_generation

    return check_generation(config, overrides)


COMMAND = Command(
    "generate",
    generate,
    check,
    raw_keys=frozenset({"prompt"}),
    aliases=CHECKPOINT_KEY,
    remote_keys={"checkpoint.path": "best"},
)


def main() -> NoReturn:
    """Run `python -m wmtp.generate` with the command-line arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
