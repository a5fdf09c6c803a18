"""The table that a run prints at its end, and the notes below it."""

from __future__ import annotations

from pathlib import Path

from quasar.results import metrics
from quasar.results.certificate import certificate
from quasar.results.console import Reporter
from quasar.results.metrics import MISSING, Measured, Metric, named
from quasar.results.schema import Json


def print_report(reporter: Reporter, run: Measured, values: Json, folder: Path) -> None:
    """Print the table of a run, notes on its numbers, the paths of its files, and one line that is easy to grep.

    The table has one row per task family and one row for all prompts.

    values: every metric over all records of the run
    """
    facts = run.facts
    printed = [metric for metric in metrics.METRICS if metric.printed]
    families = dict.fromkeys(record.family for record in run.records)
    rows = [_family_row(printed, family, run.of_family(family)) for family in families]
    rows.append(["all", *(metric.text(values[metric.name]) for metric in printed)])
    title = f"{facts.model}: drafter={facts.drafter} verifier={facts.verifier}"
    if facts.simulated:
        title += " (simulated acceptance)"
    elif facts.lossy:
        title += " (typical acceptance: lossy)"
    reporter.line()
    reporter.table(title, ["task family", *(metric.heading for metric in printed)], rows)
    for note in _notes(run, values):
        reporter.line(note)
    certified = certificate(run)
    if certified is not None:
        (reporter.line if certified.holds else reporter.warning)(certified.text)
    for name in ("summary.json", "generations.jsonl", "config.yaml", "environment.json"):
        reporter.line(f"wrote {folder / name}")
    reporter.line(acceptance_line(values))


def acceptance_line(values: Json) -> str:
    """Return one line such as ``acceptance=0.645 (167/259) mean_len=2.92 per_pos=(.81,.63,.48)``."""
    rate, length = (
        "n/a" if values[name] is None else _text(values, name) for name in ("acceptance_rate", "mean_acceptance_length")
    )
    positions = _text(values, "acceptance_by_position")
    return f"acceptance={rate} ({values['accepted']}/{values['drafted']}) mean_len={length} per_pos=({positions})"


def _family_row(printed: list[Metric], family: str, run: Measured) -> list[str]:
    return [family, *(metric.text(metric.compute(run)) for metric in printed)]


def _text(values: Json, name: str) -> str:
    return named(name).text(values[name])


def _notes(run: Measured, values: Json) -> list[str]:
    notes = [*_validity(run)]
    if values["kl_to_reference"] is not None:
        notes.append(
            "KL and top-1 compare the verifier with the reference on the reference's answers; the verifier's argmax "
            f"matches them for {_text(values, 'exact_match_length')} tokens on average."
        )
    if values["kl_noise_floor"] is not None:
        notes.append(
            "Noise floor (the reference against its own weights in float32): "
            f"KL {_text(values, 'kl_noise_floor')}, top-1 {_text(values, 'top1_noise_floor')}."
        )
    if values["task_accuracy"] is not None:
        isolation = f"; generated code was isolated by {run.facts.sandbox}" if run.facts.sandbox else ""
        notes.append(f"Task accuracy: {_accuracies(run)}{isolation}.")
    if values["distinct_4gram_ratio_reference"] is not None and values["distinct_4gram_ratio"] is not None:
        notes.append(
            f"Distinct 4-grams: {_text(values, 'distinct_4gram_ratio')} in the output, "
            f"{_text(values, 'distinct_4gram_ratio_reference')} in the reference's answers; repetition inflates τ, "
            "not τ_ref."
        )
    notes += [_drafter_note(name, value) for name, value in (values["drafter_notes"] or {}).items()]
    if values["speedup_ci95"] is not None:
        interval = _text(values, "speedup_ci95")
        notes.append(f"Speedup over AR-ref, each on its own text: 95 % interval {interval} (bootstrap over prompts).")
    if values["reference_text_speedup"] is not None:
        interval = _text(values, "reference_text_speedup_ci95")
        notes.append(
            "Speedup over AR-ref along the reference's own text, so that both decode the same tokens: "
            f"{_text(values, 'reference_text_speedup')}, 95 % interval {interval}."
        )
    return notes + _prediction(values) + _attempts(run)


def _prediction(values: Json) -> list[str]:
    """Return a note on the speedup that the timed passes predict, if there are any."""
    if values["predicted_speedup"] is None:
        return []
    predicted, length, cost = (
        _text(values, name) for name in ("predicted_speedup", "mean_acceptance_length", "pass_cost")
    )
    notes = [f"Speedup over AR-same that the timed passes predict: {predicted}, τ {length} over a pass cost of {cost}"]
    if values["prediction_residual"] is not None:
        measured, residual = (_text(values, name) for name in ("speedup_vs_ar_same", "prediction_residual"))
        notes.append(f"measured {measured}, {residual} of it; the rest is drafting and what else a step does")
    notes.append(f"{_text(values, 'share_of_oracle')} of an oracle that drafts only what will be accepted")
    return ["; ".join(notes) + "."]


def _attempts(run: Measured) -> list[str]:
    """Return a note if the run was interrupted and continued."""
    attempts = {record.attempt for record in run.records}
    if len(attempts) < 2:
        return []
    lengths = any("chosen_length" in turn.steps.notes for turn in run.turns)
    blocks = any("chosen_block" in turn.steps.notes for turn in run.turns)
    effect = (
        f"the estimates of {'decode.draft_tokens' if lengths else 'drafter.block'}=auto started again in each, so that "
        "draft lengths and times differ from those of a run that was never interrupted"
        if lengths or blocks
        else "their times were measured at different moments"
    )
    return [f"The prompts were decoded in {len(attempts)} attempts (attempt in generations.jsonl): {effect}."]


def _validity(run: Measured) -> list[str]:
    """Return notes on limits of the output: simulated acceptance, a lossy rule, or a verifier that is approximate."""
    if run.facts.simulated:
        return [
            "SIMULATED: step times are measured, but acceptance is replayed or drawn, not decided by the verifier; the "
            "text is meaningless, and no speedup here was achieved by decoding."
        ]
    if run.facts.lossy:
        return ["The output is LOSSY: typical acceptance does not preserve the verifier's distribution."]
    if not run.facts.is_reference:
        return [f"The output is lossless with respect to the {run.facts.verifier_label} only, not to the reference."]
    return []


def _drafter_note(name: str, value: float | Json | None) -> str:
    """Return a sentence on one of the drafter's notes: a mean over steps, or counts for each text value."""
    title = name.replace("_", " ").capitalize()
    if not isinstance(value, dict):
        return f"{title}: {MISSING if value is None else f'{value:.2f}'} (mean over steps)."
    parts = [
        f"{key}: {found['steps']} steps, accepted {found['accepted']} of {found['drafted']}, "
        f"τ {_text(found, 'mean_acceptance_length')}"
        for key, found in value.items()
    ]
    return f"{title}: {'; '.join(parts)}."


def _accuracies(run: Measured) -> str:
    graded = [record for record in run.records if record.correct is not None]
    parts = []
    for family in dict.fromkeys(record.family for record in graded):
        answers = [bool(record.correct) for record in graded if record.family == family]
        parts.append(f"{family} {sum(answers)}/{len(answers)}")
    return ", ".join(parts)
