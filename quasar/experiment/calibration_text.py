"""The calibration text of a run: prompts that are not evaluated, and on request what the reference answers to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch

from quasar.cache import json_store
from quasar.config.schema import RunConfig
from quasar.evaluation.calibration import prepare_calibration, text_key
from quasar.evaluation.fidelity import trajectory_of
from quasar.evaluation.prompts import Prompt
from quasar.experiment.reference import Reference
from quasar.quantization.statistics import Calibration
from quasar.results.console import Reporter
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier


def calibration_text(
    settings: RunConfig, evaluated: Sequence[Prompt], located: Reference, reporter: Reporter
) -> Callable[[], Calibration | None]:
    """Return a function that prepares the text when it is first called, as `prepare_calibration` does.

    With ``calibration.answers`` the reference's greedy answer follows each prompt. A verifier mostly reads text that a
    model like it has written, and a prompt alone has none of it (Williams et al. 2024 calibrate on such text too). The
    reference is loaded once more for this, and its answers are cached.
    """

    @cache
    def prepared() -> Calibration | None:
        found = prepare_calibration(settings.calibration, evaluated, located.tokenizer, located.checkpoint)
        length = settings.calibration.answers
        if found is None or not length:
            return found
        stop = located.tokenizer.stop_tokens
        key = {**found.key, "answers": length, "stop": sorted(stop)}

        def answered() -> list[list[int]]:
            return _answered([sequence.tolist() for sequence in found.sequences], length, located, reporter)

        texts = [torch.tensor(text) for text in STORE.get(key, located.device, located.dtype, answered)]
        return replace(found, sequences=texts, key=text_key(located.checkpoint, texts))

    return prepared


def _answered(prompts: Sequence[list[int]], length: int, located: Reference, reporter: Reporter) -> list[list[int]]:
    """Return each prompt with the reference's greedy answer of at most ``length`` tokens behind it."""
    stop = located.tokenizer.stop_tokens
    reference = FP16Verifier(located.load(located.dtype, reporter), Setup())
    texts = []
    with reporter.progress("answering calibration prompts") as advance:
        for done, prompt in enumerate(prompts):
            advance(done, len(prompts))
            texts.append([*prompt, *trajectory_of(reference, prompt, length, stop).answer])
        advance(len(prompts), len(prompts))
    return texts


STORE = json_store("calibration_answers")
