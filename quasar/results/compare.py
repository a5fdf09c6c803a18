"""The command ``quasar compare``: runs against the first one, prompt by prompt, with intervals of the differences.

Both runs decoded the same prompts, so that what is easy or hard about a prompt cancels: prompts are resampled together
with both runs' values, and the interval belongs to the difference itself. Two separate intervals may overlap although
their difference is clear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from quasar.errors import RequestError
from quasar.results.attempt import Inputs
from quasar.results.console import Reporter
from quasar.results.estimates import Quantity
from quasar.results.generations import read_records
from quasar.results.intervals import Estimate, Sums, ratio_of_totals
from quasar.results.labels import arm_names
from quasar.results.metric import MISSING
from quasar.results.quantities import QUANTITIES
from quasar.results.rows import sums_of, untimed
from quasar.results.runs import StoredRun, flatten
from quasar.results.schema import Json
from quasar.results.show import environment_of, stored_run

DECISIVE = ("decode.temperature", "decode.top_k", "decode.top_p", "decode.max_new_tokens", "decode.stop")
"""Decode settings without which two runs do not answer the same question."""
KEYS = ["family", "question", "repetition"]
_FIRST, _SECOND = "first_", "second_"

_PER_TOKEN = Quantity(
    "ms_per_token",
    "ms per token",
    ("decode_ms", "emitted"),
    ratio_of_totals("decode_ms", "emitted"),
    "{:.2f}".format,
    "milliseconds of decoding per token, prefill excluded",
)
COMPARED = (
    QUANTITIES["tokens_per_second"],
    _PER_TOKEN,
    QUANTITIES["mean_acceptance_length"],
    QUANTITIES["mean_acceptance_length_ref"],
    QUANTITIES["acceptance_rate"],
    QUANTITIES["step_ms"],
    QUANTITIES["draft_ms"],
    QUANTITIES["verify_ms"],
    QUANTITIES["kl_to_reference"],
    QUANTITIES["top1_agreement"],
    QUANTITIES["task_accuracy"],
)


@dataclass(frozen=True)
class Difference:
    """A quantity of two runs over the prompts that both have decoded.

    first, second: its values in the runs
    difference: second minus first, with its interval
    """

    quantity: Quantity
    first: float
    second: float
    difference: Estimate


def compare(folders: Sequence[Path], reporter: Reporter) -> None:
    """Print a table for each run after the first: both runs' values, their differences, and the intervals of these.

    Raises RequestError if fewer than two runs are given, or if two runs cannot be compared.
    """
    if len(folders) < 2:
        raise RequestError(f"{folders[0] if folders else 'no run'}: nothing to compare it with; pass two runs or more")
    runs = [stored_run(folder) for folder in folders]
    inputs = [_inputs(run) for run in runs]
    names = arm_names(runs)
    for run, made_from in zip(runs[1:], inputs[1:], strict=True):
        require_comparable(runs[0], inputs[0], run, made_from)
    for run, made_from, name in zip(runs[1:], inputs[1:], names[1:], strict=True):
        found, prompts, repetitions = _paired(runs[0], run)
        reporter.line(f"first:  {folders[0]} ({names[0]})")
        reporter.line(f"second: {run.folder} ({name})")
        reporter.table(f"{name} against {names[0]}", *_table(differences(found)))
        reporter.paragraph(
            f"Prompts that both runs have decoded: {prompts}, in {repetitions} repetitions. The intervals are those of "
            "the paired differences (BCa bootstrap over prompts and repetitions); * marks those without 0."
        )
        for note in _notes(runs[0], inputs[0], run, made_from):
            reporter.warning(note)


def differences(pairs: pd.DataFrame) -> list[Difference]:
    """Return the differences of all quantities that both runs have measured.

    pairs: one row per prompt and repetition, with the columns of `quasar.results.rows` of either run, prefixed by
        ``first_`` and ``second_``
    """
    found = []
    for quantity in COMPARED:
        values = [_side(quantity, side).of(pairs) for side in (_FIRST, _SECOND)]
        difference = _difference(quantity).of(pairs)
        if difference is not None and values[0] is not None and values[1] is not None:
            found.append(Difference(quantity, values[0].value, values[1].value, difference))
    return found


def require_comparable(first: StoredRun, its_inputs: Inputs, second: StoredRun, inputs: Inputs) -> None:
    """Raise RequestError if the runs differ in their model, their prompts, or in decode settings that decide."""
    both = f"{first.folder} and {second.folder} cannot be compared"
    prompts, others = its_inputs.prompts, inputs.prompts
    if set(prompts) != set(others):
        alone = sorted(set(prompts) ^ set(others))
        raise RequestError(f"{both}: {len(alone)} prompts are in only one of them ({_some(alone)}); use the same data")
    if changed := [name for name in prompts if prompts[name] != others[name]]:
        raise RequestError(f"{both}: the text of {len(changed)} prompts differs ({_some(changed)}); use the same data")
    if its_inputs.model != inputs.model or _model(first) != _model(second):
        raise RequestError(f"{both}: they decode different models ({_model(first)}, {_model(second)})")
    ours, theirs = flatten(first.config), flatten(second.config)
    decisive = [*DECISIVE, *(["seed"] if ours.get("decode.temperature") else [])]
    different = [f"{key}={ours.get(key)} and {theirs.get(key)}" for key in decisive if ours.get(key) != theirs.get(key)]
    if different:
        raise RequestError(f"{both}: {'; '.join(different)}; repeat one of them with the settings of the other")


def _inputs(run: StoredRun) -> Inputs:
    found = Inputs.from_json(environment_of(run))
    if found is None:
        raise RequestError(f"{run.folder}: environment.json does not say what its records were made from; run it again")
    return found


def _paired(first: StoredRun, second: StoredRun) -> tuple[pd.DataFrame, int, int]:
    """Return the pairs, and the numbers of prompts and repetitions in them. Raises RequestError if there are none."""
    tables = []
    for run, prefix in ((first, _FIRST), (second, _SECOND)):
        found = [sums_of(record) for record in read_records(run.folder)]
        rows = pd.DataFrame(map(untimed, found) if _emulated(run) else found)
        if rows.empty:
            raise RequestError(f"{run.folder}: no prompt is finished; wait for the first one, or continue the run")
        tables.append(rows.rename(columns={name: f"{prefix}{name}" for name in rows if name not in KEYS}))
    pairs = tables[0].merge(tables[1], on=KEYS)
    if pairs.empty:
        raise RequestError(f"{first.folder} and {second.folder} have finished no prompt in common yet")
    return pairs, pairs["question"].nunique(), pairs["repetition"].nunique()


def _side(quantity: Quantity, prefix: str) -> Quantity:
    """Return the quantity of one of the two runs."""
    return _over(quantity, (prefix,), lambda value: value)


def _difference(quantity: Quantity) -> Quantity:
    return _over(quantity, (_FIRST, _SECOND), lambda first, second: second - first)


def _over(quantity: Quantity, prefixes: Sequence[str], combine: Callable[..., np.ndarray]) -> Quantity:
    """Return a quantity that combines the values of runs whose columns have these prefixes."""

    def derive(pairs: pd.DataFrame) -> pd.DataFrame:
        parts = [pairs[KEYS]]
        for prefix in prefixes:
            names = [name for name in map(str, pairs.columns) if name.startswith(prefix)]
            own = pairs[names].set_axis([name.removeprefix(prefix) for name in names], axis=1)
            own = own if quantity.derive is None else quantity.derive(own)
            parts.append(own.add_prefix(prefix))
        return pd.concat(parts, axis=1)

    def statistic(sums: Sums) -> np.ndarray:
        own = ({name: sums[f"{prefix}{name}"] for name in quantity.columns} for prefix in prefixes)
        return combine(*map(quantity.statistic, own))

    columns = tuple(f"{prefix}{name}" for prefix in prefixes for name in quantity.columns)
    return Quantity(quantity.name, quantity.heading, columns, statistic, quantity.form, quantity.meaning, derive)


def _table(found: Sequence[Difference]) -> tuple[list[str], list[list[str]]]:
    headings = ["", "first", "second", "difference", "its 95 % interval"]
    return headings, [_line(entry) for entry in found]


def _line(entry: Difference) -> list[str]:
    form, difference = entry.quantity.form, entry.difference
    interval = MISSING
    if difference.low is not None and difference.high is not None:
        mark = "*" if difference.low > 0 or difference.high < 0 else " "
        interval = f"{_signed(form, difference.low)} to {_signed(form, difference.high)} {mark}"
    return [
        entry.quantity.heading,
        form(entry.first),
        form(entry.second),
        _signed(form, difference.value),
        interval,
    ]


def _signed(form: Callable[[float], str], value: float) -> str:
    return f"{'-' if value < 0 else '+'}{form(abs(value))}"


def _notes(first: StoredRun, its_inputs: Inputs, second: StoredRun, inputs: Inputs) -> list[str]:
    """Return what makes the runs' times or texts hard to compare."""
    environments = [environment_of(run) for run in (first, second)]
    facts = [environment["facts"] for environment in environments]
    notes = []
    machines = [_machine(run, environment) for run, environment in zip((first, second), environments, strict=True)]
    if machines[0] != machines[1]:
        notes.append(f"other machines or numbers of threads ({'; '.join(machines)}): compare acceptance, not times")
    if its_inputs.code_version != inputs.code_version:
        notes.append(f"other versions of the code ({its_inputs.code_version}, {inputs.code_version})")
    for run, fact in zip((first, second), facts, strict=True):
        if fact["simulated"]:
            notes.append(f"{run.folder} is a simulation: its acceptance is replayed from another run")
        if fact["lossy"]:
            notes.append(f"{run.folder} accepts by a lossy rule, so that its text is not the verifier's own")
        if fact["emulated"]:
            notes.append(f"{run.folder} emulates its number format: its times are no speedup and are not compared")
        if run.summary.get("disturbed"):
            notes.append(f"{run.folder} was disturbed by other processes: its times are too long")
    return notes


def _emulated(run: StoredRun) -> bool:
    return bool(environment_of(run)["facts"]["emulated"])


def _machine(run: StoredRun, environment: Json) -> str:
    return f"{' + '.join(run.machines)}, {environment['device']}, {environment['threads']} threads"


def _model(run: StoredRun) -> str:
    return str(run.config["model"]["name"])


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
