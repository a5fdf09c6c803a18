"""Names of arms: what a table or figure calls the runs of one configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence

from quasar.results.runs import StoredRun, flatten

_OPTIONS = ("verifier.", "drafter.", "decode.")
_CONDITIONS = ("decode.temperature", "decode.max_new_tokens", "decode.draft_tokens")
"""Options that rows have as columns of their own, so that they need not be in an arm's name."""


def arm_names(runs: Sequence[StoredRun]) -> list[str]:
    """Return the name of each run's arm.

    It is the configuration's key ``arm``, if it is set. Otherwise it is the verifier, the drafter if the runs have
    several, and the options in which runs with the same verifier and drafter differ, such as ``pruned, ratio=0.3``.
    """
    flat = [flatten(run.config) for run in runs]
    pairs = [(str(keys["verifier.name"]), str(keys["drafter.name"])) for keys in flat]
    several = len({drafter for _, drafter in pairs}) > 1
    names = []
    for keys, pair in zip(flat, pairs, strict=True):
        alike = [other for other, its_pair in zip(flat, pairs, strict=True) if its_pair == pair]
        shown = [option for option in keys if _is_option(option) and _differs(option, alike)]
        options = [f"{option.split('.', 1)[1]}={keys[option]}" for option in shown if keys[option] is not None]
        names.append(keys.get("arm") or ", ".join([", ".join(pair) if several else pair[0], *options]))
    return names


def _is_option(key: str) -> bool:
    return key.startswith(_OPTIONS) and key not in _CONDITIONS and not key.endswith((".name", "._target_"))


def _differs(key: str, configs: Sequence[dict[str, object]]) -> bool:
    return len({json.dumps(config.get(key), default=str) for config in configs}) > 1
