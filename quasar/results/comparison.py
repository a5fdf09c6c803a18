"""The table and the JSON file of `quasar fidelity`: how two verifiers differ on the same texts, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quasar.evaluation.comparison import Comparison
from quasar.results.intervals import Estimate, Statistic, Sums, estimate, ratio_of_totals
from quasar.results.schema import Json

PERCENTILE = 99


@dataclass(frozen=True)
class Compared:
    """A text and its comparison. Intervals come from a bootstrap over the texts, within their families."""

    family: str
    comparison: Comparison


@dataclass(frozen=True)
class Row:
    """A row of the table. form: the value as a text; statistic: its value from sums of the columns over texts."""

    name: str
    heading: str
    form: Callable[[float], str]
    statistic: Statistic


class Table:
    """The rows of all texts.

    estimates: by the name of the row, those of `ROWS`
    kl_percentile, kl_largest: of KL(A || B) in nats over all tokens; they have no interval
    """

    def __init__(self, texts: Sequence[Compared]) -> None:
        self._texts = texts
        tokens = np.concatenate([text.comparison.kl for text in texts])
        self.tokens = len(tokens)
        self.kl_percentile, self.kl_largest = float(np.percentile(tokens, PERCENTILE)), float(tokens.max())

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        rows = [_sums(text.comparison) for text in self._texts]
        columns = {name: np.array([[row[name]] for row in rows], dtype=np.float64) for name in rows[0]}
        families = [text.family for text in self._texts]
        return {entry.name: estimate(columns, families, entry.statistic) for entry in ROWS}

    def rows(self) -> list[list[str]]:
        """Return the rows of the printed table: heading, value and interval."""
        found = []
        for entry in ROWS:
            value = self.estimates[entry.name]
            bounded = value.low is not None and value.high is not None
            interval = f"{entry.form(value.low)} to {entry.form(value.high)}" if bounded else "none"  # type: ignore[arg-type]
            found.append([entry.heading, entry.form(value.value), interval])
            if entry.name == "kl":
                found.append([f"  {PERCENTILE} % of the tokens are below", _nats(self.kl_percentile), ""])
                found.append(["  largest of a token", _nats(self.kl_largest), ""])
        return found

    def to_json(self) -> Json:
        """Return every row's value with its 95 % interval; the bounds are null if there are fewer than two texts."""
        found: Json = {
            name: {"value": value.value, "low": value.low, "high": value.high} for name, value in self.estimates.items()
        }
        return {
            "texts": len(self._texts),
            "tokens": self.tokens,
            **found,
            f"kl_percentile_{PERCENTILE}": self.kl_percentile,
            "kl_largest": self.kl_largest,
        }


def perplexity(loss: str) -> Statistic:
    """The exponential of the mean loss per token, from the column of losses in nats."""
    mean = ratio_of_totals(loss, "tokens")
    return lambda sums: np.exp(mean(sums))


def _sums(comparison: Comparison) -> dict[str, float]:
    a, b = np.array(comparison.a_right), np.array(comparison.b_right)
    return {
        "tokens": len(comparison.kl),
        "kl": sum(comparison.kl),
        "agrees": sum(comparison.agrees),
        "lost": int((a & ~b).sum()),
        "gained": int((~a & b).sum()),
        "a_loss": sum(comparison.a_loss),
        "b_loss": sum(comparison.b_loss),
    }


def _perplexity_ratio(sums: Sums) -> np.ndarray:
    return perplexity("b_loss")(sums) / perplexity("a_loss")(sums)


def _nats(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 0.1 else f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{value:.2%}"


ROWS = (
    Row("kl", "KL(A || B), nats per token", _nats, ratio_of_totals("kl", "tokens")),
    Row("top1_agreement", "top-1 agreement", _percent, ratio_of_totals("agrees", "tokens")),
    Row("flips_to_wrong", "flips: only A predicts the token", _percent, ratio_of_totals("lost", "tokens")),
    Row("flips_to_right", "flips: only B predicts the token", _percent, ratio_of_totals("gained", "tokens")),
    Row("perplexity_a", "perplexity of A", "{:.3f}".format, perplexity("a_loss")),
    Row("perplexity_b", "perplexity of B", "{:.3f}".format, perplexity("b_loss")),
    Row("perplexity_ratio", "perplexity of B / A", "{:.4f}".format, _perplexity_ratio),
)
"""Flips are tokens of the text that one of the two predicts and the other one does not (Dutta et al. 2024, Accuracy is
not all you need): they show changes that cancel each other in the perplexity."""
