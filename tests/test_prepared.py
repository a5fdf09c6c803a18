"""A verifier from cached weights equals the prepared one bit for bit, and nothing is prepared again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quasar.config.build import build
from quasar.quantization.statistics import Calibration
from quasar.testing import tiny_model, tiny_setup
from quasar.verifiers.base import Setup
from quasar.verifiers.int4 import Int4Verifier
from quasar.verifiers.int8 import Int8Verifier
from quasar.verifiers.pruned import PrunedVerifier
from quasar.verifiers.transformer import TransformerVerifier
from tests.compose import composed_run
from tests.selection import fast

TOKENS = torch.arange(40) % 64
CHOICES = (
    ("int8",),
    ("int8", "verifier.lm_head_bits=8", "verifier.method=gptq"),
    ("int8", "verifier.activation_bits=16", "verifier.method=rtn"),
    ("int8_paper",),
    ("int4",),
    ("int4", "verifier.method=awq", "verifier.symmetric=false", "verifier.lm_head_bits=8"),
    ("int4", "verifier.activation_bits=8", "verifier.group_size=32"),
    ("int4", "verifier.rotation=hadamard", "verifier.keep_8bit=[down_proj,o_proj]", "verifier.symmetric=false"),
    ("int4", "verifier.rotation=hadamard", "verifier.method=rtn", "verifier.lm_head_bits=8"),
    ("int4", "verifier.keep_8bit=[down_proj]", "verifier.method=awq", "verifier.activation_bits=8"),
    ("int4", "verifier.bits=5.2", "verifier.symmetric=false"),
    ("pruned", "verifier.ratio=0.3"),
    ("pruned", "verifier.ratio=0.3", "verifier.heads=true"),
    ("pruned", "verifier.method=depth", "verifier.ratio=0.3"),
    ("pruned", "verifier.ratio=0.3", "verifier.quantize=int4"),
    ("pruned", "verifier.method=depth", "verifier.ratio=0.3", "verifier.quantize={name: int8, lm_head_bits: 8}"),
)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    return replace(tiny_setup(), identity="tiny")


def made(setup: Setup, dtype: torch.dtype, name: str, *options: str) -> TransformerVerifier:
    settings = composed_run(f"verifier={name}", *options).verifier
    verifier: TransformerVerifier = build("verifier", settings, tiny_model(dtype), setup)
    return verifier


@pytest.mark.parametrize("dtype", fast([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_the_second_verifier_is_the_first_one(
    setup: Setup, choice: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(setup, dtype, *choice)
    progressed: list[int] = []
    again = made(replace(setup, progress=lambda done, total: progressed.append(done)), dtype, *choice)
    assert progressed == [], "it was prepared again"
    assert torch.equal(again.teacher_forced(TOKENS, 0), first.teacher_forced(TOKENS, 0))
    assert (again.cost, again.details, again.model.config) == (first.cost, first.details, first.model.config)
    assert type(again.executor) is type(first.executor), "the cached weights run op by op"
    fresh = made(replace(setup, identity=None), dtype, *choice)
    assert torch.equal(again.teacher_forced(TOKENS, 0), fresh.teacher_forced(TOKENS, 0))


def test_other_models_settings_texts_and_precisions_have_their_own(setup: Setup) -> None:
    calls: list[str] = []
    text = setup.calibration()
    assert text is not None
    other_text = Calibration(text.sequences[:1], {"model": "another text"})
    setups = {
        "first": setup,
        "again": setup,
        "model": replace(setup, identity="other"),
        "text": replace(setup, calibration=lambda: other_text),
    }
    for name, own in setups.items():
        watched = replace(own, progress=lambda done, total, name=name: calls.append(name))
        Int8Verifier(tiny_model(), watched, method="smoothquant")
    watched = replace(setup, progress=lambda done, total: calls.append("precision"))
    Int8Verifier(tiny_model(torch.bfloat16), watched, method="smoothquant")
    watched = replace(setup, progress=lambda done, total: calls.append("settings"))
    Int8Verifier(tiny_model(), watched, method="rtn")
    assert set(calls) == {"first", "model", "text", "precision", "settings"}


def test_every_constructor_argument_is_part_of_the_key(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the key lacked a setting, the weights of another value would be found."""
    import inspect

    keys: list[dict[str, object]] = []
    for module in ("int4", "int8", "pruned"):
        monkeypatch.setattr(
            f"quasar.verifiers.{module}.prepared",
            lambda model, setup, settings, prepare: keys.append(settings) or prepare(model),
        )
    for cls in (Int4Verifier, Int8Verifier, PrunedVerifier):
        keys.clear()
        cls(tiny_model(), setup)
        # Pruned weights are the same for all quantizers; the quantized ones have a key of their own. The KV cache holds
        # no weights.
        arguments = set(inspect.signature(cls).parameters) - {"model", "setup", "method", "quantize", "kv_bits"}
        assert arguments <= set(keys[0]), cls.__name__
