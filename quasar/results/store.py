"""The files of a run's folder: config, environment, generations, summary, status."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from quasar.cache import code_version
from quasar.config.hash import config_hash
from quasar.config.text import config_yaml
from quasar.errors import RequestError, actionable, storage_error
from quasar.results.attempt import Environment, Inputs, Status
from quasar.results.files import append_line, overwrite_json, read_json, write_atomically, write_json
from quasar.results.generations import GENERATIONS, PASSES, GenerationsFile, PassesFile, RecordsFile, read_passes
from quasar.results.load import LOAD, between, sample
from quasar.results.schema import Json, PassPoint, PassRecord, PromptRecord

Record = TypeVar("Record", PromptRecord, PassRecord)

LOCK = ".lock"
ENVIRONMENT = "environment.json"
# `is_locked` in another process holds the lock for a moment while it checks the folder; this is long enough to wait.
LOCK_SECONDS = 5.0


class BusyError(RequestError):
    """Another process is working on the run."""


class RunFolder:
    """The files of one run.

    The constructor checks that the folder is new or belongs to the same configuration and schema. It writes nothing.
    The process holds a lock on the folder from `begin` until the status is done or failed. The lock is released if the
    process dies, so a run whose status is "running" and whose folder is not locked was killed.

    Raises RequestError if the folder contains results of another configuration or records of another schema, and
    StorageError if it cannot be written.
    """

    def __init__(self, path: Path, config: DictConfig, resume: bool) -> None:
        self.path = path
        self.hash = config_hash(config)
        self._config, self._resume = config, resume
        self._lock = FileLock(path / LOCK)
        self._begun = False
        self._attempt = 1
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise storage_error(path, PermissionError(13, os.strerror(13)))
        self._require_same_run()
        GenerationsFile(path / GENERATIONS).read_on()
        PassesFile(path / PASSES).read_on()

    def begin(
        self, command: list[str], environment: Environment, points: Collection[PassPoint] = ()
    ) -> list[PromptRecord]:
        """Write config, environment and status; return the records of prompts that an earlier attempt finished.

        points: the passes that the run times

        Everything that the folder contains is compared while the lock is held, because another run may have begun in
        the folder meanwhile.

        Raises BusyError if another process is working on the run, RequestError if the folder has become another run's
        or if the records were made from other inputs, and StorageError if the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise BusyError(f"{self.path}: another process is working on this run; wait for it or stop it") from None
        except OSError as error:
            raise storage_error(self.path, error) from None
        try:
            self._require_same_run()
            records, timed = self._recover(environment.inputs, points)
            finished = {"prompts_done_before": len(records), "passes_done_before": len(timed)}
            self._begin(command, environment, finished)
            self._begun = True
        except BaseException:
            self._lock.release()
            raise
        return records

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Set the status to ``failed`` if the body raises, except for a RequestError before `begin`."""
        try:
            yield
        except KeyboardInterrupt:
            self._failed("interrupted")
            raise
        except BaseException as error:
            known = actionable(error)
            if self._begun or not isinstance(known, RequestError):
                self._failed(traceback.format_exc() if known is None else str(known))
            raise

    def append(self, record: PromptRecord) -> PromptRecord:
        """Append one prompt's record and flush it to disk. If writing fails, the file is left unchanged.

        Returns the record with the number of this attempt, as it is in the file.
        """
        return self._append(GENERATIONS, record)

    @contextmanager
    def load_recorded(self, cores: int) -> Iterator[None]:
        """Write how busy the machine was during the body into this attempt's entry in environment.json.

        cores: number of threads that the run computes with
        """
        begin = sample()
        try:
            yield
        finally:
            load = between(begin, sample(), cores)
            # A full disk must not end a run here: its records matter more, and the next write reports the full disk.
            with suppress(OSError):
                self._add_to_attempt(LOAD, None if load is None else load.to_json())

    def attempts(self) -> list[Json]:
        """Return the attempts in environment.json."""
        found = (read_json(self.path / ENVIRONMENT) or {}).get("attempts")
        return found if isinstance(found, list) else []

    def passes(self) -> list[PassRecord]:
        """Return the passes that earlier attempts timed."""
        return read_passes(self.path)

    def append_pass(self, record: PassRecord) -> PassRecord:
        """Append one timed pass like `append`."""
        return self._append(PASSES, record)

    def finish(self, summary: Json) -> None:
        write_json(self.path / "summary.json", summary)
        self.status("done")

    def status(self, state: str, error: str | None = None) -> None:
        """Write the state: running, done or failed. Done and failed release the lock."""
        try:
            write_status(self.path, state, error, self.hash)
        except OSError:
            # If the disk is too full to store the error, the user still sees it: the caller raises it again.
            if state != "failed":
                raise
        finally:
            if state != "running":
                self._lock.release()

    def _append(self, name: str, record: Record) -> Record:
        record = replace(record, attempt=self._attempt)
        append_line(self.path / name, json.dumps(record.to_json(), ensure_ascii=False))
        return record

    def _begin(self, command: list[str], environment: Environment, finished: Json) -> None:
        for leftover in self.path.glob(".*.partial"):
            leftover.unlink()
        write_atomically(self.path / "config.yaml", config_yaml(self._config, command))
        content = self._environment(command, environment, finished)
        write_json(self.path / ENVIRONMENT, content)
        self.status("running")

    def _environment(self, command: list[str], environment: Environment, finished: Json) -> Json:
        """Return the content of environment.json with an entry for this attempt.

        finished: numbers of prompts and passes that earlier attempts finished, by their keys in the entry

        Entries of earlier attempts stay as they are. The top level describes the attempt that made the first record.
        """
        previous = read_json(self.path / ENVIRONMENT) or {}
        attempts = self.attempts()
        self._attempt = len(attempts) + 1
        attempt = {
            "attempt": self._attempt,
            "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "command": command,
            **finished,
            **environment.to_json(),
        }
        described = {key: value for key, value in previous.items() if key not in ("run_id", "attempts")}
        return {
            "run_id": previous.get("run_id") or secrets.token_hex(8),
            **(described if any(finished.values()) else environment.to_json()),
            "attempts": [*attempts, attempt],
        }

    def _add_to_attempt(self, key: str, value: Json | None) -> None:
        content = read_json(self.path / ENVIRONMENT)
        if content is not None:
            content["attempts"][-1][key] = value
            write_json(self.path / ENVIRONMENT, content)

    def _failed(self, error: str) -> None:
        if self._begun or self._claimed():
            self.status("failed", error)

    def _claimed(self) -> bool:
        """Lock the folder before `begin`, unless it has become another run's or already contains the finished run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._require_same_run()
        except (OSError, Timeout, RequestError):
            self._lock.release()
            return False
        status = read_status(self.path)
        if status is not None and status.status == "done":
            self._lock.release()
            return False
        return True

    def _require_same_run(self) -> None:
        """Raise RequestError if the folder contains another configuration, or this one and it must not be resumed."""
        config = self.path / "config.yaml"
        if not config.exists():
            if any((self.path / name).exists() for name in (GENERATIONS, PASSES)):
                raise RequestError(
                    f"{self.path} contains records but no config.yaml, so that their configuration is unknown; choose "
                    "another hydra.run.dir"
                )
            return
        first = config.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
        previous = first.removeprefix("# config hash: ").strip()
        if previous != self.hash:
            raise RequestError(
                f"{self.path} contains a run with another configuration (hash {previous}, this one has {self.hash}); "
                "choose another hydra.run.dir"
            )
        if not self._resume:
            raise RequestError(
                f"{self.path} already contains this run; pass resume=true to continue it, or another hydra.run.dir"
            )

    def _recover(self, inputs: Inputs, points: Collection[PassPoint]) -> tuple[list[PromptRecord], list[PassRecord]]:
        """Return the records of the complete lines, and remove incomplete lines that a crash left after them.

        Raises RequestError if the records are not answers to these prompts and passes at these points, or were made
        from other inputs.
        """
        generations, passes = GenerationsFile(self.path / GENERATIONS), PassesFile(self.path / PASSES)
        records, timed = generations.read_on(), passes.read_on()
        if records or timed:
            require_same_inputs(self.path, inputs)
        generations.require_prompts(inputs.prompts)
        passes.require_points(points)
        _cut(generations)
        _cut(passes)
        return records, timed


