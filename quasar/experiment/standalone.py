"""Builds a verifier from overrides, without a run: no drafter, no folder of results."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from quasar.config.build import build
from quasar.config.rules import check
from quasar.config.schema import CONF, RunConfig, register
from quasar.errors import RequestError, first_line
from quasar.evaluation.prompts import Prompt
from quasar.experiment.calibration_text import calibration_text
from quasar.experiment.reference import locate_reference
from quasar.model.devices import use_threads
from quasar.model.sources import Checkpoint
from quasar.model.tokenizer import Tokenizer
from quasar.results.console import Reporter
from quasar.results.schema import Json
from quasar.verifiers.base import Setup, Verifier


@dataclass(frozen=True)
class Standalone:
    """A verifier and what it was built from. overrides: as they were given"""

    overrides: str
    settings: RunConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    verifier: Verifier

    def sentence(self) -> str:
        """Return one sentence for the header of the output."""
        verifier, size = self.verifier, f"{self.verifier.cost.weight_bytes / 1e6:.0f} MB of weights"
        dtype = str(verifier.dtype).removeprefix("torch.")
        return "; ".join([f"{self.checkpoint.name}, {verifier.label}, {dtype}, {size}", *verifier.details])

    def to_json(self) -> Json:
        """Return what describes the verifier in a file of results."""
        return {
            "overrides": self.overrides,
            "model": self.checkpoint.name,
            "origin": self.checkpoint.origin,
            "files": self.checkpoint.file_hashes,
            "verifier": self.settings.verifier,
            "label": self.verifier.label,
            "details": list(self.verifier.details),
            "dtype": str(self.verifier.dtype).removeprefix("torch."),
            "device": str(self.verifier.device),
            "weight_bytes": self.verifier.cost.weight_bytes,
        }


def settings_of(overrides: Sequence[str]) -> RunConfig:
    """Compose and check the configuration that these overrides make of conf/config.yaml.

    Raises RequestError for what ``run.py`` would refuse too.
    """
    register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=list(overrides), return_hydra_config=True)
            choices = dict(config.hydra.runtime.choices)
            with open_dict(config):
                del config["hydra"]
            return check(DictConfig(config), choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise RequestError(f"{shlex.join(overrides)}: {first_line(error)}") from None


def split(overrides: str) -> list[str]:
    """Split a text such as ``verifier=int8 verifier.method=rtn`` as a shell does.

    Raises RequestError if a quotation mark is not closed, or if a word is no override.
    """
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise RequestError(f"{overrides!r}: {error}") from None
    for word in words:
        if "=" not in word:
            raise RequestError(f"{word!r} in {overrides!r} is no override; write KEY=VALUE, such as verifier=int8")
    return words


def build_alone(
    overrides: str, common: Sequence[str], evaluated: Callable[[RunConfig], Sequence[Prompt]], reporter: Reporter
) -> Standalone:
    """Load the model and transform it into the verifier that the overrides name.

    common: overrides that come before them
    evaluated: returns the prompts that the verifier is measured on, which its calibration text must not overlap

    Raises RequestError if the configuration does not fit the model or this machine.
    """
    settings = settings_of([*common, *split(overrides)])
    use_threads(settings.threads)
    located = locate_reference(settings, reporter)
    checkpoint, tokenizer = located.checkpoint, located.tokenizer
    model = located.load(located.dtype, reporter)
    calibration = calibration_text(settings, evaluated(settings), located, reporter)
    with reporter.progress(f"preparing verifier={settings.verifier['name']}") as advance:
        setup = Setup(folder=checkpoint.folder, identity=checkpoint.identity, progress=advance, calibration=calibration)
        verifier: Verifier = build("verifier", settings.verifier, model, setup)
    return Standalone(overrides, settings, checkpoint, tokenizer, verifier)
