"""Drafts with speculative decoding: a cheap copy of the model decodes blocks that the run's verifier checks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PositiveInt, validate_call
from torch import Tensor

from quasar.config.build import build, chosen_node
from quasar.decoding.draft import MAX_ROWS, Context, Draft, StepResult
from quasar.drafters._block_choice import LEAST_EVIDENCE, BlockChoice, Start, Times, unknown_agreement
from quasar.drafters._inner_level import InnerLevel, is_hit
from quasar.drafters._pass_cost import PassCost
from quasar.drafters.base import Drafter, FinishedSequence, Resources
from quasar.errors import RequestError
from quasar.verifiers.base import LayeredVerifier

LONGEST_BLOCK = 32
"""Longest block that ``block=auto`` chooses."""
DIRECT, BLOCK = "direct", "block"
"""Values of the note ``level``: whether the inner verifier took part in a step."""

Choice = str | dict[str, Any]


def _known(group: str, key: str, choice: Choice) -> Choice:
    chosen_node(group, choice, f"drafter.{key}")
    return choice


class CascadeDrafter(Drafter):
    """Speculative decoding in several levels (hierarchical speculative decoding, arXiv 2510.19705).

    The inner level consists of a cheap copy of the run's model, such as its INT8 version, and of a drafter. It decodes
    a block of tokens by speculative decoding, and the block is the draft for the run's verifier. With the unquantized
    model as the verifier, the output is the reference's own, and its pass is paid once per block:

        inner drafter  --drafts-->  inner verifier  --blocks-->  the run's verifier

    Every level is exact with respect to its own verifier (see `InnerLevel.block`), so the run's acceptance rule decides
    on a block as on any draft. With ``decode.acceptance=typical`` the run's verifier is lossy and the inner level is
    still exact. After a step the inner level forgets the tokens that the run's verifier rejected: the inner verifier's
    cache and the inner drafter contain what stands.

    Example: the block a b c d was decoded in two passes of the INT8 model, of which the first accepted a draft of two
    tokens, a b, and added c. The reference accepts a b c and emits x instead of d. The INT8 model's cache is rolled
    back to c, and its next pass reads x.

    The copy uses the tensors of the run's verifier for the layers that both have in common, such as embedding and head,
    and has its own KV cache.

    inner: name of the inner verifier in conf/verifier, or a node such as ``{name: int8, lm_head_bits: 8}`` that
        replaces values of this file; it is always made from the run's model
    inner_drafter: name of the inner drafter in conf/drafter, or such a node. It may be a cascade as well
    block: number of tokens after which a block ends. The inner pass that reaches it is not cut, so a block may have a
        few more tokens, but never more than the draft budget (``decode.draft_tokens``). auto chooses this number for
        every step, or lets the run's verifier check the inner drafter's drafts directly, whichever is expected to be
        faster (see `BlockChoice`). Because the choice depends on measured times, two runs that sample may then draw
        different texts; greedy output does not depend on it
    """

    @validate_call
    def __init__(
        self,
        inner: Annotated[Choice, AfterValidator(partial(_known, "verifier", "inner"))] = "int8",
        inner_drafter: Annotated[Choice, AfterValidator(partial(_known, "drafter", "inner_drafter"))] = "ngram",
        block: PositiveInt | Literal["auto"] = "auto",
    ) -> None:
        self.node = chosen_node("verifier", inner, "drafter.inner")
        self.drafter: Drafter = build("drafter", chosen_node("drafter", inner_drafter, "drafter.inner_drafter"))
        if self.drafter.rule is not None:
            raise RequestError(
                f"drafter.inner_drafter={inner_drafter}: it decides itself what is accepted, which is a simulation; "
                "choose another drafter"
            )
        self.block = block
        self._level: InnerLevel | None = None
        self._choice: BlockChoice | None = None
        self._clock: Callable[[], float] = time.perf_counter
        self._agreement = unknown_agreement()
        self._length, self._size = 0, 0
        self._start, self._began, self._drafted = Start(0, 1, False), 0.0, 0.0
        self._notes: dict[str, list[int | float | str]] = {}
        self._totals = _Totals()
        # The inner verifier reads its weights once per step of its own, not per token.
        self.weight_bytes = None

    @property
    def chooses_size(self) -> bool:
        return True

    def prepare(self, resources: Resources) -> None:
        """Build the inner verifier, prepare the inner drafter for it, and time the passes of both verifiers."""
        outer = resources.verifier
        inner = resources.build_verifier(self.node)
        saved = inner.share_weights(outer)
        identity = {**resources.identity, "verifier": json.dumps(self.node, sort_keys=True), "dtype": str(inner.dtype)}
        within = replace(resources, verifier=inner, identity=identity)
        self.drafter.prepare(within)
        costs = (resources.pass_cost, within.pass_cost) if self.block == "auto" else None
        self.use(inner, costs)
        weights, cache = inner.cost.weight_bytes, inner.capacity * inner.cost.kv_bytes_per_token
        self.details = (
            f"inner verifier of {weights / 1e6:.0f} MB per pass, which shares {saved / 1e6:.0f} MB of its weights with "
            f"the run's verifier and has a KV cache of {cache / 1e6:.0f} MB",
            *(f"inner verifier: {detail}" for detail in inner.details),
            *(f"inner drafter: {detail}" for detail in self.drafter.details),
        )

    def use(
        self,
        verifier: LayeredVerifier,
        costs: tuple[PassCost, PassCost] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Decode blocks with this verifier from now on, and with the inner drafter, which is ready for it.

        costs: those of the passes of the run's verifier and of this one; needed for ``block=auto``
        clock: returns seconds since any fixed time
        """
        self._level, self._clock = InnerLevel(verifier, self.drafter), clock
        self._choice = None if costs is None else BlockChoice(*costs, self._agreement)

    def start(self, finished: Iterable[FinishedSequence]) -> None:
        self.drafter.start(finished)

    def begin(self, prompt: Tensor) -> None:
        # A drafter that learns from finished sequences knows them up to its last draft for the run's verifier.
        self.drafter.rewind(self._length)
        self._notes, self._totals = {}, _Totals()
        self._inner_level.begin(prompt)

    def propose(self, context: Context, budget: int) -> Draft:
        level = self._inner_level
        self._length = len(context.tokens)
        self._start = Start(self._length - 1, level.unread(context), level.hit)
        self._began = self._clock()
        longest = min(budget, MAX_ROWS - 1)
        size = self._size = self._chosen_size(longest)
        draft = level.block(context, size, longest) if size else level.draft(context, budget)
        self._drafted = self._clock()
        return draft

    def observe(self, step: StepResult) -> None:
        level, choice = self._inner_level, self._choice
        now = self._clock()
        times = Times(step.draft.rows, (self._drafted - self._began) * 1e3, (now - self._drafted) * 1e3)
        accepted = len(step.path)
        if self._size:
            rejected = accepted < len(step.draft) and not step.cut
            self._agreement.add(accepted, accepted + rejected)
            self._totals.add(len(step.draft), level.passes, accepted, accepted + rejected)
            level.hit = level.hit and not rejected
            level.rewind(self._length + accepted)
            if choice is not None:
                choice.add_block(self._start, times)
        else:
            self._agreement.forget(LEAST_EVIDENCE)
            level.hit = is_hit(step.draft, step.path)
            self.drafter.observe(step)
            if choice is not None:
                choice.add_direct(self._start, times, len(step.emitted))
        self._note(len(step.draft) if self._size else 0, level.passes if self._size else 0)

    def rewind(self, length: int) -> None:
        self._length = min(self._length, length)
        self._inner_level.rewind(length)

    def notes(self) -> dict[str, list[int | float | str]]:
        """Return for every step:

        level: "block" if the inner level decoded the draft, or "direct" if the inner drafter made it
        chosen_block: with ``block=auto``, the number of tokens that the block was to have, 0 for a direct step
        block: tokens that the inner level decoded
        inner_passes: passes of the inner verifier in which it did so
        inner_acceptance_length: tokens per inner pass in this sequence so far, the τ of the inner level
        agreement: of the blocks' tokens in this sequence that the run's verifier has decided on, the share that it
            accepted. Both are 1 before the first block
        """
        return self._notes

    @property
    def _inner_level(self) -> InnerLevel:
        if self._level is None:
            raise RuntimeError("CascadeDrafter: there is no inner verifier yet; call prepare or use first")
        return self._level

    def _chosen_size(self, longest: int) -> int:
        """Return after how many tokens the next block ends; 0 for a direct step."""
        if isinstance(self.block, int):
            return min(self.block, longest)
        if self._choice is None:
            raise RuntimeError("CascadeDrafter: block=auto needs the costs of passes")
        return self._choice.choose(min(longest, LONGEST_BLOCK), self._start)

    def _note(self, block: int, passes: int) -> None:
        values: dict[str, int | float | str] = {
            "level": BLOCK if block else DIRECT,
            **({} if self._choice is None else {"chosen_block": self._size}),
            "block": block,
            "inner_passes": passes,
            "inner_acceptance_length": round(self._totals.acceptance_length, 4),
            "agreement": round(self._totals.agreement, 4),
        }
        for name, value in values.items():
            self._notes.setdefault(name, []).append(value)


class _Totals:
    """Counts of the blocks of a sequence."""

    def __init__(self) -> None:
        self._tokens = self._passes = self._accepted = self._decided = 0

    def add(self, tokens: int, passes: int, accepted: int, decided: int) -> None:
        """Add a block. decided: tokens that the outer verifier accepted or rejected."""
        self._tokens += tokens
        self._passes += passes
        self._accepted += accepted
        self._decided += decided

    @property
    def acceptance_length(self) -> float:
        return self._tokens / self._passes if self._passes else 1.0

    @property
    def agreement(self) -> float:
        return self._accepted / self._decided if self._decided else 1.0
