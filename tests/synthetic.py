"""Artificial rows of experiments, in the form of results.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from quasar.results.provenance import Provenance
from quasar.results.rows import table_of

FAMILIES = ("math_reasoning", "mt_bench", "qa", "summarization", "translation")
AR_MS = 21.0


@dataclass(frozen=True)
class SyntheticArm:
    """An arm with its true properties.

    step: time of a step in units of AR-ref's time per token
    single: time of AR-same per token in the same units
    acceptance: true conditional acceptance per position along the reference's text
    free: added to it in free-running decoding
    kl: true KL to the reference
    divergent: share of the prompts whose output differs from AR-same
    """

    name: str
    verifier: str
    drafter: str
    step: float
    single: float
    acceptance: tuple[float, ...]
    kl: float
    megabytes: float
    free: float = 0.0
    temperature: float = 0.0
    max_new_tokens: int = 128
    draft_tokens: str = ""
    divergent: float = 0.0


NGRAM, LOOKAHEAD = (0.31, 0.62, 0.71, 0.74, 0.78), (0.42, 0.50, 0.53, 0.52, 0.55)
MAIN = tuple(
    SyntheticArm(name, verifier, drafter, step, single, acceptance, kl, size, free, temperature)
    for temperature in (0.0, 1.0)
    for name, verifier, drafter, step, single, acceptance, kl, size, free in (
        ("AR", "fp16", "none", 1.0, 1.0, (), 0.0, 269, 0.0),
        ("n-gram + fp16", "fp16", "ngram", 1.09, 1.0, NGRAM, 0.0, 269, 0.0),
        ("n-gram + int8 (paper)", "int8", "ngram", 0.83, 0.74, NGRAM, 0.012, 163, 0.04),
        ("n-gram + int4", "int4", "ngram", 0.71, 0.60, NGRAM, 0.14, 110, 0.15),
        ("lookahead + int8 (ours)", "int8", "lookahead", 0.81, 0.62, LOOKAHEAD, 0.015, 136, 0.04),
        ("lookahead + int4 (ours)", "int4", "lookahead", 0.62, 0.48, LOOKAHEAD, 0.16, 82, 0.16),
    )
)
"""Six arms at two temperatures."""
DRAFTERS = {"none": (1.0, ()), "ngram": (1.09, NGRAM), "lookahead": (1.2, LOOKAHEAD), "layerskip": (1.6, NGRAM[:3])}
VERIFIERS = {"fp16": (1.0, 0.0, 269), "int8": (0.74, 0.012, 163), "int4": (0.60, 0.14, 110), "pruned": (0.8, 0.9, 190)}
MATRIX = tuple(
    SyntheticArm(
        f"{verifier}, {drafter}",
        verifier,
        drafter,
        step * single * (1.2 if (drafter, verifier) == ("layerskip", "int4") else 1.0),
        single,
        acceptance,
        kl,
        size,
        free=min(0.2, kl),
    )
    for drafter, (step, acceptance) in DRAFTERS.items()
    for verifier, (single, kl, size) in VERIFIERS.items()
)
"""Four drafters with four verifiers; layer-skip and INT4 interact."""
LENGTHS = tuple(
    SyntheticArm(
        f"{verifier}, {length or 'auto'}",
        verifier,
        "ngram",
        single * (1 + 0.03 * (length or 5)),
        single,
        (0.45, 0.7, 0.75, 0.75, 0.78, 0.78, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8)[: length or 5],
        kl,
        size,
        draft_tokens=str(length or "auto"),
    )
    for verifier, (single, kl, size) in list(VERIFIERS.items())[:3]
    for length in (1, 2, 3, 5, 8, 12, None)
)
"""Draft lengths from 1 to 12 and auto with three verifiers."""
STRENGTHS = (
    *(
        SyntheticArm(f"pruned {kept} %", "pruned", "ngram", kept / 95, kept / 100, NGRAM, kl, 2.69 * kept, free)
        for kept, kl, free in ((90, 0.35, 0.1), (80, 0.9, 0.2), (70, 1.6, 0.2), (60, 2.6, 0.2), (50, 3.9, 0.2))
    ),
    *(
        SyntheticArm(name, verifier, "ngram", 0.8, 0.74, NGRAM, kl, size)
        for name, verifier, kl, size in (
            ("fp16", "fp16", 0.0, 269),
            ("int8 SmoothQuant", "int8", 0.012, 163),
            ("int8 8-bit head", "int8", 0.014, 136),
            ("int4 RTN g32", "int4", 0.14, 112),
            ("int4 AWQ g64", "int4", 0.11, 107),
            ("int4 GPTQ g128", "int4", 0.10, 104),
            ("int4 with INT8 inputs", "int4", 0.16, 82),
            ("bnb NF4", "bnb", 0.12, 118),
            ("packed Q4", "packed", 0.09, 92),
        )
    ),
)
"""Quantizers and pruners at several strengths."""


def experiment_rows(
    arms: Sequence[SyntheticArm],
    families: Sequence[str] = FAMILIES,
    prompts: int = 16,
    repetitions: int = 2,
    seed: int = 0,
) -> pd.DataFrame:
    """Rows of an experiment whose prompts differ in acceptance, and whose repetitions differ in the machine's speed."""
    generator = np.random.default_rng(seed)
    questions = [(family, f"{family}-{number}") for family in families for number in range(prompts)]
    prompt_effect = generator.normal(0, 0.08, len(questions))
    prompt_effect += np.repeat(generator.normal(0, 0.06, len(families)), prompts)
    machine = np.exp(generator.normal(0, 0.02, repetitions))
    rows = []
    for arm in arms:
        divergent = generator.random(len(questions)) < arm.divergent
        for repetition in range(repetitions):
            for place, (family, question) in enumerate(questions):
                row = _row(generator, arm, float(prompt_effect[place]), float(machine[repetition]))
                if repetition:
                    row |= dict.fromkeys(("kl", "scored", "top1", "match_length", "answers", "noise_kl", "noise_top1"))
                first = int(generator.integers(1, arm.max_new_tokens)) if divergent[place] else None
                row |= {"family": family, "question": question, "repetition": repetition}
                row |= {"compared": 1, "match_self": int(first is None), "first_divergence": first}
                rows.append(row)
    return table_of(rows)


