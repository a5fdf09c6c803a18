"""The warnings below a run's header."""

from __future__ import annotations

import pytest

from quasar.config.build import node_named
from quasar.config.schema import Grid
from quasar.experiment.header import stores_exactly

GRID = Grid(bits=4, symmetric=False, group_size=32)
SAME = {**node_named("verifier", "int4"), "symmetric": False, "group_size": 32}


def test_int4_on_the_grid_of_the_weights_is_lossless() -> None:
    assert stores_exactly(SAME, GRID)
    assert stores_exactly({**SAME, "group_size": 16, "method": "rtn"}, GRID)
    assert not stores_exactly(node_named("verifier", "int8"), GRID)


@pytest.mark.parametrize(
    "changed",
    [
        {"symmetric": True},
        {"group_size": 64},
        {"method": "awq"},
        {"rotation": "hadamard"},
        {"keep_8bit": ["down_proj"]},
        {"bits": 5.0},
        {"activation_bits": 8},
        {"lm_head_bits": 8},
        {"kv_bits": 8},
    ],
    ids=str,
)
def test_any_other_change_is_called_lossy(changed: dict[str, object]) -> None:
    assert not stores_exactly({**SAME, **changed}, GRID)
