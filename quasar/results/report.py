"""The table and the closing lines of a run."""

from __future__ import annotations

from pathlib import Path

from quasar.config.schema import RunConfig
from quasar.console import Reporter
from quasar.results.metrics import summarize
from quasar.results.records import Json
from quasar.verifiers.base import Verifier

_COLUMNS = (
    "task family",
    "prompts",
    "tokens",
    "tokens/s",
    "τ",
    "τ_ref",
    "KL",
    "top-1",
    "accept",
    "step ms",
    "vs AR-same",
    "vs AR-ref",
    "= AR-same",
)


def print_report(
    reporter: Reporter,
    settings: RunConfig,
    verifier: Verifier,
    records: list[Json],
    measured: Json,
    folder: Path,
) -> None:
    """A row per task family and one for all, what the figures mean, where the files are, and one greppable line."""
    families = list(dict.fromkeys(record["family"] for record in records))
    rows = [(family, summarize([record for record in records if record["family"] == family])) for family in families]
    rows.append(("all", measured))
    title = f"{settings.model.name}: drafter={settings.drafter['name']} verifier={settings.verifier['name']}"
    if measured["simulated"]:
        title += " (simulated acceptance)"
    elif settings.decode.acceptance == "typical":
        title += " (typical acceptance: lossy)"
    reporter.line()
    reporter.table(title, _COLUMNS, [_row(name, metrics) for name, metrics in rows])
    for note in _notes(settings, verifier, records, measured):
        reporter.line(note)
    for name in ("summary.json", "generations.jsonl", "config.yaml", "environment.json"):
        reporter.line(f"wrote {folder / name}")
    reporter.line(acceptance_line(measured))


def acceptance_line(measured: Json) -> str:
    """For example ``acceptance=0.645 (167/259) mean_len=2.92 per_pos=(.81,.63,.48)``."""
    rate = "n/a" if measured["acceptance_rate"] is None else f"{measured['acceptance_rate']:.3f}"
    length = "n/a" if measured["mean_acceptance_length"] is None else f"{measured['mean_acceptance_length']:.2f}"
    positions = ",".join(f"{share:.2f}".removeprefix("0") for share in measured["acceptance_by_position"])
    return f"acceptance={rate} ({measured['accepted']}/{measured['drafted']}) mean_len={length} per_pos=({positions})"


def _row(name: str, metrics: Json) -> list[str]:
    return [
        name,
        str(metrics["prompts"]),
        str(metrics["tokens_generated"]),
        _number(metrics["tokens_per_second"], ".1f"),
        _number(metrics["mean_acceptance_length"], ".2f"),
        _number(metrics["mean_acceptance_length_ref"], ".2f"),
        _number(metrics["kl_to_reference"], ".4f"),
        _number(metrics["top1_agreement"], ".3f"),
        _number(metrics["acceptance_rate"], ".3f"),
        _number(metrics["step_ms"], ".1f"),
        _number(metrics["speedup_vs_ar_same"], ".2f", "x"),
        _number(metrics["speedup_vs_ar_ref"], ".2f", "x"),
        _number(metrics["exact_match_to_self"], ".0%"),
    ]


def _notes(settings: RunConfig, verifier: Verifier, records: list[Json], measured: Json) -> list[str]:
    notes = []
    if measured["simulated"]:
        notes.append(
            "SIMULATED: step times are measured, acceptance is replayed from a recorded run; the text means nothing, "
            "and no speedup here was achieved by decoding."
        )
    elif settings.decode.acceptance == "typical":
        notes.append("The output is LOSSY: typical acceptance follows no model's distribution.")
    elif not verifier.is_reference:
        notes.append(f"The output is lossless with respect to the {verifier.label} only, not to the reference.")
    if measured["kl_to_reference"] is not None:
        notes.append(
            "KL and top-1: against the reference along its own answers, which the output matches for "
            f"{measured['exact_match_length']:.1f} tokens. The reference against itself, in one pass and step by step: "
            f"KL {measured['kl_noise_floor']:.4f}, top-1 {measured['top1_noise_floor']:.3f}."
        )
    if measured["task_accuracy"] is not None:
        notes.append(f"Task accuracy: {_accuracies(records)}.")
    if measured["distinct_4gram_ratio_reference"] is not None and measured["distinct_4gram_ratio"] is not None:
        notes.append(
            f"Distinct 4-grams: {measured['distinct_4gram_ratio']:.2f} of the output, "
            f"{measured['distinct_4gram_ratio_reference']:.2f} of the reference's; repetition inflates τ, not τ_ref."
        )
    notes += [_drafter_note(name, value) for name, value in (measured["drafter_notes"] or {}).items()]
    interval = measured["speedup_ci95"]
    if interval is not None:
        notes.append(
            f"Speedup over AR-ref: 95 % interval {interval[0]:.2f}x to {interval[1]:.2f}x (bootstrap over prompts)."
        )
    diverged = [
        turn["exactness"]
        for record in records
        for turn in record["turns"]
        if turn["exactness"].get("top2_gap") is not None
    ]
    if diverged:
        gap = max(entry["top2_gap"] for entry in diverged)
        first = min(entry["first_divergence"] for entry in diverged)
        notes.append(
            f"{len(diverged)} outputs differ from autoregressive decoding by rounding (earliest at token {first}; "
            f"largest gap between the two best logits there {gap:.3f})."
        )
    return notes


def _drafter_note(name: str, value: float | Json | None) -> str:
    """One of the drafter's own notes: a mean over steps, or what each value of a text came to."""
    title = name.replace("_", " ").capitalize()
    if not isinstance(value, dict):
        return f"{title}: {_number(value, '.2f')} (mean over steps)."
    parts = [
        f"{key}: {found['steps']} steps, accepted {found['accepted']} of {found['drafted']}, "
        f"τ {_number(found['mean_acceptance_length'], '.2f')}"
        for key, found in value.items()
    ]
    return f"{title}: {'; '.join(parts)}."


def _accuracies(records: list[Json]) -> str:
    graded = [record for record in records if record.get("correct") is not None]
    families = dict.fromkeys(record["family"] for record in graded)
    parts = []
    for family in families:
        answers = [record["correct"] for record in graded if record["family"] == family]
        parts.append(f"{family} {sum(answers)}/{len(answers)}")
    return ", ".join(parts)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
