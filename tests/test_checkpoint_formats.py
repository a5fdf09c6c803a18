"""Quantized checkpoints of every encoding, against a definition in float64 and the formats' libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quasar.errors import RequestError
from quasar.model.gguf_file import GGUFFile, write_dequantized
from quasar.model.loading import load_transformer
from quasar.model.sources import Checkpoint, hash_of_parts, locate
from quasar.model.transformer import Transformer
from quasar.quantization.layers import Fp8Linear, GroupInt8Linear, W4Linear, W8A8Linear, W8A16Linear
from quasar.quantization.packed import load_packed, load_reference, open_packed, quantized_share
from quasar.quantization.packed_safetensors import SafetensorsCheckpoint
from tests.gguf_files import is_linear, write_gguf
from tests.test_packed import CONFIG, GROUP, TOKENS, assert_recorded, gptq_tensors, write

Change = Callable[[dict], None]


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    """A model whose logits are of size 8, so that a wrong weight shows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 1.0 if "embed" in name else 2.5 * parameter.shape[1] ** -0.5)
    with torch.no_grad():
        assert 4 < model(TOKENS.unsqueeze(0)).logits.abs().max() < 16
    return model


@torch.no_grad()
def logits_of(dense: LlamaForCausalLM, restored: dict[str, Tensor], config: LlamaConfig = CONFIG) -> Tensor:
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({**dense.state_dict(), **restored})
    return model(TOKENS.unsqueeze(0)).logits[0]


