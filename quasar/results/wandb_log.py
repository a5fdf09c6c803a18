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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from quasar.results.records import GENERATIONS, Json, whole_records, write_atomically
from quasar.results.runs import MANIFEST, StoredRun, read_run

FOLDER = "wandb"
OUTCOME = "outcome.json"
STAGING = "staging"
ARTIFACT_FILES = ("config.yaml", "environment.json", GENERATIONS, "summary.json", "status.json")
FIGURES = "figures"
INIT_SECONDS = 30
POLL_SECONDS = 2.0
BEGIN_SECONDS = 3600.0
# A process that W&B keeps from ending is ended.
LAST_SECONDS = 900.0
DEFAULT_HOST = "https://api.wandb.ai"


@dataclass
class Totals:
    """Sums over the prompts so far, for the live curves."""

    steps: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    milliseconds: float = 0.0

    def add(self, other: Totals) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def curves(self, prefix: str) -> Json:
        return {
            f"{prefix}/acceptance_length": _ratio(self.emitted, self.steps),
            f"{prefix}/acceptance_rate": _ratio(self.accepted, self.drafted),
            f"{prefix}/tokens_per_second": _ratio(self.emitted * 1e3, self.milliseconds),
        }


@dataclass(frozen=True)
class Target:
    """Where runs go. mode: auto, online or offline."""

    mode: str = "auto"
    project: str = "quasar"
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass
class Feed:
    """The whole lines of a growing generations.jsonl, each once."""

    file: Path
    position: int = 0
    seen: list[Json] = field(default_factory=list)

    def new(self) -> Iterator[Json]:
        if not self.file.exists():
            return
        with self.file.open("rb") as stream:
            stream.seek(self.position)
            records, whole = whole_records(stream.read())
        self.position += whole
        for record in records:
            self.seen.append(record)
            yield record


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
        feed = Feed(folder / GENERATIONS)
        totals = Totals()
        while True:
            ended = begun is None or read_run(folder).status != "running"
            for record in feed.new():
                handle.log(_history(record, totals), step=len(feed.seen) - 1)
            if ended:
                break
            time.sleep(POLL_SECONDS)
        run = read_run(folder)
        handle.log({"generations": _table(feed.seen)}, step=len(feed.seen))
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


def _history(record: Json, totals: Totals) -> Json:
    """What one prompt adds: its own figures, those so far, and the distributions over its steps."""
    turns = record["turns"]
    own = _totals(turns)
    totals.add(own)
    steps = {
        **{name: [value for turn in turns for value in turn["steps"][name]] for name in ("accepted", "drafted")},
        **{f"{name}_ms": [lap for turn in turns for lap in turn["milliseconds"][name]] for name in ("verify", "draft")},
    }
    histograms = {f"steps/{name}": _histogram(values) for name, values in steps.items() if values}
    curves = {**own.curves("prompt"), **totals.curves("so_far")}
    return {**{key: value for key, value in curves.items() if value is not None}, **histograms}


def _histogram(values: Sequence[float]) -> Any:
    """Of times, 64 even bins; of counts, one bin each."""
    import numpy as np
    import wandb

    if not all(isinstance(value, int) for value in values):
        return wandb.Histogram(values)
    counts = np.bincount(values)
    return wandb.Histogram(np_histogram=(counts, np.arange(len(counts) + 1) - 0.5))


def _totals(turns: Sequence[Json]) -> Totals:
    counts = {name: sum(sum(turn["steps"][name]) for turn in turns) for name in ("emitted", "drafted", "accepted")}
    phases = [values for turn in turns for name, values in turn["milliseconds"].items() if name != "prefill"]
    steps = sum(len(turn["steps"]["emitted"]) for turn in turns)
    return Totals(steps=steps, milliseconds=sum(map(sum, phases)), **counts)


def _table(records: Sequence[Json]) -> Any:
    import wandb

    rows: list[Iterable[Any]] = [
        [record["question_id"], record["family"], number, turn["text"], len(turn["token_ids"]), turn["finish_reason"]]
        for record in records
        for number, turn in enumerate(record["turns"])
    ]
    return wandb.Table(columns=["question_id", "family", "turn", "text", "tokens", "finish_reason"], data=rows)


def _artifact(folder: Path, identity: str) -> Any:
    import wandb

    artifact = wandb.Artifact(f"run-{identity}", type="run")
    for name in ARTIFACT_FILES:
        if (folder / name).exists():
            artifact.add_file(str(folder / name))
    if (folder / FIGURES).is_dir():
        artifact.add_dir(str(folder / FIGURES), name=FIGURES)
    return artifact


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


if __name__ == "__main__":
    main(sys.argv[1:])
