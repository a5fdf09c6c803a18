"""Times every matmul of the three models in every form. Copies of a weight rotate, so that it is read from memory."""

from __future__ import annotations

from functools import partial

import torch

from scripts.gpu_suite.contenders import Build, Contender, builders
from scripts.gpu_suite.plan import Plan, Product
from scripts.gpu_suite.record import Json, Recorder
from scripts.gpu_suite.timing import milliseconds_per_call

ROTATED_BYTES = 192 << 20
"""Bytes that one replay reads. The L2 cache of an H100 has 50 MB."""
MOST_COPIES = 256
FEWEST_CALLS = 8
SHARE_FOR_PASSES = 0.4
"""Share of the suite's time that must be left when the benchmark ends."""


def measure(plan: Plan, recorder: Recorder) -> list[Json]:
    """Return one row per matmul, contender and number of rows. The largest model is first, because time may run out."""
    rows: list[Json] = []
    for product in reversed(plan.products):
        for name, build in builders(product, plan.device):
            if recorder.seconds_left() < SHARE_FOR_PASSES * recorder.seconds:
                rows.append({"skipped": f"{product.model} {product.layer} {name}", "reason": "time"})
                continue
            try:
                rows += _measure(plan, product, build)
            except Exception as error:  # a peer that cannot run this shape
                rows.append(_facts(product, name) | {"error": f"{type(error).__name__}: {str(error)[:300]}"})
        recorder.keep("products", rows)
    return rows


def _measure(plan: Plan, product: Product, build: Build) -> list[Json]:
    copies = _copies(plan, build())
    contenders = [build() for _ in range(copies)]
    rows = []
    for count in plan.rows:
        x = torch.randn(count, product.inputs, device=plan.device).bfloat16()
        contenders[0].run(x)
        calls = [partial(contender.run, x) for contender in contenders]
        while len(calls) < (1 if plan.tiny else FEWEST_CALLS):
            calls += calls
        milliseconds = milliseconds_per_call(calls, plan.device)
        first = contenders[0]
        rows.append(
            _facts(product, first.name)
            | {
                "rows": count,
                "microseconds": milliseconds * 1e3,
                "weight_bytes": first.nbytes,
                "bytes_per_second": first.nbytes / (milliseconds / 1e3),
                "rotated_bytes": first.nbytes * len(contenders),
            }
        )
    return rows


def _copies(plan: Plan, contender: Contender) -> int:
    return 1 if plan.tiny else min(MOST_COPIES, max(2, -(-ROTATED_BYTES // contender.nbytes)))


def _facts(product: Product, contender: str) -> Json:
    return {
        "model": product.model,
        "layer": product.layer,
        "outputs": product.outputs,
        "inputs": product.inputs,
        "group_size": product.group_size,
        "contender": contender,
    }
