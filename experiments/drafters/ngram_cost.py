"""Milliseconds that prompt lookup takes per step at a context of 4096 tokens, beside one pass of the verifier there.

python experiments/drafters/ngram_cost.py [--context N] [--steps N] [--model NAME]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from quasar.cli import model_source
from quasar.decoding.draft import Context, Draft
from quasar.decoding.sampling import Sampling
from quasar.drafters.ngram import NgramDrafter
from quasar.model.devices import choose_device, choose_dtype
from quasar.model.loading import load_model
from quasar.model.sources import locate
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier

VARIANTS = {
    "lookup, recent": NgramDrafter(),
    "lookup, frequent": NgramDrafter(match="frequent"),
    "lookup, 3 branches": NgramDrafter(branches=3),
    "suffix automaton": NgramDrafter(num_tokens=16, method="suffix_automaton"),
    "suffix automaton, session": NgramDrafter(num_tokens=16, method="suffix_automaton", scope="session"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of prompt lookup at a long context.")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", default="smollm2_135m")
    arguments = parser.parse_args()
    tokens = text_like_tokens(arguments.context + 3 * arguments.steps)
    verify_ms = pass_milliseconds(arguments.model, tokens[: arguments.context])
    print(f"verify_ms {verify_ms:.2f} (6 rows behind {arguments.context} tokens)")
    print("| method | reading the prompt, ms | draft_ms | of verify_ms |\n| --- | --- | --- | --- |")
    for name, drafter in VARIANTS.items():
        prompt_ms, step_ms = draft_milliseconds(drafter, tokens, arguments.context)
        print(f"| {name} | {prompt_ms:.1f} | {step_ms:.4f} | {step_ms / verify_ms:.2%} |")


def text_like_tokens(count: int) -> list[int]:
    """Token ids with the frequencies of text (Zipf) and repeated passages."""
    choose = random.Random(0)
    weights = [1 / rank for rank in range(1, 20001)]
    tokens = choose.choices(range(1, 20001), weights, k=count)
    for _ in range(count // 100):
        source, target = choose.randrange(count - 30), choose.randrange(count - 30)
        tokens[target : target + 30] = tokens[source : source + 30]
    return tokens


def draft_milliseconds(drafter: NgramDrafter, tokens: list[int], context_length: int) -> tuple[float, float]:
    """Time to begin with the prompt, and the mean time of a step that emits three tokens."""
    started = time.perf_counter()
    drafter.begin(torch.tensor(tokens[:context_length]))
    prompt_ms = (time.perf_counter() - started) * 1e3
    times = []
    for end in range(context_length + 1, len(tokens), 3):
        context = Context(tokens[:end], context_length, Sampling(), torch.Generator())
        started = time.perf_counter()
        drafter.propose(context, 16)
        times.append((time.perf_counter() - started) * 1e3)
    return prompt_ms, statistics.fmean(times)


def pass_milliseconds(model: str, tokens: list[int]) -> float:
    """Median time of a pass of six rows by the 16-bit verifier."""
    device = choose_device("auto")
    transformer = load_model(locate(model_source(model)), choose_dtype("auto", device), device)
    verifier = FP16Verifier(transformer, Setup(len(tokens) + 64))
    verifier.prefill(torch.tensor(tokens))
    times = []
    for _ in range(12):
        started = time.perf_counter()
        verifier.verify(tokens[-1], Draft.chain(tokens[:5])).logits.sum().item()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
