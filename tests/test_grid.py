"""Low-bit grids are recognized in dequantized weights, and not in weights as they were trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quasar.model.grid import GROUP, on_grid, weights_on_grid

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _normal(groups: int) -> torch.Tensor:
    return torch.randn(groups, GROUP, generator=torch.Generator().manual_seed(0)) * 0.02


def _dequantized_4_bit(groups: torch.Tensor) -> torch.Tensor:
    lowest = groups.amin(1, keepdim=True)
    step = (groups.amax(1, keepdim=True) - lowest) / 15
    return lowest + step * ((groups - lowest) / step).round()


def _dequantized_8_bit(groups: torch.Tensor) -> torch.Tensor:
    step = groups.abs().amax(1, keepdim=True) / 127
    return step * (groups / step).round()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dequantized", [_dequantized_4_bit, _dequantized_8_bit])
def test_dequantized_weights_lie_on_their_grid(dequantized, dtype: torch.dtype) -> None:
    assert on_grid(dequantized(_normal(500)).to(dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_weights_lie_on_no_grid(dtype: torch.dtype) -> None:
    assert not on_grid(_normal(500).to(dtype)).any()


def test_one_weight_off_the_grid_is_seen() -> None:
    groups = _dequantized_4_bit(_normal(2))
    step = (groups[1].amax() - groups[1].amin()) / 15
    middle = int((groups[1] - groups[1].mean()).abs().argmin())
    groups[1, middle] += 0.4 * step
    assert on_grid(groups).tolist() == [True, False]


def test_equal_weights_lie_on_every_grid() -> None:
    assert on_grid(torch.stack([torch.zeros(GROUP), torch.full((GROUP,), 0.3)])).all()


def test_share_counts_weights_of_matrices(tmp_path: Path) -> None:
    quantized = _dequantized_4_bit(_normal(300)).reshape(100, 96)
    trained = _normal(100).reshape(100, 32)
    save_file(
        {"a": quantized, "b": trained, "norm": torch.ones(32), "odd": torch.ones(3, 33)}, tmp_path / "x.safetensors"
    )
    assert weights_on_grid(tmp_path) == pytest.approx(0.75)
    save_file({"norm": torch.ones(32)}, tmp_path / "x.safetensors")
    assert weights_on_grid(tmp_path) is None