def into_words(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers of a row in int32, the first in the low bits."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % per_word)).view(len(values), -1, per_word)
    packed = sum(padded[:, :, place] << (bits * place) for place in range(per_word))
    return (packed - ((packed >> 31) << 32)).int()


class Layer:
    """A quantized matrix: signed integers [N, K], scales and zeros [N, G], and the group of every input [K]."""

    def __init__(
        self, weight: Tensor, bits: int, strategy: str, symmetric: bool = True, shuffled: bool = False
    ) -> None:
        rows, columns = weight.shape
        size = GROUP if strategy == "group" else columns
        self.bits, self.strategy, self.symmetric, self.size = bits, strategy, symmetric, size
        self.group_of = torch.arange(columns) // size
        if shuffled:
            self.group_of = self.group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        top = (1 << (bits - 1)) - 1
        groups = torch.stack([weight[:, self.group_of == group] for group in range(columns // size)], dim=1)
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        self.scales = groups.abs().amax(2) / top if symmetric else (high - low) / (2 * top + 1)
        if strategy == "tensor":
            self.scales = self.scales.amax().expand(rows, 1).clone()
        self.zeros = torch.zeros_like(low) if symmetric else torch.round(-top - 1 - low / self.scales)
        self.values = torch.round(weight / self.scales[:, self.group_of]) + self.zeros[:, self.group_of]
        self.values = self.values.clamp(-top - 1, top)

    def restored(self) -> Tensor:
        """In float64, input by input."""
        zeros, scales = self.zeros.double()[:, self.group_of], self.scales.double()[:, self.group_of]
        return ((self.values.double() - zeros) * scales).float()

    def packed(self, name: str) -> dict[str, Tensor]:
        offset = 1 << (self.bits - 1)
        tensors = {
            f"{name}.weight_packed": into_words(self.values + offset, self.bits),
            f"{name}.weight_scale": self.stored_scales(),
            f"{name}.weight_shape": torch.tensor(self.values.shape),
        }
        if not self.symmetric:
            tensors[f"{name}.weight_zero_point"] = into_words((self.zeros + offset).T, self.bits).T
        return tensors

    def stored_scales(self) -> Tensor:
        return self.scales[:1, 0] if self.strategy == "tensor" else self.scales

    def arguments(self) -> dict[str, object]:
        size = {"group_size": self.size} if self.strategy == "group" else {}
        return {"num_bits": self.bits, "type": "int", "strategy": self.strategy, "symmetric": self.symmetric, **size}


def quantization(groups: dict[str, tuple[list[str], Layer]], form: str = "pack-quantized") -> dict:
    schemes = {name: {"targets": targets, "weights": layer.arguments()} for name, (targets, layer) in groups.items()}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": schemes,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def loaded(folder: Path, dequantize: bool = False) -> Transformer:
    checkpoint = open_packed(folder)
    return load_packed(checkpoint, torch.float32, torch.device("cpu"), 16, lambda *_: None, dequantize)


def written(
    folder: Path, dense: LlamaForCausalLM, make: Callable[[str, Tensor], Layer], form: str = "pack-quantized"
) -> dict[str, Tensor]:
    """Write a checkpoint of compressed-tensors; returns its dequantized weights. ``make`` chooses the encoding."""
    tensors, back, kinds = {}, {}, {}
    for name, weight in dense.state_dict().items():
        if not is_linear(name):
            tensors[name] = weight
            continue
        layer = make(name, weight)
        back[name] = layer.restored()
        key = name.split(".")[-3]
        kinds[key] = ([f"re:.*{key}.*"], layer)
        tensors |= layer.packed(name.removesuffix(".weight"))
    write(folder, tensors, quantization(kinds, form))
    return back


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "strategy"), [(8, "channel"), (8, "group"), (4, "channel"), (4, "group")])
def test_packed_integers_of_both_widths(
    bits: int, strategy: str, symmetric: bool, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    back = written(tmp_path, dense, lambda name, weight: Layer(weight, bits, strategy, symmetric))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert all(torch.allclose(checkpoint.dense(name), weight, atol=1e-6) for name, weight in back.items())
    expected = logits_of(dense, back)
    assert torch.allclose(loaded(tmp_path, dequantize=True)(TOKENS), expected, atol=1e-3)
    model = loaded(tmp_path)
    # W8A16 takes activations as integers of 15 bit.
    assert torch.allclose(model(TOKENS), expected, atol=2e-2)
    kind = W4Linear if bits == 4 else W8A16Linear if strategy == "channel" and symmetric else GroupInt8Linear
    assert isinstance(model.blocks[0].mlp.down, kind)
    assert_recorded(tmp_path)
    assert not torch.allclose(expected, logits_of(dense, {}), atol=1e-2), "the quantization must show"


def test_eight_bit_attention_beside_four_bit_mlp(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    """The module's name chooses the scheme, not the first group and not the shape."""
    back = written(tmp_path, dense, lambda name, weight: Layer(weight, 8 if "attn" in name else 4, "group"))
    model = loaded(tmp_path)
    assert isinstance(model.blocks[1].attention.qkv, GroupInt8Linear)
    assert isinstance(model.blocks[1].mlp.gate_up, W4Linear)
    assert torch.allclose(model(TOKENS), logits_of(dense, back), atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_output_layer_stays_quantized_too(bits: int, dense: LlamaForCausalLM, tmp_path: Path) -> None:
    back = written(tmp_path, dense, lambda name, weight: Layer(weight, bits, "group"))
    file = tmp_path / "model.safetensors"
    tensors, head = load_file(file), Layer(dense.lm_head.weight.detach(), bits, "group")
    del tensors["lm_head.weight"]
    save_file({**tensors, **{name: part.contiguous() for name, part in head.packed("lm_head").items()}}, file)
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = config["quantization_config"]
    quantized["config_groups"]["head"] = {"targets": ["lm_head"], "weights": head.arguments()}
    quantized["ignore"] = []
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = loaded(tmp_path)
    assert isinstance(model.lm_head, W4Linear if bits == 4 else GroupInt8Linear)
    assert torch.allclose(model(TOKENS), logits_of(dense, {**back, "lm_head.weight": head.restored()}), atol=1e-3)
    assert_recorded(tmp_path)


def test_a_name_goes_before_an_expression_and_that_before_a_class(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    """As in compressed-tensors, in whatever order the groups are written."""
    exact = "model.layers.0.mlp.down_proj"
    back = written(tmp_path, dense, lambda name, weight: Layer(weight, 8 if exact in name else 4, "group"))
    config = json.loads((tmp_path / "config.json").read_text())
    wide, narrow = Layer(torch.randn(8, 64), 8, "group").arguments(), Layer(torch.randn(8, 64), 4, "group").arguments()
    config["quantization_config"]["config_groups"] = {
        "a": {"targets": ["Linear"], "weights": narrow},
        "b": {"targets": ["re:.*down_proj"], "weights": narrow},
        "c": {"targets": [exact], "weights": wide},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.allclose(loaded(tmp_path)(TOKENS), logits_of(dense, back), atol=1e-3)


@pytest.mark.parametrize("shape", [(1,), (), (1, 1)])
@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "dynamic": True, "strategy": "token"}])
def test_one_scale_per_tensor(
    shape: tuple[int, ...], inputs: dict | None, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    """int8 with a single scale: the kernels read one for each output, so it is repeated."""
    tensors, back = {}, {}
    for name, weight in dense.state_dict().items():
        tensors[name] = weight
        if is_linear(name):
            layer = Layer(weight, 8, "tensor")
            tensors[name], back[name] = layer.values.to(torch.int8), layer.restored()
            tensors[f"{name}_scale"] = layer.stored_scales().reshape(shape)
    config = quantization({"all": (["Linear"], layer)}, "int-quantized")
    config["config_groups"]["all"]["input_activations"] = inputs
    write(tmp_path, tensors, config)
    model = loaded(tmp_path)
    assert isinstance(model.blocks[0].attention.qkv, W8A16Linear if inputs is None else W8A8Linear)
    expected = logits_of(dense, back)
    # int8 activations round too: they are compared on one layer, where errors do not add up.
    if inputs is None:
        assert torch.allclose(model(TOKENS), expected, atol=2e-2)
    assert torch.equal(model(TOKENS), loaded(tmp_path)(TOKENS))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    down = back["model.layers.1.mlp.down_proj.weight"]
    assert torch.allclose(model.blocks[1].mlp.down(x), x @ down.T, atol=1e-3 if inputs is None else 0.2)


@pytest.mark.parametrize("order", ["shuffled", "identity", "minus one"])
@pytest.mark.parametrize("bits", [4, 8])
def test_activation_order_of_compressed_tensors(order: str, bits: int, dense: LlamaForCausalLM, tmp_path: Path) -> None:
    back = written(tmp_path, dense, lambda name, weight: Layer(weight, bits, "group", shuffled=order == "shuffled"))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("weight_shape")]:
        columns = int(tensors[name][1])
        group_of = Layer(torch.ones(1, columns), bits, "group", shuffled=order == "shuffled").group_of
        stored = torch.full_like(group_of, -1) if order == "minus one" else group_of
        tensors[name.replace("weight_shape", "weight_g_idx")] = stored.int()
    save_file(tensors, file)
    assert torch.allclose(loaded(tmp_path, dequantize=True)(TOKENS), logits_of(dense, back), atol=1e-3)
    assert torch.allclose(loaded(tmp_path)(TOKENS), logits_of(dense, back), atol=1e-3)
    assert_recorded(tmp_path)
    tensors[next(name for name in tensors if name.endswith("g_idx"))][0] += 1
    save_file(tensors, file)
    with pytest.raises(RequestError, match=r"weight_g_idx does not assign 32 inputs"):
        loaded(tmp_path)


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_activation_order_of_gptq(activation_bits: int, dense: LlamaForCausalLM, tmp_path: Path) -> None:
    tensors, back = {}, {}
    for name, weight in dense.state_dict().items():
        if not is_linear(name):
            tensors[name] = weight
            continue
        made, layer = Layer(weight, 4, "group", shuffled=True), name.removesuffix(".weight")
        back[name] = made.restored()
        tensors |= gptq_tensors(layer, made.values.int() + 8, made.scales, made.zeros.int() + 8, made.group_of)
    write(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True})
    expected = logits_of(dense, back)
    model = load_packed(open_packed(tmp_path), torch.float32, torch.device("cpu"), activation_bits, lambda *_: None)
    assert torch.allclose(model(TOKENS), expected, atol=1e-3 if activation_bits == 16 else 1.5)
    assert_recorded(tmp_path)
    assert torch.allclose(loaded(tmp_path, dequantize=True)(TOKENS), expected, atol=1e-3)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shuffled", [True, False])
def test_gptq_of_eight_bits(
    shuffled: bool, symmetric: bool, version: str, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    tensors, back = {}, {}
    for name, weight in dense.state_dict().items():
        if not is_linear(name):
            tensors[name] = weight
            continue
        made, layer = Layer(weight, 8, "group", symmetric, shuffled), name.removesuffix(".weight")
        back[name] = made.restored()
        stored_zeros = made.zeros + (127 if version == "gptq" else 128)
        tensors[f"{layer}.qweight"] = into_words(made.values + 128, 8).T.contiguous()
        tensors[f"{layer}.qzeros"] = into_words(stored_zeros.T.contiguous(), 8)
        tensors[f"{layer}.scales"] = made.scales.T.contiguous()
        tensors[f"{layer}.g_idx"] = made.group_of.int()
    options = {"bits": 8, "group_size": GROUP, "desc_act": shuffled, "sym": symmetric, "checkpoint_format": version}
    write(tmp_path, tensors, {"quant_method": "gptq", **options})
    expected = logits_of(dense, back)
    assert torch.allclose(loaded(tmp_path)(TOKENS), expected, atol=1e-3)
    assert_recorded(tmp_path)
    assert torch.allclose(loaded(tmp_path, dequantize=True)(TOKENS), expected, atol=1e-3)


def in_config(key: str, value: object) -> Change:
    def change(config: dict) -> None:
        *owners, last = key.split(".")
        for owner in owners:
            config = config[owner]
        config[last] = value

    return change


GROUP_0 = "config_groups.self_attn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_config("transform_config", {"config_groups": {"R1": {"type": "hadamard"}}}), "transform_config changes"),
        (in_config("sparsity_config", {"format": "sparse-24-bitmask"}), "sparsity_config changes"),
        (in_config("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
        (in_config("format", "float-quantized"), "format"),
        (in_config("quantization_status", "frozen"), "quantization_status"),
        (in_config("nobody_knows", 1), "nobody_knows"),
        (in_config(f"{GROUP_0}.weights.num_bits", 3), r"weights\.num_bits=3"),
        (in_config(f"{GROUP_0}.weights.num_bits", 8), "weight_packed is I32"),
        (in_config(f"{GROUP_0}.weights.type", "float"), "weights of type float do not have the format pack-quantized"),
        (in_config(f"{GROUP_0}.weights.strategy", "block"), r"weights\.strategy"),
        (in_config(f"{GROUP_0}.weights.strategy", "channel"), "weight_scale is F32"),
        (in_config(f"{GROUP_0}.weights.group_size", 64), "weight_scale is F32"),
        (in_config(f"{GROUP_0}.weights.group_size", 48), "group_size=48 does not divide"),
        (in_config(f"{GROUP_0}.weights.symmetric", False), "weight_zero_point is missing"),
        (in_config(f"{GROUP_0}.weights.dynamic", True), "static weights"),
        (in_config(f"{GROUP_0}.weights.nobody_knows", 1), "nobody_knows"),
        (in_config(f"{GROUP_0}.input_activations", {"num_bits": 8, "dynamic": False}), "input_activations"),
        (in_config(f"{GROUP_0}.output_activations", {"num_bits": 8}), "output_activations"),
        (in_config(f"{GROUP_0}.targets", ["re:.*nothing"]), "weight is missing"),
        (in_config(f"{GROUP_0}.targets", ["re:("]), "no regular expression"),
        (in_config(f"{GROUP_0}.targets", ["re:(a+)+b"]), "nested repetitions"),
        (in_config("ignore", "lm_head"), "ignore"),
        (in_config("config_groups", {}), "config_groups"),
    ],
)
def test_what_compressed_tensors_may_say_and_this_reader_does_not_know(
    change: Change, message: str, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    written(tmp_path, dense, lambda name, weight: Layer(weight, 4, "group"))
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("rotation", "hadamard"), ("bits", 3), ("nobody_knows", 1), ("group_size", "128"), ("format", "x")],
)
def test_keys_of_gptq_and_awq(method: str, key: str, value: object, dense: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path, dict(dense.state_dict()), {"quant_method": method, "bits": 4, key: value})
    with pytest.raises(RequestError, match=f"quantization_config: {key}"):
        loaded(folder)


def test_a_tensor_that_no_format_knows_is_refused(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    written(tmp_path, dense, lambda name, weight: Layer(weight, 4, "group"))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match=r"k_scale, which config\.json does not imply"):
        loaded(tmp_path)


def test_the_library_of_compressed_tensors_agrees(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    for bits in (4, 8):
        for symmetric in (True, False):
            layer = Layer(dense.state_dict()["model.layers.0.mlp.down_proj.weight"], bits, "group", symmetric)
            tensors = {name.removeprefix("x."): value.contiguous() for name, value in layer.packed("x").items()}
            scheme = schemes.QuantizationScheme(targets=["Linear"], weights=layer.arguments())
            compressor = library.BaseCompressor.get_value_from_registry("pack-quantized")
            assert torch.allclose(compressor.decompress(tensors, scheme)["weight"], layer.restored(), atol=1e-6)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama3_factors() -> np.ndarray:
    """The divisors of the frequencies as the converter of llama.cpp writes them."""
    factors = []
    for index in range(0, 32, 2):
        wavelength = 2 * np.pi * 10000.0 ** (index / 32)
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        factors.append(8.0 if wavelength > 32 else 1.0 if wavelength < 8 else 1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(factors, dtype=np.float32)


def add_factors(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", llama3_factors())


def add_linear(writer: GGUFWriter) -> None:
    writer.add_string("llama.rope.scaling.type", "linear")
    writer.add_float32("llama.rope.scaling.factor", 4.0)


def add_old_linear(writer: GGUFWriter) -> None:
    writer.add_float32("llama.rope.scale_linear", 4.0)


def add_yarn(writer: GGUFWriter) -> None:
    writer.add_string("llama.rope.scaling.type", "yarn")
    writer.add_float32("llama.rope.scaling.factor", 4.0)
    writer.add_uint32("llama.rope.scaling.original_context_length", 32)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("add", "rope"),
    [
        (add_factors, LLAMA3),
        (add_linear, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        (add_old_linear, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        (add_yarn, YARN),
    ],
)
def test_rope_scaling_of_gguf_in_both_loaders(
    add: Callable[[GGUFWriter], None], rope: dict, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    file, folder = tmp_path / "model.gguf", tmp_path / "converted"
    folder.mkdir()
    back = write_gguf(file, dense, GGMLQuantizationType.Q8_0, add)
    config = LlamaConfig(**{**CONFIG.to_dict(), "rope_parameters": rope})
    expected = logits_of(dense, back, config)
    assert (expected - logits_of(dense, back)).abs().max() > 0.5, "the scaling must show"
    assert torch.allclose(loaded(file)(TOKENS), expected, atol=1e-3)
    write_dequantized(GGUFFile(file), folder, lambda *_: None)
    rounded = {name: weight.bfloat16().float() for name, weight in {**dense.state_dict(), **back}.items()}
    converted = load_transformer(folder, torch.float32)
    assert torch.allclose(converted(TOKENS), logits_of(dense, rounded, config), atol=1e-3)
    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(converted(TOKENS), oracle(TOKENS.unsqueeze(0)).logits[0], atol=1e-3)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda writer: writer.add_uint16("split.count", 3), "is part 1 of 3 by its metadata, but part 1 of 1"),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"), r"rope\.scaling\.type"),
        (lambda writer: writer.add_uint32("llama.rope.dimension_sections", 4), r"llama\.rope\.dimension_sections"),
        (lambda writer: writer.add_uint32("llama.rope.dimension_count", 16), r"rope\.dimension_count=16"),
        (lambda writer: writer.add_uint32("llama.expert_count", 8), "expert_count"),
        (lambda writer: writer.add_float32("llama.logit_scale", 0.5), "logit_scale"),
        (lambda writer: writer.add_tensor("blk.1.attn_q.bias", np.ones(128, np.float32)), r"blk\.1\.attn_q\.bias"),
        (lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(128, np.float32)), r"attn_k\.bias is missing"),
        (
            lambda writer: writer.add_float32("llama.attention.scale", 0.5),
            r"attention\.scale=0\.5 is not 1 / sqrt\(32\)",
        ),
        (
            lambda writer: writer.add_float32("llama.attention.temperature_scale", 0.5),
            r"attention\.temperature_scale=0\.5",
        ),
        (lambda writer: writer.add_float32("llama.attention.max_alibi_bias", 8.0), r"attention\.max_alibi_bias"),
        (lambda writer: writer.add_float32("llama.attention.not_known_yet", 8.0), r"attention\.not_known_yet=8\.0"),
        (lambda writer: writer.add_uint32("llama.attention.sliding_window", 4096), r"attention\.sliding_window"),
        (
            lambda writer: writer.add_float32("llama.rope.scaling.yarn_ext_factor", 0.5),
            r"rope\.scaling\.yarn_ext_factor",
        ),
        (lambda writer: writer.add_float32("llama.rope.scaling.alpha", 2.0), r"rope\.scaling\.alpha"),
        (lambda writer: writer.add_float32("llama.expert_weights_scale", 2.0), "expert_weights_scale"),
        (lambda writer: writer.add_uint32("llama.nextn_predict_layers", 1), "nextn_predict_layers"),
        (lambda writer: writer.add_float32("llama.embedding_scale", 12.0), "embedding_scale"),
        (lambda writer: writer.add_float32("llama.residual_scale", 0.5), "residual_scale"),
        (lambda writer: writer.add_bool("llama.swin_norm", True), r"swin_norm=True changes what the model computes"),
        (lambda writer: writer.add_array("llama.attention.key_length", [32, 16]), "differs from layer to layer"),
        (lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(16, np.float32)), "rope_factors_long"),
    ],
)
def test_what_gguf_may_say_and_this_reader_does_not_know(
    add: Callable[[GGUFWriter], None], message: str, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", dense, GGMLQuantizationType.Q8_0, add)
    with pytest.raises(RequestError, match=message):
        GGUFFile(tmp_path / "model.gguf")


def test_what_gguf_may_say_without_changing_anything(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_float32("llama.attention.scale", 32**-0.5)
        writer.add_array("llama.attention.key_length", [32, 32])
        writer.add_uint32("llama.expert_count", 0)
        writer.add_float32("llama.logit_scale", 1.0)
        writer.add_float32("llama.attn_logit_softcapping", 0.0)
        writer.add_string("llama.tensor_data_layout", "Meta AI original pth")
        writer.add_float32("llama.rope.scaling.yarn_attn_factor", 1.0)
        writer.add_uint32("llama.nobody_knows", 1)

    back = write_gguf(tmp_path / "model.gguf", dense, GGMLQuantizationType.Q8_0, add)
    with pytest.warns(RuntimeWarning, match=r"llama\.nobody_knows is not known and has no effect"):
        model = loaded(tmp_path / "model.gguf")
    assert torch.allclose(model(TOKENS), logits_of(dense, back), atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "pangu-embedded"])
def test_biases_of_gguf(architecture: str, tmp_path: Path) -> None:
    """Those of q and k are in ggml's order too, but only for the architecture llama."""
    config = LlamaConfig(**{**CONFIG.to_dict(), "attention_bias": True, "mlp_bias": architecture == "llama"})
    torch.manual_seed(1)
    biased = LlamaForCausalLM(config).eval()
    for parameter in biased.parameters():
        parameter.data.normal_(0, 1.0 if parameter.dim() == 1 else 2.5 * parameter.shape[1] ** -0.5)
    back = write_gguf(tmp_path / "model.gguf", biased, GGMLQuantizationType.Q8_0, architecture=architecture)
    model = loaded(tmp_path / "model.gguf")
    assert torch.allclose(model(TOKENS), logits_of(biased, back, config), atol=1e-3)


def test_the_tokens_that_end_a_turn_are_stop_tokens(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_eos_token_id(7)
        writer.add_eot_token_id(9)

    write_gguf(tmp_path / "model.gguf", dense, GGMLQuantizationType.Q8_0, add)
    assert GGUFFile(tmp_path / "model.gguf").raw["eos_token_id"] == [7, 9]
    write_gguf(tmp_path / "one.gguf", dense, GGMLQuantizationType.Q8_0, lambda writer: writer.add_eos_token_id(7))
    assert GGUFFile(tmp_path / "one.gguf").raw["eos_token_id"] == 7


def test_a_model_in_several_parts(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    back = write_gguf(tmp_path / "model.gguf", dense, GGMLQuantizationType.Q8_0, tensors_per_part=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"model-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert torch.allclose(loaded(parts[0])(TOKENS), logits_of(dense, back), atol=1e-3)
    digest = hash_of_parts(parts[0])
    with pytest.raises(RequestError, match=r"is part 2 of 3; pass the first part, model-00001-of-00003\.gguf"):
        loaded(parts[1])
    content = parts[2].read_bytes()
    parts[2].write_bytes(content[:-1] + b"x")
    assert hash_of_parts(parts[0]) != digest
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(RequestError, match=r"is part 2 of 3 by its metadata, but part 3 of 3 by its name"):
        loaded(parts[0])
    parts[2].unlink()
    with pytest.raises(RequestError, match=r"model-00003-of-00003\.gguf: no such file; it is one of the 3 parts"):
        loaded(parts[0])
    alone = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(RequestError, match=r"is part 1 of 3 by its metadata.*keep the names"):
        loaded(alone)


def test_a_gguf_file_with_fewer_tensors_than_layers(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", dense, GGMLQuantizationType.Q8_0, leave_out="blk.1.ffn_up.weight")
    with pytest.raises(RequestError, match=r"blk\.1\.ffn_up\.weight is missing"):
        GGUFFile(tmp_path / "model.gguf")


def test_a_quantized_folder_is_no_reference_unless_dequantized(
    dense: LlamaForCausalLM, tmp_path: Path, path_source
) -> None:
    back = written(tmp_path, dense, lambda name, weight: Layer(weight, 4, "group"))
    with pytest.raises(RequestError, match=r"compressed-tensors.*verifier=packed.*model\.dequantize=true"):
        load_transformer(tmp_path, torch.float32)
    path_source.path, path_source.dequantize = str(tmp_path), True
    checkpoint = locate(path_source)
    assert checkpoint.origin == f"folder {tmp_path}, dequantized from compressed-tensors"
    model = load_reference(checkpoint, torch.float32, torch.device("cpu"), lambda *_: None)
    assert torch.allclose(model(TOKENS), logits_of(dense, back), atol=1e-3)
    assert type(model.blocks[0].mlp.down.weight) is torch.nn.Parameter
    matrices = [weight for weight in dense.state_dict().values() if weight.dim() == 2]
    share = sum(weight.numel() for weight in back.values()) / sum(weight.numel() for weight in matrices)
    assert quantized_share(tmp_path) == pytest.approx(share)


def test_dequantize_is_refused_for_a_folder_that_is_not_quantized(
    dense: LlamaForCausalLM, tmp_path: Path, path_source
) -> None:
    dense.save_pretrained(tmp_path)
    path_source.path, path_source.dequantize = str(tmp_path), True
    with pytest.raises(RequestError, match=r"model\.dequantize=true: .* not quantized"):
        locate(path_source)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_integers_are_no_weights_even_if_the_config_does_not_say_that_they_are_quantized(
    kind: torch.dtype, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    tensors = {name: weight.to(kind) if is_linear(name) else weight for name, weight in dense.state_dict().items()}
    dense.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match="which is no dtype of unquantized weights"):
        load_transformer(tmp_path, torch.float32)
    assert Checkpoint("model", tmp_path, "here").dequantized is False


def fp8(weight: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    """Values and scales as compressed-tensors makes them: the largest magnitude is 448, the largest E4M3 number."""
    largest = weight.abs().amax() if strategy == "tensor" else weight.abs().amax(1, keepdim=True)
    scales = (largest / 448).bfloat16()
    return (weight / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scales.reshape(-1, 1)[
        :, : weight.dim() - 1
    ]


FP8_GROUP = "config_groups.group_0"
FP8_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def written_fp8(folder: Path, dense: LlamaForCausalLM, strategy: str = "channel") -> dict[str, Tensor]:
    """Write an FP8 checkpoint; return its dequantized weights."""
    tensors, back = {}, {}
    for name, weight in dense.state_dict().items():
        tensors[name] = weight
        if is_linear(name):
            values, scales = fp8(weight, strategy)
            tensors[name], tensors[f"{name}_scale"] = values, scales.flatten() if strategy == "tensor" else scales
            back[name] = (values.double() * scales.double()).float()
    config = json.loads(json.dumps(FP8_CONFIG))
    config["config_groups"]["group_0"]["weights"]["strategy"] = strategy
    write(folder, tensors, config)
    return back


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fp8_of_compressed_tensors(strategy: str, dense: LlamaForCausalLM, tmp_path: Path) -> None:
    back = written_fp8(tmp_path, dense, strategy)
    assert torch.allclose(loaded(tmp_path, dequantize=True)(TOKENS), logits_of(dense, back), atol=1e-3)
    model = loaded(tmp_path)
    layer = model.blocks[1].attention.qkv
    assert isinstance(layer, Fp8Linear)
    stacked = torch.cat([back[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(layer.weight.values.float() * layer.weight.scales.unsqueeze(1), stacked)
    x = torch.randn(3, stacked.shape[1], generator=torch.Generator().manual_seed(1))
    scales = x.abs().amax(1, keepdim=True) / 448
    rounded = (x / scales).to(torch.float8_e4m3fn).double() * scales.double()
    assert torch.allclose(layer(x), (rounded @ stacked.double().T).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_config(f"{FP8_GROUP}.weights.strategy", "block"), r"weights\.strategy"),
        (in_config(f"{FP8_GROUP}.weights.block_structure", [128, 128]), r"weights\.block_structure"),
        (in_config(f"{FP8_GROUP}.weights.strategy", "group"), r"weights\.strategy=group is not supported for floats"),
        (in_config(f"{FP8_GROUP}.weights.num_bits", 4), r"num_bits=4, symmetric=True is not supported"),
        (in_config(f"{FP8_GROUP}.weights.symmetric", False), "symmetric=False is not supported"),
        (in_config(f"{FP8_GROUP}.weights.type", "int"), "weights of type int do not have the format float-quantized"),
        (in_config(f"{FP8_GROUP}.input_activations.type", "int"), "inputs of type int are not supported"),
        (in_config(f"{FP8_GROUP}.input_activations.dynamic", False), "input_activations is supported only"),
        (in_config(f"{FP8_GROUP}.input_activations.strategy", "tensor"), "input_activations is supported only"),
        (in_config(f"{FP8_GROUP}.input_activations", None), "are FP8 with inputs in 16 bit, which is not supported"),
        (in_config("format", "int-quantized"), "weights of type float do not have the format int-quantized"),
    ],
)
def test_what_fp8_may_say_and_this_reader_does_not_know(
    change: Change, message: str, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    written_fp8(tmp_path, dense)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=message):
        loaded(tmp_path)


def test_damaged_fp8_is_named(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    written_fp8(tmp_path, dense)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    broken = tensors[name].view(torch.uint8).clone()
    broken[3, 5] = 0x7F
    save_file({**tensors, name: broken.view(torch.float8_e4m3fn)}, file)
    with pytest.raises(RequestError, match=r"up_proj\.weight contains NaN"):
        loaded(tmp_path)
    save_file({**tensors, name: tensors[name].to(torch.bfloat16)}, file)
    with pytest.raises(RequestError, match=r"up_proj\.weight is BF16 .* but its format implies F8_E4M3"):
        loaded(tmp_path)
