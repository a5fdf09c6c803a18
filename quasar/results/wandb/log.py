"""Creates the W&B run of one run folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from quasar.results import metrics
from quasar.results.files import read_json
from quasar.results.generations import GENERATIONS, GenerationsFile
from quasar.results.measured import Measured
from quasar.results.runs import MANIFEST, StoredRun, read_run
from quasar.results.schema import Json, PromptRecord
from quasar.results.store import ENVIRONMENT
from quasar.results.wandb.target import FOLDER, Target, choose_mode

STAGING = "staging"
ARTIFACT_FILES = ("config.yaml", ENVIRONMENT, GENERATIONS, "summary.json", "status.json")
INIT_SECONDS = 30
POLL_SECONDS = 2.0


def push(folder: Path, target: Target, begun: Callable[[Json], None] | None = None) -> Json:
    """Create or update the W&B run of a run folder; return its mode, URL and local directory.

    Pushing again updates the same W&B run, because its id is kept in the folder and W&B ignores history that it
    already has. Errors of wandb are passed on.

    begun: if given, it is called with the same values once W&B has answered, and `push` follows the run until it ends
    """
    run = read_run(folder)
    identity = run_id(run)
    handle, place = open_run(folder, identity, target, _options(run, target))
    try:
        if begun is not None:
            begun(place)
        handle.define_metric("*", summary="none")
        generations, so_far = GenerationsFile(folder / GENERATIONS), Measured()
        while True:
            ended = begun is None or read_run(folder).status != "running"
            for record in generations.read_on():
                so_far.add(record)
                handle.log(_history(record, so_far), step=len(so_far.records) - 1)
            if ended:
                break
            time.sleep(POLL_SECONDS)
        run = read_run(folder)
        handle.log({"generations": _table(generations.records)}, step=len(generations.records))
        handle.summary.update(run.summary or {"status": run.status, "error": run.error})
        handle.log_artifact(_artifact(folder, identity))
    finally:
        # Without this the next run in the same process would be logged to this W&B run.
        handle.finish(exit_code=0 if run.status == "done" else 1)
    return place


def run_id(run: StoredRun) -> str:
    """Return the id of a run in W&B: the id set by a W&B sweep agent, else the id in the run's environment.json.

    The latter is drawn when the run begins, so that runs of different sweeps never share an id, and moving a folder
    does not change it. A run that failed before it began has the hash of its path and configuration.
    """
    kept = run.folder / FOLDER / "id"
    if kept.exists():
        return kept.read_text().strip()
    drawn = (read_json(run.folder / ENVIRONMENT) or {}).get("run_id")
    if isinstance(drawn, str):
        return drawn
    return hashlib.sha256(f"{run.folder.resolve()}/{run.config_hash}".encode()).hexdigest()[:16]


def open_run(folder: Path, identity: str, target: Target, options: Json) -> tuple[Any, Json]:
    """Create or update a W&B run. Returns its handle, and its mode, URL and local directory.

    folder: wandb writes all its files below it
    options: for wandb.init
    """
    import wandb

    directory = folder / FOLDER
    _keep_in(directory)
    _remove_offline(directory, identity)
    directory.mkdir(exist_ok=True)
    settings = wandb.Settings(
        init_timeout=INIT_SECONDS,
        console="off",
        silent=True,
        x_disable_stats=True,
        disable_git=True,
        save_code=False,
    )
    options = {
        "id": identity,
        "project": target.project,
        "entity": target.entity,
        "dir": str(folder),
        "settings": settings,
        **options,
    }
    mode = choose_mode(target.mode)
    try:
        handle = wandb.init(mode=mode, resume="allow" if mode == "online" else None, **options)
    except wandb.errors.CommError:
        # The server cannot be reached, so write an offline run that can be uploaded later. wandb's background service
        # would not accept the same id again without the teardown.
        wandb.teardown(exit_code=1)
        handle = wandb.init(mode="offline", **options)
    return handle, {
        "mode": "offline" if handle.offline else "online",
        "url": None if handle.offline else handle.url,
        # handle.dir is the folder of media files; wandb sync needs its parent.
        "directory": str(Path(handle.dir).parent),
    }


def sync_command(place: Json) -> str:
    return f"wandb sync {place['directory']}"


def _options(run: StoredRun, target: Target) -> Json:
    names = [run.config.get(group, {}).get("name") for group in ("model", "drafter", "verifier", "data")]
    sweep = (run.folder.parent / MANIFEST).exists()
    return {
        "name": "/".join(run.folder.absolute().parts[-2:]),
        "group": run.folder.absolute().parent.name if sweep else None,
        "job_type": "sweep" if sweep else "run",
        "tags": sorted({*target.tags, *filter(None, names)}),
        "config": {**run.config, "config_hash": run.config_hash},
    }


def _keep_in(directory: Path) -> None:
    """Make wandb write everything below the run's folder, including its logs and staged artifacts."""
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[variable] = str(directory / STAGING)


def _remove_offline(directory: Path, identity: str) -> None:
    """Remove earlier offline copies that were never uploaded; the new copy replaces them."""
    shutil.rmtree(directory / STAGING, ignore_errors=True)
    for copy in directory.glob(f"offline-run-*-{identity}"):
        if not list(copy.glob("*.synced")):
            shutil.rmtree(copy)


def _history(record: PromptRecord, so_far: Measured) -> Json:
    """Return the W&B history entry of one prompt: its metrics, the metrics so far, and histograms over its steps."""
    turns = record.turns
    steps: dict[str, list[float]] = {
        "accepted": [count for turn in turns for count in turn.steps.accepted],
        "drafted": [count for turn in turns for count in turn.steps.drafted],
        "verify_ms": [lap for turn in turns for lap in turn.milliseconds.verify],
        "draft_ms": [lap for turn in turns for lap in turn.milliseconds.draft],
    }
    histograms = {f"steps/{name}": _histogram(values) for name, values in steps.items() if values}
    return {**_curves("prompt", Measured([record])), **_curves("so_far", so_far), **histograms}


def _curves(prefix: str, measured: Measured) -> Json:
    values = {metric.curve: metric.compute(measured) for metric in metrics.METRICS if metric.curve is not None}
    return {f"{prefix}/{curve}": value for curve, value in values.items() if value is not None}


def _histogram(values: Sequence[float]) -> Any:
    """Return a histogram: 64 bins of equal width for times, one bin per value for counts."""
    import numpy as np
    import wandb

    if not all(isinstance(value, int) for value in values):
        return wandb.Histogram(values)
    counts = np.bincount(values)
    return wandb.Histogram(np_histogram=(counts, np.arange(len(counts) + 1) - 0.5))


def _table(records: Sequence[PromptRecord]) -> Any:
    import wandb

    rows: list[Iterable[Any]] = [
        [record.question_id, record.family, number, turn.text, len(turn.token_ids), turn.finish_reason]
        for record in records
        for number, turn in enumerate(record.turns)
    ]
    return wandb.Table(columns=["question_id", "family", "turn", "text", "tokens", "finish_reason"], data=rows)


def _artifact(folder: Path, identity: str) -> Any:
    import wandb

    artifact = wandb.Artifact(f"run-{identity}", type="run")
    for name in ARTIFACT_FILES:
        if (folder / name).exists():
            artifact.add_file(str(folder / name))
    return artifact
