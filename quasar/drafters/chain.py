"""Combines several drafters: the first one that offers a draft is used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, validate_call
from torch import Tensor

from quasar.config.build import build, chosen_node
from quasar.decoding.acceptance import AcceptanceRule, Accepted, rule_for
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.decoding.scores import Scores
from quasar.drafters.base import Drafter, FinishedSequence, Resources

NOBODY = "none"
"""The value in the notes for a step without a draft."""


def _known_members(members: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
    _nodes(members)
    return members


def _nodes(members: list[str | dict[str, Any]]) -> list[dict[str, Any]]:
    return [chosen_node("drafter", member, f"drafter.members.{index}") for index, member in enumerate(members)]


class ChainDrafter(Drafter):
    """Asks its members in order and uses the first draft that has a token. Cheap drafters should come first.

    The members after the first draft are not asked and do not observe the step. If a member offers scratch rows but no
    token, its scratch rows are added to the next member's draft. If a member has an acceptance rule (replay), the rule
    decides on the drafts of this member, and the exact rule of the run's sampling settings on the drafts of the others.
    The notes contain the member whose draft was used in every step.

    members: names in conf/drafter, or nodes such as ``{name: ngram, num_tokens: 8}`` that replace values of such a file
    """

    @validate_call
    def __init__(
        self, members: Annotated[list[str | dict[str, Any]], Field(min_length=1), AfterValidator(_known_members)]
    ) -> None:
        nodes = _nodes(members)
        self.names = [str(node["name"]) for node in nodes]
        self.members: list[Drafter] = [build("drafter", node) for node in nodes]
        self._drafts: list[Draft] = []
        self._winners: list[int | float | str] = []

    @property
    def rule(self) -> AcceptanceRule | None:
        return None if all(member.rule is None for member in self.members) else _WinnersRule(self)

    @property
    def chooses_size(self) -> bool:
        return all(member.chooses_size for member in self.members)

    @property
    def winner(self) -> Drafter:
        """The last member that was asked, whose draft the last step verified."""
        return self.members[len(self._drafts) - 1]

    def prepare(self, resources: Resources) -> None:
        for name, member in zip(self.names, self.members, strict=True):
            member.prepare(resources)
            self.details += tuple(f"{name}: {detail}" for detail in member.details)
        sizes = {member.weight_bytes for member in self.members}
        self.weight_bytes = sizes.pop() if len(sizes) == 1 else None

    def start(self, finished: Iterable[FinishedSequence]) -> None:
        finished = list(finished)
        for member in self.members:
            member.start(finished)

    def begin(self, prompt: Tensor) -> None:
        self._winners = []
        for member in self.members:
            member.begin(prompt)

    @property
    def reads_verifier_cache(self) -> bool:
        return any(member.reads_verifier_cache for member in self.members)

    def rewind(self, length: int) -> None:
        for member in self.members:
            member.rewind(length)

    def propose(self, context: Context, budget: int) -> Draft:
        self._drafts = []
        winner = NOBODY
        for name, member in zip(self.names, self.members, strict=True):
            self._drafts.append(member.propose(context, budget))
            if len(self._drafts[-1]):
                winner = name
                break
        self._winners.append(winner)
        owner = self._scratch_owner()
        return self._drafts[-1] if owner is None else replace(self._drafts[-1], scratch=self._drafts[owner].scratch)

    def observe(self, step: StepResult) -> None:
        owner = self._scratch_owner()
        for index, (member, draft) in enumerate(zip(self.members, self._drafts, strict=False)):
            scratch_logits = step.scratch_logits if index == owner else None
            if draft is self._drafts[-1]:
                member.observe(replace(step, draft=draft, scratch_logits=scratch_logits))
            else:
                member.observe(StepResult(draft, step.emitted, [], step.logits[:1], scratch_logits, step.cut))

    def notes(self) -> dict[str, list[int | float | str]]:
        return {"member": self._winners}

    def _scratch_owner(self) -> int | None:
        """Return the index of the first asked member with scratch rows."""
        return next((index for index, draft in enumerate(self._drafts) if draft.scratch is not None), None)


class _WinnersRule(AcceptanceRule):
    """Uses the rule of the member that made the draft, or the exact rule of the sampling settings if it has none."""

    simulated = True
    description = "SIMULATED: acceptance of the replaying members is replayed from an earlier run"

    def __init__(self, chain: ChainDrafter) -> None:
        self._chain = chain

    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        # After the prefill, before the first draft, no member has been asked yet.
        rule = self._chain.winner.rule if len(draft) else None
        return (rule or rule_for(context.sampling)).accept(draft, scores, context)
