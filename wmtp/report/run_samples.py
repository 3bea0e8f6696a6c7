"""The answers that a run gave to problems it was not trained on, as cards."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from markupsafe import Markup

from wmtp.report.page import card, cards, details, paragraph
from wmtp.report.runs import RunRecord

SHOWN, MOST = 8, 200


def samples_body(run: RunRecord) -> Markup:
    """Answers of the last step that has any, those that pass and those that do not in turn."""
    if not run.samples:
        return Markup()
    step = max(sample["step"] for sample in run.samples)
    latest = [sample for sample in run.samples if sample["step"] == step]
    chosen = [sample for sample in latest if sample.get("split") == "test"] or latest
    passed = [sample for sample in chosen if sample.get("outcome") == "pass"]
    others = [sample for sample in chosen if sample.get("outcome") != "pass"]
    mixed = [sample for pair in zip_longest(passed, others) for sample in pair if sample is not None]
    split = chosen[0].get("split", "held-out")
    judged = f": {len(passed)} of {len(chosen)} pass" if any("outcome" in sample for sample in chosen) else ""
    lead = f"Answers to {split} problems at update {step:,}{judged}."
    body = paragraph(lead) + _cards(mixed[:SHOWN])
    if rest := mixed[SHOWN:MOST]:
        left = f", of {len(mixed) - SHOWN}" if len(mixed) > MOST else ""
        body += details(f"{len(rest)} more{left}", _cards(rest))
    return body


def _cards(samples: Sequence[Mapping[str, Any]]) -> Markup:
    return cards(map(_card, samples))


def _card(sample: Mapping[str, Any]) -> Markup:
    outcome, reason = sample.get("outcome"), sample.get("reason")
    kind = "good" if outcome == "pass" else "bad" if outcome else "quiet"
    said = {"pass": "✓ passes", "fail": f"✗ {reason or 'fails'}", None: "not judged"}.get(outcome, str(outcome))
    difficulty = sample.get("difficulty")
    name = f"{sample['task_id']}{'' if difficulty is None else f' · difficulty {difficulty}'}"
    detail = Markup('<p class="quiet">{}</p>').format(sample["detail"]) if sample.get("detail") else ""
    completion = sample["completion"].rstrip("\n")
    return card(name, kind, said, Markup("<p>{}</p>\n<pre>{}</pre>{}").format(sample["prompt"], completion, detail))
