"""Whole verification steps of SmolLM2-135M on this machine: ``python experiments/kernels/steps.py``.

Every verifier in turn, call by call, beside transformers' BF16 model; medians, and the time of torch's BF16 linear in
the same run, so that figures of different days can be compared.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from quasar.cli import model_source
from quasar.decoding.draft import Draft
from quasar.model.execution.cpu_tape import CpuTapeExecutor
from quasar.model.loading import load_transformer
from quasar.model.sources import locate
from quasar.results.environment import copy_bandwidth, device_name
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.int4 import Int4Verifier
from quasar.verifiers.int8 import Int8Verifier
from quasar.verifiers.transformer import TransformerVerifier

HERE = Path(__file__).parent
CONTEXT = 512
BLOCKS = (1, 2, 4, 6, 8, 16, 32)
OVERHEAD_ROWS = 8
REPETITIONS = 40
Step = Callable[[], object]


def main() -> None:
    checkpoint = locate(model_source("smollm2_135m"))
    assert checkpoint.folder is not None
    verifiers: dict[str, Callable[..., TransformerVerifier]] = {
        "fp16": FP16Verifier,
        "int8": lambda model, setup: Int8Verifier(model, setup, method="rtn"),
        "int8, 8-bit head": lambda model, setup: Int8Verifier(model, setup, method="rtn", lm_head_bits=8),
        "int4": lambda model, setup: Int4Verifier(model, setup, method="rtn", clip=False),
        "int4, int8 inputs": lambda model, setup: Int4Verifier(
            model, setup, method="rtn", clip=False, activation_bits=8
        ),
        "int4, int8 inputs, 8-bit head": lambda model, setup: Int4Verifier(
            model, setup, method="rtn", clip=False, activation_bits=8, lm_head_bits=8
        ),
    }
    setup = Setup(CONTEXT + 64)
    built = {name: make(load_transformer(checkpoint.folder, torch.bfloat16), setup) for name, make in verifiers.items()}
    prompt = torch.randint(0, 40000, (CONTEXT,), generator=torch.Generator().manual_seed(0))
    for verifier in built.values():
        verifier.prefill(prompt)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        cache = theirs(prompt.unsqueeze(0), use_cache=True).past_key_values

    results: dict[str, dict[int, float]] = {}
    for rows in BLOCKS:
        tokens = prompt[:rows].tolist()
        steps: dict[str, Step] = {name: our_step(verifier, tokens) for name, verifier in built.items()}
        steps["transformers"] = their_step(theirs, cache, tokens)
        for name, milliseconds in medians(steps).items():
            results.setdefault(name, {})[rows] = milliseconds
    overhead = {name: overhead_ms(verifier, prompt[:OVERHEAD_ROWS].tolist()) for name, verifier in built.items()}
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16)
    x = torch.randn(8, 4096, dtype=torch.bfloat16)
    linear = medians({"linear": lambda: F.linear(x, weight)})["linear"]
    report = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "context": CONTEXT,
        "copy_bandwidth_bytes_per_second": copy_bandwidth(torch.device("cpu")),
        "torch_bf16_linear_4096x4096_8_rows_ms": linear,
        "step_ms": results,
        f"overhead_ms_{OVERHEAD_ROWS}_tokens": overhead,
        "weight_bytes": {name: verifier.cost.weight_bytes for name, verifier in built.items()},
    }
    (HERE / "steps.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console = Console(record=True, width=110)
    console.print(f"{report['device']}, {report['threads']} threads; context {CONTEXT}; milliseconds per step")
    table = Table("verifier", *[f"{rows} tokens" for rows in BLOCKS])
    for name, by_rows in results.items():
        table.add_row(name, *[f"{by_rows[rows]:.1f}" for rows in BLOCKS])
    console.print(table)
    shares = [f"{name} {ms:.2f} ms" for name, ms in overhead.items() if ms is not None]
    console.print(f"of {OVERHEAD_ROWS} tokens, outside of the kernels: {'; '.join(shares)}")
    console.print(f"torch's BF16 linear, 4096 x 4096, 8 rows: {linear:.2f} ms")
    (HERE / "steps.txt").write_text(console.export_text(), encoding="utf-8")


def our_step(verifier: TransformerVerifier, tokens: list[int]) -> Step:
    draft = Draft.chain(tokens[1:])

    def step() -> None:
        verifier.verify(tokens[0], draft)
        # The cache stays as it is: the next step writes over what this one left.

    return step


def overhead_ms(verifier: TransformerVerifier, tokens: list[int]) -> float | None:
    """What a step takes beyond its kernels; None where these are not recorded."""
    executor = verifier.executor
    if not isinstance(executor, CpuTapeExecutor):
        return None
    steps: dict[str, Step] = {"step": our_step(verifier, tokens), "kernels": lambda: executor.run_kernels(len(tokens))}
    found = medians(steps)
    return found["step"] - found["kernels"]


def their_step(model: torch.nn.Module, cache: object, tokens: list[int]) -> Step:
    block = torch.tensor([tokens])

    @torch.inference_mode()
    def step() -> None:
        model(block, past_key_values=cache, use_cache=True)
        cache.crop(-len(tokens))  # type: ignore[attr-defined]

    return step


def medians(steps: dict[str, Step]) -> dict[str, float]:
    """Milliseconds of every step, the steps taking turns."""
    laps: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(REPETITIONS + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repetition >= 3:
                laps[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in laps.items()}


if __name__ == "__main__":
    main()
