"""One run: build what the configuration names, decode every prompt, write the records, print the results."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from quasar.config.build import build
from quasar.config.rules import check
from quasar.drafters.base import Drafter
from quasar.evaluation.prompts import load_prompts
from quasar.evaluation.sandbox import required_isolation
from quasar.experiment.build import prepare
from quasar.experiment.decode import decode_all
from quasar.experiment.environment import environment_of
from quasar.experiment.facts import facts_of
from quasar.experiment.header import print_header
from quasar.experiment.passes import points_of, time_passes
from quasar.model.devices import use_threads
from quasar.results.console import Reporter
from quasar.results.measured import Measured
from quasar.results.metrics import compute, summary_of
from quasar.results.report import print_report
from quasar.results.schema import Json
from quasar.results.store import RunFolder


def run(
    config: DictConfig, folder: Path, command: list[str], reporter: Reporter, shared_baselines: Path | None = None
) -> Json:
    """Execute one run in ``folder`` and return its summary.

    shared_baselines: folder in which the jobs of a sweep share their autoregressive baselines; None if this run
        decodes its own

    Raises RequestError before anything is written if the request is wrong. A later failure sets the status to
    ``failed`` and keeps the records of all finished prompts.
    """
    settings = check(config)
    use_threads(settings.threads)
    required_isolation(settings.evaluate)
    prompts = load_prompts(settings.data)
    drafter: Drafter = build("drafter", settings.drafter)
    run_folder = RunFolder(folder, config, settings.resume)
    with run_folder.failures_recorded():
        parts = prepare(settings, prompts, drafter, reporter)
        environment = environment_of(parts)
        records = run_folder.begin(command, environment, set(points_of(parts)))
        print_header(reporter, environment, len(records), folder)
        with run_folder.load_recorded(cores=torch.get_num_threads()):
            decode_all(parts, records, run_folder, reporter, shared_baselines)
            time_passes(parts, run_folder, reporter)
        measured = Measured(records, facts_of(parts, run_folder.attempts()), run_folder.passes())
        values = compute(measured)
        summary = summary_of(values)
        run_folder.finish(summary)
    print_report(reporter, measured, values, folder)
    return summary
