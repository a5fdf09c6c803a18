"""Shared fixtures: small random models, checkpoints of every supported architecture, and SmolLM2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from quasar.cli import model_source
from quasar.config.schema import ModelSource
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.sources import Checkpoint, locate
from quasar.model.transformer import Transformer
from quasar.quantization.statistics import Calibration
from quasar.verifiers.base import Setup

if not torch.cuda.is_available():
    # Triton reads this when it is first imported. Its kernels then run in an interpreter on any machine.
    os.environ["TRITON_INTERPRET"] = "1"
# Tests look for sentences and rows in what commands print. They are one line each if lines may be this long.
os.environ["COLUMNS"] = "400"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread, because the operations of the tiny models are too small for several threads."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Transformer:
    """A random float32 model with a vocabulary of 64 tokens, with which repetition and therefore drafts are likely."""
    return random_transformer(tiny_config(vocab_size=64), seed=0, dtype=torch.float32)


@pytest.fixture
def calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """Three random sequences of 64 different tokens. Their statistics are cached in a folder of the test."""
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 64, (length,), generator=generator) for length in (50, 90, 30)]
    return Calibration(sequences, {"model": "tiny"})


@pytest.fixture
def setup(calibration: Calibration) -> Setup:
    """A setup with which every verifier can be built."""
    return Setup(calibration=lambda: calibration)


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct from the user's cache. It is downloaded on first use."""
    return locate(model_source("smollm2_135m"))


@pytest.fixture
def path_source() -> ModelSource:
    return ModelSource(name="path", source="path")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """A Spec-Bench file with three prompts. The last one has two turns."""
    file = tmp_path / "questions.jsonl"
    file.write_text(
        '{"question_id": 1, "category": "math", "turns": ["one two one two one"]}\n'
        '{"question_id": 2, "category": "chat", "turns": ["say it again"]}\n'
        '{"question_id": 3, "category": "chat", "turns": ["a b a b", "and once more"]}\n'
    )
    return file
