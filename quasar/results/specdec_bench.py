"""Writes runs as the result files of NVIDIA's specdec_bench, the harness of SPEED-Bench (Model-Optimizer, examples).

Its arithmetic is followed where it differs from this program's: the last step of a turn, which a token limit may cut,
counts in no acceptance length, a category's length is the mean over its questions, and the times between tokens begin
with that of the prefill.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import numpy as np

from quasar.results.answers import Answers
from quasar.results.files import write_atomically
from quasar.results.schema import DECODE_PHASES, Json, PromptRecord, Turn


def write_specdec_bench(runs: Sequence[Answers], folder: Path) -> list[Path]:
    """Write a folder per run into ``folder``, and return the files.

    ``acceptance_rate.json`` and ``timing.json`` have one entry per repetition, as specdec_bench appends one per start.
    ``specbench_results.json`` is the first repetition's acceptance, and ``specbench_responses.jsonl`` has its answers,
    without the questions' texts, which a run does not record.
    """
    files = []
    for run in runs:
        repetitions = _repetitions(run)
        acceptance = [_acceptance(records) for records in repetitions]
        contents = {
            "acceptance_rate.json": _text(acceptance),
            "timing.json": _text([_timing(records) for records in repetitions]),
            "specbench_results.json": _text(acceptance[0]),
            "specbench_responses.jsonl": "".join(
                json.dumps(_response(question, record), ensure_ascii=False) + "\n"
                for question, record in repetitions[0].items()
            ),
        }
        (folder / run.name).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            files.append(folder / run.name / name)
            write_atomically(files[-1], content)
    return files


_Records = dict[int | str, PromptRecord]
"""The records of one repetition by question."""


def _repetitions(run: Answers) -> list[_Records]:
    questions = run.questions()
    numbers = sorted({record.repetition for records in questions.values() for record in records})
    return [
        {name: record for name, records in questions.items() for record in records if record.repetition == number}
        for number in numbers
    ]


def _lengths(turn: Turn) -> list[int]:
    """Return the tokens of every step but the last; a turn with less than two steps counts as one of one token."""
    return turn.steps.emitted[:-1] or [1]


def _acceptance(records: _Records) -> Json:
    by_question = {
        name: [length for turn in record.turns for length in _lengths(turn)] for name, record in records.items()
    }
    means = {name: fmean(lengths) for name, lengths in by_question.items()}
    families = sorted({record.family for record in records.values()})
    histogram = Counter(length for lengths in by_question.values() for length in lengths)
    joint = _joint_acceptance(histogram)
    return {
        "Request_AL": means,
        "Category_AL": {
            family: fmean(means[name] for name, record in records.items() if record.family == family)
            for family in families
        },
        "Average_AL": fmean(means.values()),
        "Acceptance_Length_Histogram": dict(sorted(histogram.items())),
        "Conditional_Acceptance_Rate": {
            length: share / before
            for (length, share), before in zip(joint.items(), [1.0, *joint.values()], strict=False)
        },
        "Joint_Acceptance_Rate": joint,
    }


def _joint_acceptance(histogram: Counter[int]) -> dict[int, float]:
    """Return the share of the steps with at least as many tokens, for every length that occurs."""
    lengths = sorted(histogram)
    shorter = accumulate((histogram[length] for length in lengths), initial=0)
    return {length: 1 - count / histogram.total() for length, count in zip(lengths, shorter, strict=False)}


def _timing(records: _Records) -> Json:
    """Return the statistics of all turns. One prompt is decoded at a time, on one device."""
    turns = [turn for record in records.values() for turn in record.turns]
    prefills = [sum(turn.milliseconds.prefill) / 1e3 for turn in turns]
    steps = [[sum(step) / 1e3 for step in zip(*_laps(turn), strict=True)] for turn in turns]
    tokens = [len(turn.token_ids) for turn in turns]
    totals = [prefill + sum(seconds) for prefill, seconds in zip(prefills, steps, strict=True)]
    throughput = sum(tokens) / sum(totals)
    found = {
        "Output TPS": throughput,
        "Output TPS/gpu": throughput,
        "E2E Request Time": _statistics(totals),
        "TTFT Time": _statistics(prefills),
    }
    decoded = [place for place, seconds in enumerate(steps) if seconds]
    if decoded:
        gaps = [gap for place in decoded for gap in (prefills[place], *steps[place])]
        found["Request Generation Step Time"] = _statistics(gaps)
        found["Request Generation Tokens Per Second"] = _statistics(
            [(tokens[place] - 1) / sum(steps[place]) for place in decoded]
        )
    found["Number of Output Tokens"] = _statistics(tokens)
    return found


def _laps(turn: Turn) -> list[list[float]]:
    return [getattr(turn.milliseconds, phase) for phase in DECODE_PHASES]


def _statistics(values: Sequence[float]) -> Json:
    quantiles = (0.25, 0.5, 0.75)
    found = {"min": np.min(values), "max": np.max(values), "mean": np.mean(values), "std": np.std(values)}
    return {
        **{name: f"{value:.4f}" for name, value in found.items()},
        "quantiles": {f"{level}": f"{np.quantile(values, level):.4f}" for level in quantiles},
    }


def _response(question: int | str, record: PromptRecord) -> Json:
    texts = [turn.text for turn in record.turns]
    return {
        "question_id": question,
        "category": record.family,
        "acceptance_lengths": [length for turn in record.turns for length in _lengths(turn)],
        "choices": [{"index": 0, "turns": texts}],
        "raw_choices": [{"index": 0, "turns": texts}],
        "output_token_ids": [{"index": 0, "turns": [turn.token_ids for turn in record.turns]}],
    }


def _text(content: object) -> str:
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"
