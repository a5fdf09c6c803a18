"""The files of a run's folder: config, environment, generations, summary, status."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from quasar.cache import code_version
from quasar.config.hash import config_hash
from quasar.errors import QuasarError, RequestError
from quasar.results.generations import GENERATIONS, GenerationsFile
from quasar.results.schema import Environment, Json, PromptRecord, Status

LOCK = ".lock"
# `is_locked` in another process holds the lock for a moment while it checks the folder; this is long enough to wait.
LOCK_SECONDS = 5.0


class RunFolder:
    """The files of one run.

    The constructor checks that the folder is new or belongs to the same configuration and schema. It writes nothing.
    The process holds a lock on the folder from `begin` until the status is done or failed. The lock is released if the
    process dies, so a run whose status is "running" and whose folder is not locked was killed.

    Raises RequestError if the folder contains results of another configuration or records of another schema.
    """

    def __init__(self, path: Path, config: DictConfig, resume: bool) -> None:
        self.path = path
        self.hash = config_hash(config)
        self._config = config
        self._lock = FileLock(path / LOCK)
        previous = self._previous_hash()
        if previous is not None and previous != self.hash:
            raise RequestError(
                f"{path} contains a run with another configuration (hash {previous}, this one has {self.hash}); "
                "choose another hydra.run.dir"
            )
        if previous is not None and not resume:
            raise RequestError(
                f"{path} already contains this run; pass resume=true to continue it, or another hydra.run.dir"
            )
        GenerationsFile(path / GENERATIONS).read_on()

    def begin(self, command: list[str], environment: Environment) -> list[PromptRecord]:
        """Write config, environment and status; return the records of prompts that an earlier attempt finished.

        Raises RequestError if another process is working on the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise RequestError(f"{self.path}: another process is working on this run; wait for it or stop it") from None
        try:
            return self._begin(command, environment)
        except BaseException:
            self._lock.release()
            raise

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Set the status to ``failed`` if the body raises, except for a RequestError before `begin`."""
        try:
            yield
        except KeyboardInterrupt:
            self._failed("interrupted")
            raise
        except QuasarError as error:
            if self._lock.is_locked or not isinstance(error, RequestError):
                self._failed(str(error))
            raise
        except Exception:
            self._failed(traceback.format_exc())
            raise

    def append(self, record: PromptRecord) -> None:
        """Append one prompt's record and flush it to disk. If writing fails, the file is left unchanged."""
        line = (json.dumps(record.to_json(), ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.path / GENERATIONS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, line)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)

    def finish(self, summary: Json) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
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

    def _begin(self, command: list[str], environment: Environment) -> list[PromptRecord]:
        for leftover in self.path.glob(".*.partial"):
            leftover.unlink()
        values = OmegaConf.to_container(self._config, resolve=True)
        header = f"# config hash: {self.hash}\n# command: {' '.join(command)}\n"
        write_atomically(self.path / "config.yaml", header + OmegaConf.to_yaml(OmegaConf.create(values)))
        write_atomically(self.path / "environment.json", json.dumps(environment.to_json(), indent=2) + "\n")
        self.status("running")
        return self._recover()

    def _failed(self, error: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.status("failed", error)

    def _previous_hash(self) -> str | None:
        config = self.path / "config.yaml"
        if not config.exists():
            return None
        first = config.read_text(encoding="utf-8").split("\n", 1)[0]
        return first.removeprefix("# config hash: ").strip()

    def _recover(self) -> list[PromptRecord]:
        """Return the records of the complete lines, and remove an incomplete line that a crash left after them."""
        file = self.path / GENERATIONS
        generations = GenerationsFile(file)
        records = generations.read_on()
        if file.exists() and generations.whole_bytes != file.stat().st_size:
            os.truncate(file, generations.whole_bytes)
        return records


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
    write_atomically(folder / "status.json", json.dumps(status.to_json(), indent=2) + "\n")


def read_status(folder: Path) -> Status | None:
    """Return the content of status.json; None if it is missing or damaged."""
    return Status.from_json(read_json(folder / "status.json"))


def read_json(file: Path) -> Json | None:
    """Return the JSON object in a file; None if the file is missing or contains no object."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_atomically(file: Path, content: str) -> None:
    """Replace a file's content at once, so that readers see the old or the new content; if writing fails, the old."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _with(known: list[str], value: str) -> list[str]:
    return list(dict.fromkeys([*known, value]))
