"""The decode loop: draft, verify, accept, until the sequence ends. It depends on no concrete drafter or verifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quasar.decoding.acceptance import AcceptanceRule
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.decoding.sampling import Sampling
from quasar.decoding.seams import Drafting, Verifying
from quasar.decoding.stopping import Limits
from quasar.decoding.stopwatch import Stopwatch


@dataclass
class Generation:
    """The result of decoding one prompt.

    Step s proposed ``drafted[s]`` tokens in a tree of depth ``depth[s]``, and ``accepted[s]`` of them were accepted. It
    emitted ``emitted[s]`` tokens, and its verification pass read ``context[s]`` cached tokens. Every step emits its
    accepted tokens and one more: ``emitted[s] = accepted[s] + 1``, also where a stop criterion cuts the accepted path.

    tokens: the generated tokens; the first one comes from the prefill and belongs to no step
    milliseconds: duration of every lap by phase: prefill, draft, verify, overhead, observe
    """

    tokens: list[int]
    prompt_length: int
    finish_reason: str
    drafted: list[int]
    depth: list[int]
    accepted: list[int]
    emitted: list[int]
    context: list[int]
    milliseconds: dict[str, list[float]]


def decode(
    prompt: Sequence[int],
    drafter: Drafting,
    verifier: Verifying,
    rule: AcceptanceRule,
    sampling: Sampling,
    limits: Limits,
    generator: torch.Generator,
    on_step: Callable[[StepResult], None] | None = None,
) -> Generation:
    """Generate from a prompt of token ids.

    With an exact rule, the drafter and the draft length affect the speed and the random numbers drawn, but not the
    distribution of the output. In greedy decoding and with coupled sampling they do not affect the output at all.

    Raises QuasarError if a logit is NaN or infinite.

    on_step: called after every step, outside the timed phases
    """
    result = Generation([], len(prompt), "", [], [], [], [], [], {})
    clock = Stopwatch(verifier.device)
    tokens = torch.tensor(prompt, dtype=torch.int64)
    context = Context(list(prompt), len(prompt), sampling, generator)
    context.tokens.append(rule.accept(Draft(), verifier.prefill(tokens), context).bonus)
    drafter.begin(tokens)
    clock.lap("prefill")

    while (finish_reason := limits.finished(context)) is None:
        draft = drafter.propose(context, limits.budget(context))
        clock.lap("draft")
        scores = verifier.verify(context.last, draft)
        clock.lap("verify")
        accepted = rule.accept(draft, scores, context)
        scores.require_finite()
        emitted = limits.cut(context, [draft.tokens[node] for node in accepted.path] + [accepted.bonus])
        # A draft token behind the end of the output is not accepted, and the last token of a step is its bonus token.
        path = accepted.path[: len(emitted) - 1]
        verifier.keep(path)
        step = StepResult(draft, emitted, path, scores.logits, scores.scratch, len(path) < len(accepted.path))
        result.context.append(len(context.tokens) - 1)
        context.tokens += emitted
        result.drafted.append(len(draft))
        result.depth.append(max(draft.depths(), default=0))
        result.accepted.append(len(path))
        result.emitted.append(len(emitted))
        clock.lap("overhead")
        drafter.observe(step)
        clock.lap("observe")
        if on_step is not None:
            on_step(step)

    result.tokens, result.finish_reason = context.tokens[len(prompt) :], finish_reason
    result.milliseconds = clock.milliseconds()
    return result
