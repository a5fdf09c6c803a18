"""Where results come from: the code, machine, model and prompts of the runs behind a table or figure.

The footer of every table and figure is made from a `Provenance`. It cannot be made from runs that are unfinished, or
that differ in what must not differ within one table, so such a table cannot be drawn.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quasar.errors import RequestError
from quasar.results.files import read_json, write_json
from quasar.results.runs import StoredRun
from quasar.results.schema import Json
from quasar.results.store import read_status


@dataclass(frozen=True)
class Provenance:
    """The origin of a set of runs.

    code_version: hash of the program's source; git_commit, git_dirty: None if the code was in no repository
    finished: the days on which the first and the last run ended, ISO 8601
    weights_on_grid: see `quasar.model.grid`; None for random weights
    prompt_sets: hashes of the prompt sets; several if jobs decode different numbers of prompts
    prompts: the largest number of prompts that a job decoded
    declared_prompts: number of prompts that the experiment declares; None for a sweep that is no experiment
    shared_baselines: whether autoregressive baselines were measured once per sweep instead of beside every answer
    """

    code_version: str
    git_commit: str | None
    git_dirty: bool | None
    finished: tuple[str, ...]
    machine: str
    device: str
    threads: int
    torch: str | None
    model: str
    model_origin: str
    weights_on_grid: float | None
    prompt_sets: tuple[str, ...]
    prompts: int
    repetitions: tuple[int, ...]
    max_new_tokens: tuple[int, ...]
    shared_baselines: bool
    runs: int
    experiment: str | None = None
    declared_prompts: int | None = None

    def declared(self, experiment: str, prompts: int | None) -> Provenance:
        """Return this provenance as that of an experiment, which declares a number of prompts."""
        return replace(self, experiment=experiment, declared_prompts=prompts)

    @property
    def is_reduced(self) -> bool:
        """Whether fewer prompts were decoded than the experiment declares."""
        return self.declared_prompts is not None and self.prompts < self.declared_prompts

    def sentences(self) -> list[str]:
        """Return the footer's parts, from the code to the number of prompts."""
        commit = f"commit {self.git_commit[:10]}" if self.git_commit else "no commit"
        dirty = " with uncommitted changes" if self.git_dirty else ""
        days = " to ".join(dict.fromkeys((self.finished[0], self.finished[-1])))
        parts = [
            f"{commit}{dirty} (code {self.code_version}), {days}",
            f"{self.device}, {_counted(self.threads, 'thread')}, torch {self.torch}",
            f"{self.model}: {self.model_origin}",
        ]
        if self.weights_on_grid is not None:
            parts.append(f"{self.weights_on_grid:.0%} of its weights lie on a low-bit grid")
        reduced = f" of {self.declared_prompts} declared" if self.is_reduced else ""
        sets = ", ".join(found[:8] for found in self.prompt_sets)
        once = self.repetitions == (1,)
        repeated = "1 repetition" if once else f"{_range(self.repetitions)} repetitions"
        parts.append(f"{self.prompts}{reduced} prompts (set {sets}), {repeated}")
        parts.append(f"at most {_range(self.max_new_tokens)} tokens per answer")
        if self.shared_baselines:
            parts.append("baselines measured once per sweep, not beside every answer")
        return parts

    def footer(self, width: int) -> list[str]:
        """Return the footer as lines of at most ``width`` characters."""
        return textwrap.wrap("; ".join(self.sentences()) + ".", width)

    def write(self, file: Path) -> None:
        write_json(file, dataclasses.asdict(self))


def read_provenance(file: Path) -> Provenance:
    """Read what `Provenance.write` wrote. Raises RequestError if the file is missing, damaged or of another version."""
    content = read_json(file)
    if content is None:
        raise RequestError(f"{file}: missing or damaged; make reproduce writes it")
    fields = {field.name for field in dataclasses.fields(Provenance)}
    if set(content) != fields:
        wrong = ", ".join(sorted(set(content) ^ fields))
        raise RequestError(f"{file}: another version of the code wrote it (keys {wrong}); run make reproduce again")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return Provenance(**values)


def provenance_of(runs: Sequence[StoredRun]) -> Provenance:
    """Return the common origin of runs.

    Raises RequestError, naming the reason, if a run is not done, or if the runs mix code versions, commits, machines,
    devices, numbers of threads, models, or origins of the weights.
    """
    unfinished = [run for run in runs if run.status != "done"]
    if unfinished:
        states = ", ".join(f"{run.folder.name} ({run.status})" for run in unfinished[:3])
        raise RequestError(
            f"{len(unfinished)} of {len(runs)} runs are not done: {states}; finish or delete them, then draw again"
        )
    environments = [_environment(run) for run in runs]
    common: dict[str, Any] = {
        "code_version": _common("code versions", (version for run in runs for version in run.code_versions)),
        "git_commit": _common("commits", (found["git_commit"] for found in environments)),
        "machine": _common("machines", (machine for run in runs for machine in run.machines)),
        "device": _common("devices", (found["device"] for found in environments)),
        "threads": _common("numbers of threads", (found["threads"] for found in environments)),
        "torch": _common("versions of torch", (found["packages"].get("torch") for found in environments)),
        "model": _common("models", (run.summary["model"] for run in runs)),
        "model_origin": _common("model origins", (found["model"]["origin"] for found in environments)),
        "weights_on_grid": _common("weights", (found["model"]["weights_on_grid"] for found in environments)),
    }
    return Provenance(
        **common,
        git_dirty=any(found["git_dirty"] for found in environments),
        finished=_ends(sorted({_day(run) for run in runs})),
        prompt_sets=tuple(dict.fromkeys(found["prompt_set"] for found in environments)),
        prompts=max(run.summary["prompts"] for run in runs),
        repetitions=tuple(sorted({run.summary["repetitions"] for run in runs})),
        max_new_tokens=tuple(sorted({run.config["decode"]["max_new_tokens"] for run in runs})),
        shared_baselines=any(run.config["sweep"]["share_baselines"] for run in runs),
        runs=len(runs),
    )


def _environment(run: StoredRun) -> Json:
    content = read_json(run.folder / "environment.json")
    if content is None or "repetitions" not in run.summary:
        raise RequestError(
            f"{run.folder}: its environment.json or summary.json was written by an earlier version of the code, or is "
            "damaged; run it again"
        )
    return content


def _common(words: str, values: Iterable[Any]) -> Any:
    found = list(dict.fromkeys(values))
    if len(found) != 1:
        raise RequestError(
            f"the runs are of several {words}: {'; '.join(map(str, found))}; draw the runs of each separately"
        )
    return found[0]


def _day(run: StoredRun) -> str:
    status = read_status(run.folder)
    assert status is not None
    return status.time[:10]


def _ends(values: Sequence[str]) -> tuple[str, str]:
    return values[0], values[-1]


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
