"""Times the model's forward pass under ``torch.compile``, as in gpt-fast, for comparison with captured passes."""

from __future__ import annotations

import torch
from torch import Tensor

from quasar.decoding.draft import Draft
from quasar.model.transformer import Transformer
from scripts.gpu_suite.models import random_model
from scripts.gpu_suite.passes import filled_cache
from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import Json, Recorder
from scripts.gpu_suite.timing import milliseconds_per_call

ROWS = (6, 1)
"""The numbers of rows, that of the targets first, because every size is compiled separately."""
SECONDS_TO_COMPILE = 75.0


def measure(plan: Plan, recorder: Recorder) -> list[Json]:
    """Return one row per number of rows, in BF16 at the main context length."""
    name, config = plan.passes_model
    model = random_model(config, "bf16", plan.device, torch.bfloat16)
    rows: list[Json] = []
    for count in ROWS:
        facts = {"model": name, "weights": "bf16", "rows": count, "context": plan.main_context}
        if recorder.seconds_left() < SECONDS_TO_COMPILE:
            rows.append(facts | {"skipped": "time"})
            continue
        milliseconds, checksum = _measure(model, count, plan)
        rows.append(facts | {"milliseconds": milliseconds, "checksum": checksum})
        recorder.keep("compiled", rows)
    return rows


@torch.inference_mode()
def _measure(model: Transformer, rows: int, plan: Plan) -> tuple[float, float]:
    """Return the time of a pass and the sum of its logits' magnitudes, which captured passes give up to rounding."""
    cache = filled_cache(model, plan)
    cache.length = plan.main_context
    chain = Draft.chain(list(range(1, rows)))
    tokens, offsets, mask = (
        part.to(plan.device) for part in (chain.row_tokens(0), chain.offsets(), chain.block_mask())
    )

    def step() -> Tensor:
        return model(tokens, cache, offsets=offsets, block_mask=mask)

    torch.compiler.reset()
    compiled = torch.compile(step, dynamic=False)
    checksum = float(compiled().double().abs().sum())
    return milliseconds_per_call([compiled], plan.device), checksum
