"""Runs in Weights & Biases, made from their files alone: while they run or at any time after.

The files are the truth. Whatever W&B does (fail, hang, be missing) happens in a process of its own or in
``quasar wandb push``; a run neither fails nor waits for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import netrc
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from quasar.results import metrics
from quasar.results.generations import GENERATIONS, GenerationsFile
from quasar.results.metrics import Measured
from quasar.results.runs import MANIFEST, StoredRun, read_run
from quasar.results.schema import Json, PromptRecord
from quasar.results.store import write_atomically

FOLDER = "wandb"
OUTCOME = "outcome.json"
STAGING = "staging"
ARTIFACT_FILES = ("config.yaml", "environment.json", GENERATIONS, "summary.json", "status.json")
INIT_SECONDS = 30
POLL_SECONDS = 2.0
BEGIN_SECONDS = 3600.0
# A process that W&B keeps from ending is ended.
LAST_SECONDS = 900.0
DEFAULT_HOST = "https://api.wandb.ai"


@dataclass(frozen=True)
class Target:
    """Where runs go. mode: auto, online or offline."""

    mode: str = "auto"
    project: str = "quasar"
    entity: str | None = None
    tags: tuple[str, ...] = ()


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


def choose_mode(chosen: str) -> Literal["online", "offline"]:
    """What ``auto`` comes to: what the variable WANDB_MODE says, else online where there is a key."""
    if chosen == "auto":
        chosen = os.environ.get("WANDB_MODE") or ("online" if key_is_configured() else "offline")
    return "online" if chosen == "online" else "offline"


def key_is_configured() -> bool:
    """Whether wandb would find a key: in the environment or in the file that ``wandb login`` writes. It is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", DEFAULT_HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def stamp(folder: Path) -> int:
    """When a run last said how it fares: changes when it begins, and again when it ends. 0: never."""
    try:
        return (folder / "status.json").stat().st_mtime_ns
    except OSError:
        return 0


def main(arguments: Sequence[str]) -> None:
    """The process beside a run: wait until it begins, keep pace with it, leave word of the outcome."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--before", type=int, required=True, help="stamp of the run before this attempt")
    parser.add_argument("--target", type=json.loads, required=True)
    chosen = parser.parse_args(arguments)
    # The run's own threads come first.
    os.nice(19)
    if not _begun(chosen.folder, chosen.parent, chosen.before):
        return
    directory = chosen.folder / FOLDER

    def tell(outcome: Json, ended: bool = False) -> None:
        write_atomically(directory / OUTCOME, json.dumps({**outcome, "ended": ended}) + "\n")

    try:
        directory.mkdir(exist_ok=True)
        _adopt_agents_id(directory)
        watchdog = threading.Thread(target=_end_late, args=(chosen.folder,), daemon=True)
        watchdog.start()
        target = Target(**{**chosen.target, "tags": tuple(chosen.target["tags"])})
        tell(push(chosen.folder, target, tell), ended=True)
    except Exception as error:
        tell({"error": _without_key(f"{type(error).__name__}: {error}")}, ended=True)


def _begun(folder: Path, parent: int, before: int) -> bool:
    """Wait until the run is at work, or was; False where its process ends before."""
    deadline = time.monotonic() + BEGIN_SECONDS
    while (alive := os.getppid() == parent and time.monotonic() < deadline) and stamp(folder) == before:
        time.sleep(0.2)
    return alive or stamp(folder) != before


def _without_key(message: str) -> str:
    key = os.environ.get("WANDB_API_KEY")
    return message.replace(key, "(key)") if key else message


def _end_late(folder: Path) -> None:
    while read_run(folder).status == "running":
        time.sleep(POLL_SECONDS)
    time.sleep(LAST_SECONDS)
    os._exit(1)


def _adopt_agents_id(directory: Path) -> None:
    """An agent of a W&B sweep looks for the run under an id of its own choice."""
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        write_atomically(directory / "id", os.environ["WANDB_RUN_ID"])


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


if __name__ == "__main__":
    main(sys.argv[1:])
