"""Calibration text: token ids of prompts that are not in the evaluation set."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from quasar.config.schema import CalibrationConfig, DataConfig
from quasar.errors import RequestError
from quasar.evaluation.prompts import BUILTIN, Prompt, load_prompts, read_prompts
from quasar.model.sources import Checkpoint
from quasar.model.tokenizer import Tokenizer
from quasar.quantization.statistics import Calibration

# Two texts overlap if they share this many consecutive words, a common measure of test-set contamination (Brown et al.
# 2020, appendix C).
OVERLAP_WORDS = 13


def prepare_calibration(
    chosen: CalibrationConfig, evaluated: Sequence[Prompt], tokenizer: Tokenizer, checkpoint: Checkpoint
) -> Calibration | None:
    """Tokenize the text that ``calibration`` in the configuration names; None if ``calibration.prompts`` is 0.

    Raises RequestError if a calibration prompt overlaps an evaluated prompt; the message names both.
    """
    if chosen.prompts == 0:
        return None
    prompts = calibration_prompts(chosen)
    refuse_overlap(prompts, evaluated)
    sequences = [
        torch.tensor(tokenizer.encode_chat([{"role": "user", "content": turn}])[: chosen.max_tokens])
        for prompt in prompts
        for turn in prompt.turns
    ]
    return Calibration(sequences, text_key(checkpoint, sequences), chosen.seed)


def text_key(checkpoint: Checkpoint, sequences: Sequence[torch.Tensor]) -> dict[str, str | int]:
    """Return the cache key of a model and a text, see `Calibration`."""
    texts = hashlib.sha256(json.dumps([sequence.tolist() for sequence in sequences]).encode()).hexdigest()
    return {"model": checkpoint.identity, "tokens": texts}


def calibration_prompts(chosen: CalibrationConfig) -> list[Prompt]:
    """Draw ``calibration.prompts`` prompts at random with ``calibration.seed``; they keep their order in the set."""
    if chosen.path is None:
        everything = list(read_prompts(BUILTIN / "calibration.jsonl", by_file=False))
    else:
        everything = load_prompts(DataConfig(name="calibration", path=chosen.path, limit=None), key="calibration.path")
    count = min(chosen.prompts, len(everything))
    picked = sorted(random.Random(chosen.seed).sample(range(len(everything)), count))
    return [everything[index] for index in picked]


def refuse_overlap(calibration: Sequence[Prompt], evaluated: Sequence[Prompt]) -> None:
    """Raise RequestError if a calibration prompt shares `OVERLAP_WORDS` consecutive words with an evaluated prompt."""
    seen = {passage: prompt for prompt in evaluated for passage in _passages(prompt)}
    for prompt in calibration:
        for passage in _passages(prompt):
            if passage in seen:
                raise RequestError(
                    f"calibration prompt {prompt.key} ({_name(prompt)}) overlaps evaluation prompt {seen[passage].key} "
                    f"({_name(seen[passage])}): both contain {passage!r}; calibrate on other text (calibration.path)"
                )


def _passages(prompt: Prompt) -> Iterator[str]:
    for turn in prompt.turns:
        words = turn.lower().split()
        for start in range(max(len(words) - OVERLAP_WORDS, 0) + 1):
            yield " ".join(words[start : start + OVERLAP_WORDS])


def _name(prompt: Prompt) -> str:
    return Path(prompt.place).name
