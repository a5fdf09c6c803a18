"""Fixed draft lengths against ``decode.draft_tokens=auto``, per task family; prints the tables of README.md.

python experiments/drafters/lengths.py PROMPTS [--limit N] [--tokens N] [--repetitions N] [--only TEXT]

FP16 verifier, greedy. All lengths and autoregressive decoding take turns, prompt by prompt and in a new order each
time, so that a change in the machine's speed meets all of them alike.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.progress import track

from quasar.config.build import build
from quasar.config.schema import CONF, check, register
from quasar.console import Reporter
from quasar.decoding.acceptance import Greedy
from quasar.decoding.loop import decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.decoding.stopwatch import DECODE_PHASES
from quasar.drafters._adaptive_length import AdaptiveLength, measure_pass_cost
from quasar.drafters.base import Drafter
from quasar.drafters.none import NoneDrafter
from quasar.evaluation.prompts import Prompt, load_prompts
from quasar.experiment.build import Prepared, prepare

DRAFTERS = {
    "ngram": "drafter=ngram drafter.num_tokens=12",
    "layerskip": "drafter=layerskip drafter.num_tokens=8",
    "model: INT4": "drafter=model verifier@drafter.draft=int4 drafter.num_tokens=8",
}
AUTOREGRESSIVE, AUTO = "0", "auto"
FIXED = ("1", "2", "3", "5", "8", "12")

RESAMPLES = 5000
"""Of the bootstrap; the ends of its interval then move by some 0.002 from one seed to another."""

Rates = dict[str, dict[int, list[float]]]
"""Milliseconds per token by length and by index of the prompt, one for each repetition."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Fixed draft lengths against auto.")
    parser.add_argument("prompts", type=Path, help="file or folder of Spec-Bench JSONL")
    parser.add_argument("--limit", type=int, default=4, help="prompts per task family")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default="", help="drafters whose name holds this text")
    arguments = parser.parse_args()
    for name, settings in DRAFTERS.items():
        if arguments.only in name:
            overrides = [
                f"data.path={arguments.prompts.resolve()}",
                f"data.limit={arguments.limit}",
                f"decode.max_new_tokens={arguments.tokens}",
                *settings.split(),
            ]
            prompts, rates = measured(overrides, arguments.repetitions)
            print(f"\n### Length of {name}: speed over AR of the same run, per task family, greedy\n")
            print("\n".join(table(prompts, rates)), flush=True)


def measured(overrides: list[str], repetitions: int) -> tuple[list[Prompt], Rates]:
    """Decode the first turn of every prompt at every length, ``repetitions`` times over."""
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        settings = check(compose("config", ["verifier=fp16", "data=specbench", "decode=greedy", *overrides]))
    prompts = load_prompts(settings.data)
    drafter: Drafter = build("drafter", settings.drafter)
    parts = prepare(settings, prompts, drafter, Reporter())
    encoded = [parts.tokenizer.encode_chat([{"role": "user", "content": prompt.turns[0]}]) for prompt in prompts]
    for chosen in (NoneDrafter(), drafter):
        milliseconds_per_token(parts, chosen, None, encoded[0])
    cost = measure_pass_cost(parts.verifier, encoded[0], parts.verifier.capacity)

    choose = random.Random(0)
    lengths = [AUTOREGRESSIVE, *FIXED, AUTO]
    rates: Rates = {length: {index: [] for index in range(len(prompts))} for length in lengths}
    for repetition in range(repetitions):
        # What it learns carries over from prompt to prompt, as in a run, and not from one repetition to the next.
        adaptive = AdaptiveLength(drafter, cost)
        for index, tokens in enumerate(track(encoded, f"repetition {repetition + 1}", transient=True)):
            for length in choose.sample(lengths, len(lengths)):
                rates[length][index].append(rate_at(parts, length, adaptive, tokens))
    return prompts, rates


def rate_at(parts: Prepared, length: str, adaptive: AdaptiveLength, tokens: list[int]) -> float:
    if length == AUTOREGRESSIVE:
        return milliseconds_per_token(parts, NoneDrafter(), None, tokens)
    if length == AUTO:
        return milliseconds_per_token(parts, adaptive, None, tokens)
    return milliseconds_per_token(parts, adaptive.drafter, int(length), tokens)


