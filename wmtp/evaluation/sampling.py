"""A model's answers to problems, judged while it writes the next ones."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from wmtp.data.records import Record
from wmtp.data.tokenizer import Tokenizer
from wmtp.generation.decoding import Completion, Request, generate
from wmtp.generation.settings import Decoding
from wmtp.models.mtp import MtpModel
from wmtp.sandbox.grader import Program, Verdict

Judge = Callable[[Program], Verdict]


@dataclass(frozen=True)
class Answer:
    """Sample `index` of a problem, and what its tests say of it; None where it was not judged."""

    record: Record
    index: int
    completion: Completion
    verdict: Verdict | None


def first_records(records: Sequence[Record]) -> list[Record]:
    """One record for each problem: its prompt and tests are the same in all of them."""
    return list({record.task_id: record for record in reversed(records)}.values())[::-1]


def program_of(record: Record, text: str) -> Program:
    """The program that an answer makes, with the problem's tests."""
    return Program(record.preamble + text, record.tests, setup=record.setup, preamble=record.preamble)


def sample_seed(seed: int, name: str, index: int) -> int:
    """The seed of one sample's noise, whatever else is sampled: 63 bits of a hash."""
    digest = hashlib.sha256(f"{seed}\n{index}\n{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def encode_prompts(tokenizer: Tokenizer, template: str, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens that a model reads before it answers."""
    return tokenizer.encode([template.replace("{prompt}", prompt) for prompt in prompts])


def answers(
    model: MtpModel,
    tokenizer: Tokenizer,
    template: str,
    wanted: Sequence[tuple[Record, int]],
    decoding: Decoding,
    *,
    context: int,
    seed: int,
    judge: Judge | None,
    workers: int,
) -> Iterator[Answer]:
    """Answer problems, and judge the answers that have tests, in the order in which they are ready.

    `wanted` names samples as (problem, index); what a sample is depends on these two and the seed alone.
    """
    prompts = encode_prompts(tokenizer, template, [record.prompt for record, _ in wanted])
    requests = [
        Request(prompt, sample_seed(seed, record.task_id, index))
        for prompt, (record, index) in zip(prompts, wanted, strict=True)
    ]
    pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
    waiting: dict[Future[Verdict], tuple[int, Completion]] = {}

    def judged(future: Future[Verdict]) -> Answer:
        number, completion = waiting.pop(future)
        return Answer(*wanted[number], completion, future.result())

    try:
        for number, completion in generate(model, tokenizer, requests, decoding, context):
            record, index = wanted[number]
            if judge is None or not record.tests:
                yield Answer(record, index, completion, None)
                continue
            waiting[pool.submit(judge, program_of(record, completion.text))] = (number, completion)
            yield from [judged(future) for future in list(waiting) if future.done()]
        for future in as_completed(list(waiting)):
            yield judged(future)
    finally:
        pool.shutdown(cancel_futures=True)
