"""Generation of samples for programming problems. Samples are graded while further samples are generated."""

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

Grader = Callable[[Program], Verdict]


@dataclass(frozen=True)
class Sample:
    """A completion of a problem's prompt, with the verdict of the problem's tests.

    `index` is the number of the sample among the samples of its problem, starting with 0. `verdict` is None if the
    sample was not graded.
    """

    record: Record
    index: int
    completion: Completion
    verdict: Verdict | None


def unique_problems(records: Sequence[Record]) -> list[Record]:
    """Return the first record of each problem. All records of a problem have the same prompt and the same tests."""
    return list({record.task_id: record for record in reversed(records)}.values())[::-1]


def build_program(record: Record, text: str) -> Program:
    """Return the program that consists of a record's preamble and the completion `text`, with the record's tests."""
    return Program(
        record.preamble + text, record.tests, setup=record.setup, preamble=record.preamble,
        input_file=record.input_file, output_file=record.output_file, time_limit=record.time_limit,
    )  # fmt: skip


def sample_seed(seed: int, name: str, index: int) -> int:
    """Return the random seed of one sample, which is a hash of 63 bits.

    Args:
        seed: the seed of the evaluation.
        name: the name of the problem.
        index: the number of the sample among the samples of its problem.
    """
    digest = hashlib.sha256(f"{seed}\n{index}\n{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generate_samples(
    model: MtpModel,
    tokenizer: Tokenizer,
    template: str,
    keys: Sequence[tuple[Record, int]],
    decoding: Decoding,
    *,
    context: int,
    seed: int,
    grader: Grader | None,
    workers: int,
) -> Iterator[Sample]:
    """Generate a sample for each pair (problem, sample index) in `keys`, and yield each sample as soon as it is ready.

    If there is a `grader`, it grades the samples of problems that have tests. Up to `workers` programs are graded at
    the same time. A sample depends on its problem, its index and `seed`, but not on the other samples.
    """
    prompts = tokenizer.encode_prompts(template, [record.prompt for record, _ in keys])
    requests = [
        Request(prompt, sample_seed(seed, record.task_id, index))
        for prompt, (record, index) in zip(prompts, keys, strict=True)
    ]
    pool = ThreadPoolExecutor(workers, thread_name_prefix="grader")
    pending: dict[Future[Verdict], tuple[int, Completion]] = {}

    def _graded(future: Future[Verdict]) -> Sample:
        """Return the sample of a finished grading."""
        number, completion = pending.pop(future)
        return Sample(*keys[number], completion, future.result())

    try:
        for number, completion in generate(model, tokenizer, requests, decoding, context):
            record, index = keys[number]
            if grader is None or not record.tests:
                yield Sample(record, index, completion, None)
                continue
            pending[pool.submit(grader, build_program(record, completion.text))] = (number, completion)
            yield from [_graded(future) for future in list(pending) if future.done()]
        for future in as_completed(list(pending)):
            yield _graded(future)
    finally:
        pool.shutdown(cancel_futures=True)
