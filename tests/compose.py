"""Configurations as the command line would compose them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from quasar.config import CONF, RunConfig, check, register


def composed(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def composed_run(*overrides: str) -> RunConfig:
    return check(composed(*overrides))
