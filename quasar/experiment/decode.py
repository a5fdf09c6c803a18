"""Decodes every prompt of a run and shows the progress."""

from __future__ import annotations

from pathlib import Path

from quasar.decoding.draft import StepResult
from quasar.evaluation.fidelity import Trajectories
from quasar.experiment.build import Prepared
from quasar.experiment.decoder import PromptDecoder
from quasar.experiment.resuming import finished_sequences
from quasar.results.baselines import SharedBaselines, baseline_identity
from quasar.results.console import Reporter
from quasar.results.measured import Measured
from quasar.results.metrics import named
from quasar.results.schema import PromptRecord
from quasar.results.store import RunFolder


def decode_all(
    parts: Prepared,
    records: list[PromptRecord],
    folder: RunFolder,
    reporter: Reporter,
    shared_baselines: Path | None = None,
) -> None:
    """Decode what is not in ``records`` yet, every prompt once per repetition, and append to it and to the folder.

    shared_baselines: see `quasar.experiment.run.run`
    """
    prompts, decoder = parts.prompts, _decoder(parts, shared_baselines)
    done = {(record.question_id, record.repetition) for record in records}
    planned = [(prompt, repetition) for repetition in range(parts.settings.evaluate.repetitions) for prompt in prompts]
    decoder.warm_up()
    parts.drafter.start(finished_sequences(prompts, records, parts.tokenizer))
    tokens, steps = 0, 0
    finished, speed, rate = Measured(), named("tokens_per_second"), ""
    with reporter.live("decoding") as update:

        def on_step(step: StepResult) -> None:
            nonlocal tokens, steps
            tokens, steps = tokens + len(step.emitted), steps + 1
            update(len(records), len(planned), f"{rate}acceptance length {tokens / steps:.2f}")

        for prompt, repetition in planned:
            if (prompt.key, repetition) not in done:
                record = folder.append(decoder.decode_prompt(prompt, on_step, repetition))
                records.append(record)
                # The speed comes from the measured decode times; elapsed time would include baselines and fidelity.
                finished.add(record)
                if (measured := speed.compute(finished)) is not None:
                    rate = f"{speed.text(measured)} tokens/s, "


def _decoder(parts: Prepared, shared_baselines: Path | None) -> PromptDecoder:
    verifier = parts.verifier

    def shared(is_reference: bool) -> SharedBaselines | None:
        if shared_baselines is None:
            return None
        identity = baseline_identity(parts.settings, is_reference, str(verifier.dtype))
        return SharedBaselines(shared_baselines, identity, parts.machine.name)

    trajectories = Trajectories(parts.checkpoint.identity, verifier.device, verifier.dtype, parts.exact_reference)
    return PromptDecoder(
        parts.settings,
        parts.drafter,
        verifier,
        parts.tokenizer,
        parts.reference,
        trajectories if parts.settings.evaluate.fidelity else None,
        shared_same=shared(verifier.is_reference),
        shared_reference=shared(True),
    )
