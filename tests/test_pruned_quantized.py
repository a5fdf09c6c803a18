"""Pruned models that are quantized: the same recipes as for whole models, on widths that fit their groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quasar.config.build import build
from quasar.errors import RequestError
from quasar.model.config import LayerShape, ModelConfig
from quasar.model.loading import random_transformer
from quasar.model.transformer import Transformer
from quasar.pruning.allocation import Amount, removals
from quasar.pruning.importance import BlockScores
from quasar.testing import check_verifier, tiny_model, tiny_setup
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.int4 import Int4Verifier
from quasar.verifiers.int8 import Int8Verifier
from quasar.verifiers.pruned import PrunedVerifier
from tests.compose import composed_run

TOKENS = torch.arange(40) % 64
WIDE_GROUPS: dict[str, Any] = {"name": "int4", "group_size": 128, "lm_head_bits": 8}
QUANTIZERS: list[str | dict[str, Any]] = ["int8", "int8_paper", "int4", WIDE_GROUPS]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    return replace(tiny_setup(), identity="tiny")


def odd(intermediate_size: int = 200) -> Transformer:
    """A model whose MLP width is no multiple of 64."""
    config = ModelConfig(vocab_size=64, hidden_size=128, head_dim=32, layers=(LayerShape(4, 2, intermediate_size),) * 3)
    return random_transformer(config, 0, torch.float32)


def widths(verifier: PrunedVerifier) -> list[int]:
    return [shape.intermediate_size for shape in verifier.model.config.layers]


@pytest.mark.parametrize("method", ["width", "depth"])
@pytest.mark.parametrize("importance", ["flap", "magnitude"])
def test_a_ratio_of_zero_is_the_reference_bit_for_bit(method: str, importance: str, setup: Setup) -> None:
    reference = FP16Verifier(odd(), setup)
    options = {"importance": importance} if method == "width" else {}
    verifier = PrunedVerifier(odd(), setup, method=method, ratio=0, **options)  # type: ignore[arg-type]
    assert torch.equal(verifier.teacher_forced(TOKENS, 0), reference.teacher_forced(TOKENS, 0))
    assert (verifier.achieved_ratio, verifier.cost) == (0, reference.cost)
    assert widths(verifier) == [200, 200, 200]


@pytest.mark.parametrize("quantizer", ["int8", "int4"])
def test_a_ratio_of_zero_is_the_quantizer_bit_for_bit(quantizer: str, setup: Setup) -> None:
    whole = {"int8": Int8Verifier, "int4": Int4Verifier}[quantizer](tiny_model(), setup)
    verifier = PrunedVerifier(tiny_model(), setup, ratio=0, quantize=quantizer)
    assert torch.equal(verifier.teacher_forced(TOKENS, 0), whole.teacher_forced(TOKENS, 0))
    assert verifier.cost == whole.cost


def test_widths_are_multiples_or_whole() -> None:
    """Some of 3 x 200 channels are wanted, whose scores are the same in all blocks: there are many ties."""
    scores = [BlockScores(torch.arange(200.0), torch.ones(2)) for _ in range(3)]
    model = odd()
    per_channel = 3 * 128
    total = sum(parameter.numel() for parameter in model.blocks.parameters())

    def kept(wanted: int, multiple: int) -> list[int]:
        found = removals(model, scores, Amount((600 - wanted) * per_channel / total, multiple=multiple))
        return [200 - len(removal.channels) for removal in found]

    assert kept(600, 64) == [200, 200, 200]
    assert kept(598, 64) == [200, 200, 200]  # 192 would remove four times as much
    assert kept(590, 64).count(192) == 1
    for wanted in range(210, 600, 30):
        found = kept(wanted, 64)
        assert set(found) <= {64, 128, 192, 200}
        assert abs(sum(found) - wanted) <= 32
        assert set(kept(wanted + 30, 32)) <= {32, 64, 96, 128, 160, 192, 200}
    assert set(kept(450, 128)) == {128, 200}


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("method", ["width", "depth"])
def test_the_pruned_model_goes_through_the_quantizers_recipe(
    quantizer: str | dict[str, Any], method: Any, setup: Setup
) -> None:
    pruned = PrunedVerifier(tiny_model(), setup, method=method, ratio=0.3)
    assert method == "depth" or {128, 192} <= set(widths(pruned))
    verifier = PrunedVerifier(tiny_model(), setup, method=method, ratio=0.3, quantize=quantizer)
    given = {"name": quantizer} if isinstance(quantizer, str) else quantizer
    if quantizer is WIDE_GROUPS and method == "width":
        # The widths suit the groups, so they are not those of the 16-bit model.
        assert widths(verifier) == [128] * 4
    else:
        # Statistics of the pruned model are not in the cache of this setup.
        text = tiny_setup().calibration()
        assert text is not None
        own = Setup(calibration=lambda: replace(text, key={"model": "pruned"}))
        node = {**composed_run(f"verifier={given['name']}").verifier, **given}
        expected = build("verifier", node, pruned.model, own)
        assert torch.equal(verifier.teacher_forced(TOKENS, 0), expected.teacher_forced(TOKENS, 0))
        assert verifier.cost == expected.cost
        assert verifier.details == (*pruned.details, *expected.details)
    assert verifier.label == ("pruned INT4 model" if "int4" in given["name"] else "pruned INT8 model")
    assert verifier.cost.weight_bytes < 0.6 * pruned.cost.weight_bytes
    check_verifier(verifier)


def test_every_pair_of_pruning_and_quantizer_has_its_own_weights(setup: Setup) -> None:
    """The second of two equal choices is read from the cache, and a different one never is."""
    prepared: list[str] = []

    def made(name: str, **options: Any) -> PrunedVerifier:
        watched = replace(setup, progress=lambda done, total: prepared.append(name))
        return PrunedVerifier(tiny_model(), watched, importance="wanda", **options)

    choices: dict[str, dict[str, Any]] = {
        "16 bit": {"ratio": 0.3},
        "int4": {"ratio": 0.3, "quantize": "int4"},
        "less": {"ratio": 0.2, "quantize": "int4"},
        "int8": {"ratio": 0.3, "quantize": "int8"},
        "options": {"ratio": 0.3, "quantize": {"name": "int4", "clip": False}},
    }
    for name, options in choices.items():
        first = made(name, **options)
        assert name in prepared
        prepared.clear()
        again = made(name, **options)
        assert prepared == [], f"{name} was prepared again"
        assert torch.equal(again.teacher_forced(TOKENS, 0), first.teacher_forced(TOKENS, 0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fp16", "verifier.quantize=fp16: must be int8, int4"),
        ("pruned", "verifier.quantize=pruned: must be int8, int4"),
        ("int3", "verifier 'int3' is not in conf/verifier; choose one of"),
        ("4", "verifier '4' is not in conf/verifier"),
        ("true", "verifier.quantize=true: "),
        ("''", "verifier.quantize='': must not be empty"),
        ("{group_size: 32}", "which lacks a name of conf/verifier"),
        ("{name: int4, groups: 32}", "verifier.quantize.groups=32: verifier.quantize has no key 'groups'"),
        ("{name: int4, group_size: 0}", "verifier.quantize.group_size=0: input should be greater than 0"),
        ("{name: int8, method: rtn, alpha: 0.5}", "verifier.quantize.alpha=0.5: has no effect with verifier.quantize"),
        ("{name: int4, dtype: float32}", "verifier.quantize.dtype=float32: has no effect"),
    ],
)
def test_a_wrong_quantizer_is_refused_before_a_run_begins(value: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        composed_run("verifier=pruned", f"verifier.quantize={value}")
    assert message in str(refused.value)


def test_groups_that_do_not_fit_the_model_are_refused_by_key(setup: Setup) -> None:
    with pytest.raises(RequestError, match=r"verifier\.quantize=int4: .*group_size=96 does not divide 128"):
        PrunedVerifier(tiny_model(), setup, ratio=0.1, quantize={"name": "int4", "group_size": 96})
    # A width of which nothing is removed fits no more than it does in the whole model.
    with pytest.raises(RequestError, match=r"verifier\.quantize=int4: .*group_size=64 does not divide 200"):
        PrunedVerifier(odd(), replace(setup, identity="odd"), ratio=0, importance="magnitude", quantize="int4")


def test_it_can_be_the_cheap_copy_of_a_cascade() -> None:
    composed_run("drafter=cascade", "drafter.inner={name: pruned, ratio: 0.2, quantize: int4}")
    with pytest.raises(RequestError, match=r"verifier\.quantize=fp16"):
        composed_run("drafter=cascade", "drafter.inner={name: pruned, quantize: fp16}")
