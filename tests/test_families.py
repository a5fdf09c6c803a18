"""Families of models that differ from Llama in norms, activations, windows and multipliers, against transformers."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from quasar_kernels import cpu
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    SmolLM3Config,
)

from quasar.config.build import build
from quasar.config.schema import ModelSource, PackageSource
from quasar.decoding.draft import ROOT, Draft
from quasar.errors import QuasarError, RequestError
from quasar.experiment.export import export_verifier
from quasar.model.config import RopeConfig
from quasar.model.config_file import config_of, read_config
from quasar.model.execution.cpu_tape import CpuTapeExecutor
from quasar.model.gguf_file import GGUFFile
from quasar.model.loading import load_transformer
from quasar.model.rope import head_order
from quasar.model.sources import locate
from quasar.model.tokenizer import _byte_tokenizer
from quasar.model.transformer import Transformer
from quasar.quantization.packed import load_packed
from quasar.quantization.rotation import Rotation
from quasar.quantization.smoothing import fold
from quasar.quantization.statistics import Calibration
from quasar.results.console import Reporter
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.transformer import TransformerVerifier
from tests.blocks import logits_in_blocks
from tests.compose import composed_run
from tests.gguf_files import add_shape, finish
from tests.selection import fast

SMALL: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SMALL, "head_dim": 32, "sliding_window": 20, "tie_word_embeddings": True}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(12)],
    "long_factor": [2.0 + 0.5 * index for index in range(12)],
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(**GEMMA, query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    ),
    "phi3": Phi3Config(**SMALL, sliding_window=20),
    "phi4": Phi3Config(**SMALL, rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 0.75}),
    "phi3-longrope": Phi3Config(
        **SMALL,
        original_max_position_embeddings=256,
        rope_parameters={**LONGROPE, "partial_rotary_factor": 0.75},
    ),
    "smollm3": SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1, 0]),
    "smollm3-sliding": SmolLM3Config(**SMALL, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=20),
    "olmo2": Olmo2Config(**SMALL),
    "granite": GraniteConfig(
        **SMALL, embedding_multiplier=6.0, attention_multiplier=0.15, residual_multiplier=0.22, logits_scaling=4.0
    ),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=20),
    "qwen2-sliding": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=20, max_window_layers=2),
}
SETUP = Setup(calibration=lambda: Calibration([torch.arange(200) % 211, torch.arange(150) * 7 % 211], {"text": "test"}))
TOKENS = torch.randint(0, 211, (150,), generator=torch.Generator().manual_seed(5))


def saved(name: str, folder: Path) -> Any:
    """Save a transformers model with random weights and return it. No norm and no bias has its trivial value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Transformer, torch.Tensor]:
    """A model in float32, and the logits of `TOKENS` by transformers."""
    theirs = saved(request.param, tmp_path)
    with torch.no_grad():
        return load_transformer(tmp_path, torch.float32), theirs(TOKENS[None]).logits[0]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_logits_equal_transformers(pair: tuple[Transformer, torch.Tensor]) -> None:
    """The text is several times as long as the windows."""
    ours, theirs = pair
    assert relative_error(ours(TOKENS), theirs) < 1e-4


def test_chains_and_rollback_equal_one_pass(pair: tuple[Transformer, torch.Tensor]) -> None:
    ours, theirs = pair
    found = logits_in_blocks(ours, TOKENS, (1, 5, 3, 8, 2, 7, 4, 9, 30))
    assert relative_error(found, theirs[19 : 19 + len(found)]) < 1e-4


def test_nodes_of_a_tree_equal_transformers(tmp_path: Path, pair: tuple[Transformer, torch.Tensor]) -> None:
    """The context is longer than the windows, so that a node's window ends within the context or the tree."""
    ours, _ = pair
    prompt, last = TOKENS[:30], 9
    draft = Draft(tokens=[10, 11, 12, 13, 14], parents=[ROOT, 0, 0, ROOT, 3])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    verifier = FP16Verifier(ours, Setup())
    verifier.prefill(prompt)
    logits = verifier.verify(last, draft).logits
    for node, path in enumerate([[10], [10, 11], [10, 12], [13], [13, 14]]):
        whole = torch.tensor([[*prompt.tolist(), last, *path]])
        with torch.no_grad():
            assert relative_error(logits[node + 1], theirs(whole).logits[0, -1]) < 1e-4
    verifier.keep([0, 2])
    after = verifier.verify(20, Draft()).logits
    with torch.no_grad():
        alone = theirs(torch.tensor([[*prompt.tolist(), last, 10, 12, 20]])).logits[0, -1]
    assert relative_error(after[0], alone) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["fp16", "int8 verifier.method=rtn"])
