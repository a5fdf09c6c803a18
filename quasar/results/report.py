"""The table that a run prints at its end, and the notes below it."""

from __future__ import annotations

from pathlib import Path

from quasar.results import metrics
from quasar.results.certificate import certificate
from quasar.results.console import Reporter
from quasar.results.layout import Column
from quasar.results.load import DISTURBED
from quasar.results.measured import Measured
from quasar.results.metric import MISSING
from quasar.results.metrics import named
from quasar.results.schema import Json
from quasar.results.slowness import explanation, mean_step


def print_report(reporter: Reporter, run: Measured, values: Json, folder: Path) -> None:
    """Print the results of a run, the paths of its files, and one line that is easy to grep.

    values: every metric over all records of the run
    """
    print_results(reporter, run, values)
    for name in ("summary.json", "generations.jsonl", "config.yaml", "environment.json"):
        reporter.line(f"wrote {folder / name}")
    reporter.line(acceptance_line(values))


def print_results(reporter: Reporter, run: Measured, values: Json) -> None:
    """Print the table of a run, with one row per task family and one for all prompts, and notes on its numbers."""
    reporter.line()
    reporter.fitted_table(_title(run), _columns(run, values), "summary.json has them")
    for note in _notes(run, values):
        reporter.paragraph(note)
    for text in _disturbance(run):
        reporter.warning(text)
    certified = certificate(run)
    if certified is not None:
        (reporter.paragraph if certified.holds else reporter.warning)(certified.text)


def acceptance_line(values: Json) -> str:
    """Return one line such as ``acceptance=0.645 (167/259) mean_len=2.92 per_pos=(.81,.63,.48)``."""
    rate, length = (
        "n/a" if values[name] is None else _text(values, name) for name in ("acceptance_rate", "mean_acceptance_length")
    )
    positions = _text(values, "acceptance_by_position")
    return f"acceptance={rate} ({values['accepted']}/{values['drafted']}) mean_len={length} per_pos=({positions})"


def _title(run: Measured) -> str:
    facts = run.facts
    title = f"{facts.model}: drafter={facts.drafter} verifier={facts.verifier}"
    if facts.simulated:
        return f"{title} (simulated acceptance)"
    return f"{title} (typical acceptance: lossy)" if facts.lossy else title


def _columns(run: Measured, values: Json) -> list[Column]:
    """Return the table's columns: the task families with "all" at the end, then every metric that has a rank."""
    families = {family: run.of_family(family) for family in dict.fromkeys(record.family for record in run.records)}
    columns = [Column("task family", (*families, "all"), is_text=True)]
    for metric in metrics.METRICS:
        if metric.rank is not None:
            cells = (metric.text(metric.compute(part)) for part in families.values())
            columns.append(Column(metric.heading, (*cells, metric.text(values[metric.name])), metric.rank))
    return columns


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
    step = mean_step(run)
    if step is not None and (reason := explanation(step, run.facts.drafter)) is not None:
        notes.append(reason)
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
    adaptive = any({"chosen_length", "window", "chosen_block"} & turn.steps.notes.keys() for turn in run.turns)
    effect = (
        "the estimates behind automatic lengths (decode.draft_tokens, drafter.window, drafter.block) started again in "
        "each, so that draft lengths and times differ from those of a run that was never interrupted"
        if adaptive
        else "their times were measured at different moments"
    )
    return [f"The prompts were decoded in {len(attempts)} attempts (attempt in generations.jsonl): {effect}."]


def _disturbance(run: Measured) -> list[str]:
    """Return a warning if other processes were busy while the run decoded."""
    share = run.facts.other_cpu_share
    if share is None or share <= DISTURBED:
        return []
    return [
        f"disturbed: other processes took {share:.0%} of the cores that this run uses. Its times are not comparable "
        f"above {DISTURBED:.0%}; repeat it on an idle machine (environment.json has the load of every attempt)"
    ]


def _validity(run: Measured) -> list[str]:
    """Return notes on limits: emulated arithmetic, simulated acceptance, a lossy rule, an approximate verifier."""
    emulated = "EMULATED: this device has no instructions for the verifier's number format. Its times are no speedup."
    return [*([emulated] if run.facts.emulated else []), *_limits(run)]


def _limits(run: Measured) -> list[str]:
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
