"""The facts about a run that its metrics need in addition to the records."""

from __future__ import annotations

from collections.abc import Sequence

from quasar.experiment.build import Prepared
from quasar.results.environment import peak_memory_bytes
from quasar.results.load import worst_of
from quasar.results.measured import RunFacts
from quasar.results.schema import Json


def facts_of(parts: Prepared, attempts: Sequence[Json] = ()) -> RunFacts:
    """Return the facts about a run; its peak memory is read now.

    attempts: the attempts in environment.json, which say how busy the machine was
    """
    settings, verifier = parts.settings, parts.verifier
    return RunFacts(
        model=settings.model.name,
        drafter=settings.drafter["name"],
        verifier=settings.verifier["name"],
        data=settings.data.name,
        temperature=settings.decode.temperature,
        verifier_label=verifier.label,
        is_reference=verifier.is_reference,
        weight_bytes=verifier.cost.weight_bytes,
        kv_bytes_per_token=verifier.cost.kv_bytes_per_token,
        copy_bandwidth=parts.machine.copy_bandwidth_bytes_per_second,
        peak_memory_bytes=peak_memory_bytes(verifier.device),
        device=parts.machine.device,
        simulated=parts.rule.simulated,
        lossy=parts.rule.lossy,
        emulated=verifier.emulated,
        draft_weight_bytes=parts.drafter.weight_bytes,
        model_origin=parts.checkpoint.origin,
        weights_on_grid=parts.weights_on_grid,
        sandbox=parts.isolation,
        other_cpu_share=worst_of(attempts),
        dtype=str(verifier.dtype).removeprefix("torch."),
        rows_are_independent=verifier.rows_are_independent,
    )
