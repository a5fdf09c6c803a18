"""The W&B run of one run folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from quasar.results import metrics
from quasar.results.generations import GENERATIONS, GenerationsFile
from quasar.results.metrics import Measured
from quasar.results.runs import MANIFEST, StoredRun, read_run
from quasar.results.schema import Json, PromptRecord
from quasar.results.wandb.target import FOLDER, Target, choose_mode

STAGING = "staging"
ARTIFACT_FILES = ("config.yaml", "environment.json", GENERATIONS, "summary.json", "status.json")
INIT_SECONDS = 30
POLL_SECONDS = 2.0


def push(folder: Path, target: Target, begun: Callable[[Json], None] | None = None) -> Json:
    """Make the W&B run of a run folder, anew or for the first time; where it is to be found.

    begun: told the same once W&B has answered; if given, keep pace with the run until it ends. Pushing again makes the
    same run again, not another: its id follows from the folder, and W&B drops history that it has already. Raises what
    wandb raises.
    """
    import wandb

    run = read_run(folder)
    mode = choose_mode(target.mode)
    directory = folder / FOLDER
    identity = run_id(run)
    _keep_in(directory)
    _remove_offline(directory, identity)
    directory.mkdir(exist_ok=True)
    options = _options(run, target, identity)
    try:
        handle = wandb.init(mode=mode, resume="allow" if mode == "online" else None, **options)
    except wandb.errors.CommError:
        # Out of reach: what is written now can be uploaded later. wandb's service holds on to the id that it tried.
        wandb.teardown(exit_code=1)
        handle = wandb.init(mode="offline", **options)
    place = {"mode": "offline" if handle.offline else "online", "url": None if handle.offline else handle.url}
    # The run's own directory has its media; wandb sync wants the one above.
    place["directory"] = str(Path(handle.dir).parent)
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
        # Without this the next run of the same process would go on in this one.
        handle.finish(exit_code=0 if run.status == "done" else 1)
    return place


def run_id(run: StoredRun) -> str:
    """The id of a run in W&B: what an agent of a W&B sweep gave it, else made from its place and configuration."""
    kept = run.folder / FOLDER / "id"
    if kept.exists():
        return kept.read_text().strip()
    place = "/".join(run.folder.absolute().parts[-2:])
    return hashlib.sha256(f"{place}/{run.config_hash}".encode()).hexdigest()[:16]


def sync_command(place: Json) -> str:
    return f"wandb sync {place['directory']}"


def _options(run: StoredRun, target: Target, identity: str) -> Json:
    import wandb

    names = [run.config.get(group, {}).get("name") for group in ("model", "drafter", "verifier", "data")]
    sweep = (run.folder.parent / MANIFEST).exists()
    return {
        "id": identity,
        "name": "/".join(run.folder.absolute().parts[-2:]),
        "project": target.project,
        "entity": target.entity,
        "group": run.folder.absolute().parent.name if sweep else None,
        "job_type": "sweep" if sweep else "run",
        "tags": sorted({*target.tags, *filter(None, names)}),
        "config": {**run.config, "config_hash": run.config_hash},
        "dir": str(run.folder),
        "settings": wandb.Settings(
            init_timeout=INIT_SECONDS,
            console="off",
            silent=True,
            x_disable_stats=True,
            disable_git=True,
            save_code=False,
        ),
    }


def _keep_in(directory: Path) -> None:
    """Have wandb keep everything below the run's folder, its own logs and staged artifacts too."""
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[variable] = str(directory / STAGING)


def _remove_offline(directory: Path, identity: str) -> None:
    """An earlier offline copy that was never uploaded would only be uploaded beside the new one."""
    shutil.rmtree(directory / STAGING, ignore_errors=True)
    for copy in directory.glob(f"offline-run-*-{identity}"):
        if not list(copy.glob("*.synced")):
            shutil.rmtree(copy)


def _history(record: PromptRecord, so_far: Measured) -> Json:
    """What one prompt adds: its own figures, those so far, and the distributions over its steps."""
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
    """Of times, 64 even bins; of counts, one bin each."""
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
