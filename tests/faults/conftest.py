"""Runs and sweeps of the tiny model in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quasar.experiment.main import main

Start = Callable[..., tuple[int, str, str]]


@pytest.fixture
def start(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Start:
    """``run.py`` with these arguments; returns the exit code and what it printed to both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("quasar.results.environment.copy_bandwidth", lambda _: 1e10)

    def run(*overrides: str) -> tuple[int, str, str]:
        fixed = ["threads=1", "data=specbench", f"data.path={prompt_file}", "decode.max_new_tokens=8"]
        defaults = {
            "model": "tiny",
            "drafter": "none",
            "verifier": "fp16",
            "evaluate.baselines": "false",
            "evaluate.fidelity": "false",
        }
        for key, value in defaults.items():
            if not any(override.startswith(f"{key}=") for override in overrides):
                fixed.append(f"{key}={value}")
        monkeypatch.setattr(sys, "argv", ["run.py", *overrides, *fixed])
        capfd.readouterr()
        return main(), *capfd.readouterr()

    return run
