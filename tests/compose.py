"""Configurations as the command line would compose them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from quasar.config.build import build, node_named
from quasar.config.rules import check
from quasar.config.schema import CONF, RunConfig, register
from quasar.drafters.base import Resources
from quasar.model.loading import random_transformer
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier


def composed(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def composed_run(*overrides: str) -> RunConfig:
    return check(composed(*overrides))


def resources_for(verifier: TransformerVerifier, setup: Setup, seed: int = 0) -> Resources:
    """Return what a run gives to a drafter, for a verifier of `random_transformer` with this seed."""

    def another(choice) -> TransformerVerifier:
        node = node_named("verifier", choice) if isinstance(choice, str) else choice
        model = random_transformer(verifier.model.config, seed, verifier.model.dtype)
        return build("verifier", node, model, setup)

    def encode(text: str) -> list[int]:
        return list(text.encode())

    return Resources(verifier, encode, another, setup.calibration, {"model": "tiny"})