def test_bfloat16_passes_are_recorded_and_exact(name: str, kind: str, tmp_path: Path) -> None:
    """On a CPU, a chain has the bits of single tokens, in every family, and no family falls back to eager passes."""
    if cpu.backend() is None:
        pytest.skip("this machine cannot compile the CPU kernels")
    saved(name, tmp_path)
    verifier = made(kind, load_transformer(tmp_path, torch.bfloat16))
    assert isinstance(verifier.executor, CpuTapeExecutor)
    verifier.prefill(TOKENS[:8])
    single = []
    for token in TOKENS[8:60].tolist():
        single.append(verifier.verify(token, Draft()).logits)
        verifier.keep([])
    chained = []
    verifier.rewind(0)
    verifier.prefill(TOKENS[:8])
    for part in TOKENS[8:60].split([7, 1, 20, 24]):
        last, *rest = part.tolist()
        chained.append(verifier.verify(last, Draft.chain(rest)).logits)
        verifier.keep(range(len(rest)))
    assert torch.equal(torch.cat(chained), torch.cat(single))


def made(choice: str, model: Transformer) -> TransformerVerifier:
    name, *options = choice.split()
    settings = composed_run(f"verifier={name}", *options).verifier
    verifier: TransformerVerifier = build("verifier", settings, model, SETUP)
    return verifier


CHOICES = (
    "int8",
    "int8 verifier.method=gptq verifier.lm_head_bits=8",
    "int8_paper",
    "int4",
    "int4 verifier.method=awq verifier.symmetric=false",
    "int4 verifier.method=rtn verifier.activation_bits=8",
    "fp8",
    "pruned verifier.ratio=0.2",
    "pruned verifier.ratio=0.2 verifier.importance=taylor",
    "pruned verifier.ratio=0.2 verifier.importance=wanda verifier.heads=true",
    "pruned verifier.ratio=0.3 verifier.method=depth",
)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", fast(["gemma3", "gemma2", "phi4", "olmo2", "granite"], "gemma3", "phi4"))
def test_every_verifier_of_a_family(name: str, choice: str, tmp_path: Path) -> None:
    """The verifier is closer to the model than chance, and its chains equal its single passes."""
    saved(name, tmp_path)
    reference = load_transformer(tmp_path, torch.float32)
    expected = reference(TOKENS[:60]).double()
    if name == "olmo2" and "heads=true" in choice:
        with pytest.raises(RequestError, match="normalizes the queries and keys of all heads together"):
            made(choice, reference)
        return
    verifier = made(choice, reference)
    found = verifier.teacher_forced(TOKENS[:60], 0).double()
    agreement = torch.cosine_similarity(found, expected[-len(found) :], dim=-1).mean()
    # Random weights are hard to quantize: four bits leave 0.87 to 0.99, a wrongly folded scale hardly anything.
    least = {"pruned": 0.5, "int4": 0.8}.get(choice.split()[0], 0.98)
    assert agreement > least, float(agreement)
    verifier.rewind(0)
    verifier.prefill(TOKENS[:30])
    logits = verifier.verify(int(TOKENS[30]), Draft.chain(TOKENS[31:45].tolist())).logits
    assert relative_error(logits.double(), found[30 - 60 + len(found) :][: len(logits)]) < 1e-3


@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_rotation_of_post_norms_is_refused(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    with pytest.raises(RequestError, match="rotation=hadamard: this model normalizes the outputs"):
        made("int4 verifier.rotation=hadamard", load_transformer(tmp_path, torch.float32))


@pytest.mark.parametrize("name", ["granite", "phi4", "smollm3"])
def test_rotation_without_post_norms_keeps_the_function(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    model = load_transformer(tmp_path, torch.float32)
    expected = model(TOKENS)
    rotation = Rotation(model)
    for block in model.blocks:
        rotation.rotate(block)
    assert relative_error(model(TOKENS), expected) < 1e-3


def test_one_plus_survives_smoothing(tmp_path: Path) -> None:
    """Scales are folded into 1 + weight, not into the weight."""
    saved("gemma3", tmp_path)
    model = load_transformer(tmp_path, torch.float32)
    expected = model(TOKENS)
    block = model.blocks[1]
    scales = torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.5
    fold(block, "attention.qkv", scales)
    fold(block, "mlp.gate_up", scales)
    assert relative_error(model(TOKENS), expected) < 1e-5


def test_order_of_partly_rotated_heads() -> None:
    assert head_order(RopeConfig(share=0.5), 8) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert head_order(RopeConfig(), 8) is None
    assert head_order(RopeConfig(type="none"), 8) is None


GEMMA3_V4 = {
    "model_type": "gemma3_text", "vocab_size": 211, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32,
    "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 20,
    "sliding_window_pattern": 3, "rope_theta": 500_000.0, "rope_local_base_freq": 9_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


def test_gemma3_config_of_transformers_4() -> None:
    config = config_of(GEMMA3_V4)
    assert [layer.window for layer in config.layers] == [20, 20, None, 20, 20, None, 20]
    assert [layer.second_rope for layer in config.layers] == [True, True, False, True, True, False, True]
    assert (config.rope.theta, config.rope.type, config.rope.parameters) == (500_000.0, "linear", {"factor": 8.0})
    assert config.second_rope == RopeConfig(9_000.0)
    assert config.attention_scale == 256**-0.5
    assert config_of({**GEMMA3_V4, "query_pre_attn_scalar": 32}).attention_scale is None


LLAMA = {
    "model_type": "llama", "vocab_size": 211, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 100),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 400),
        ({"model_type": "mistral", "sliding_window": 30}, 100),
    ],
)
def test_context_length(changes: dict[str, Any], length: int) -> None:
    """YaRN extends the original context by its factor; a window does not end it."""
    assert config_of({**LLAMA, **changes}).context_length == length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 changes what the model computes"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 changes"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 changes"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act=gelu_pytorch_tanh is not supported for llama"),
        ({"model_type": "gemma3"}, "model_type 'gemma3'"),
        ({"model_type": "gemma2", "hidden_act": "silu"}, "hidden_act=silu is not supported for gemma2"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True changes"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.35}, "rotates 11 elements; it must be even"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 entries"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ],
)
def test_keys_of_other_families_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        config_of({**LLAMA, **changes})


