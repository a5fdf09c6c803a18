"""Checkpoints of other quantizers, which are written here by the rules of each format or by gguf's quantizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from quasar_kernels import cpu
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quasar.errors import RequestError
from quasar.model.execution.cpu_tape import CpuTapeExecutor
from quasar.model.loading import load_transformer, random_transformer, tiny_config
from quasar.quantization.layers import W4Linear, W8A8Linear
from quasar.verifiers.base import Setup
from quasar.verifiers.packed import PackedVerifier
from tests.gguf_files import is_linear, write_gguf

TOKENS = torch.arange(40) % 90
GROUP = 32
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def dense_folder(dense: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    dense.save_pretrained(folder)
    return folder


def verifier(path: Path, dense_folder: Path) -> PackedVerifier:
    return PackedVerifier(load_transformer(dense_folder, torch.float32), Setup(), path=str(path))


@torch.no_grad()
def expected_logits(dense: LlamaForCausalLM, restored: dict[str, Tensor]) -> Tensor:
    """Return what transformers computes with the restored weights."""
    model = LlamaForCausalLM(CONFIG).eval()
    model.load_state_dict({**dense.state_dict(), **restored})
    return model(TOKENS.unsqueeze(0)).logits[0]


def grid(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round-to-nearest int4: values in 0..15 [N, K], scales [N, G], zeros [N, G]."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    if symmetric:
        scales, zeros = groups.abs().amax(2) / 7, torch.full_like(low, 8)
    else:
        scales = (high - low) / 15
        zeros = torch.round(-low / scales).clamp(1, 15)
    values = (torch.round(groups / scales.unsqueeze(2)) + zeros.unsqueeze(2)).clamp(0, 15)
    return values.view_as(weight).int(), scales, zeros.int()


def restored(values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    groups = values.view(*scales.shape, GROUP)
    return ((groups - zeros.unsqueeze(2)) * scales.unsqueeze(2)).view(values.shape)


def into_int32(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight values of a row in one int32; ``order[j]`` is the one that goes to bits 4 j."""
    chunks = values.view(len(values), -1, 8).long()
    packed = sum(chunks[:, :, source] << (4 * place) for place, source in enumerate(order))
    return (packed - ((packed >> 31) << 32)).int()


def gptq_tensors(
    layer: str, values: Tensor, scales: Tensor, zeros: Tensor, group_of_input: Tensor
) -> dict[str, Tensor]:
    """A layer with values in 0..15 as a GPTQ checkpoint stores it: weights packed along the inputs, zeros less 1."""
    return {
        f"{layer}.qweight": into_int32(values).T,
        f"{layer}.qzeros": into_int32(zeros.T.contiguous() - 1),
        f"{layer}.scales": scales.T,
        f"{layer}.g_idx": group_of_input.int(),
    }


def assert_recorded(path: Path) -> None:
    """A checkpoint with 96 tokens runs from a tape, which computes the same as its calls one by one."""
    if cpu.backend() is None:
        pytest.skip("this machine cannot compile the CPU kernels")
    model = random_transformer(tiny_config(vocab_size=96), 0, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = PackedVerifier(model, Setup(), path=str(path))
    assert isinstance(found.executor, CpuTapeExecutor)
    rows = torch.arange(9) * 5, torch.arange(9), torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(found.executor(*rows).clone(), found.executor.eagerly(*rows))


def write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, object]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "quantization_config": quantization}))
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_four_bit_safetensors(
    method: str, symmetric: bool, dense: LlamaForCausalLM, dense_folder: Path, tmp_path: Path
) -> None:
    tensors, back = {}, {}
    for name, weight in dense.state_dict().items():
        if not is_linear(name):
            tensors[name] = weight
            continue
        values, scales, zeros = grid(weight, symmetric)
        back[name] = restored(values, scales, zeros)
        layer = name.removesuffix(".weight")
        if method == "gptq":
            tensors |= gptq_tensors(layer, values, scales, zeros, torch.arange(weight.shape[1]) // GROUP)
        elif method == "awq":
            tensors[f"{layer}.qweight"] = into_int32(values.T.contiguous(), (0, 2, 4, 6, 1, 3, 5, 7))
            tensors[f"{layer}.qzeros"] = into_int32(zeros.T.contiguous(), (0, 2, 4, 6, 1, 3, 5, 7))
            tensors[f"{layer}.scales"] = scales.T
        else:
            tensors[f"{layer}.weight_packed"] = into_int32(values)
            tensors[f"{layer}.weight_scale"] = scales
            tensors[f"{layer}.weight_shape"] = torch.tensor(weight.shape)
            if not symmetric:
                tensors[f"{layer}.weight_zero_point"] = into_int32(zeros.T.contiguous()).T
    quantization: dict[str, object] = {"quant_method": method, "bits": 4, "group_size": GROUP}
    if method == "compressed-tensors":
        quantization = compressed({"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": symmetric})
    folder = write(tmp_path, tensors, quantization)
    found = verifier(folder, dense_folder)
    assert isinstance(found.model.blocks[0].attention.qkv, W4Linear)
    assert found.model.blocks[0].attention.qkv.weight.symmetric == symmetric
    assert torch.allclose(found.model(TOKENS), expected_logits(dense, back), atol=1e-4)
    assert_recorded(folder)


def compressed(
    weights: dict[str, object], form: str = "pack-quantized", inputs: dict[str, object] | None = None
) -> dict[str, object]:
    """The config of a checkpoint of compressed-tensors whose linear layers but lm_head are all quantized alike."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def test_w8a8_safetensors(dense: LlamaForCausalLM, dense_folder: Path, tmp_path: Path) -> None:
    tensors = {}
    for name, weight in dense.state_dict().items():
        if is_linear(name):
            scales = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = torch.round(weight / scales).to(torch.int8)
            tensors[name.replace(".weight", ".weight_scale")] = scales
        else:
            tensors[name] = weight
    inputs = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    quantization = compressed({"num_bits": 8, "strategy": "channel"}, "int-quantized", inputs)
    folder = write(tmp_path, tensors, quantization)
    layer = verifier(folder, dense_folder).model.blocks[1].mlp.down
    assert isinstance(layer, W8A8Linear)
    weight = dense.model.layers[1].mlp.down_proj.weight
    x = torch.randn(3, 256)
    assert torch.allclose(layer(x), x @ weight.T, atol=0.02)
    assert not torch.allclose(layer(x), x @ weight.T, atol=1e-6)
    assert_recorded(folder)


def test_what_cannot_be_read_is_named(dense: LlamaForCausalLM, dense_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"verifier\.path=.*nowhere: no such file"):
        verifier(tmp_path / "nowhere", dense_folder)
    with pytest.raises(RequestError, match=r"quant_method is None; supported are compressed-tensors, gptq, awq, bits"):
        verifier(dense_folder, dense_folder)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    with pytest.raises(RequestError, match=r"cut\.gguf: not a readable GGUF file"):
        verifier(tmp_path / "cut.gguf", dense_folder)
    write_gguf(tmp_path / "mxfp4.gguf", dense, GGMLQuantizationType.MXFP4)
    with pytest.raises(RequestError, match=r"attn_q\.weight is MXFP4; only Q8_0, Q4_0, .* can stay quantized"):
        verifier(tmp_path / "mxfp4.gguf", dense_folder)
    folder = write(tmp_path, dict(dense.state_dict()), {"quant_method": "gptq", "bits": 4, "rotation": "hadamard"})
    with pytest.raises(RequestError, match=r"quantization_config: rotation=\"hadamard\""):
        verifier(folder, dense_folder)