def require_same_inputs(folder: Path, inputs: Inputs) -> None:
    """Raise RequestError if the records in a run's folder were made from other inputs; the message names them."""
    recorded = Inputs.from_json(read_json(folder / ENVIRONMENT))
    if recorded is None:
        different = f"{ENVIRONMENT} does not say what its records were made from"
    elif found := inputs.differences(recorded):
        different = f"its records were made with a difference in {'; '.join(found)}"
    else:
        return
    raise RequestError(
        f"{folder}: {different}. Results of both would be mixed; restore what has changed, or choose another "
        "hydra.run.dir (for a sweep: another hydra.sweep.dir)"
    )


def write_status(folder: Path, state: str, error: str | None, config_hash: str) -> None:
    """Write status.json. This machine and code version are added to those of earlier attempts."""
    previous = read_status(folder)
    status = Status(
        status=state,
        error=error,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        config_hash=config_hash,
        code_versions=_with(previous.code_versions if previous else [], code_version()),
        machines=_with(previous.machines if previous else [], socket.gethostname()),
        pid=os.getpid(),
    )
    file = folder / "status.json"
    try:
        write_json(file, status.to_json())
    except OSError:
        if previous is None or state == "running":
            raise
        # A full disk has no room for a second file, but the existing one has room for a short error.
        short = replace(status, error=None if error is None else error.strip().splitlines()[-1])
        overwrite_json(file, short.to_json())


def read_status(folder: Path) -> Status | None:
    """Return the content of status.json; None if it is missing or damaged."""
    return Status.from_json(read_json(folder / "status.json"))


def _cut(lines: RecordsFile[Record]) -> None:
    """Remove the incomplete line that a crash left after the complete ones."""
    if lines.file.exists() and lines.whole_bytes != lines.file.stat().st_size:
        os.truncate(lines.file, lines.whole_bytes)


def _with(known: list[str], value: str) -> list[str]:
    return list(dict.fromkeys([*known, value]))
