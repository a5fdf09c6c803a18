"""Compares two verifiers token by token on the same text, as `quasar fidelity` does.

Neither has to be the reference, and nothing is drafted: both are teacher-forced along a text in one pass each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.errors import QuasarError, RequestError
from quasar.evaluation.fidelity import COMPARE_ROWS, Trajectory, answer_logits, divergence
from quasar.verifiers.base import Verifier

WINDOW = 512
"""Tokens of a plain text that are read in one pass. The first half of them is only context."""


@dataclass(frozen=True)
class Comparison:
    """What two verifiers, a and b, say about each token of a text.

    kl: KL(a || b) in nats
    agrees: whether the argmaxes are equal
    a_loss, b_loss: negative log-likelihood of the token in nats
    a_right, b_right: whether the token is the argmax
    """

    kl: list[float]
    agrees: list[bool]
    a_loss: list[float]
    b_loss: list[float]
    a_right: list[bool]
    b_right: list[bool]

    def __add__(self, other: Comparison) -> Comparison:
        """Return the comparison of both texts, one after the other."""
        return Comparison(
            *(own + theirs for own, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def compare(a: Verifier, b: Verifier, text: Trajectory) -> Comparison:
    """Teacher-force both verifiers along the text, and compare their logits at every token of its ``answer``.

    Raises RequestError if their vocabularies differ, and QuasarError if a logit is NaN or infinite.
    """
    logits = [answer_logits(verifier, text).to(a.device) for verifier in (a, b)]
    if logits[0].shape[1] != logits[1].shape[1]:
        raise RequestError(
            f"the vocabularies have {logits[0].shape[1]} and {logits[1].shape[1]} tokens; only models with the same "
            "tokens can be compared token by token"
        )
    for name, verifier, rows in zip("AB", (a, b), logits, strict=True):
        if not rows.isfinite().all():
            raise QuasarError(f"logits of {name}, the {verifier.label}, are NaN or infinite")
    kl, agrees = divergence(*logits)
    (a_loss, a_right), (b_loss, b_right) = (likelihood(rows, text.answer) for rows in logits)
    return Comparison(kl, agrees, a_loss, b_loss, a_right, b_right)


def likelihood(logits: Tensor, tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Return the negative log-likelihood in nats of every token, and whether it is the argmax. logits: [A, V]."""
    targets = torch.tensor(tokens, device=logits.device)
    loss: list[float] = []
    for rows, wanted in zip(logits.split(COMPARE_ROWS), targets.split(COMPARE_ROWS), strict=True):
        loss += (-rows.float().log_softmax(-1).gather(1, wanted.unsqueeze(1)).squeeze(1)).tolist()
    return loss, (logits.argmax(-1) == targets).tolist()


def windows(tokens: Sequence[int], beginning: Sequence[int] = (), size: int = WINDOW) -> Iterator[Trajectory]:
    """Cut a text into overlapping windows, so that every token is scored once with a long context.

    tokens: ids of the text
    beginning: ids that every window begins with, see `Tokenizer.beginning`; without them nothing comes before the first
        token, which is then not scored
    size: most tokens of a window. Half of its text is context, but in the first window

    For example five tokens in windows of four are scored as ``[1] -> [2, 3, 4]`` and ``[3, 4] -> [5]``.
    """
    context, text = (beginning, tokens) if beginning else (tokens[:1], tokens[1:])
    half, first = (size - len(beginning)) // 2, size - len(context)
    yield Trajectory(list(context), list(text[:first]), [], [])
    for place in range(first, len(text), half):
        yield Trajectory([*beginning, *text[place - half : place]], list(text[place : place + half]), [], [])
