"""Runs and experiments of the tiny model in the test's own process."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from quasar.experiment.main import main
from quasar.experiment.reproduce import reproduce
from quasar.results.console import Reporter

Start = Callable[..., tuple[int, str, str]]
"""Executes ``run.py`` with these arguments; returns the exit code and what it printed to both streams."""
DEFAULTS = {
    "model": "tiny",
    "drafter": "none",
    "verifier": "fp16",
    "evaluate.baselines": "false",
    "evaluate.fidelity": "false",
}


def starter(
    folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tokens: int
) -> Start:
    """Return a function that executes ``run.py`` in ``folder`` with an own cache; `DEFAULTS` may be overridden.

    tokens: most tokens per answer
    """
    monkeypatch.chdir(folder)
    monkeypatch.setenv("QUASAR_CACHE", str(folder / "cache"))
    monkeypatch.setattr("quasar.results.environment.copy_bandwidth", lambda _: 1e10)

    def start(*overrides: str) -> tuple[int, str, str]:
        fixed = ["threads=1", "data=specbench", f"data.path={prompts}", f"decode.max_new_tokens={tokens}"]
        for key, value in DEFAULTS.items():
            if not any(override.startswith(f"{key}=") for override in overrides):
                fixed.append(f"{key}={value}")
        monkeypatch.setattr(sys, "argv", ["run.py", *overrides, *fixed])
        capfd.readouterr()
        return main(), *capfd.readouterr()

    return start


def reproduced(name: str, overrides: Sequence[str], root: Path) -> Path:
    """Reproduce an experiment with the built-in prompts in ``root``; return the folder of its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("quasar_kernels.bandwidth.CopyBandwidth.measure", lambda _: 1e10)
        return root / reproduce(name, overrides, None, Reporter())


@contextmanager
def disk_full_after(writes: int) -> Iterator[None]:
    """Fail every flush to disk after this many."""
    fsync, done = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal done
        done += 1
        if done > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield
