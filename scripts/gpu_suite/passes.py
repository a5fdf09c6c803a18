"""Times whole verification passes of a randomly initialized model as CUDA graphs."""

from __future__ import annotations

import gc
import statistics

import torch

from quasar.decoding.draft import Draft
from quasar.model.execution.cuda_graph import CudaGraphExecutor, bucket_for
from quasar.model.kv_cache import KVCache
from quasar.model.transformer import Transformer
from quasar.verifiers.transformer import weight_bytes
from scripts.gpu_suite.models import FORMATS, random_model
from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import Json, Recorder
from scripts.gpu_suite.timing import milliseconds_per_call, replay_milliseconds


def measure(plan: Plan, recorder: Recorder) -> list[Json]:
    """Return one row per weight format, number of rows and context length."""
    rows: list[Json] = []
    for weights in FORMATS:
        name, config = plan.passes_model
        try:
            model = random_model(config, weights, plan.device, torch.bfloat16)
            rows += _measure(plan, name, weights, model)
            del model
        except Exception as error:
            rows.append({"model": name, "weights": weights, "error": f"{type(error).__name__}: {str(error)[:500]}"})
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
        recorder.keep("passes", rows)
    return rows


def filled_cache(model: Transformer, plan: Plan) -> KVCache:
    """Return a cache with random keys and values in every slot, the same in every section."""
    torch.manual_seed(0)
    cache = KVCache(model.config, max(plan.contexts) + bucket_for(max(plan.rows)), model.dtype, model.device)
    for stored in (*cache.keys, *cache.values):
        stored.normal_()
    return cache


@torch.inference_mode()
def _measure(plan: Plan, name: str, weights: str, model: Transformer) -> list[Json]:
    cache = filled_cache(model, plan)
    executor = CudaGraphExecutor(model, cache)
    rows = []
    for count in plan.rows:
        chain = Draft.chain(list(range(1, count)))
        arguments = chain.row_tokens(0), chain.offsets(), chain.block_mask()
        for context in plan.contexts:
            cache.length = context
            logits = executor(*arguments)
            graph = executor.graph_of(count)
            if graph is not None:
                milliseconds = statistics.median(replay_milliseconds(graph.replay))
            else:
                milliseconds = milliseconds_per_call([lambda a=arguments: executor(*a)], torch.device("cpu"))  # type: ignore[misc]
            cost = weight_bytes(model) + cache.bytes_per_token * context
            rows.append(
                {
                    "model": name,
                    "weights": weights,
                    "rows": count,
                    "context": context,
                    "milliseconds": milliseconds,
                    "bytes": cost,
                    "bytes_per_second": cost / (milliseconds / 1e3),
                    "graph": graph is not None,
                    "checksum": float(logits.double().abs().sum()),
                    "finite": bool(logits.isfinite().all()),
                }
            )
    return rows
