"""Several drafters in a row: the first one that offers a draft wins."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, validate_call
from torch import Tensor

from quasar.config.build import build, node_named
from quasar.decoding.acceptance import AcceptanceRule, Accepted, Greedy
from quasar.decoding.draft import Context, Draft, StepResult
from quasar.decoding.scores import Scores
from quasar.drafters.base import Drafter, Resources
from quasar.errors import RequestError

NOBODY = "none"
"""The member that a step without a draft is noted under."""


class ChainDrafter(Drafter):
    """Asks its members in order and stops at the first draft with a token in it: cheap, seldom right ones come first.

    members: names of conf/drafter, or nodes ``{name: ngram, num_tokens: 8}`` whose other values are the file's

    A member with an acceptance rule of its own (replay) decides on its own drafts; the greedy rule then decides on the
    others', as the text means nothing any more. A member that was not asked does not learn from the step. Scratch rows
    of a member that offers no token ride along with the next one's draft. Notes the winner of every step. Costs what
    the members cost that are asked.
    """

    @validate_call
    def __init__(self, members: Annotated[list[str | dict[str, Any]], Field(min_length=1)]) -> None:
        nodes = [{"name": member} if isinstance(member, str) else member for member in members]
        for node in nodes:
            if "name" not in node:
                raise RequestError(f"drafter.members has {node}, which lacks a name of conf/drafter")
        self.names = [str(node["name"]) for node in nodes]
        self.members: list[Drafter] = [build("drafter", {**node_named("drafter", str(n["name"])), **n}) for n in nodes]
        self._drafts: list[Draft] = []
        self._winners: list[int | float | str] = []

    @property
    def rule(self) -> AcceptanceRule | None:
        return None if all(member.rule is None for member in self.members) else _WinnersRule(self)

    @property
    def winner(self) -> Drafter:
        """The member whose draft the last step verified: the last one asked."""
        return self.members[len(self._drafts) - 1]

    def prepare(self, resources: Resources) -> None:
        for name, member in zip(self.names, self.members, strict=True):
            member.prepare(resources)
            self.details += tuple(f"{name}: {detail}" for detail in member.details)

    def begin(self, prompt: Tensor) -> None:
        self._winners = []
        for member in self.members:
            member.begin(prompt)

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
                member.observe(StepResult(draft, step.emitted, [], step.logits[:1], scratch_logits))

    def notes(self) -> dict[str, list[int | float | str]]:
        return {"member": self._winners}

    def _scratch_owner(self) -> int | None:
        """Index of the first asked member with scratch rows."""
        return next((index for index, draft in enumerate(self._drafts) if draft.scratch is not None), None)


class _WinnersRule:
    """Decides by the rule of the member whose draft it is, or greedily."""

    def __init__(self, chain: ChainDrafter) -> None:
        self._chain = chain

    def accept(self, draft: Draft, scores: Scores, generator: torch.Generator) -> Accepted:
        # Before the first draft, of the prefill, nobody has been asked yet.
        rule = self._chain.winner.rule if len(draft) else None
        return (rule or Greedy()).accept(draft, scores, generator)
