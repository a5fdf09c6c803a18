"""The result of a verification pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quasar.decoding.sampling import most_likely


class Scores:
    """The logits of a verification pass over a draft of T tokens.

    logits:  float [T + 1, V]; row 0 predicts the token after the context, row t + 1 the token after draft token t
    scratch: float [O, V], the logits of ``Scratch.outputs``, or None if the draft has no scratch rows
    found:   returns the argmax of every row of ``logits`` if the pass has computed it, which saves a synchronization,
             else None
    check:   raises QuasarError with the name of the layer if a logit is NaN or infinite; None if the logits have been
             checked already
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
        """Return the argmax of every row of ``logits``, the first one of equal maxima. Waits for the pass to finish."""
        found = None if self._found is None else self._found()
        return most_likely(self.logits) if found is None else found

    def require_finite(self) -> None:
        """Raise QuasarError if a logit is NaN or infinite; the message names the first layer with such an output.

        Must be called before the verifier's next pass. On a GPU it waits for the pass, unless a result has been read.
        """
        if self._check is not None:
            self._check()
