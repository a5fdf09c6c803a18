"""The benchmark of the kernels: what it measures agrees with itself, and the contenders compute the same thing."""

from __future__ import annotations

import json

import pytest
import torch
from quasar_kernels.bench.__main__ import app
from quasar_kernels.bench.fused import LAYERS, Layer, _attention
from quasar_kernels.bench.products import BASELINE, backends
from quasar_kernels.bench.timing import alternating_medians
from typer.testing import CliRunner


def test_report_covers_every_op_and_its_ratios_are_those_of_its_times(tmp_path) -> None:
    options = ["--shapes", "64x128", "--rows", "1,3", "--layers", "smollm2-135m", "--repetitions", "2"]
    result = CliRunner().invoke(app, [*options, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "cpu.json").read_text())
    baseline = {one["rows"]: one["milliseconds"] for one in report["measurements"] if one["backend"] == BASELINE}
    assert set(baseline) == {1, 3}
    for one in report["measurements"]:
        assert one["speedup"] == pytest.approx(baseline[one["rows"]] / one["milliseconds"])
    assert {one["op"] for one in report["fused"]} == {
        "rms_norm", "rms_norm_quantize", "silu_mul", "silu_mul_quantize", "rotary_write", "block_attention",
    }  # fmt: skip
    for one in report["fused"]:
        assert one["speedup"] == pytest.approx(one["torch_milliseconds"] / one["milliseconds"])
    assert "block_attention, context 4096" in (tmp_path / "cpu.txt").read_text()
    assert (tmp_path / "cpu.png").stat().st_size > 0


@pytest.mark.parametrize("options", [["--shapes", "qwen9"], ["--shapes", "33x64"], ["--layers", "llama"]])
def test_unknown_names_are_answered_with_those_that_exist(options: list[str]) -> None:
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert options[1] in result.output


def test_every_backend_multiplies_by_the_given_matrix() -> None:
    weight, x = torch.randn(64, 128, dtype=torch.bfloat16), torch.randn(5, 128, dtype=torch.bfloat16)
    exact = x.double() @ weight.double().T
    with torch.inference_mode():
        for backend in backends():
            error = (backend.prepare(weight.clone())(x).double() - exact).norm() / exact.norm()
            # Rounding to four bits costs about a tenth; any mistake of layout or scale costs everything.
            assert error < (0.15 if backend.bits < 8 else 0.02), backend.name


@pytest.mark.parametrize("layer", [LAYERS["smollm2-135m"], Layer(64, 64, 4, 2, 32, True)])
def test_both_attentions_agree(layer: Layer) -> None:
    with torch.inference_mode():
        contest = _attention(layer, 5, 40)
        theirs = contest.torch()[0].transpose(0, 1).reshape(5, -1)
        torch.testing.assert_close(contest.ours(), theirs, rtol=0.02, atol=0.02)


def test_contenders_take_turns_and_rotate_their_copies() -> None:
    calls: list[str] = []

    def noting(name: str):
        return lambda: calls.append(name)

    alternating_medians([[noting("a0"), noting("a1")], [noting("b0")]], 2)
    assert calls == ["a0", "b0", "a1", "b0", "a0", "b0", "a1", "b0"]
