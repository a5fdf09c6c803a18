"""verifier.bits: the layers that matter most per byte have 8 bits, under a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quasar.errors import RequestError
from quasar.evaluation.fidelity import divergence
from quasar.model.transformer import Transformer
from quasar.quantization.layers import W4Linear, W8A8Linear, W8A16Linear
from quasar.quantization.mixed import Candidate, candidates, choose, mean_bits
from quasar.quantization.recipes import Int4Format, quantize_w4
from quasar.quantization.smoothing import LAYERS
from quasar.quantization.statistics import Calibration
from quasar.testing import check_verifier, tiny_model, tiny_setup
from quasar.verifiers.base import Setup
from quasar.verifiers.int4 import Int4Verifier
from tests.compose import composed_run

NAMES = [f"blocks.{index}.{layer}" for index in range(4) for layer in LAYERS]
FORM = Int4Format(32, True, 16, torch.float32)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    return replace(tiny_setup(), identity="tiny")


@pytest.fixture
def text(setup: Setup) -> Calibration:
    found = setup.calibration()
    assert found is not None
    return found


def silent(done: int, total: int) -> None:
    pass


def sensitive(name: str = "blocks.2.attention.output", factor: float = 30.0) -> Transformer:
    """A model in which one layer's outputs are large, so that its rounding errors are too."""
    model = tiny_model()
    model.get_submodule(name).weight.data *= factor
    return model


def bits_of(verifier: Int4Verifier) -> float:
    """Count the bits of the layers as they are stored."""
    linears = [verifier.model.get_submodule(name) for name in NAMES]
    weights = sum(linear.weight.outputs * linear.weight.inputs for linear in linears)
    return 8 * sum(linear.weight.nbytes for linear in linears) / weights


def in_8bit(verifier: Int4Verifier) -> set[str]:
    return {name for name in NAMES if isinstance(verifier.model.get_submodule(name), W8A8Linear | W8A16Linear)}


def test_choice_by_hand() -> None:
    """The example of the module: 10 weights a layer; 8 bits cost 5 bytes more."""
    layers = [
        Candidate("a", 10, 5, 10, gain=4.0),
        Candidate("b", 10, 5, 10, gain=9.0),
        Candidate("big", 40, 20, 40, gain=12.0),
        Candidate("worse", 10, 5, 10, gain=-1.0),
    ]
    none = frozenset[str]()
    assert mean_bits(layers, none) == 4
    assert mean_bits(layers, frozenset("a")) == pytest.approx(8 * 40 / 70)
    assert choose(layers, 4.0, none) == none
    # 70 weights: each small layer costs 0.571 bits. b has the most gain per byte (1.8), then a (0.8) and big (0.6).
    assert choose(layers, 4.6, none) == {"b"}
    assert choose(layers, 5.2, none) == {"a", "b"}
    # big has the largest gain, but b and a have more per byte, and then it does not fit any more.
    assert choose(layers, 6.3, none) == {"a", "b"}
    assert choose(layers, 9.0, none) == {"a", "b", "big"}
    assert choose(layers, 5.2, frozenset({"worse"})) == {"worse", "b"}
    with pytest.raises(RequestError, match=r"verifier\.bits=4\.5: the layers have 4\.571 bits per weight"):
        choose(layers, 4.5, frozenset("a"))


@pytest.mark.parametrize("rotated", [False, True])
def test_gains_follow_the_measured_divergence(rotated: bool, text: Calibration) -> None:
    """Against the KL divergence on the same text with one layer after the other in 4 and in 8 bit."""

    def kl(in_8bit: set[str]) -> float:
        model = tiny_model()
        quantize_w4(model, replace(FORM, keep_8bit=frozenset(in_8bit)), True, silent, rotated)
        pairs = [divergence(reference(tokens), model(tokens))[0] for tokens in text.sequences]
        return sum(map(sum, pairs)) / sum(map(len, text.sequences))

    reference = tiny_model()
    found = {layer.name: layer.gain for layer in candidates(tiny_model(), FORM, rotated, text, silent)}
    everything = set(NAMES)
    floor = kl(everything)
    measured = {name: kl(everything - {name}) - floor for name in NAMES}
    ours = torch.tensor([found[name] for name in NAMES])
    theirs = torch.tensor([measured[name] for name in NAMES])
    correlation = float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])
    assert correlation > 0.8
    assert 0.5 < float(ours.sum() / theirs.sum()) < 2


@pytest.mark.parametrize("options", [{}, {"method": "rtn", "rotation": "hadamard"}, {"method": "awq"}], ids=str)
def test_the_sensitive_layer_is_chosen_and_the_budget_holds(options: dict[str, Any], setup: Setup) -> None:
    name = "blocks.2.attention.output"
    plain = Int4Verifier(sensitive(), setup, **options)
    for bits in (5.0, 5.5, 6.5):
        verifier = Int4Verifier(sensitive(), replace(setup, identity="sensitive"), bits=bits, **options)
        assert bits_of(plain) < bits_of(verifier) <= bits
        # 128 x 128 weights in 8 bit instead of 4 are 0.13 bits in the mean of all: less than that is unused.
        assert bits_of(verifier) > bits - 0.5
        assert verifier.in_8bit == tuple(sorted(in_8bit(verifier)))
        assert name in in_8bit(verifier)
        assert f"{bits_of(verifier):.3f} bits per weight" in verifier.details[0]
        assert "o_proj of block" in verifier.details[0]
        assert verifier.cost.weight_bytes > plain.cost.weight_bytes
    assert plain.in_8bit is None
    assert plain.details == ()


def test_named_layers_count_and_stay(setup: Setup) -> None:
    verifier = Int4Verifier(tiny_model(), setup, bits=6.5, keep_8bit=["qkv_proj"], method="rtn")
    assert {f"blocks.{index}.attention.qkv" for index in range(4)} < in_8bit(verifier)
    assert bits_of(verifier) <= 6.5
    with pytest.raises(RequestError, match=r"verifier\.bits=4\.6: the layers have .* bits per weight before any"):
        Int4Verifier(tiny_model(), setup, bits=4.6, keep_8bit=["qkv_proj"], method="rtn")


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_it_verifies_and_its_cached_weights_are_the_same(activation_bits: Any, setup: Setup) -> None:
    tokens = torch.arange(40) % 64
    options: dict[str, Any] = {"bits": 5.5, "activation_bits": activation_bits}
    first = Int4Verifier(tiny_model(), setup, **options)
    check_verifier(first)
    again = Int4Verifier(tiny_model(), replace(setup, progress=lambda done, total: pytest.fail("again")), **options)
    assert torch.equal(first.teacher_forced(tokens, 0), again.teacher_forced(tokens, 0))
    assert (first.details, first.in_8bit, first.cost) == (again.details, again.in_8bit, again.cost)
    assert any(isinstance(module, W4Linear) for module in again.model.modules())


def test_bad_requests(setup: Setup) -> None:
    for value, message in (("3", "verifier.bits=3"), ("9.5", "verifier.bits=9.5"), ("much", "verifier.bits=much")):
        with pytest.raises(RequestError) as refused:
            composed_run("verifier=int4", f"verifier.bits={value}")
        assert message in str(refused.value)
    with pytest.raises(RequestError, match=r"verifier\.bits=5 needs calibration text"):
        Int4Verifier(tiny_model(), Setup(), bits=5, method="rtn")
    with pytest.raises(RequestError, match=r"verifier\.group_size=48 does not divide 128"):
        Int4Verifier(tiny_model(), setup, bits=5, group_size=48)
