"""The results of an experiment as one tidy table: one row per prompt, arm and repetition.

A row holds sums (tokens, steps, milliseconds), never ratios, so that every ratio, mean and interval can be computed
from the rows alone, see `quasar.results.quantities`.

| columns | meaning |
| --- | --- |
| arm, verifier, drafter, temperature, max_new_tokens, draft_tokens | the configuration; draft_tokens is text, empty if the drafter decides |
| family, question, repetition | the prompt, and the number of the repetition from 0 |
| tokens, steps, drafted, accepted, emitted | free-running decoding: generated tokens, steps, proposed and accepted draft tokens, tokens emitted by steps |
| draft_ms, verify_ms, overhead_ms, decode_ms, prefill_ms | its time by phase; decode_ms is the sum of the first three |
| ar_same_tokens, ar_same_ms, ar_ref_tokens, ar_ref_ms | autoregressive decoding with the same verifier and with the reference |
| text_tokens, text_steps, text_ms, text_ar_same_ms, text_ar_ref_ms | decoding along the reference's own answer by the pair, by AR-same and by AR-ref; text_tokens counts tokens that steps emit |
| scored, kl, top1, match_length, answers | fidelity: compared tokens, the sum of their KL in nats, the number of equal argmaxes, the sum over answers of equal tokens before the first difference, and the number of answers |
| noise_kl, noise_top1 | the same two sums for the noise floor |
| distinct_4grams, distinct_4grams_ref | mean share of distinct 4-grams in the prompt's outputs, and in the reference's answers |
| turns, truncated | answers, and those that ended at the token limit |
| compared, match_self, match_ref, first_divergence | outputs compared with autoregressive decoding, equal ones, and the earliest token that differs |
| correct | whether the answer solves the task; null if it was not graded |
| context | tokens of context that verification passes read, summed over steps |
| drafted_by_length | list: drafts of at least that many tokens, from 1 |
| depth_by_position, reached_by_position, accepted_by_position | lists: drafts at least that deep, those of them whose tokens before that depth were accepted, and drafts accepted to that depth |
| weight_bytes, kv_bytes_per_token, draft_weight_bytes, copy_bandwidth, emulated | facts of the run; where ``emulated`` is true, the times of the verifier are null, because they are those of an emulation of its number format |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from quasar.errors import RequestError
from quasar.evaluation.repetition import distinct_ngram_ratio
from quasar.results.files import read_json
from quasar.results.generations import read_records
from quasar.results.labels import arm_names
from quasar.results.runs import StoredRun
from quasar.results.schema import Baselines, Json, PromptRecord, Timing

CONDITIONS = ("drafter", "temperature", "max_new_tokens", "draft_tokens")
"""The columns of the configuration in which runs of one arm may differ, if a sweep crosses its arms with a grid."""
KEY = ("arm", *CONDITIONS, "family", "question", "repetition")
"""The columns that identify a row."""
TIMES_OF_VERIFIER = (
    *("draft_ms", "verify_ms", "overhead_ms", "decode_ms", "prefill_ms"),
    *("ar_same_ms", "text_ms", "text_ar_same_ms"),
)
"""The times that depend on how fast the verifier is; the others are those of the reference."""


def rows_of_runs(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Return the rows of finished runs. Raises RequestError if two runs have the same arm and a common prompt."""
    rows = [row for run, arm in zip(runs, arm_names(runs), strict=True) for row in _rows_of_run(run, arm)]
    table = table_of(rows)
    twice = table[table.duplicated(list(KEY))]
    if len(twice):
        first = twice.iloc[0]
        raise RequestError(
            f"arm {first['arm']!r} has more than one result for question {first['question']}; give each job of an "
            "experiment its own name in hydra.sweeper.arms"
        )
    return table


