"""Builds the model, verifier and drafter that the configuration names, before a run's first prompt."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from quasar_kernels.cpu.levels import chosen_levels

from quasar.config.build import build, node_named
from quasar.config.schema import RunConfig
from quasar.console import Reporter
from quasar.drafters._adaptive_length import AdaptiveLength, measure_pass_cost
from quasar.drafters.base import Drafter, Resources
from quasar.errors import RequestError
from quasar.evaluation.calibration import prepare_calibration
from quasar.evaluation.prompts import Prompt
from quasar.experiment.decoder import WARM_UP
from quasar.model.grid import weights_on_grid
from quasar.model.loading import load_transformer, random_transformer, tiny_config
from quasar.model.sources import Checkpoint, locate
from quasar.model.tokenizer import Tokenizer, load_tokenizer
from quasar.model.transformer import Transformer
from quasar.results.environment import device_name
from quasar.verifiers.base import LayeredVerifier, Setup, Verifier
from quasar.verifiers.fp16 import FP16Verifier

# The initial KV cache has room for the longest prompt, its answer, and a verification pass of this many rows.
BLOCK_ROOM = 64


@dataclass(frozen=True)
class Prepared:
    """Everything that is loaded and built for a run.

    capacity: initial size of the KV caches in tokens
    weights_on_grid: see `quasar.model.grid`; None for random weights
    """

    settings: RunConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    drafter: Drafter
    verifier: Verifier
    capacity: int
    weights_on_grid: float | None

    def build_reference(self, reporter: Reporter) -> FP16Verifier:
        """Build the reference, the unquantized and unpruned model, with the verifier's dtype and device."""
        model = load_model(self.checkpoint, self.verifier.dtype, self.verifier.device, reporter)
        return FP16Verifier(model, Setup(self.capacity, self.checkpoint.folder))


def prepare(
    settings: RunConfig, prompts: list[Prompt], drafter: Drafter, device: torch.device, reporter: Reporter
) -> Prepared:
    """Load the model, transform it into the verifier, and prepare the drafter. Writes no file of the run.

    Raises RequestError if the configuration does not fit the model.
    """
    with reporter.stages() as stage:
        checkpoint = locate(settings.model, stage)
    tokenizer = load_tokenizer(checkpoint)
    dtype = choose_dtype(settings.verifier["dtype"], device)
    model = load_model(checkpoint, dtype, device, reporter)
    longest = _longest(prompts, tokenizer, model.config.context_length)
    capacity = min(longest + settings.decode.max_new_tokens, model.config.context_length) + BLOCK_ROOM
    calibration = partial(prepare_calibration, settings.calibration, prompts, tokenizer, checkpoint)
    with reporter.progress(f"preparing verifier={settings.verifier['name']}") as advance:
        setup = Setup(capacity, checkpoint.folder, checkpoint.identity, advance, calibration)
        verifier: Verifier = build("verifier", settings.verifier, model, setup)
    del model
    with reporter.progress(f"preparing drafter={settings.drafter['name']}") as advance:
        another = partial(_build_another, checkpoint, dtype, device, replace(setup, progress=advance), reporter)
        identity = _identity(settings, checkpoint, verifier)
        drafter.prepare(Resources(verifier, tokenizer.encode, another, calibration, identity, advance))
    if settings.decode.draft_tokens == "auto":
        cost = measure_pass_cost(verifier, tokenizer.encode_chat(WARM_UP), verifier.capacity)
        drafter = AdaptiveLength(drafter, cost)
    gc.collect()
    on_grid = None if checkpoint.folder is None else weights_on_grid(checkpoint.folder)
    return Prepared(settings, checkpoint, tokenizer, drafter, verifier, capacity, on_grid)


def check_machine(settings: RunConfig) -> None:
    """Raise RequestError if this machine cannot do what is requested. A sweep's jobs check this where they run."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if settings.threads is not None and settings.threads > available:
        raise RequestError(
            f"threads={settings.threads}: this process may use {available} CPUs, and more threads would wait for each "
            f"other; use at most {available}, or null"
        )
    try:
        chosen_levels()
    except ValueError as error:
        raise RequestError(str(error)) from None


def choose_device(name: str) -> torch.device:
    """Return the device; ``auto`` is CUDA if it is available. Raises RequestError if ``cuda`` is not available."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("device=cuda: PyTorch finds no CUDA device; use device=cpu or install a CUDA build of torch")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype; ``auto`` is BF16 on CPUs and on GPUs that support it, else FP16."""
    if name == "auto":
        bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, reporter: Reporter) -> Transformer:
    """Load the unquantized, unpruned model of a checkpoint."""
    if checkpoint.folder is None:
        return random_transformer(tiny_config(), checkpoint.seed, dtype, device)
    with reporter.progress("loading weights") as advance:
        return load_transformer(checkpoint.folder, dtype, device, advance)


def _build_another(
    checkpoint: Checkpoint,
    run_dtype: torch.dtype,
    device: torch.device,
    setup: Setup,
    reporter: Reporter,
    choice: str | dict[str, Any],
) -> LayeredVerifier:
    """Build another verifier of the run's model, given its name or its config node; ``dtype`` auto is ``run_dtype``."""
    node = node_named("verifier", choice) if isinstance(choice, str) else choice
    name = node.get("dtype", "auto")
    dtype = run_dtype if name == "auto" else choose_dtype(name, device)
    built = build("verifier", node, load_model(checkpoint, dtype, device, reporter), setup)
    assert isinstance(built, LayeredVerifier)
    return built


def _identity(settings: RunConfig, checkpoint: Checkpoint, verifier: Verifier) -> dict[str, str]:
    """Return the cache key of measurements that depend on the model, the verifier and the machine."""
    return {
        "model": checkpoint.identity,
        "verifier": json.dumps(settings.verifier, sort_keys=True),
        "dtype": str(verifier.dtype),
        "device": f"{device_name(verifier.device)}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def _longest(prompts: Iterable[Prompt], tokenizer: Tokenizer, context_length: int) -> int:
    """Return the tokens of the longest prompt, all turns together. Raises RequestError if a prompt is too long."""
    longest = 0
    for prompt in prompts:
        length = len(tokenizer.encode_chat([{"role": "user", "content": "\n".join(prompt.turns)}]))
        if length >= context_length:
            raise RequestError(
                f"{prompt.place}: question {prompt.key} has {length} tokens, but the model's context window is "
                f"{context_length}; shorten it or leave it out"
            )
        longest = max(longest, length)
    return longest
