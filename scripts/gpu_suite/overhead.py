"""Times the part of a decoding step outside its pass: filling buffers, reading tokens, acceptance, bookkeeping."""

from __future__ import annotations

import statistics
import time

import torch

from quasar.decoding.acceptance import Greedy
from quasar.decoding.draft import Context, Draft
from quasar.decoding.loop import decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.decoding.stopwatch import DECODE_PHASES
from quasar.drafters.base import Drafter
from quasar.model.execution.cuda_graph import CudaGraphExecutor
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from scripts.gpu_suite.models import random_model
from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import Json, Recorder
from scripts.gpu_suite.timing import replay_milliseconds

DRAFT_TOKENS = 5
FORMATS = ("int8", "int4")


class FixedDrafter(Drafter):
    """Proposes the same tokens at every step, which takes no time."""

    def propose(self, context: Context, budget: int) -> Draft:
        return Draft.chain(list(range(1, 1 + min(DRAFT_TOKENS, budget))))


def measure(plan: Plan, recorder: Recorder) -> list[Json]:
    """Return for each weight format the time of a step, of its phases on the device, and outside the graph.

    The phase ``verify`` holds the host's work of filling buffers and launching the graph too.
    """
    rows: list[Json] = []
    name, config = plan.passes_model
    for weights in FORMATS:
        model = random_model(config, weights, plan.device, torch.bfloat16)
        verifier = FP16Verifier(model, Setup(capacity=plan.main_context + 512))
        prompt = list(range(1, plan.main_context))
        new_tokens = 8 if plan.tiny else 64
        limits = Limits(new_tokens, plan.main_context + 512, frozenset())
        generator = torch.Generator(plan.device)
        for _ in range(2):  # the first captures graphs
            begin = time.perf_counter()
            generation = decode(prompt, FixedDrafter(), verifier, Greedy(), Sampling(), limits, generator)
            seconds = time.perf_counter() - begin
        laps = {phase: statistics.median(times) for phase, times in generation.milliseconds.items()}
        step = sum(laps[phase] for phase in DECODE_PHASES)
        graph = _graph_milliseconds(verifier)
        rows.append(
            {
                "model": name,
                "weights": weights,
                "context": plan.main_context,
                "median_milliseconds": laps,
                "step_milliseconds": step,
                "overhead_milliseconds": laps["overhead"],
                "overhead_share": laps["overhead"] / step,
                "graph_milliseconds": graph,
                "beyond_the_graph_share": None if graph is None else (step - graph) / step,
                "wall_seconds_with_prefill": seconds,
                "steps": len(generation.emitted),
            }
        )
        recorder.keep("overhead", rows)
        del model, verifier
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _graph_milliseconds(verifier: FP16Verifier) -> float | None:
    """Return the time of a step's pass at the context length where decoding ended; None if it runs op by op."""
    executor = verifier.executor
    graph = executor.graph_of(1 + DRAFT_TOKENS) if isinstance(executor, CudaGraphExecutor) else None
    return None if graph is None else statistics.median(replay_milliseconds(graph.replay))
