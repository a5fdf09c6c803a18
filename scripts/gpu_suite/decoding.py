"""Decodes with SmolLM2, autoregressively and with prompt lookup, with this program and with transformers."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from quasar.decoding.acceptance import Greedy
from quasar.decoding.draft import Context, Draft
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.decoding.stopwatch import DECODE_PHASES
from quasar.drafters.base import Drafter
from quasar.drafters.none import NoneDrafter
from quasar.model.loading import load_transformer
from quasar.model.transformer import Transformer
from quasar.quantization.recipes import Int4Format, Int8Format, quantize_w4, rtn_w8
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from scripts.gpu_suite.plan import SMALL_GROUP_SIZE, Plan
from scripts.gpu_suite.record import Json, Recorder

NEW_TOKENS = 128
NUM_TOKENS = 5
LONGEST_NGRAM = 3
PROMPTS = (
    "Repeat this sentence three times: the quick brown fox jumps over the lazy dog.",
    "Write a Python function that adds two numbers, and one that multiplies two numbers.",
    "Summarize: A bank is a place that keeps money. People put money into a bank. A bank lends money to people.",
    "Count from one to thirty in words.",
)


class PromptLookup(Drafter):
    """The drafter `quasar.drafters.ngram` with a linear search, which needs no pydantic."""

    def propose(self, context: Context, budget: int) -> Draft:
        tokens = context.tokens
        for size in range(LONGEST_NGRAM, 0, -1):
            suffix = tokens[-size:]
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == suffix:
                    return Draft.chain(tokens[start + size : start + size + min(NUM_TOKENS, budget)])
        return Draft()


def measure(plan: Plan, recorder: Recorder) -> Json:
    """Decode in every weight format. Nothing is measured if no checkpoint was given."""
    if plan.smollm2 is None:
        return {"skipped": "no --smollm2 FOLDER"}
    rows: list[Json] = []
    for weights in ("bf16", "int8", "int4"):
        try:
            rows += _own(plan, plan.smollm2, weights)
        except Exception as error:
            rows.append({"weights": weights, "error": f"{type(error).__name__}: {str(error)[:500]}"})
        recorder.keep("decoding", {"rows": rows})
    try:
        rows += _transformers(plan, plan.smollm2)
    except Exception as error:
        rows.append({"program": "transformers", "error": f"{type(error).__name__}: {str(error)[:500]}"})
    return {"rows": rows}


def _own(plan: Plan, folder: Path, weights: str) -> list[Json]:
    model = load_transformer(folder, torch.bfloat16, plan.device)
    _quantize(model, weights)
    verifier = FP16Verifier(model, Setup())
    prompts = _prompts(folder)
    rows, outputs = [], {}
    drafters: tuple[tuple[str, Drafter], ...] = (("none", NoneDrafter()), ("prompt lookup", PromptLookup()))
    for name, drafter in drafters:
        _generate(prompts[0], drafter, verifier, 8)
        new_tokens = 8 if plan.tiny else NEW_TOKENS
        generations = [
            _generate(prompt, drafter, verifier, new_tokens) for prompt in prompts[: 1 if plan.tiny else None]
        ]
        outputs[name] = [generation.tokens for generation in generations]
        milliseconds = sum(
            sum(generation.milliseconds.get(phase, [])) for generation in generations for phase in DECODE_PHASES
        )
        emitted = sum(sum(generation.emitted) for generation in generations)
        steps = sum(len(generation.emitted) for generation in generations)
        rows.append(
            {
                "program": "quasar",
                "weights": weights,
                "drafter": name,
                "tokens_per_second": emitted / milliseconds * 1e3,
                "acceptance_length": emitted / steps,
                "step_milliseconds": milliseconds / steps,
            }
        )
    rows[-1]["same_tokens_as_without_drafting"] = outputs["none"] == outputs["prompt lookup"]
    return rows


def _quantize(model: Transformer, weights: str) -> None:
    if weights == "int8":
        rtn_w8(model, Int8Format(), lambda done, total: None)
    elif weights == "int4":
        quantize_w4(model, Int4Format(SMALL_GROUP_SIZE, True, 16, model.dtype), False, lambda done, total: None)


def _generate(prompt: list[int], drafter: Drafter, verifier: FP16Verifier, new_tokens: int) -> Generation:
    limits = Limits(new_tokens, 2048, frozenset())
    generator = torch.Generator(verifier.device)
    return decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, generator)


def _prompts(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


def _transformers(plan: Plan, folder: Path) -> list[Json]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(plan.device).eval()
    rows = []
    for name, options in (("none", {}), ("prompt lookup", {"prompt_lookup_num_tokens": NUM_TOKENS})):
        new_tokens = 8 if plan.tiny else NEW_TOKENS
        seconds, tokens = 0.0, 0
        for index, prompt in enumerate([_prompts(folder)[0], *_prompts(folder)]):
            ids = torch.tensor([prompt], device=plan.device)
            begin = time.perf_counter()
            out = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **options)
            if plan.device.type == "cuda":
                torch.cuda.synchronize()
            if index > 0:  # the first call is a warm-up
                seconds, tokens = seconds + time.perf_counter() - begin, tokens + out.shape[1] - len(prompt)
        rows.append(
            {
                "program": "transformers",
                "weights": "bf16",
                "drafter": name,
                "tokens_per_second_with_prefill": tokens / seconds,
            }
        )
    return rows
