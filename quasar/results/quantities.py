"""The quantities that tables and figures of an experiment show: each with its columns, its statistic and its format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from quasar.results.estimates import PARTNER, Group, Quantity, groups, times
from quasar.results.intervals import (
    Estimate,
    Statistic,
    Sums,
    divided,
    geometric_mean,
    mean_over_families,
    ratio_of_totals,
)


def _log_ratio(table: pd.DataFrame) -> pd.DataFrame:
    ratio = table["text_ar_ref_ms"].astype(float) / table["text_ms"].astype(float)
    return table.assign(log_ratio=np.log(ratio), ones=1.0)


def _ones(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(ones=1.0)


def _graded(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(solved=table["correct"].astype("Float64"), ones=1.0)


def _free_speedup(baseline: str) -> Statistic:
    def statistic(sums: Sums) -> np.ndarray:
        return _throughputs({name: values.sum(-1) for name, values in sums.items()}, baseline)

    return statistic


def _free_speedup_by_family(sums: Sums) -> np.ndarray:
    result: np.ndarray = _throughputs(sums, "ar_ref").mean(-1)
    return result


def _throughputs(sums: Sums, baseline: str) -> np.ndarray:
    """Return the pair's tokens per millisecond over the baseline's."""
    return divided(
        divided(sums["emitted"], sums["decode_ms"]), divided(sums[f"{baseline}_tokens"], sums[f"{baseline}_ms"])
    )


def _interaction(sums: Sums) -> np.ndarray:
    """(both / quantization alone) / speculation alone."""
    both = sums["text_ar_ref_ms"].sum(-1) / sums["text_ms"].sum(-1)
    quantization = sums["text_ar_ref_ms"].sum(-1) / sums["text_ar_same_ms"].sum(-1)
    speculation = sums[f"{PARTNER}text_ar_ref_ms"].sum(-1) / sums[f"{PARTNER}text_ms"].sum(-1)
    result: np.ndarray = both / quantization / speculation
    return result


def _cheaper_step(sums: Sums) -> np.ndarray:
    """The unquantized verifier's step over this one's, each in units of the AR-ref time of its own run."""
    ours = sums["text_ms"].sum(-1) / sums["text_steps"].sum(-1) / sums["text_ar_ref_ms"].sum(-1)
    theirs = (
        sums[f"{PARTNER}text_ms"].sum(-1)
        / sums[f"{PARTNER}text_steps"].sum(-1)
        / sums[f"{PARTNER}text_ar_ref_ms"].sum(-1)
    )
    result: np.ndarray = theirs / ours
    return result


def _break_even(sums: Sums) -> np.ndarray:
    step = sums["text_ms"].sum(-1) / sums["text_steps"].sum(-1)
    token = sums["text_ar_ref_ms"].sum(-1) / sums["text_tokens"].sum(-1)
    result: np.ndarray = step / token
    return result


def _bytes(sums: Sums) -> np.ndarray:
    weights = sums["weight_bytes"].sum(-1) / sums["ones"].sum(-1)
    per_token = sums["kv_bytes_per_token"].sum(-1) / sums["ones"].sum(-1)
    result: np.ndarray = weights + per_token * sums["context"].sum(-1) / sums["steps"].sum(-1)
    return result


def _memory_bound(sums: Sums) -> np.ndarray:
    steps = sums["steps"].sum(-1)
    share = sums["draft_weight_bytes"].sum(-1) / sums["weight_bytes"].sum(-1)
    result: np.ndarray = sums["emitted"].sum(-1) / (steps + share * sums["drafted"].sum(-1))
    return result


_2, _3, _4 = (f"{{:.{digits}f}}".format for digits in (2, 3, 4))
_percent, _megabytes = "{:.1%}".format, (lambda value: f"{value / 1e6:.0f}")
_TEXT = ("text_ms", "text_ar_ref_ms")


QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        Quantity(
            "reference_text_speedup",
            "speedup on the reference's text",
            _TEXT,
            ratio_of_totals("text_ar_ref_ms", "text_ms"),
            times,
            "AR-ref's decode time over the pair's, both along the reference's own answers",
        ),
        Quantity(
            "reference_text_speedup_by_family",
            "mean of the families",
            _TEXT,
            mean_over_families("text_ar_ref_ms", "text_ms"),
            times,
            "the same speedup per task family, averaged over the families",
        ),
        Quantity(
            "reference_text_speedup_geometric",
            "geometric mean",
            ("log_ratio", "ones"),
            geometric_mean("log_ratio", "ones"),
            times,
            "the geometric mean of the prompts' speedups on the reference's text",
            _log_ratio,
        ),
        Quantity(
            "speedup_vs_ar_ref",
            "free vs AR-ref",
            ("emitted", "decode_ms", "ar_ref_tokens", "ar_ref_ms"),
            _free_speedup("ar_ref"),
            times,
            "throughput over AR-ref's, each on its own text",
        ),
        Quantity(
            "speedup_vs_ar_ref_by_family",
            "free vs AR-ref, mean of the families",
            ("emitted", "decode_ms", "ar_ref_tokens", "ar_ref_ms"),
            _free_speedup_by_family,
            times,
            "the same ratio per task family, averaged over the families, as the paper reports it",
        ),
        Quantity(
            "speedup_vs_ar_same",
            "free vs AR-same",
            ("emitted", "decode_ms", "ar_same_tokens", "ar_same_ms"),
            _free_speedup("ar_same"),
            times,
            "throughput over that of autoregressive decoding with the same verifier",
        ),
        Quantity(
            "quantization_alone",
            "quantization alone",
            ("text_ar_same_ms", "text_ar_ref_ms"),
            ratio_of_totals("text_ar_ref_ms", "text_ar_same_ms"),
            times,
            "AR-ref's decode time over AR-same's, both along the reference's answers",
        ),
        Quantity(
            "speculation_alone",
            "speculation alone",
            (f"{PARTNER}text_ms", f"{PARTNER}text_ar_ref_ms"),
            ratio_of_totals(f"{PARTNER}text_ar_ref_ms", f"{PARTNER}text_ms"),
            times,
            "the speedup of the same drafter with the unquantized verifier, on the reference's text",
        ),
        Quantity(
            "interaction",
            "interaction",
            ("text_ms", "text_ar_ref_ms", "text_ar_same_ms", f"{PARTNER}text_ms", f"{PARTNER}text_ar_ref_ms"),
            _interaction,
            _2,
            "the speedup over the product of quantization alone and speculation alone; 1 if they are independent",
        ),
        Quantity(
            "cheaper_step",
            "cheaper step",
            (*_TEXT, "text_steps", *(f"{PARTNER}{column}" for column in (*_TEXT, "text_steps"))),
            _cheaper_step,
            times,
            "the unquantized verifier's time per step over this verifier's, each in units of its own run's AR-ref",
        ),
        Quantity(
            "mean_acceptance_length",
            "τ",
            ("emitted", "steps"),
            ratio_of_totals("emitted", "steps"),
            _2,
            "tokens per step of free-running decoding",
        ),
        Quantity(
            "mean_acceptance_length_ref",
            "τ_ref",
            ("text_tokens", "text_steps"),
            ratio_of_totals("text_tokens", "text_steps"),
            _2,
            "tokens per step along the reference's answers",
        ),
        Quantity(
            "break_even_acceptance_length",
            "τ needed",
            (*_TEXT, "text_tokens", "text_steps"),
            _break_even,
            _2,
            "a step's time over AR-ref's time per token: the τ_ref from which on the pair is faster than AR-ref",
        ),
        Quantity(
            "memory_bound_speedup",
            "MBSU",
            ("emitted", "steps", "drafted", "weight_bytes", "draft_weight_bytes"),
            _memory_bound,
            times,
            "the speedup over AR-same if a pass took the time of reading its weights: τ / (1 + c γ) with γ draft "
            "tokens per step and c the weights that drafting a token reads over those of a verification pass",
        ),
        Quantity(
            "acceptance_rate",
            "accepted",
            ("accepted", "drafted"),
            ratio_of_totals("accepted", "drafted"),
            _3,
            "accepted draft tokens over proposed ones",
        ),
        Quantity(
            "kl_to_reference",
            "KL",
            ("kl", "scored"),
            ratio_of_totals("kl", "scored"),
            _4,
            "KL(reference ‖ verifier) in nats per token of the reference's answers",
        ),
        Quantity(
            "top1_agreement",
            "top-1",
            ("top1", "scored"),
            ratio_of_totals("top1", "scored"),
            _3,
            "share of these tokens at which both have the same argmax",
        ),
        Quantity(
            "kl_noise_floor",
            "KL noise",
            ("noise_kl", "scored"),
            ratio_of_totals("noise_kl", "scored"),
            _4,
            "KL divergence between the reference and its own weights in float32 per answer token, in nats",
        ),
        Quantity(
            "top1_noise_floor",
            "top-1 noise",
            ("noise_top1", "scored"),
            ratio_of_totals("noise_top1", "scored"),
            _3,
            "share of these tokens at which both have the same argmax",
        ),
        Quantity(
            "exact_match_length",
            "match length",
            ("match_length", "answers"),
            ratio_of_totals("match_length", "answers"),
            "{:.1f}".format,
            "tokens of an answer before the verifier's argmax first differs from the reference's",
        ),
        Quantity(
            "distinct_4gram_ratio",
            "distinct 4-grams",
            ("distinct_4grams", "ones"),
            ratio_of_totals("distinct_4grams", "ones"),
            _2,
            "share of distinct 4-grams in the output; repetition is easy to draft and inflates τ",
            _ones,
        ),
        Quantity(
            "distinct_4gram_ratio_reference",
            "distinct 4-grams of the reference",
            ("distinct_4grams_ref", "ones"),
            ratio_of_totals("distinct_4grams_ref", "ones"),
            _2,
            "the same share in the reference's answers",
            _ones,
        ),
        Quantity(
            "truncated",
            "truncated",
            ("truncated", "turns"),
            ratio_of_totals("truncated", "turns"),
            _percent,
            "share of the answers that ended at the token limit",
        ),
        Quantity(
            "exact_match_to_self",
            "= AR-same",
            ("match_self", "compared"),
            ratio_of_totals("match_self", "compared"),
            _percent,
            "share of the outputs that equal autoregressive decoding with the same verifier",
        ),
        Quantity(
            "exact_match_to_reference",
            "= AR-ref",
            ("match_ref", "compared"),
            ratio_of_totals("match_ref", "compared"),
            _percent,
            "share of the greedy outputs that equal the reference's",
        ),
        Quantity(
            "task_accuracy",
            "accuracy",
            ("solved", "ones"),
            ratio_of_totals("solved", "ones"),
            _percent,
            "share of the graded answers that are correct",
            _graded,
        ),
        Quantity(
            "bytes_per_step",
            "MB per pass",
            ("weight_bytes", "kv_bytes_per_token", "context", "steps", "ones"),
            _bytes,
            _megabytes,
            "weights, keys and values that a verification pass reads, in millions of bytes",
            _ones,
        ),
        *(
            Quantity(
                f"{part}_ms",
                f"{part} ms",
                (f"{part}_ms", "steps"),
                ratio_of_totals(f"{part}_ms", "steps"),
                _2,
                f"milliseconds per step: {meaning}",
            )
            for part, meaning in (
                ("draft", "drafting"),
                ("verify", "the verification pass"),
                ("overhead", "everything else, such as acceptance"),
            )
        ),
        Quantity(
            "step_ms",
            "step ms",
            ("decode_ms", "steps"),
            ratio_of_totals("decode_ms", "steps"),
            _2,
            "milliseconds per step",
        ),
        Quantity(
            "tokens_per_second",
            "tokens/s",
            ("emitted", "decode_s"),
            ratio_of_totals("emitted", "decode_s"),
            "{:.1f}".format,
            "tokens per second of decoding, prefill excluded",
            lambda table: table.assign(decode_s=table["decode_ms"] / 1e3),
        ),
    )
}


def estimates(rows: pd.DataFrame, names: Sequence[str]) -> list[tuple[Group, dict[str, Estimate | None]]]:
    """Return every group of rows with its estimates by quantity. Raises KeyError for an unknown quantity."""
    return [(group, {name: QUANTITIES[name].of(group.rows, rows) for name in names}) for group in groups(rows)]


def conditional_acceptance(position: int) -> Quantity:
    """Return the share of drafts accepted at a position, from 1, among those that reach it: drafts at least that deep
    whose tokens before the position were accepted.
    """

    def derive(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(
            reached=[_at(counts, position) for counts in table["reached_by_position"]],
            kept=[_at(counts, position) for counts in table["accepted_by_position"]],
        )

    return Quantity(
        f"conditional_acceptance_{position}",
        f"accepted at {position}",
        ("kept", "reached"),
        ratio_of_totals("kept", "reached"),
        _2,
        f"share of the drafts that reach position {position} whose token there is accepted",
        derive,
    )


def _at(counts: Sequence[int], position: int) -> int:
    return int(counts[position - 1]) if position <= len(counts) else 0
