"""HTML cards that show generated samples with their verdicts."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from markupsafe import Markup

from wmtp.report.html import card, cards, details, paragraph
from wmtp.report.run_record import is_attempt

NUM_SHOWN, MAX_SAMPLES = 8, 200
"""Number of samples that are visible at first, and maximum number of samples in the page."""


def latest_samples(samples: Sequence[Mapping[str, Any]]) -> Markup:
    """Return HTML that shows the samples of the last step at which a run generated samples.

    `samples` are the lines of its samples.jsonl. If this step has samples for test problems, only these are shown.
    Samples that passed the tests alternate with the other samples. Attempts, which are samples at a temperature above
    0, follow after the greedy samples.
    """
    if not samples:
        return Markup()
    step = max(sample["step"] for sample in samples)
    latest = [sample for sample in samples if sample["step"] == step]
    chosen = [sample for sample in latest if sample.get("split") == "test"] or latest
    problems = f"{chosen[0].get('split', 'held-out')} problems at update {step:,}"
    greedy, attempts = ([s for s in chosen if is_attempt(s) == kind] for kind in (False, True))
    mixed = _alternating(greedy)
    body = paragraph(f"Samples for {problems}{_passes(greedy)}.") + _cards(mixed[:NUM_SHOWN])
    if rest := mixed[NUM_SHOWN:MAX_SAMPLES]:
        total = f", of {len(mixed) - NUM_SHOWN}" if len(mixed) > MAX_SAMPLES else ""
        body += details(f"{len(rest)} more{total}", _cards(rest))
    if attempts:
        shown = _alternating(attempts)[:MAX_SAMPLES]
        total = f"; {len(shown)} are shown" if len(shown) < len(attempts) else ""
        title = f"Samples at temperature {attempts[0]['temperature']:g} for the same problems{_passes(attempts)}{total}"
        body += details(title, _cards(shown))
    return body


def _passes(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return how many of the samples passed the tests, as the end of a sentence, if any of them was graded."""
    num_passed = sum(sample.get("outcome") == "pass" for sample in samples)
    return f": {num_passed} of {len(samples)} pass" if any("outcome" in sample for sample in samples) else ""


def _alternating(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the samples in an order in which those that passed the tests alternate with the others."""
    passed = [sample for sample in samples if sample.get("outcome") == "pass"]
    others = [sample for sample in samples if sample.get("outcome") != "pass"]
    return [sample for pair in zip_longest(passed, others) for sample in pair if sample is not None]


def _cards(samples: Sequence[Mapping[str, Any]]) -> Markup:
    return cards(map(_card, samples))


def _card(sample: Mapping[str, Any]) -> Markup:
    outcome, reason = sample.get("outcome"), sample.get("reason")
    kind = "good" if outcome == "pass" else "bad" if outcome else "quiet"
    verdict = {"pass": "✓ passes", "fail": f"✗ {reason or 'fails'}", None: "not graded"}.get(outcome, str(outcome))
    difficulty = sample.get("difficulty")
    name = f"{sample['task_id']}{'' if difficulty is None else f' · difficulty {difficulty}'}"
    name += f" · sample {sample['index'] + 1}" if is_attempt(sample) else ""
    detail = Markup('<p class="quiet">{}</p>').format(sample["detail"]) if sample.get("detail") else ""
    completion = sample["completion"].rstrip("\n")
    return card(name, kind, verdict, Markup("<p>{}</p>\n<pre>{}</pre>{}").format(sample["prompt"], completion, detail))