def test_a_gguf_file_of_gemma3(tmp_path: Path) -> None:
    """It has the config and the tensors of the checkpoint: norms are stored as 1 + weight, layer types not at all."""
    pattern = ["full_attention" if layer == 5 else "sliding_attention" for layer in range(7)]
    config = Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 7}, layer_types=pattern, query_pre_attn_scalar=32)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.2 if "norm" in name else 0.1)
    model.save_pretrained(tmp_path / "folder")
    file = GGUFFile(write_gemma3(tmp_path / "model.gguf", model))
    expected = read_config(tmp_path / "folder")
    assert replace(file.config, rms_norm_eps=expected.rms_norm_eps) == expected
    stored = model.state_dict()
    assert file.shapes.keys() == stored.keys() - {"lm_head.weight"}
    for name in file.shapes:
        assert torch.allclose(file.dense(name), stored[name], atol=1e-6), name


def write_gemma3(file: Path, model: Any) -> Path:
    """Write a file as llama.cpp converts it: it adds 1 to the weights of all norms."""
    config = model.config
    writer = GGUFWriter(file, "gemma3")
    add_shape(writer, config, config.max_position_embeddings)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config.sliding_window)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            shifted = tensor + 1 if "norm" in name else tensor
            writer.add_tensor(gemma3_name(name), shifted.numpy())
    finish(writer)
    return file


def gemma3_name(name: str) -> str:
    """Return the name of a tensor in llama.cpp."""
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, index, rest = name.split(".", 3)
        return f"blk.{index}.{names[rest]}.weight"
    return f"{names[name]}.weight"


def with_terms(sha256: str) -> ModelSource:
    package = PackageSource(
        requirement="some-model==1.0",
        download_bytes=1,
        file="model.gguf",
        sha256=sha256,
        parts=["some_model_one/data/model.part0", "some_model_two/data/model.part1"],
        terms="https://example.com/terms",
    )
    return ModelSource(name="some", source="package", package=package)


def test_a_package_with_terms_is_never_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar.model.sources.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("quasar.model.sources.subprocess.Popen", None)  # pip is not run
    with pytest.raises(RequestError, match=r"terms at https://example\.com/terms .* pip install some-model==1\.0"):
        locate(with_terms("0" * 64))


def test_the_parts_of_an_installed_package_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is that of the joined file, and the file is read as GGUF only if it is the expected one."""
    monkeypatch.setattr("quasar.model.sources.cache_folder", lambda: tmp_path / "cache")
    for name, part, content in (("one", 0, b"GG"), ("two", 1, b"UF")):
        data = tmp_path / f"some_model_{name}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"model.part{part}").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256(b"GGUF").hexdigest()
    with pytest.raises(QuasarError, match=f"has SHA-256 {digest}, expected 000"):
        locate(with_terms("0" * 64))
    with pytest.raises(RequestError, match=r"model\.gguf: not a readable GGUF file"):
        locate(with_terms(digest))


def test_partly_rotated_heads_of_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    """Their rows would have to change places, so that reading them as they are would be wrong."""
    saved("phi4", tmp_path)
    checkpoint: Any = SimpleNamespace(path=tmp_path, config=read_config(tmp_path))
    with pytest.raises(RequestError, match=r"partial_rotary_factor=0\.75 is supported for unquantized weights only"):
        load_packed(checkpoint, torch.float32, torch.device("cpu"), 16, lambda done, total: None)


@pytest.mark.parametrize("name", ["gemma3", "phi3", "phi4", "granite", "olmo2"])
def test_an_exported_family_is_read_back(name: str, tmp_path: Path) -> None:
    """The file has the tensors of a checkpoint, under their names. Heads that are rotated in part are refused."""
    saved(name, tmp_path / "model")
    choice = ["model=path", f"model.path={tmp_path / 'model'}", "verifier=fp16", "device=cpu", "verifier.dtype=float32"]
    _byte_tokenizer().save_pretrained(tmp_path / "model")
    reporter = Reporter()
    if name == "phi4":
        with pytest.raises(RequestError, match="rotates 24 of 32 elements of a head"):
            export_verifier(tmp_path / "out", choice, reporter)
        return
    export_verifier(tmp_path / "out", choice, reporter)
    first, again = (load_transformer(tmp_path / folder, torch.float32) for folder in ("model", "out"))
    assert torch.equal(first(TOKENS), again(TOKENS))
