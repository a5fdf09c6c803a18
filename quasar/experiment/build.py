"""Builds the model, verifier, reference and drafter that the configuration names, before a run's first prompt."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from quasar.config.build import build, node_named
from quasar.config.schema import RunConfig
from quasar.decoding.acceptance import AcceptanceRule
from quasar.drafters._adaptive_length import AdaptiveLength
from quasar.drafters.base import Drafter, Resources
from quasar.evaluation.prompts import Prompt
from quasar.evaluation.sandbox import required_isolation
from quasar.experiment.calibration_text import calibration_text
from quasar.experiment.capacity import cache_capacity, timed_tokens
from quasar.experiment.reference import Reference, locate_reference
from quasar.experiment.rule import rule_of
from quasar.model.devices import choose_dtype
from quasar.model.grid import weights_on_grid
from quasar.model.sources import Checkpoint
from quasar.model.tokenizer import Tokenizer
from quasar.quantization.packed import quantized_share
from quasar.results.attempt import Machine
from quasar.results.console import Reporter
from quasar.results.environment import describe_machine
from quasar.verifiers.base import LayeredVerifier, Setup, Verifier
from quasar.verifiers.fp16 import FP16Verifier


@dataclass(frozen=True)
class Prepared:
    """Everything that is loaded and built for a run.

    reference: the unquantized, unpruned model, with the dtype and device of ``verifier``; None if ``verifier`` is the
        reference, or if the run measures nothing against it
    exact_reference: loads the reference's weights in float32, once, for the noise floor; None if it is not measured
    weights_on_grid: see `quasar.model.grid`; None for random weights
    """

    settings: RunConfig
    prompts: list[Prompt]
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    drafter: Drafter
    verifier: Verifier
    reference: Verifier | None
    exact_reference: Callable[[], Verifier] | None
    machine: Machine
    weights_on_grid: float | None

    @property
    def rule(self) -> AcceptanceRule:
        """The acceptance rule of the run: the drafter's, or else that of the configuration."""
        return self.drafter.rule or rule_of(self.settings.decode)

    @property
    def isolation(self) -> str | None:
        """What isolates generated code; None if none is executed."""
        return required_isolation(self.settings.evaluate)


def prepare(settings: RunConfig, prompts: list[Prompt], drafter: Drafter, reporter: Reporter) -> Prepared:
    """Load the model, transform it into the verifier, and prepare the drafter. Writes no file of the run.

    Raises RequestError if the configuration does not fit the model or this machine.
    """
    located = locate_reference(settings, reporter)
    device, checkpoint, tokenizer = located.device, located.checkpoint, located.tokenizer
    load = partial(located.load, reporter=reporter)
    model = load(located.dtype)
    window = model.config.context_length
    capacity = max(
        cache_capacity(prompts, settings.decode.max_new_tokens, tokenizer, window),
        timed_tokens(settings.evaluate.passes, window),
    )
    calibration = calibration_text(settings, prompts, located, reporter)
    with reporter.progress(f"preparing verifier={settings.verifier['name']}") as advance:
        setup = Setup(capacity, checkpoint.folder, checkpoint.identity, advance, calibration)
        verifier: Verifier = build("verifier", settings.verifier, model, setup)
    del model
    machine = describe_machine(device)
    # Measurements that are cached between runs depend on the model, the verifier and the machine.
    identity = {
        "model": checkpoint.identity,
        "verifier": json.dumps(settings.verifier, sort_keys=True),
        "dtype": str(verifier.dtype),
        "device": machine.name,
        "torch": torch.__version__,
    }
    with reporter.progress(f"preparing drafter={settings.drafter['name']}") as advance:
        another = partial(_build_another, located, reporter, replace(setup, progress=advance))
        resources = Resources(verifier, tokenizer.encode, another, calibration, identity, advance)
        drafter.prepare(resources)
    if settings.decode.draft_tokens == "auto" and not drafter.chooses_size:
        drafter = AdaptiveLength(drafter, resources.pass_cost)
    gc.collect()
    reference = None
    evaluate = settings.evaluate
    if (evaluate.baselines or evaluate.fidelity or evaluate.passes.repetitions) and not verifier.is_reference:
        reference = FP16Verifier(load(verifier.dtype), setup)

    @cache
    def exact_reference() -> Verifier:
        return FP16Verifier(load(torch.float32), setup)

    return Prepared(
        settings,
        prompts,
        checkpoint,
        tokenizer,
        drafter,
        verifier,
        reference,
        exact_reference if evaluate.noise_floor else None,
        machine,
        share_on_grid(checkpoint),
    )


def share_on_grid(checkpoint: Checkpoint) -> float | None:
    """Return which share of the weights is on a low-bit grid; None for random weights."""
    if checkpoint.folder is None:
        return None
    # Dequantized weights are on the grid of the integers that they come from.
    return (quantized_share if checkpoint.dequantized else weights_on_grid)(checkpoint.folder)


def _build_another(
    located: Reference, reporter: Reporter, setup: Setup, choice: str | dict[str, Any]
) -> LayeredVerifier:
    """Build another verifier of the run's model from its name or config node. ``dtype`` auto is the run's dtype."""
    node = node_named("verifier", choice) if isinstance(choice, str) else choice
    name = node.get("dtype", "auto")
    dtype = located.dtype if name == "auto" else choose_dtype(name, located.device)
    built = build("verifier", node, located.load(dtype, reporter), setup)
    assert isinstance(built, LayeredVerifier)
    return built
