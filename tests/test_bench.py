"""The benchmark of the kernels: its results are consistent, and all contenders compute the same."""

from __future__ import annotations

import json

import pytest
import torch
from quasar_kernels.bench.__main__ import app
from quasar_kernels.bench.matmuls import BASELINE, backends
from quasar_kernels.bench.timing import alternating_medians
from quasar_kernels.cases import LAYERS, Layer, Setting
from quasar_kernels.dispatch import LayerOp
from quasar_kernels.ops import LAYER_OPS, MATMULS
from typer.testing import CliRunner


@pytest.mark.slow
def test_report_covers_every_op_and_its_ratios_are_those_of_its_times(tmp_path) -> None:
    options = ["--shapes", "64x128", "--rows", "1,3", "--layers", "smollm2-135m", "--repetitions", "2"]
    result = CliRunner().invoke(app, [*options, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "cpu.json").read_text())
    baseline = {one["rows"]: one["milliseconds"] for one in report["measurements"] if one["backend"] == BASELINE}
    assert set(baseline) == {1, 3}
    for one in report["measurements"]:
        assert one["speedup"] == pytest.approx(baseline[one["rows"]] / one["milliseconds"])
    assert {one["backend"] for one in report["measurements"]} >= {op.format for op in MATMULS}
    assert {one["op"] for one in report["layer_ops"]} == {
        "add_rms_norm", "add_rms_norm_quantize", "silu_mul", "silu_mul_quantize", "gelu_mul", "gelu_mul_quantize",
        "add_scaled", "rotary_write", "rotary_write_kv8", "rotary_write_kv4", "block_attention", "block_attention_kv8",
        "block_attention_kv4", "first_maxima", "select_inputs",
    }  # fmt: skip
    for one in report["layer_ops"]:
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
            # The error of rounding to four bits is about a tenth, that of FP8, which has 3 bits of mantissa, a 25th. A
            # mistake in layout or scale makes a much larger one.
            assert error < (0.15 if backend.bits < 8 else {"fp8": 0.06}.get(backend.name, 0.02)), backend.name


@pytest.mark.parametrize("op", LAYER_OPS, ids=[op.name for op in LAYER_OPS])
@pytest.mark.parametrize("layer", [LAYERS["smollm2-135m"], Layer(64, 64, 4, 2, 32, True, 64)])
def test_an_op_and_its_peer_agree(layer: Layer, op: LayerOp) -> None:
    with torch.inference_mode():
        case = op.case(Setting(layer, 5, 40))
        ours, theirs = op(*case.arguments), case.peer()
        if isinstance(theirs, tuple):
            # A value half-way between two integers may be rounded to either, and bfloat16 rounds before that.
            (values, scale), (expected, expected_scale) = ours[:2], theirs
            error = (values * scale - expected * expected_scale).abs()
            assert (error <= 1.01 * expected_scale + 0.01 * (expected * expected_scale).abs()).all()
            assert error.mean() < 0.2 * expected_scale.mean()
            return
        if isinstance(ours, tuple):
            ours = ours[0]
        if op.name.startswith("block_attention"):
            theirs = theirs[0].transpose(0, 1).reshape(5, -1)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_contenders_take_turns_and_rotate_their_copies() -> None:
    calls: list[str] = []

    def noting(name: str):
        return lambda: calls.append(name)

    alternating_medians([[noting("a0"), noting("a1")], [noting("b0")]], 2)
    assert calls == ["a0", "b0", "a1", "b0", "a0", "b0", "a1", "b0"]
