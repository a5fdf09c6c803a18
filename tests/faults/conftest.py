"""Runs and sweeps of the tiny model in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_process import Start, starter


@pytest.fixture
def start(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Start:
    return starter(tmp_path, prompt_file, monkeypatch, capfd, tokens=8)
