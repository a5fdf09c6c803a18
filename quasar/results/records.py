"""The files of a run's folder: config, environment, generations, summary, status."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from quasar.config import config_hash
from quasar.errors import QuasarError, RequestError

Json = dict[str, Any]


class RunFolder:
    """One run's files. Opening checks that the folder is fresh or belongs to the same configuration; it writes nothing.

    Raises RequestError where it holds another run's results.
    """

    def __init__(self, path: Path, config: DictConfig, resume: bool) -> None:
        self.path = path
        self.hash = config_hash(config)
        self._config = config
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

    def begin(self, command: list[str], environment: Json) -> list[Json]:
        """Write what is known before the first prompt; return the finished prompts' records of an earlier attempt."""
        self.path.mkdir(parents=True, exist_ok=True)
        values = OmegaConf.to_container(self._config, resolve=True)
        header = f"# config hash: {self.hash}\n# command: {' '.join(command)}\n"
        write_atomically(self.path / "config.yaml", header + OmegaConf.to_yaml(OmegaConf.create(values)))
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        self.status("running")
        return self._recover()

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Leave status.json as ``failed`` when what runs inside fails, except where the request was wrong."""
        try:
            yield
        except KeyboardInterrupt:
            self._failed("interrupted")
            raise
        except RequestError:
            raise
        except QuasarError as error:
            self._failed(str(error))
            raise
        except Exception:
            self._failed(traceback.format_exc())
            raise

    def append(self, record: Json) -> None:
        """Add one prompt's record; it is on disk when this returns."""
        with (self.path / "generations.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self, summary: Json) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.status("done")

    def status(self, state: str, error: str | None = None) -> None:
        """``state``: running, done or failed."""
        content = {
            "status": state,
            "error": error,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config_hash": self.hash,
        }
        write_atomically(self.path / "status.json", json.dumps(content, indent=2) + "\n")

    def _failed(self, error: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.status("failed", error)

    def _previous_hash(self) -> str | None:
        config = self.path / "config.yaml"
        if not config.exists():
            return None
        first = config.read_text(encoding="utf-8").split("\n", 1)[0]
        return first.removeprefix("# config hash: ").strip()

    def _recover(self) -> list[Json]:
        """Records of whole lines; a line cut short by a crash is dropped from the file."""
        file = self.path / "generations.jsonl"
        if not file.exists():
            return []
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with file.open("r+b") as stream:
                stream.truncate(len(whole))
        return [json.loads(line) for line in whole.decode().splitlines()]


def write_atomically(file: Path, content: str) -> None:
    """Readers see the old content or the new, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