def _row(generator: np.random.Generator, arm: SyntheticArm, effect: float, machine: float) -> dict[str, Any]:
    tokens = arm.max_new_tokens - 1
    own = float(np.exp(generator.normal(0, 0.01)))
    reference = AR_MS * machine * tokens * float(np.exp(generator.normal(0, 0.01)))
    text_steps, *_ = _steps(generator, arm.acceptance, effect, tokens)
    steps, drafted, depth, reached, accepted = _steps(
        generator, tuple(min(0.97, rate + arm.free) for rate in arm.acceptance), effect, tokens
    )
    step_ms = AR_MS * machine * arm.step * own
    single_ms = AR_MS * machine * arm.single * float(np.exp(generator.normal(0, 0.01)))
    draft_ms = (0.18 * step_ms * steps) if arm.drafter in ("lookahead", "layerskip") else 0.01 * step_ms * steps
    overhead_ms = 0.02 * step_ms * steps
    return {
        "arm": arm.name,
        "verifier": arm.verifier,
        "drafter": arm.drafter,
        "temperature": arm.temperature,
        "max_new_tokens": arm.max_new_tokens,
        "draft_tokens": arm.draft_tokens,
        "tokens": tokens + 1,
        "steps": steps,
        "drafted": drafted,
        "accepted": tokens - steps,
        "emitted": tokens,
        "draft_ms": draft_ms,
        "overhead_ms": overhead_ms,
        "verify_ms": step_ms * steps - draft_ms - overhead_ms,
        "decode_ms": step_ms * steps,
        "prefill_ms": 60.0,
        "ar_same_tokens": tokens,
        "ar_same_ms": single_ms * tokens,
        "ar_ref_tokens": tokens,
        "ar_ref_ms": reference,
        "text_tokens": tokens,
        "text_steps": text_steps,
        "text_ms": step_ms * text_steps,
        "text_ar_same_ms": single_ms * tokens,
        "text_ar_ref_ms": reference,
        "scored": tokens + 1,
        "kl": (tokens + 1) * arm.kl * float(np.exp(generator.normal(0, 0.3))),
        "top1": int((tokens + 1) / (1 + arm.kl)),
        "match_length": tokens / (1 + 20 * arm.kl),
        "answers": 1,
        "noise_kl": 1e-4,
        "noise_top1": tokens,
        "distinct_4grams": max(0.1, 0.95 - arm.free),
        "distinct_4grams_ref": 0.95,
        "turns": 1,
        "truncated": int(generator.random() < 0.7),
        "match_ref": None,
        "correct": None,
        "context": steps * 200,
        "drafted_by_length": depth,
        "depth_by_position": depth,
        "reached_by_position": reached,
        "accepted_by_position": accepted,
        "weight_bytes": int(arm.megabytes * 1e6),
        "kv_bytes_per_token": 23_040,
        "draft_weight_bytes": int(arm.megabytes * 0.75e6) if arm.drafter == "layerskip" else 0,
        "copy_bandwidth": 1.2e10,
    }


def _steps(
    generator: np.random.Generator, acceptance: tuple[float, ...], effect: float, tokens: int
) -> tuple[int, int, list[int], list[int], list[int]]:
    """Return the number of steps that emit ``tokens`` tokens, the drafted tokens, and the counts by position."""
    rates = np.clip(np.array(acceptance) + effect, 0.02, 0.97)
    steps = emitted = 0
    accepted = np.zeros(len(rates), dtype=int)
    reached = np.zeros(len(rates), dtype=int)
    while emitted < tokens:
        hits = generator.random(len(rates)) < rates
        length = min(int(np.cumprod(hits).sum()), tokens - emitted - 1)
        accepted[:length] += 1
        reached[: length + 1] += 1
        emitted += length + 1
        steps += 1
    depth = [steps] * len(rates)
    return steps, steps * len(rates), depth, reached.tolist(), accepted.tolist()


def synthetic_provenance(**others: Any) -> Provenance:
    """The provenance of artificial runs."""
    values: dict[str, Any] = {
        "code_version": "0123456789ab",
        "git_commit": "fedcba9876543210",
        "git_dirty": False,
        "finished": ("2026-01-02", "2026-01-03"),
        "machine": "testbench",
        "device": "cpu (a CPU with a name of some length @ 2.1 GHz)",
        "threads": 2,
        "torch": "2.13.0",
        "model": "smollm2_135m",
        "model_origin": "synthetic-models 1.0: a-model-135m-q4_1.gguf (Q4_1, dequantized)",
        "weights_on_grid": 0.997,
        "prompt_sets": ("0a1b2c3d4e5f",),
        "prompts": 80,
        "repetitions": (2,),
        "max_new_tokens": (128,),
        "shared_baselines": False,
        "runs": 12,
    }
    return Provenance(**{**values, **others})
