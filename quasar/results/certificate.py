"""Did speculation change the text? One sentence that certifies a run's output, or names where it differs."""

from __future__ import annotations

from dataclasses import dataclass

from quasar.results.measured import Measured
from quasar.results.schema import Exactness, PromptRecord, Turn


@dataclass(frozen=True)
class Certificate:
    """The comparison of a run's answers with autoregressive decoding by the same verifier.

    holds: whether every answer is equal
    text: the sentence that the run prints; a warning if the certificate does not hold
    """

    holds: bool
    text: str


def certificate(run: Measured) -> Certificate | None:
    """Return the certificate of a run; None if no answer was compared.

    Example: "736 tokens of 10 answers equal autoregressive decoding bit for bit." Of several answers that differ it
    names the first one in the order in which they were decoded.
    """
    compared = [place for record in run.records for place in _compared(record)]
    if not compared:
        return None
    differing = [place for place in compared if not place.found.match_self]
    if not differing:
        tokens = sum(len(place.turn.token_ids) for place in compared)
        answers = f"{len(compared)} answers equal" if len(compared) > 1 else "1 answer equal"
        return Certificate(True, f"{tokens} tokens of {answers} autoregressive decoding bit for bit.")
    cause = (
        "the drafter or the verifier has a fault"
        if run.facts.rows_are_independent
        else f"in a pass of the {run.facts.verifier_label} the rows depend on each other, so that equality is not "
        "guaranteed"
    )
    return Certificate(
        False,
        f"{len(differing)} of {len(compared)} answers DIFFER from autoregressive decoding with the same verifier, "
        f"first {differing[0].described(run.facts.dtype)}. Decoding was not lossless: {cause}",
    )


@dataclass(frozen=True)
class _Place:
    """A compared answer and the name of its prompt."""

    name: str
    turn: Turn
    found: Exactness

    def described(self, dtype: str) -> str:
        """Return where the answer differs and how close the decision was there."""
        token, gap = self.found.first_divergence, self.found.top2_gap
        assert token is not None
        assert gap is not None
        return (
            f"in {self.name} at token {token} ({_step(self.turn, token)}), where the best two choices are {gap:.4g} "
            f"apart in {dtype}"
        )


def _compared(record: PromptRecord) -> list[_Place]:
    repetition = f", repetition {record.repetition}" if record.repetition else ""
    return [
        _Place(f"prompt {record.question_id}, turn {number}{repetition}", turn, turn.exactness)
        for number, turn in enumerate(record.turns)
        if turn.exactness is not None
    ]


def _step(turn: Turn, token: int) -> str:
    """Return which step emitted a token of an answer; both count from 0, and token 0 comes from the prefill."""
    behind = 1
    if token < behind:
        return "the prefill's"
    for step, emitted in enumerate(turn.steps.emitted):
        behind += emitted
        if token < behind:
            return f"step {step}"
    return "after the last step"
