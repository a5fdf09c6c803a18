"""Checkpoints that transformers has saved with bitsandbytes: int8 is read as it is stored, 4 bits are refused."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from quasar.config.schema import ModelSource
from quasar.errors import RequestError
from quasar.model.loading import load_transformer
from quasar.model.sources import locate
from quasar.quantization.layers import W8A16Linear
from quasar.quantization.packed import load_reference
from quasar.verifiers.base import Setup
from quasar.verifiers.packed import PackedVerifier
from tests.test_packed import CONFIG, TOKENS


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return folder


def quantized(dense: Path, folder: Path, **options: object) -> Path:
    """Quantize and save a checkpoint by transformers and bitsandbytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="cpu")
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def int8(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(dense, tmp_path_factory.mktemp("int8"), load_in_8bit=True)


@pytest.fixture(scope="module", params=["nf4", "fp4"])
def four_bits(
    request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, quantized(dense, folder, load_in_4bit=True, bnb_4bit_quant_type=request.param)


def restored(folder: Path) -> LlamaForCausalLM:
    """Return the model whose weights are the stored integers times the stored maximum of their row, over 127."""
    stored = load_file(folder / "model.safetensors")
    weights = {}
    for name, value in stored.items():
        scale = stored.get(name.removesuffix("weight") + "SCB")
        if name.endswith("weight"):
            weights[name] = value.float() if scale is None else value.float() * scale[:, None] / 127
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights, strict=True)
    return model


@torch.no_grad()
def test_int8_is_packed_as_it_is_stored(dense: Path, int8: Path) -> None:
    verifier = PackedVerifier(load_transformer(dense, torch.float32), Setup(), path=str(int8))
    assert sum(isinstance(layer, W8A16Linear) for layer in verifier.model.modules()) == 2 * 4, "fused q k v, gate up"
    expected = restored(int8)(TOKENS[None]).logits[0]
    assert torch.allclose(verifier.teacher_forced(TOKENS, 0), expected, atol=1e-4)


@torch.no_grad()
def test_int8_is_a_reference_when_it_is_dequantized(int8: Path) -> None:
    source = ModelSource(name="path", source="path", path=str(int8))
    with pytest.raises(RequestError, match=r"quantized \(bitsandbytes\), so it is no reference as it is"):
        load_transformer(int8, torch.float32)
    checkpoint = locate(ModelSource(**{**vars(source), "dequantize": True}))
    model = load_reference(checkpoint, torch.float32, torch.device("cpu"), lambda done, total: None)
    expected = restored(int8)(TOKENS[None]).logits[0]
    assert torch.allclose(model(TOKENS), expected, atol=1e-4)


def test_four_bits_are_refused_and_the_remedy_works(dense: Path, four_bits: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = four_bits
    remedy = re.escape(f"verifier=bnb_{kind}")
    with pytest.raises(RequestError, match=rf"{kind.upper()} of bitsandbytes.* {remedy} .*dequantize\(\)"):
        PackedVerifier(load_transformer(dense, torch.float32), Setup(), path=str(folder))
    with pytest.raises(RequestError, match="so it is no reference as it is"):
        load_transformer(folder, torch.float32)
    AutoModelForCausalLM.from_pretrained(folder).dequantize().save_pretrained(tmp_path, save_original_format=False)
    written = load_transformer(tmp_path, torch.float32)
    original = load_transformer(dense, torch.float32)
    error = (written.blocks[0].mlp.down.weight - original.blocks[0].mlp.down.weight).abs().max()
    assert 0 < error < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, r"weight_format is not 0 \(rows\)"),
        ({"SCB": torch.ones(3)}, r"SCB is F32 \[3\], but its format implies .* \[128\]"),
        ({"SCB": torch.full((128,), torch.nan)}, "SCB contains NaN"),
    ],
)
def test_damaged_int8_is_refused(
    change: dict[str, torch.Tensor], message: str, dense: Path, int8: Path, tmp_path: Path
) -> None:
    stored = load_file(int8 / "model.safetensors")
    stored |= {f"model.layers.0.mlp.down_proj.{name}": value for name, value in change.items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((int8 / "config.json").read_text())
    with pytest.raises(RequestError, match=message):
        PackedVerifier(load_transformer(dense, torch.float32), Setup(), path=str(tmp_path))


def test_an_unknown_option_is_refused(dense: Path, int8: Path, tmp_path: Path) -> None:
    raw = json.loads((int8 / "config.json").read_text())
    raw["quantization_config"]["llm_int8_has_fp16_weight"] = True
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((int8 / "model.safetensors").read_bytes())
    with pytest.raises(RequestError, match="llm_int8_has_fp16_weight"):
        PackedVerifier(load_transformer(dense, torch.float32), Setup(), path=str(tmp_path))
