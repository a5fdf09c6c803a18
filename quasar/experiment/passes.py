"""Times verification passes of every length behind every context, alternating with the reference's pass of one row."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from quasar_kernels.bandwidth import CopyBandwidth

from quasar.config.schema import PassesConfig
from quasar.decoding.draft import Draft
from quasar.experiment.build import Prepared
from quasar.experiment.decoder import WARM_UP
from quasar.results.console import Reporter
from quasar.results.generations import PASSES
from quasar.results.schema import PassPoint, PassRecord
from quasar.results.store import RunFolder
from quasar.verifiers.base import Verifier
from quasar.verifiers.timing import pass_milliseconds


def points_of(parts: Prepared) -> list[PassPoint]:
    """Return the passes that a run asks for and that fit the context window."""
    return _timer(parts).points()


def time_passes(parts: Prepared, folder: RunFolder, reporter: Reporter) -> None:
    """Time the passes that the run asks for and that no earlier attempt has timed, and append them to its folder."""
    wanted = parts.settings.evaluate.passes
    if not wanted.repetitions:
        return
    timer = _timer(parts)
    done, total = folder.passes(), len(timer.points())
    left_out = wanted.repetitions * len(wanted.rows) * len(wanted.contexts) - total
    if left_out:
        window = f"the model's context window of {parts.verifier.context_length} tokens"
        reporter.warning(f"{left_out} of {left_out + total} passes exceed {window} and are left out")
    with reporter.live("passes") as update:

        def on_record(record: PassRecord) -> None:
            done.append(folder.append_pass(record))
            update(len(done), total, f"{record.rows} rows behind {record.context} tokens")

        timer.run(list(done), on_record)
    reporter.line(f"wrote {folder.path / PASSES}")


@dataclass(frozen=True)
class PassTimer:
    """Times the passes that ``evaluate.passes`` asks for.

    reference: the unquantized, unpruned model; None if ``verifier`` is the reference
    tokens: the text that contexts consist of, repeated up to their length
    seed: seed of the orders that are drawn
    """

    wanted: PassesConfig
    verifier: Verifier
    reference: Verifier | None
    tokens: Sequence[int]
    seed: int

    def points(self) -> list[PassPoint]:
        """Return everything that is timed, in order.

        The order of the numbers of rows is drawn anew in every repetition, so that a change in the machine's speed
        favours none. The last of the rows has to fit the context window.
        """
        found: list[PassPoint] = []
        for context in self.wanted.contexts:
            fitting = [rows for rows in self.wanted.rows if context + rows <= self.verifier.context_length]
            for repetition in range(self.wanted.repetitions):
                order = self._random(context, repetition).sample(fitting, len(fitting))
                found += [(context, repetition, rows) for rows in order]
        return found

    def run(self, done: Iterable[PassRecord], on_record: Callable[[PassRecord], None]) -> None:
        """Time all points that are not in ``done``, and call ``on_record`` with each as soon as it is timed."""
        known = {record.point for record in done}
        missing = [point for point in self.points() if point not in known]
        if not missing:
            return
        copies = CopyBandwidth(self.verifier.device)
        reference = self.reference or self.verifier
        begun: tuple[int, int] | None = None
        bandwidth = 0.0
        for context, repetition, rows in missing:
            if begun is None or begun[0] != context:
                self._read(context)
            if begun != (context, repetition):
                begun, bandwidth = (context, repetition), copies.measure()
            passes = {"pass": (self.verifier, rows), "reference": (reference, 1)}
            times = {
                name: self._milliseconds(*passes[name])
                for name in self._random(context, repetition, rows).sample(list(passes), len(passes))
            }
            on_record(
                PassRecord(
                    rows, context, repetition, round(times["pass"], 4), round(times["reference"], 4), round(bandwidth)
                )
            )

    def _read(self, context: int) -> None:
        text = torch.tensor(list(islice(cycle(self.tokens), context)), dtype=torch.int64)
        self.verifier.prefill(text)
        if self.reference is not None:
            self.reference.prefill(text)

    def _milliseconds(self, verifier: Verifier, rows: int) -> float:
        """Time a pass after an untimed one of the same model, so that caches hold what they hold during decoding."""
        last = self.tokens[0]
        draft = Draft.chain(list(islice(cycle(self.tokens), 1, rows)))
        verifier.verify(last, draft)
        return pass_milliseconds(verifier, last, draft)

    def _random(self, *key: int) -> random.Random:
        return random.Random(f"{self.seed} {key}")


def _timer(parts: Prepared) -> PassTimer:
    settings, tokens = parts.settings, parts.tokenizer.encode_chat(WARM_UP)
    return PassTimer(settings.evaluate.passes, parts.verifier, parts.reference, tokens, settings.seed)
