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
from quasar.config.schema import config_hash
from quasar.errors import QuasarError, RequestError
from quasar.results.generations import GENERATIONS, GenerationsFile
from quasar.results.schema import Environment, Json, PromptRecord, Status

LOCK = ".lock"
# Long enough to outlast a reader that looks whether the lock is held.
LOCK_SECONDS = 5.0


class RunFolder:
    """One run's files. Opening checks that the folder is fresh, or belongs to the same configuration and schema; it
    writes nothing.

    From `begin` until the status is done or failed the process holds a lock on the folder, which falls with the
    process: a folder that is "running" without it was killed.

    Raises RequestError where the folder holds another run's results, or records of another schema.
    """

    def __init__(self, path: Path, config: DictConfig, resume: bool) -> None:
        self.path = path
        self.hash = config_hash(config)
        self._config = config
        self._lock = FileLock(path / LOCK)
        previous = self._previous_hash()
        if previous is not None and previous != self.hash:
            raise RequestError(
                f"{path} holds a run with another configuration (hash {previous}, this one has {self.hash}); "
                "choose another hydra.run.dir"
            )
        if previous is not None and not resume:
            raise RequestError(
                f"{path} already holds this run; pass resume=true to continue it, or another hydra.run.dir"
            )
        GenerationsFile(path / GENERATIONS).read_on()

    def begin(self, command: list[str], environment: Environment) -> list[PromptRecord]:
        """Write what is known before the first prompt; return the finished prompts' records of an earlier attempt.

        Raises RequestError where another process is at work in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise RequestError(f"{self.path}: another process is at work on this run; wait for it or stop it") from None
        try:
            return self._begin(command, environment)
        except BaseException:
            self._lock.release()
            raise

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Leave status.json as ``failed`` when what runs inside fails, except for requests refused before `begin`."""
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
        """Add one prompt's record; it is on disk when this returns. Where it cannot be, the file stays as it was."""
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
        """``state``: running, done or failed; the last two end the attempt."""
        try:
            write_status(self.path, state, error, self.hash)
        except OSError:
            # A disk too full for the error's text: the error itself is on its way to the user.
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
        """Records of whole lines; what a crash left behind them is dropped from the file."""
        file = self.path / GENERATIONS
        generations = GenerationsFile(file)
        records = generations.read_on()
        if file.exists() and generations.whole_bytes != file.stat().st_size:
            os.truncate(file, generations.whole_bytes)
        return records


def write_status(folder: Path, state: str, error: str | None, config_hash: str) -> None:
    """status.json. Machines and code versions gather over a run's attempts: more than one of either is worth a look."""
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
    """None where status.json is missing or damaged."""
    return Status.from_json(read_json(folder / "status.json"))


def read_json(file: Path) -> Json | None:
    """The object in a file; None where the file is missing or holds none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_atomically(file: Path, content: str) -> None:
    """Readers see the old content or the new, never a part; where writing fails, the old content stays."""
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
