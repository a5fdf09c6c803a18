"""The hash that identifies a run by its configuration."""

from __future__ import annotations

import hashlib
import json

from omegaconf import DictConfig

from quasar.config.rules import settled

NOT_HASHED = ("arm", "output_dir", "resume", "sweep", "logger", "publish")
"""Keys that do not affect the results of a run, only where and how it is executed. They are not part of its hash."""


def config_hash(config: DictConfig) -> str:
    """Return a hash of twelve hex digits over everything that affects the results of a run.

    Raises RequestError if a value has the wrong type.
    """
    kept = {key: value for key, value in settled(config).items() if key not in NOT_HASHED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
