"""The result of a verification pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quasar.decoding.sampling import most_likely


class Scores:
    """What a pass says of a draft of T tokens.

    logits:  float [T + 1, V]; row 0 follows the last token of the context, row t + 1 follows draft token t
    scratch: float [O, V], the logits of ``Scratch.outputs``, or None if the draft has no scratch rows
    found:   gives the argmax of every row of ``logits``, if the pass found it, which saves the host a wait; None where
             it did not look
    check:   raises QuasarError if a logit is NaN or infinite, naming the layer; None if that is known already
    """

    def __init__(
        self,
        logits: Tensor,
        scratch: Tensor | None = None,
        found: Callable[[], list[int] | None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.logits, self.scratch = logits, scratch
        self._found, self._check = found, check

    def argmax(self) -> list[int]:
        """The most likely token after every row of ``logits``, the first of equal ones. Waits for the pass."""
        found = None if self._found is None else self._found()
        return most_likely(self.logits) if found is None else found

    def require_finite(self) -> None:
        """Raises QuasarError if a logit is NaN or infinite, naming the first layer whose output is.

        Must come before the verifier's next pass. On a GPU it waits for this one, unless something of it was read.
        """
        if self._check is not None:
            self._check()
