"""`quasar export`: what is written is the verifier bit for bit, and what a config cannot express is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from quasar.cli import app
from quasar.decoding.draft import Draft
from quasar.errors import RequestError
from quasar.experiment.export import export_verifier
from quasar.experiment.standalone import build_alone
from quasar.model.tokenizer import _byte_tokenizer
from quasar.quantization.export import pack
from quasar.quantization.packed import open_packed
from quasar.quantization.packed_source import unpack
from quasar.results.console import Reporter
from quasar.verifiers.base import Verifier
from quasar.verifiers.transformer import TransformerVerifier

TOKENS = torch.randint(0, 500, (60,), generator=torch.Generator().manual_seed(0))


def built(*overrides: str) -> Verifier:
    return build_alone("", overrides, lambda settings: (), Reporter()).verifier


def logits(verifier: Verifier) -> Tensor:
    """Teacher-forced, and step by step after a prompt."""
    assert isinstance(verifier, TransformerVerifier)
    verifier.prefill(TOKENS[:20])
    steps = []
    for token in TOKENS[20:28].tolist():
        steps.append(verifier.verify(token, Draft()).logits[0].clone())
        verifier.keep([])
    return torch.cat([verifier.teacher_forced(TOKENS, 0), torch.stack(steps)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of every key that an export has to carry over: tied embeddings, grouped heads, biases of q, k, v."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=256,
        bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "bias" in name or parameter.dim() == 2:
            parameter.data.normal_(0, 0.1)
        else:
            parameter.data.uniform_(0.5, 2.0)
    folder = tmp_path_factory.mktemp("qwen2")
    model.to(torch.bfloat16).save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return str(folder)


QUANTIZED = [
    ("int8", "int-quantized"),
    ("int8 verifier.activation_group=null", "int-quantized"),
    ("int8 verifier.method=rtn verifier.lm_head_bits=8", "mixed-precision"),
    ("int8 verifier.method=gptq verifier.activation_bits=16", "pack-quantized"),
    ("int4", "pack-quantized"),
    ("int4 verifier.method=awq verifier.symmetric=false verifier.group_size=32", "pack-quantized"),
    ("int4 verifier.method=rtn verifier.activation_bits=8", "pack-quantized"),
    ("int4 verifier.method=rtn verifier.rotation=hadamard verifier.keep_8bit=[down_proj]", "pack-quantized"),
    ("int4 verifier.method=rtn verifier.keep_8bit=[o_proj] verifier.activation_bits=8", "mixed-precision"),
    ("fp8", "float-quantized"),
    ("fp8 verifier.lm_head_bits=8", "mixed-precision"),
]


@pytest.mark.parametrize("model", ["tiny", "qwen2"])
@pytest.mark.parametrize(("verifier", "form"), QUANTIZED)
def test_a_quantized_verifier_is_read_back_bit_for_bit(
    verifier: str, form: str, model: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    source = ["model=tiny"] if model == "tiny" else ["model=path", f"model.path={base}"]
    overrides = [*source, "calibration.prompts=3", *f"verifier={verifier}".split()]
    folder = tmp_path / "exported"
    export_verifier(folder, overrides, Reporter())
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == form
    exported = built(*overrides)
    read = built(*source, "verifier=packed", f"verifier.path={folder}")
    assert torch.equal(logits(read), logits(exported))
    assert read.cost == exported.cost
    if model == "qwen2":
        assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "verifier",
    [
        "fp16",
        "pruned verifier.method=depth verifier.layers=[1]",
        "pruned verifier.uniform=true verifier.importance=wanda verifier.ratio=0.1667",
        "pruned verifier.uniform=true verifier.importance=flap verifier.ratio=0.5 verifier.heads=true",
    ],
)
def test_a_pruned_verifier_is_an_ordinary_checkpoint(
    verifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    overrides = ["model=tiny", "calibration.prompts=3", *f"verifier={verifier}".split()]
    folder = tmp_path / "exported"
    export_verifier(folder, overrides, Reporter())
    _byte_tokenizer().save_pretrained(folder)
    exported = built(*overrides)
    read = built("model=path", f"model.path={folder}", "verifier=fp16")
    assert torch.equal(logits(read), logits(exported))
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = oracle(TOKENS.unsqueeze(0)).logits[0]
    ours = (
        built(*overrides, "verifier.dtype=float32").teacher_forced(TOKENS, 0)
        if verifier == "fp16"
        else logits(read)[:60]
    )
    assert torch.allclose(ours.float(), theirs, atol=0.15)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (
            "pruned verifier.importance=wanda verifier.ratio=0.3",
            "the layers differ .MLP widths .*verifier.uniform=true",
        ),
        (
            "pruned verifier.importance=flap verifier.ratio=0.1667 verifier.uniform=true",
            "model_type qwen2 cannot express (output|down)_bias=True",
        ),
        ("bnb_nf4", "Linear4bit"),
    ],
)
def test_what_no_config_can_say_is_refused_and_leaves_no_folder(
    verifier: str, message: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    overrides = ["model=path", f"model.path={base}", "calibration.prompts=3", *f"verifier={verifier}".split()]
    with pytest.raises(RequestError, match=message):
        export_verifier(tmp_path / "exported", overrides, Reporter())
    assert not list(tmp_path.glob("*exported*"))


def test_the_command_says_how_to_read_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    done = CliRunner().invoke(app, ["export", str(folder), "model=tiny", "verifier=int8", "verifier.method=rtn"])
    assert done.exit_code == 0, done.output
    assert f"verifier=packed verifier.path={folder}" in done.output
    assert "scale per token and group" in done.output
    again = CliRunner().invoke(app, ["export", str(folder), "model=tiny", "verifier=int8"])
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_integers_are_packed_from_the_low_bits_on() -> None:
    """The format's own definition, and the inverse of the reader."""
    values = torch.arange(10).unsqueeze(0).to(torch.uint8)
    assert pack(values, 4).tolist() == [[sum(value << (4 * place) for place, value in enumerate(range(8))), 0x98]]
    assert pack(torch.tensor([[0, 0, 0, 255]], dtype=torch.uint8), 8).tolist() == [[-(1 << 24)]]
    for bits in (4, 8):
        values = torch.randint(0, 1 << bits, (6, 40), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
        assert torch.equal(unpack(pack(values, bits), bits), values)


def test_smoothed_norms_are_exported(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmoothQuant changes the norms; the original ones with these weights would be another model."""
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    source = ["model=path", f"model.path={base}", "calibration.prompts=3"]
    export_verifier(tmp_path / "exported", [*source, "verifier=int8", "verifier.alpha=0.5"], Reporter())
    name = "model.layers.0.input_layernorm.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (Path(base), tmp_path / "exported"))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("verifier", ["int8", "fp8", "int4 verifier.method=rtn verifier.symmetric=false"])
def test_the_library_of_compressed_tensors_agrees(
    verifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")
    folder = tmp_path / "exported"
    overrides = ["model=tiny", "calibration.prompts=3", *f"verifier={verifier}".split()]
    export_verifier(folder, overrides, Reporter())
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    (scheme,) = schemes.QuantizationConfig.model_validate(raw).config_groups.values()
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.2.mlp.down_proj."
    layer = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
    theirs = library.BaseCompressor.get_value_from_registry(scheme.format).decompress(layer, scheme)["weight"]
    rows = open_packed(folder).packed(f"{name}weight")
    assert rows is not None
    assert torch.equal(theirs.float(), rows.restored())