def milliseconds_per_token(parts: Prepared, drafter: Drafter, length: int | None, tokens: list[int]) -> float:
    """Of the decoding alone, without the prefill and its token."""
    limits = Limits(
        parts.settings.decode.max_new_tokens,
        parts.verifier.model.config.context_length,
        parts.tokenizer.stop_tokens,
        length,
    )
    found = decode(tokens, drafter, parts.verifier, Greedy(), Sampling(), limits, torch.Generator())
    return sum(sum(found.milliseconds[phase]) for phase in DECODE_PHASES) / max(1, sum(found.emitted))


def table(prompts: list[Prompt], rates: Rates) -> Iterator[str]:
    """A row per length, a column per family; the last rows compare `auto` with the best fixed length.

    The length that was fastest in some measurements is partly the one that was luckiest in them. "Held out" chooses it
    in all repetitions but one and compares on that one.
    """
    families = {family: members(prompts, family) for family in dict.fromkeys(prompt.family for prompt in prompts)}
    families["all"] = list(range(len(prompts)))
    yield row("length", *families)
    yield row(*["---"] * (1 + len(families)))
    for length in (*FIXED, AUTO):
        yield row(length, *(f"{speedup(rates, length, indices):.2f}x" for indices in families.values()))
    ratios, spreads = [], []
    for indices in families.values():
        best = max(FIXED, key=lambda length: speedup(rates, length, indices))
        ratios.append(f"{speedup(rates, AUTO, indices) / speedup(rates, best, indices):.2f}")
        repeated = [total(rates, best, indices, turn) / total(rates, AUTO, indices, turn) for turn in turns(rates)]
        spreads.append(f"{min(repeated):.2f} to {max(repeated):.2f}")
    yield row("auto / best fixed", *ratios)
    yield row("in single repetitions", *spreads)
    if len(turns(rates)) > 1:
        compared = [held_out(rates, indices) for indices in families.values()]
        yield row("auto / best fixed, held out", *(f"{ratio:.2f}" for ratio, _, _ in compared))
        yield row("95 % interval", *(f"{low:.2f} to {high:.2f}" for _, low, high in compared))


def held_out(rates: Rates, indices: list[int]) -> tuple[float, float, float]:
    """Speed of `auto` over that of the length which was the best in the other repetitions, and its 95 % interval.

    A percentile bootstrap that draws prompts and repetitions anew, each with replacement: neither the times of a prompt
    nor those of a repetition are independent (Owen 2007, the pigeonhole bootstrap). The choice of the length is part
    of what is compared, and not drawn anew.
    """
    fixed = np.array([[rates[best][index][turn] for index in indices] for turn, best in best_elsewhere(rates, indices)])
    auto = np.array([[rates[AUTO][index][turn] for index in indices] for turn in turns(rates)])
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = np.ix_(*(generator.integers(size, size=size) for size in auto.shape))
        ratios.append(fixed[drawn].sum() / auto[drawn].sum())
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(fixed.sum() / auto.sum()), float(low), float(high)


def best_elsewhere(rates: Rates, indices: list[int]) -> Iterator[tuple[int, str]]:
    """Every repetition with the fixed length that was the fastest in the others together."""
    for turn in turns(rates):
        others = [other for other in turns(rates) if other != turn]
        yield turn, min(FIXED, key=lambda length: sum(total(rates, length, indices, other) for other in others))


def members(prompts: list[Prompt], family: str) -> list[int]:
    return [index for index, prompt in enumerate(prompts) if prompt.family == family]


def speedup(rates: Rates, length: str, indices: list[int]) -> float:
    """Over autoregressive decoding: of milliseconds per token, medians over the repetitions, summed over prompts."""
    own, base = (sum(statistics.median(rates[one][index]) for index in indices) for one in (length, AUTOREGRESSIVE))
    return base / own


def total(rates: Rates, length: str, indices: list[int], turn: int) -> float:
    return sum(rates[length][index][turn] for index in indices)


def turns(rates: Rates) -> range:
    return range(len(rates[AUTO][0]))


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
