"""Answer a prompt: `python -m wmtp.generate checkpoint=RUN prompt="…"`; `--help` lists the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import CHECKPOINT_KEY, Command, run_command
from wmtp.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import Task
    from wmtp.config.schema import Fault

STANDARD_INPUT = "-"


def generate(task: Task) -> None:
    """Write the answers to standard output as they come, and what they cost to standard error."""
    from wmtp.config.schema import build  # these import torch, and --help needs none of it
    from wmtp.evaluation.sampling import encode_prompts, sample_seed
    from wmtp.generation.decoding import Completion, Request
    from wmtp.generation.decoding import generate as completions
    from wmtp.generation.speculation_stats import speculation_metrics
    from wmtp.models.loading import find_checkpoint, load_trained, read_config, require_room

    config = task.config
    checkpoint, config_path = find_checkpoint(Path(config.checkpoint.path))
    trained = read_config(config_path)
    text = read_prompt(config.prompt)
    cache_dir = Path(config.cache_dir)
    tokenizer = build(trained.model.tokenizer, cache_dir=cache_dir)
    (prompt,) = encode_prompts(tokenizer, trained.data.template, [text])
    context = config.context or trained.data.max_length
    if len(prompt) >= context:
        raise InputError(
            f"prompt: has {len(prompt)} tokens, which leaves no room for an answer in a context of {context}; "
            "shorten it, or set context=… beyond what the model was trained on"
        )
    hardware = build(config.hardware)
    model = load_trained(checkpoint, tokenizer, hardware, cache_dir)
    require_room(model, context, "context")
    requests = [Request(prompt, sample_seed(config.seed, text, index)) for index in range(config.n)]

    def show(index: int, piece: str) -> None:
        if config.n == 1:
            print(piece, end="", flush=True)

    found: dict[int, Completion] = {}
    num_shown = 0
    with hardware.autocast():
        for index, completion in completions(model, tokenizer, requests, build(config.generation), context, show):
            found[index] = completion
            while num_shown in found:  # in their order
                header = f"--- answer {num_shown + 1} of {config.n}\n"
                print("" if config.n == 1 else f"{header}{found[num_shown].text}", flush=True)
                num_shown += 1
    metrics = speculation_metrics([completion.cost for completion in found.values()])
    costs = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    tokens = sum(len(completion.tokens) for completion in found.values())
    ends = ", ".join(sorted({completion.finish for completion in found.values()}))
    print(f"[{tokens} tokens, ended by {ends}; {costs}]", file=sys.stderr)


def read_prompt(typed: str) -> str:
    """The prompt: what was typed, or standard input, without its last line's end.

    Raises:
        InputError: it is empty, or no text.
    """
    try:
        text = sys.stdin.read().removesuffix("\n") if typed == STANDARD_INPUT else typed
        text.encode()
    except UnicodeError as error:
        raise InputError(f"prompt: is no text in UTF-8: {error}") from error
    if not text:
        raise InputError("prompt: standard input is empty; there is nothing to answer")
    return text


def complete(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config with a temperature."""
    from wmtp.evaluation.validate import with_temperature

    return with_temperature(config, config.n)


def faults(config: DictConfig) -> list[Fault]:
    """All faults of a config."""
    from wmtp.evaluation.validate import generation_faults

    return generation_faults(config)


COMMAND = Command(
    "generate",
    generate,
    faults,
    lambda config, overrides: None,
    complete=complete,
    texts=frozenset({"prompt"}),
    short=CHECKPOINT_KEY,
    fetches={"checkpoint.path": "best"},
)


def main() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
