"""What a run stores in environment.json: its machine, its model and its prompts."""

from __future__ import annotations

from dataclasses import asdict

from quasar.cache import device_identity
from quasar.evaluation.prompts import prompt_set_hash
from quasar.experiment.build import Prepared
from quasar.experiment.facts import facts_of
from quasar.experiment.header import header_of, warnings_of
from quasar.experiment.inputs import inputs_of
from quasar.results.attempt import Environment, ModelFiles


def environment_of(parts: Prepared) -> Environment:
    """Describe what the results of a run depend on apart from its configuration."""
    checkpoint = parts.checkpoint
    return Environment(
        machine=parts.machine,
        model=ModelFiles(checkpoint.origin, checkpoint.revision, checkpoint.file_hashes, parts.weights_on_grid),
        verifier=list(parts.verifier.details),
        drafter=list(parts.drafter.details),
        prompt_set=prompt_set_hash(parts.prompts),
        prompts=len(parts.prompts),
        inputs=inputs_of(parts.settings, parts.prompts, checkpoint, device_identity(parts.verifier.device)),
        sandbox=parts.isolation,
        header=header_of(parts),
        warnings=warnings_of(parts),
        facts=asdict(facts_of(parts)),
    )
