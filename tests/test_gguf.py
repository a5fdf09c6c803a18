"""GGUF files of every type: as a reference, which gguf dequantizes, and as a verifier that keeps their blocks."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from quasar_kernels import GroupInt8Weight, Int4Weight
from quasar_kernels.cpu.levels import available_levels
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quasar.errors import RequestError
from quasar.model.execution.cpu_tape import CpuTapeExecutor
from quasar.model.gguf_file import GGUFFile, write_dequantized
from quasar.model.grid import weights_on_grid
from quasar.model.loading import load_transformer
from quasar.model.sources import locate
from quasar.model.tokenizer import load_tokenizer
from quasar.quantization.layers import GroupInt8Linear, QuantizedEmbedding, W4Linear
from quasar.quantization.packed_blocks import BlockRows, stacked
from quasar.quantization.packed_gguf import READERS
from quasar.verifiers.base import Setup
from quasar.verifiers.packed import PackedVerifier
from tests.gguf_files import HALVES, random_blocks, write_gguf

TOKENS = torch.arange(40) * 7 % 90
STORED_BITS = {
    "Q8_0": 8.5,
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q5_0": 8.5,
    "Q5_1": 9.0,
    "IQ4_NL": 8.5,
    "Q2_K": 4 + 16 / 16 + 32 / 256,
    "Q3_K": 4 + 8 / 16 + 16 / 256,
    "Q4_K": 4 + 16 / 32 + 32 / 256,
    "Q5_K": 8 + 16 / 32 + 32 / 256,
    "Q6_K": 8 + 8 / 16 + 16 / 256,
    "IQ4_XS": 8 + 8 / 32 + 16 / 256,
}
"""Bits of a weight with its share of scales and minimums, as they are stored in memory."""
FOUR_BITS = ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K")

needs_kernels = pytest.mark.skipif(
    not available_levels() or shutil.which("g++") is None, reason="no AVX2, or no C++ compiler"
)


def model_of(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 1.0 if "embed" in name else 2.0 * parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def untied() -> LlamaForCausalLM:
    return model_of(tied=False)


@pytest.fixture(scope="module")
def tied() -> LlamaForCausalLM:
    return model_of(tied=True)


@torch.no_grad()
def logits_of(dense: LlamaForCausalLM, restored: dict[str, Tensor]) -> Tensor:
    """What transformers computes in float32 with the dequantized weights."""
    model = LlamaForCausalLM(dense.config).eval()
    tied = {"lm_head.weight": restored.get("model.embed_tokens.weight")} if dense.config.tie_word_embeddings else {}
    replaced = {name: weight for name, weight in {**restored, **tied}.items() if weight is not None}
    model.load_state_dict({**dense.state_dict(), **replaced})
    return model(TOKENS.unsqueeze(0)).logits[0]


def verifier(file: Path, dense: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> PackedVerifier:
    reference = file.parent / "reference"
    dense.save_pretrained(reference)
    return PackedVerifier(load_transformer(reference, dtype), Setup(), path=str(file))


def every(kind: str) -> Callable[[str], GGMLQuantizationType]:
    """All matrices, the embedding too."""
    return lambda name: GGMLQuantizationType[kind]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal but for roundings in float32."""
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", READERS)
def test_a_packed_file_computes_with_its_dequantized_weights(
    kind: str, untied: LlamaForCausalLM, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    expected = logits_of(untied, write_gguf(file, untied, every(kind)))
    found = verifier(file, untied)
    assert_close(found.model(TOKENS), expected)
    form = W4Linear if kind in FOUR_BITS else GroupInt8Linear
    assert {type(layer) for name, layer in found.model.named_modules() if name.endswith(("qkv", "down", "head"))} == {
        form
    }
    # What transformers makes of the file agrees too, whatever this test believes of the format.
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert_close(found.model(TOKENS), oracle(TOKENS.unsqueeze(0)).logits[0])


@pytest.mark.parametrize("kind", READERS)
def test_the_pass_is_charged_for_what_is_stored(kind: str, tied: LlamaForCausalLM, tmp_path: Path) -> None:
    """The embedding is the output layer here, so every matrix is read. Six norms of 16 bit come on top."""
    file = tmp_path / "model.gguf"
    expected = logits_of(tied, write_gguf(file, tied, every(kind)))
    found = verifier(file, tied)
    assert isinstance(found.model.embedding, QuantizedEmbedding)
    assert_close(found.model(TOKENS), expected)
    in_16_bit = verifier(file, tied, torch.bfloat16)
    weights = sum(weight.numel() for weight in tied.parameters() if weight.dim() == 2)
    assert in_16_bit.cost.weight_bytes == weights * STORED_BITS[kind] / 8 + 5 * 256 * 2
    memory = [part for layer in in_16_bit.model.modules() for part in stored_parts(layer)]
    assert in_16_bit.cost.weight_bytes == sum(part.nbytes for part in memory)
    if kind in ("Q8_0", "Q4_0", "Q4_1"):
        assert weights * STORED_BITS[kind] / 8 == sum(
            int(tensor.n_bytes) for tensor in GGUFFile(file).tensors if tensor.tensor_type.name == kind
        )


def stored_parts(layer: torch.nn.Module) -> list[Tensor]:
    """The tensors of a layer in memory."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return [weight]
    packed = None if weight is None else weight.packed_for_cpu
    if packed is None:
        return []
    numbers = [part for part in (packed.scales, packed.zeros) if part is not None]
    return [packed.values, *(part for one in numbers for part in (one.values, one.factors) if part is not None)]


@needs_kernels
@pytest.mark.parametrize("kind", READERS)
def test_a_packed_file_runs_from_a_tape(kind: str, tied: LlamaForCausalLM, tmp_path: Path) -> None:
    """No layer falls back to PyTorch's operations, and the tape computes what they compute one by one."""
    file = tmp_path / "model.gguf"
    expected = logits_of(tied, write_gguf(file, tied, every(kind)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = verifier(file, tied, torch.bfloat16)
    assert isinstance(found.executor, CpuTapeExecutor)
    rows = TOKENS[:9], torch.arange(9), torch.ones(9, 9, dtype=torch.bool).tril()
    recorded = found.executor(*rows).clone()
    assert torch.equal(recorded, found.executor.eagerly(*rows))
    assert (recorded.float() - expected[:9]).abs().max() < 0.1 * expected.abs().max()


MIXES: dict[str, Callable[[str], str]] = {
    "Q4_K_M": lambda name: "Q6_K" if any(part in name for part in ("v_proj", "down_proj", "embed")) else "Q4_K",
    "Q5_K_M": lambda name: "Q6_K" if "v_proj" in name else "Q5_K",
    "Q3_K_M": lambda name: "Q5_K" if "v_proj" in name else "Q4_K" if "o_proj" in name else "Q3_K",
    "Q2_K": lambda name: "Q4_K" if "v_proj" in name else "Q3_K" if "o_proj" in name else "Q2_K",
    "fallbacks": lambda name: "Q5_0" if "v_proj" in name else "Q8_0" if "gate" in name else "Q4_1",
    "symmetric": lambda name: "Q4_0" if "v_proj" in name else "IQ4_XS",
}
"""Which types files mix, by the name of the mix; q, k and v of a layer are one layer here."""


@pytest.mark.parametrize("mix", MIXES)
def test_matrices_of_different_types_form_one_layer(mix: str, untied: LlamaForCausalLM, tmp_path: Path) -> None:
    file, chosen = tmp_path / "model.gguf", MIXES[mix]
    expected = logits_of(untied, write_gguf(file, untied, lambda name: GGMLQuantizationType[chosen(name)]))
    found = verifier(file, untied)
    qkv = found.model.blocks[0].attention.qkv
    assert isinstance(qkv, GroupInt8Linear)
    assert qkv.weight.group_size == (16 if mix in ("Q4_K_M", "Q5_K_M", "Q3_K_M", "Q2_K") else 32)
    assert_close(found.model(TOKENS), expected)
    assert any(f"{qkv.weight.nbytes * 8 / 512 / 256:.3g} bits per weight" in one for one in found.details)


def test_some_matrices_may_be_floats(untied: LlamaForCausalLM, tmp_path: Path) -> None:
    """But not only some of those that form one layer."""
    file = tmp_path / "model.gguf"
    kinds = {"down_proj": GGMLQuantizationType.F16, "o_proj": GGMLQuantizationType.BF16}
    back = write_gguf(file, untied, lambda name: kinds.get(name.split(".")[-2], GGMLQuantizationType.Q4_K))
    found = verifier(file, untied)
    assert_close(found.model(TOKENS), logits_of(untied, back))
    assert isinstance(found.model.blocks[0].attention.output, torch.nn.Linear)
    write_gguf(file, untied, lambda name: None if "v_proj" in name else GGMLQuantizationType.Q4_K)
    with pytest.raises(RequestError, match=r"v_proj\.weight are quantized and some are not"):
        verifier(file, untied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q3_K", "Q4_1"])
def test_four_bit_layers_with_int8_activations(
    kind: str, dtype: torch.dtype, untied: LlamaForCausalLM, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    expected = logits_of(untied, write_gguf(file, untied, every(kind)))
    verifier(file, untied)
    found = PackedVerifier(load_transformer(tmp_path / "reference", dtype), Setup(), path=str(file), activation_bits=8)
    assert found.model.blocks[0].mlp.down.int8_activations
    assert not found.model.lm_head.int8_activations
    error = (found.model(TOKENS) - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 0.1


def test_scales_that_are_not_finite_are_refused(untied: LlamaForCausalLM, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, untied, every("Q8_0"))
    where = int(GGUFFile(file).tensor("model.layers.1.mlp.up_proj.weight").data_offset)
    content = bytearray(file.read_bytes())
    content[where : where + 2] = np.float16("inf").tobytes()
    file.write_bytes(content)
    with pytest.raises(RequestError, match=r"blk\.1\.ffn_up\.weight has scales that are NaN or infinite"):
        verifier(file, untied)
    with pytest.raises(RequestError, match=r"blk\.1\.ffn_up\.weight has values that are NaN or infinite"):
        GGUFFile(file).dense("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(("kind", "share"), [("Q6_K", 1.0), ("IQ2_XXS", 1.0), ("F16", 0.0)])
def test_the_share_of_dequantized_weights_is_known(
    kind: str, share: float, untied: LlamaForCausalLM, tmp_path: Path
) -> None:
    """A grid of 6 bits could not be told from rounding, so the types of the file are kept."""
    file, folder = tmp_path / "model.gguf", tmp_path / "converted"
    folder.mkdir()
    write_gguf(file, untied, lambda name: GGMLQuantizationType.F16 if "down" in name else GGMLQuantizationType[kind])
    write_dequantized(GGUFFile(file), folder, lambda *_: None)
    sizes = {name: weight.numel() for name, weight in untied.named_parameters() if weight.dim() == 2}
    down = sum(size for name, size in sizes.items() if "down" in name)
    assert weights_on_grid(folder) == pytest.approx(share * (1 - down / sum(sizes.values())))


KINDS = [kind for kind in GGMLQuantizationType if kind.name in HALVES]


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), rows=st.sampled_from([16, 48]), blocks=st.sampled_from([1, 3]), seed=st.integers(0))
def test_every_block_means_what_gguf_says(kind: GGMLQuantizationType, rows: int, blocks: int, seed: int) -> None:
    """Bit for bit: a scale of 11 bits times a factor of 8 times an integer of 5 is exact in float32."""
    if kind.name not in READERS:
        return
    shape = rows, blocks * GGML_QUANT_SIZES[kind][0]
    stored = random_blocks(kind, shape, np.random.default_rng(seed))
    expected = torch.from_numpy(np.array(quants.dequantize(stored, kind), dtype=np.float32))
    found = READERS[kind.name](torch.from_numpy(stored))
    assert torch.equal(restored(found), expected)
    weight = found.weight(torch.device("cpu"), torch.float32)
    if isinstance(weight, GroupInt8Weight):
        assert torch.equal(weight.dequantize(), expected)
    else:
        assert isinstance(weight, Int4Weight)
        # With a zero point for a minimum, float32 rounds once more.
        assert torch.allclose(weight.dequantize(), expected, rtol=0, atol=float(2e-7 * expected.abs().max()))
    # Beside rows of another type all of them are int8.
    other = random_blocks(GGMLQuantizationType.Q6_K, (16, 768), np.random.default_rng(seed))
    if shape[1] == 768:
        both = stacked([found, READERS["Q6_K"](torch.from_numpy(other))])
        beside = torch.from_numpy(np.array(quants.dequantize(other, GGMLQuantizationType.Q6_K)))
        assert torch.equal(restored(both), torch.cat([expected, beside]))


def restored(rows: BlockRows) -> Tensor:
    """float32 [N, K], in the order of gguf's operations."""
    groups = rows.values.float().view(len(rows.values), rows.scales.groups, -1)
    if rows.bits == 4 and rows.minimums is None:
        groups = groups - 8
    groups = groups * rows.scales.expanded().unsqueeze(2)
    if rows.minimums is not None:
        groups = groups - rows.minimums.expanded().unsqueeze(2)
    return groups.flatten(1)


@pytest.mark.parametrize("kind", list(GGMLQuantizationType), ids=lambda kind: kind.name)
def test_every_type_is_read_exactly_or_refused(
    kind: GGMLQuantizationType, untied: LlamaForCausalLM, tmp_path: Path
) -> None:
    """As a reference a file of this type is what gguf says; as a verifier it is kept, or the error says what to do."""
    file, name = tmp_path / "model.gguf", "model.layers.1.mlp.down_proj.weight"
    shape = untied.state_dict()[name].shape
    stored = random_blocks(kind, tuple(shape), np.random.default_rng(0))
    floats = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    integers = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
    array = stored
    if kind.name in {**floats, **integers}:
        array = (np.random.default_rng(0).standard_normal(shape) * 5).astype({**floats, **integers}[kind.name])

    def add(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.1.ffn_down.weight", array, raw_dtype=kind)

    write_gguf(file, untied, lambda name: None, add, leave_out="blk.1.ffn_down.weight")
    try:
        with np.errstate(all="ignore"):
            expected = np.array(quants.dequantize(array, kind), dtype=np.float32)
    except NotImplementedError:
        with pytest.raises(RequestError, match=rf"tensor blk\.1\.ffn_down\.weight is {kind.name}.*llama-quantize"):
            GGUFFile(file).dense(name)
        with pytest.raises(RequestError, match=rf"tensor blk\.1\.ffn_down\.weight is {kind.name}.*llama-quantize"):
            verifier(file, untied)
        return
    if not np.isfinite(expected).all():
        with pytest.raises(RequestError, match=r"blk\.1\.ffn_down\.weight has values that are NaN or infinite"):
            GGUFFile(file).dense(name)
        return
    assert torch.equal(GGUFFile(file).dense(name), torch.from_numpy(expected))
    folder = tmp_path / "converted"
    folder.mkdir()
    write_dequantized(GGUFFile(file), folder, lambda *_: None)
    assert torch.equal(
        load_transformer(folder, torch.bfloat16).blocks[1].mlp.down.weight, torch.from_numpy(expected).bfloat16()
    )
    if kind.name in READERS or kind.name in ("F32", "F16", "BF16"):
        assert_close(verifier(file, untied).model(TOKENS), logits_of(untied, {name: torch.from_numpy(expected)}))
    else:
        with pytest.raises(RequestError, match=rf"ffn_down\.weight is {kind.name}; only .*model=path model\.path="):
            verifier(file, untied)


def add_vocabulary(split: str | None) -> Callable[[GGUFWriter], None]:
    """A byte-level vocabulary whose merges make a token of three spaces and of ``ab``."""

    def add(writer: GGUFWriter) -> None:
        alphabet = [chr(code) for code in range(33, 123)]
        writer.add_tokenizer_model("gpt2")
        if split is not None:
            writer.add_tokenizer_pre(split)
        writer.add_token_list([*alphabet, "Ġ", "ĠĠ", "ĠĠĠ", "ab", "<e>", "12"])
        writer.add_token_types([1] * (len(alphabet) + 4) + [3, 1])
        writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ", "a b", "1 2"])
        writer.add_eos_token_id(len(alphabet) + 4)
        writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")

    return add


@pytest.mark.parametrize(
    ("split", "tokens"),
    [
        ("smollm", ["ab", "ĠĠĠ", "1", "2", "<e>"]),
        ("gpt-2", ["ab", "ĠĠ", "Ġ", "12", "<e>"]),
        ("llama-bpe", ["ab", "ĠĠ", "Ġ", "12", "<e>"]),
        ("qwen2", ["ab", "ĠĠ", "Ġ", "1", "2", "<e>"]),
    ],
)
def test_texts_are_split_as_the_file_says(
    split: str, tokens: list[str], untied: LlamaForCausalLM, tmp_path: Path, path_source, monkeypatch
) -> None:
    monkeypatch.setattr("quasar.model.sources.cache_folder", lambda: tmp_path / "cache")
    file = tmp_path / "model.gguf"
    write_gguf(file, untied, every("Q8_0"), add_vocabulary(split))
    path_source.path = str(file)
    checkpoint = locate(path_source)
    inner = AutoTokenizer.from_pretrained(checkpoint.folder)
    assert inner.convert_ids_to_tokens(inner.encode("ab   12<e>")) == tokens
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.stop_tokens == {94}
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == [93]


def test_an_unknown_split_is_refused(untied: LlamaForCausalLM, tmp_path: Path, path_source, monkeypatch) -> None:
    monkeypatch.setattr("quasar.model.sources.cache_folder", lambda: tmp_path / "cache")
    file = tmp_path / "model.gguf"
    path_source.path = str(file)
    write_gguf(file, untied, every("Q8_0"), add_vocabulary("nobody-knows"))
    with pytest.raises(RequestError, match=r"tokenizer\.ggml\.pre=nobody-knows is not known.*pass the folder"):
        locate(path_source)
    write_gguf(file, untied, every("Q8_0"), add_vocabulary(None))
    with pytest.warns(RuntimeWarning, match=r"tokenizer\.ggml\.pre is missing"):
        locate(path_source)
