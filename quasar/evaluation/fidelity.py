"""Fidelity: how close a verifier is to the reference, measured token by token on the reference's text, and in τ_ref.

The reference's greedy answers (trajectories) are computed once per model, prompt set and length, and cached. A
verifier is then teacher-forced along them in one pass per prompt. All verifiers are therefore compared on the same
tokens, and not on the text that each of them would generate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.cache import json_store
from quasar.decoding.acceptance import AcceptanceRule, Accepted
from quasar.decoding.draft import ROOT, Context, Draft
from quasar.decoding.scores import Scores
from quasar.verifiers.base import Verifier

# Rows of logits that are compared at a time. This bounds the memory for large vocabularies.
COMPARE_ROWS = 64


@dataclass(frozen=True)
class Trajectory:
    """The reference's greedy answer to one prompt, and its noise floor.

    prompt, answer: token ids
    noise_kl: KL(reference || the same weights in float32) in nats, per answer token; empty if it was not measured
    noise_top1: whether the two argmaxes agree, per answer token; empty likewise
    """

    prompt: list[int]
    answer: list[int]
    noise_kl: list[float]
    noise_top1: list[bool]

    @property
    def token_ids(self) -> list[int]:
        """The answer, by the name that it has in the records of a run."""
        return self.answer


@dataclass(frozen=True)
class Fidelity:
    """Per answer token along one trajectory: KL(reference || verifier) in nats, and whether the argmaxes agree."""

    kl: list[float]
    top1: list[bool]


def measure(reference: Verifier, verifier: Verifier, trajectory: Trajectory) -> Fidelity:
    """Teacher-force both models along the trajectory in one pass each, and compare their logits."""
    kl, top1 = divergence(answer_logits(reference, trajectory), answer_logits(verifier, trajectory))
    return Fidelity(kl, top1)


def answer_logits(verifier: Verifier, trajectory: Trajectory) -> Tensor:
    """Return the logits [A, V] that predict the A answer tokens, from one pass over prompt and answer."""
    tokens = torch.tensor([*trajectory.prompt, *trajectory.answer[:-1]])
    return verifier.teacher_forced(tokens, len(trajectory.prompt) - 1)


def divergence(reference: Tensor, verifier: Tensor) -> tuple[list[float], list[bool]]:
    """Return KL(reference || verifier) in nats and argmax agreement, per row of logits [A, V], computed in float32."""
    kl: list[float] = []
    top1: list[bool] = []
    for ours, theirs in zip(reference.split(COMPARE_ROWS), verifier.split(COMPARE_ROWS), strict=True):
        log_p, log_q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).tolist()
        top1 += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
    return kl, top1


class ReferencePath(AcceptanceRule):
    """Acceptance rule of τ_ref: the sequence always follows the reference's answer.

    A draft token is accepted if it is the verifier's argmax *and* the next token of the answer. The bonus token is
    taken from the answer. A degenerate verifier that agrees with repetitive drafts therefore does not increase τ_ref.
    """

    def __init__(self, answer: Sequence[int]) -> None:
        self._answer = answer

    def accept(self, draft: Draft, scores: Scores, context: Context) -> Accepted:
        targets = scores.argmax()
        rest = self._answer[len(context.tokens) - context.prompt_length :]
        path: list[int] = []
        node = ROOT
        # The last answer token is always the bonus token, because the token after it is unknown.
        while len(path) < len(rest) - 1 and targets[node + 1] == rest[len(path)]:
            target = targets[node + 1]
            following = next((child for child in draft.children(node) if draft.tokens[child] == target), None)
            if following is None:
                break
            path.append(following)
            node = following
        return Accepted(path, rest[len(path)])


def trajectory_of(
    reference: Verifier, prompt: list[int], length: int, stop: frozenset[int], exact: Verifier | None = None
) -> Trajectory:
    """Decode at most ``length`` tokens greedily and autoregressively with the reference, and measure its noise floor.

    exact: the reference's weights in float32; None skips the noise floor

    The noise floor is the difference between the reference, which computes in 16 bit, and ``exact`` on the same tokens.
    This is what the rounding of activations costs, so that a verifier of the same dtype is not expected to be closer.
    """
    rows = [reference.prefill(torch.tensor(prompt)).logits[0].clone()]
    answer = [int(rows[0].argmax())]
    room = reference.context_length - len(prompt)
    while len(answer) < min(length, room) and answer[-1] not in stop:
        scores = reference.verify(answer[-1], Draft())
        scores.require_finite()
        rows.append(scores.logits[0])
        reference.keep([])
        answer.append(int(rows[-1].argmax()))
    plain = Trajectory(prompt, answer, [], [])
    if exact is None:
        return plain
    return Trajectory(prompt, answer, *divergence(torch.stack(rows), answer_logits(exact, plain)))


class Trajectories:
    """The reference's answers, which are computed once and cached for all runs that need them.

    model: identity of the reference's checkpoint
    exact: returns the reference's weights in float32, for the noise floor; called only if an answer is not cached. None
        skips the noise floor
    """

    def __init__(
        self, model: str, device: torch.device, dtype: torch.dtype, exact: Callable[[], Verifier] | None = None
    ) -> None:
        self._model, self._device, self._dtype, self._exact = model, device, dtype, exact

    def get(self, reference: Verifier, prompt: list[int], length: int, stop: frozenset[int]) -> Trajectory:
        """Return the trajectory of a prompt from the cache, or compute it with `trajectory_of`."""
        noise = None if self._exact is None else "float32"
        key = {"model": self._model, "prompt": prompt, "length": length, "stop": sorted(stop), "noise": noise}

        def computed() -> dict[str, object]:
            return vars(trajectory_of(reference, prompt, length, stop, self._exact() if self._exact else None))

        return Trajectory(**STORE.get(key, self._device, self._dtype, computed))


STORE = json_store("trajectories")