def table_of(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Return rows as a table. Columns of integers, booleans and texts may lack values; in a column of float64 the
    missing ones are NaN.
    """
    table = pd.DataFrame(rows).convert_dtypes()
    return table.astype({name: "float64" for name, dtype in table.dtypes.items() if dtype == "Float64"})


def write_rows(table: pd.DataFrame, file: Path) -> None:
    table.to_parquet(file, index=False, compression="zstd")


def read_rows(file: Path) -> pd.DataFrame:
    """Read results.parquet. Raises RequestError if the file is missing."""
    if not file.is_file():
        raise RequestError(f"{file}: no such file; make reproduce writes it")
    return pd.read_parquet(file)


def _rows_of_run(run: StoredRun, arm: str) -> list[Json]:
    config, summary = run.config, run.summary
    decode = config["decode"]
    machine = read_json(run.folder / "environment.json") or {}
    constant = {
        "arm": arm,
        "verifier": config["verifier"]["name"],
        "drafter": config["drafter"]["name"],
        "temperature": float(decode["temperature"]),
        "max_new_tokens": decode["max_new_tokens"],
        "draft_tokens": "" if decode["draft_tokens"] is None else str(decode["draft_tokens"]),
    }
    facts = {
        "weight_bytes": summary["weight_bytes"],
        "kv_bytes_per_token": summary["kv_bytes_per_token"],
        "draft_weight_bytes": summary.get("draft_weight_bytes"),
        "copy_bandwidth": machine.get("copy_bandwidth_bytes_per_second"),
        "emulated": bool(summary.get("emulated")),
    }
    sums = [sums_of(record) for record in read_records(run.folder)]
    return [{**constant, **(untimed(row) if facts["emulated"] else row), **facts} for row in sums]


def untimed(row: Json) -> Json:
    """Return a row without the times of its verifier, whose arithmetic is emulated. No speedup follows from them."""
    return {**row, **dict.fromkeys(TIMES_OF_VERIFIER)}


def sums_of(record: PromptRecord) -> Json:
    """Return the columns of a row that come from its record: the prompt, sums over its turns, and their fidelity."""
    turns = record.turns
    steps = [turn.steps for turn in turns]
    times = {
        "draft_ms": _total(turn.milliseconds.draft + turn.milliseconds.observe for turn in turns),
        "verify_ms": _total(turn.milliseconds.verify for turn in turns),
        "overhead_ms": _total(turn.milliseconds.overhead for turn in turns),
    }
    return {
        "family": record.family,
        "question": record.question_id,
        "repetition": record.repetition,
        "tokens": sum(len(turn.token_ids) for turn in turns),
        "steps": sum(len(found.emitted) for found in steps),
        "drafted": sum(sum(found.drafted) for found in steps),
        "accepted": sum(sum(found.accepted) for found in steps),
        "emitted": sum(sum(found.emitted) for found in steps),
        "context": sum(sum(found.context) for found in steps),
        **times,
        "decode_ms": sum(times.values()),
        "prefill_ms": _total(turn.milliseconds.prefill for turn in turns),
        **_baselines([turn.baselines for turn in turns]),
        **_fidelity(record),
        "distinct_4grams": _distinct(turn.token_ids for turn in turns),
        "distinct_4grams_ref": _distinct(answer.token_ids for answer in record.fidelity),
        "turns": len(turns),
        "truncated": sum(turn.finish_reason == "length" for turn in turns),
        **_exactness(record),
        "correct": record.correct,
        **_positions(record),
    }


def _baselines(found: Sequence[Baselines | None]) -> Json:
    columns: Json = {}
    for name in ("ar_same", "ar_ref"):
        timings: list[Timing | None] = [None if entry is None else getattr(entry, name) for entry in found]
        known = [timing for timing in timings if timing is not None]
        complete = bool(known) and len(known) == len(timings)
        columns[f"{name}_tokens"] = sum(timing.decoded_tokens for timing in known) if complete else None
        columns[f"{name}_ms"] = sum(timing.decode_ms for timing in known) if complete else None
    return columns


def _fidelity(record: PromptRecord) -> Json:
    answers = record.fidelity
    scored = [answer for answer in answers if answer.kl]
    columns: Json = {
        "text_tokens": sum(sum(answer.emitted) for answer in answers) or None,
        "text_steps": sum(len(answer.emitted) for answer in answers) or None,
        "scored": sum(len(answer.kl) for answer in scored) or None,
        "answers": len(scored) or None,
        "text_ms": sum(answer.forced_ms for answer in answers) if answers else None,
    }
    for name in ("ar_same", "ar_ref"):
        times = [getattr(answer, f"{name}_ms") for answer in answers]
        columns[f"text_{name}_ms"] = sum(times) if times and None not in times else None
    sums = {
        "kl": sum(sum(answer.kl) for answer in scored),
        "top1": sum(sum(answer.top1) for answer in scored),
        "match_length": sum([*answer.top1, False].index(False) for answer in scored),
    }
    noise = {
        "noise_kl": sum(sum(answer.noise_kl) for answer in scored),
        "noise_top1": sum(sum(answer.noise_top1) for answer in scored),
    }
    measured = bool(scored) and all(len(answer.noise_kl) == len(answer.kl) for answer in scored)
    columns |= {name: value if scored else None for name, value in sums.items()}
    return columns | {name: value if measured else None for name, value in noise.items()}


def _exactness(record: PromptRecord) -> Json:
    found = [turn.exactness for turn in record.turns if turn.exactness is not None]
    divergences = [entry.first_divergence for entry in found if entry.first_divergence is not None]
    references = [entry.match_reference for entry in found if entry.match_reference is not None]
    return {
        "compared": len(found) or None,
        "match_self": sum(entry.match_self for entry in found) if found else None,
        "match_ref": sum(references) if references else None,
        "first_divergence": min(divergences, default=None),
    }


def _positions(record: PromptRecord) -> Json:
    drafted, depth, accepted = (
        np.array([value for turn in record.turns for value in getattr(turn.steps, name)], dtype=np.int64)
        for name in ("drafted", "depth", "accepted")
    )
    deepest = int(depth.max(initial=0))
    return {
        "drafted_by_length": _at_least(drafted, int(drafted.max(initial=0))),
        "depth_by_position": _at_least(depth, deepest),
        "reached_by_position": [
            int(((depth >= place) & (accepted >= place - 1)).sum()) for place in range(1, deepest + 1)
        ],
        "accepted_by_position": _at_least(accepted, deepest),
    }


def _at_least(values: np.ndarray, longest: int) -> list[int]:
    """Return how many of the values are at least 1, at least 2 and so on up to ``longest``."""
    return [int((values >= number).sum()) for number in range(1, longest + 1)]


def _distinct(outputs: Iterable[Sequence[int]]) -> float | None:
    ratios = [ratio for tokens in outputs if (ratio := distinct_ngram_ratio(tokens)) is not None]
    return float(np.mean(ratios)) if ratios else None


def _total(laps: Iterable[Sequence[float]]) -> float:
    return float(sum(sum(entries) for entries in laps))
