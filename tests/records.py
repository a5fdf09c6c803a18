"""Artificial records and environments of runs."""

from __future__ import annotations

from typing import Any

from quasar.results.attempt import Environment, Inputs, Machine, ModelFiles
from quasar.results.measured import RunFacts
from quasar.results.schema import Milliseconds, Steps, Turn


def turn(drafted: list[int], accepted: list[int], prompt_tokens: int = 4, **others: Any) -> Turn:
    """A turn with drafts of these lengths and a millisecond per phase and step. ``others``: other fields."""
    emitted = [count + 1 for count in accepted]
    steps = Steps(drafted, drafted, accepted, emitted, [prompt_tokens] * len(drafted))
    laps = [1.0] * len(drafted)
    values: dict[str, Any] = {
        "token_ids": list(range(1 + sum(emitted))),
        "text": "text",
        "finish_reason": "length",
        "steps": steps,
        "milliseconds": Milliseconds([2.0], laps, laps, laps, laps),
    }
    return Turn(prompt_tokens, **{**values, **others})


def environment(prompts: int) -> Environment:
    machine = Machine(None, None, "3.11", {}, "Linux", "a CPU", 2, 1, "cpu (a CPU)", 1e10)
    inputs = Inputs("code", "cpu", {}, {str(key): "hash" for key in range(1, prompts + 1)}, {}, None, {})
    return Environment(machine, ModelFiles("random weights", None, {}, None), [], [], "hash", prompts, inputs)


def facts(**others: Any) -> RunFacts:
    values: dict[str, Any] = {
        "model": "tiny",
        "drafter": "ngram",
        "verifier": "int4",
        "data": "builtin",
        "temperature": 0.0,
        "verifier_label": "INT4 model",
        "is_reference": False,
        "weight_bytes": 2_000_000,
        "kv_bytes_per_token": 1000,
        "copy_bandwidth": 1e10,
        "peak_memory_bytes": 5_000_000,
        "device": "cpu",
        "simulated": False,
        "lossy": False,
        "model_origin": "random weights",
        "weights_on_grid": None,
    }
    return RunFacts(**{**values, **others})
