"""Compares the inputs of a sweep's earlier results with the present ones, before any job is launched."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from quasar.config.schema import DataConfig, ModelSource, RunConfig
from quasar.errors import QuasarError, RequestError
from quasar.evaluation.prompts import Prompt, load_prompts
from quasar.experiment.inputs import inputs_of
from quasar.experiment.sweep.plan import Job
from quasar.model.sources import Checkpoint, locate
from quasar.results.attempt import Inputs
from quasar.results.console import Reporter
from quasar.results.files import read_json
from quasar.results.store import ENVIRONMENT, require_same_inputs

Found = TypeVar("Found")


def refuse_other_inputs(jobs: Sequence[Job], root: Path, any_code: bool, reporter: Reporter) -> None:
    """Raise RequestError if a job's earlier records were made from other prompts, model files or texts.

    The device is not compared, because jobs may run on another machine than the sweep. The code is not compared either:
    `quasar.experiment.sweep.plan` replaces results of other versions.

    any_code: also accept results without recorded inputs, which earlier versions of the code made
    """
    prompts: dict[str, list[Prompt]] = {}
    checkpoints: dict[str, Checkpoint] = {}
    for job in jobs:
        if job.action not in ("done", "continue", "again") or job.stored is None or not job.stored.prompts:
            continue
        folder, settings = root / job.folder, job.request.settings
        recorded = Inputs.from_json(read_json(folder / ENVIRONMENT))
        if recorded is None and any_code:
            continue
        try:
            inputs = _inputs(settings, prompts, checkpoints)
        except RequestError:
            raise
        except QuasarError as error:
            reporter.warning(f"job {job.folder}: its inputs cannot be compared with those of its results: {error}")
            continue
        if recorded is not None:
            inputs = dataclasses.replace(inputs, device=recorded.device, code_version=recorded.code_version)
        require_same_inputs(folder, inputs)


def _inputs(settings: RunConfig, prompts: dict[str, list[Prompt]], checkpoints: dict[str, Checkpoint]) -> Inputs:
    found = _once(prompts, settings.data, load_prompts)
    checkpoint = _once(checkpoints, settings.model, locate)
    return inputs_of(settings, found, checkpoint, device="")


def _once(known: dict[str, Found], node: DataConfig | ModelSource, make: Callable[..., Found]) -> Found:
    """Return what ``make`` returns for a configuration node; jobs often have the same one."""
    key = json.dumps(dataclasses.asdict(node), sort_keys=True)
    if key not in known:
        known[key] = make(node)
    return known[key]
