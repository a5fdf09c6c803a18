"""Keys and values in 8 and 4 bit: the formats, the ops that write and read them, and verifiers with such a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import quasar_kernels
import torch
from quasar_kernels import AttentionOptions, QuantizedSlots, cpu, reference
from quasar_kernels.ops import rotary_write
from torch import Tensor

from quasar.decoding.acceptance import rule_for
from quasar.decoding.draft import Draft
from quasar.decoding.loop import decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.drafters.base import Drafter
from quasar.drafters.cascade import CascadeDrafter
from quasar.drafters.layerskip import LayerSkipDrafter
from quasar.drafters.lookahead import LookaheadDrafter
from quasar.drafters.ngram import NgramDrafter
from quasar.drafters.none import NoneDrafter
from quasar.drafters.recycling import RecyclingDrafter
from quasar.errors import QuasarError, RequestError
from quasar.experiment.export import export_verifier
from quasar.model.execution.cpu_tape import CpuTapeExecutor
from quasar.model.execution.eager import EagerExecutor
from quasar.model.kv_cache import KVCache
from quasar.model.loading import random_transformer, tiny_config
from quasar.results.console import Reporter
from quasar.testing import check_verifier, tiny_model, tiny_setup
from quasar.verifiers.base import Setup
from quasar.verifiers.fp8 import Fp8Verifier
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.int4 import Int4Verifier
from quasar.verifiers.int8 import Int8Verifier
from quasar.verifiers.pruned import PrunedVerifier
from quasar.verifiers.transformer import TransformerVerifier
from tests import definitions
from tests.compose import composed_run
from tests.test_graphs import TREE, scratched
from tests.test_kernels_cpu import level, needs_kernels, normal, relative_error  # noqa: F401
from tests.test_recorded import WIDE

BITS = pytest.mark.parametrize("bits", [8, 4])
with_kernels = pytest.mark.skipif(cpu.backend() is None, reason="this machine cannot compile the CPU kernels")


def slots_of(x: Tensor, bits: int) -> QuantizedSlots:
    return QuantizedSlots(*reference.quantize_slots(x, bits))


def cache_of(bits: int, kv_heads: int, capacity: int, head_dim: int) -> tuple[QuantizedSlots, QuantizedSlots]:
    keys, values = (slots_of(normal(kv_heads, capacity, head_dim, seed=seed), bits) for seed in (1, 2))
    return keys, values


@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 96])
@BITS
def test_a_slot_is_what_the_format_says(bits: int, head_dim: int) -> None:
    x = normal(2, 5, head_dim).bfloat16()
    x[0, 1], x[1, 2, 3] = 0, 40
    x[0, 3] = 1.5  # no range
    found = slots_of(x, bits).dequantized(torch.float32)
    assert found.dtype == torch.float32
    for head in range(2):
        for row in range(5):
            if x[head, row].unique().numel() == 1:
                assert torch.equal(found[head, row], x[head, row].float())
                continue
            expected, half = definitions.quantized_slot(x[head, row].float(), bits)
            # A value between two codes may be rounded to either, and otherwise float32 alone makes a difference.
            difference = (found[head, row] - expected).abs()
            assert (difference < 1e-5 * x[head, row].abs().max()).double().mean() > 0.9
            assert ((found[head, row] - x[head, row]).abs() <= 1.02 * half + 1e-3 * x[head, row].abs().max()).all()


def test_formats_by_example() -> None:
    codes, scales = reference.quantize_slots(torch.tensor([[254.0, -2.0, 3.0, 1.0]]), 8)
    assert (codes.tolist(), scales.tolist()) == ([[127, -1, 2, 0]], [[2.0]])  # 1.5 and 0.5 go to the even code
    codes, scales = reference.quantize_slots(torch.tensor([[-1.0, 2.0, 0.2, 0.0]]), 4)
    # One step is 3 / 15: the codes are 0, 15, 6 and 5, two per byte.
    assert (codes.tolist(), scales.dtype) == ([[0 + 16 * 15, 6 + 16 * 5]], torch.float16)
    assert scales.tolist()[0] == pytest.approx([0.2, -1.0], abs=1e-4)


@pytest.mark.parametrize("head_dim", [1, 2, 32, 40, 64, 96, 128])
def test_hadamard_transform(head_dim: int) -> None:
    x, y = normal(3, head_dim), normal(3, head_dim, seed=1)
    found = reference.hadamard_transform(x)
    assert torch.allclose(found.double(), definitions.hadamard(x), atol=1e-5)
    assert torch.allclose(reference.hadamard_transform(found), x, atol=1e-5)
    kept = (found * reference.hadamard_transform(y)).sum(1)
    assert torch.allclose(kept, (x * y).sum(1), atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@BITS
def test_what_is_not_finite_is_not_lost(bits: int, bad: float) -> None:
    x = normal(1, 3, 64)
    x[0, 1, 40] = bad
    rows = slots_of(x, bits).dequantized(torch.float32)
    assert not rows[0, 1, 40].isfinite()
    assert rows[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("normalized", [False, True])
@BITS
def test_keys_and_values_are_quantized_when_they_are_written(
    level: str,  # noqa: F811
    bits: int,
    head_dim: int,
    normalized: bool,
) -> None:
    heads, kv_heads, capacity = 6, 2, 40
    norms = None
    if normalized:
        norms = normal(head_dim, seed=1, dtype=torch.bfloat16), normal(head_dim, seed=2, dtype=torch.bfloat16)
    for rows, start in [(1, 0), (5, 35), (17, 9)]:
        qkv = normal(rows, (heads + 2 * kv_heads) * head_dim, dtype=torch.bfloat16)
        angles = normal(rows, head_dim // 2).repeat(1, 2)
        rotation = angles.cos(), angles.sin()
        keys, values = cache_of(bits, kv_heads, capacity, head_dim)
        before = copy.deepcopy((keys, values))
        floats = torch.zeros(kv_heads, capacity, head_dim), torch.zeros(kv_heads, capacity, head_dim)
        q, k, v = definitions.rotary_write(qkv, rotation, floats, start, norms, 1e-6)
        arguments = torch.tensor([start]), *(norms or (None, None)), 1e-6
        found = quasar_kernels.rotary_write(qkv, *rotation, keys, values, *arguments)
        assert relative_error(found, definitions.hadamard(q)) < 2e-2
        written = slice(start, start + rows)
        largest_step = 1 / 127 if bits == 8 else 2 / 15
        assert relative_error(keys.dequantized(torch.float32)[:, written], definitions.hadamard(k)[:, written]) < (
            0.5 * largest_step + 2e-2
        )
        for head in range(kv_heads):
            for row in range(start, start + rows):
                expected, half = definitions.quantized_slot(v[head, row], bits)
                difference = (values.dequantized(torch.float32)[head, row] - expected).abs()
                assert (difference <= 2.02 * half).all()
                assert (difference > 1e-4).sum() <= 2  # rounded the other way
        others = [slot for slot in range(capacity) if not start <= slot < start + rows]
        for part, old in zip((keys, values), before, strict=True):
            assert torch.equal(part.codes[:, others], old.codes[:, others])
            assert torch.equal(part.scales[:, others], old.scales[:, others])
        plain = copy.deepcopy(before)
        expected = rotary_write.OP.plain(qkv, *rotation, *plain, *arguments)
        if not normalized:  # a norm may be rounded differently, before the quantization
            assert torch.equal(found, expected)
            for part, wanted in zip((keys, values), plain, strict=True):
                assert torch.equal(part.codes, wanted.codes)
                assert torch.equal(part.scales, wanted.scales)


@pytest.mark.parametrize("options", [AttentionOptions(), AttentionOptions(window=100, softcap=2.0)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96])
@BITS
def test_attention_has_the_bits_of_the_dequantized_cache(
    level: str,  # noqa: F811
    bits: int,
    head_dim: int,
    options: AttentionOptions,
) -> None:
    chain, tree = torch.ones(33, 33, dtype=torch.bool).tril(), definitions.ancestors([-1, *(n // 2 for n in range(32))])
    for mask in (chain, tree, chain[:1, :1]):
        for context in (0, 107, 128, 292):
            rows = len(mask)
            q = normal(rows, 6, head_dim, dtype=torch.bfloat16)
            cache = cache_of(bits, 2, context + rows + 5, head_dim)
            keys, values = (part.dequantized(torch.bfloat16) for part in cache)
            start = torch.tensor([context])
            found = quasar_kernels.block_attention(q, *cache, start, mask, options)
            assert torch.equal(found, quasar_kernels.block_attention(q, keys, values, start, mask, options))
            if options == AttentionOptions():
                exact = definitions.block_attention(
                    q, *(part.dequantized(torch.float64) for part in cache), context, mask
                )
                assert relative_error(found, exact) < 2e-2


@needs_kernels
@pytest.mark.parametrize("context", [0, 100, 127, 128, 129, 250])
@BITS
def test_attention_of_a_node_has_the_bits_of_its_branch(level: str, context: int, bits: int) -> None:  # noqa: F811
    if level == "torch":
        pytest.skip("holds for the kernels")
    generator, rows = torch.Generator().manual_seed(context), 40
    mask = definitions.ancestors([-1, *(int(torch.randint(row, (), generator=generator)) for row in range(1, rows))])
    q = normal(rows, 6, 64, dtype=torch.bfloat16)
    cache = cache_of(bits, 2, context + rows, 64)
    tree = quasar_kernels.block_attention(q, *cache, torch.tensor([context]), mask)
    for row in range(rows):
        branch = [*range(context), *(context + mask[row].nonzero().flatten()).tolist()]
        own = [
            QuantizedSlots(part.codes[:, branch].contiguous(), part.scales[:, branch].contiguous()) for part in cache
        ]
        alone = torch.ones(1, 1, dtype=torch.bool)
        expected = quasar_kernels.block_attention(q[row : row + 1], *own, torch.tensor([len(branch) - 1]), alone)
        assert torch.equal(tree[row : row + 1], expected), f"row {row}"


@BITS
def test_a_cache_moves_codes_and_scales(bits: int) -> None:
    config = tiny_config()
    cache = KVCache(config, 8, torch.float32, "cpu", bits)
    layer, heads, head_dim = 1, config.layers[1].num_kv_heads, config.head_dim
    rows = normal(heads, 8, head_dim)
    keys = cache.keys[layer]
    assert isinstance(keys, QuantizedSlots)
    keys.write(torch.arange(8), rows)
    expected = slots_of(rows, bits).dequantized(torch.float32)
    cache.commit(range(3))
    cache.commit([0, 2, 4])
    cache.reserve(100)
    found = cache.keys[layer]
    assert isinstance(found, QuantizedSlots)
    assert cache.capacity >= 106
    assert torch.equal(found.dequantized(torch.float32)[:, :6], expected[:, [0, 1, 2, 3, 5, 7]])
    part = cache.slots(5)[layer][0]
    assert torch.equal(part.dequantized(torch.float32), expected[:, [0, 1, 2, 3, 5]])


def test_bytes_are_those_of_codes_and_scales() -> None:
    config = tiny_config()
    heads, head_dim = sum(layer.num_kv_heads for layer in config.layers), config.head_dim
    assert head_dim == 32
    for bits, per_head in ((16, 2 * 32), (8, 32 + 4), (4, 16 + 4)):
        verifier = FP16Verifier(tiny_model(torch.bfloat16), Setup(), kv_bits=bits)
        assert verifier.cost.kv_bytes_per_token == 2 * heads * per_head
        held = {id(store): store.nbytes for stores in verifier.cache._stores for store in stores}
        assert sum(held.values()) == verifier.cost.kv_bytes_per_token * verifier.capacity


VERIFIERS: dict[str, Callable[[int, torch.dtype], TransformerVerifier]] = {
    "fp16": lambda bits, dtype: FP16Verifier(tiny_model(dtype), tiny_setup(), kv_bits=bits),
    "int8": lambda bits, dtype: Int8Verifier(tiny_model(dtype), tiny_setup(), method="rtn", kv_bits=bits),
    "int4": lambda bits, dtype: Int4Verifier(tiny_model(dtype), tiny_setup(), method="rtn", kv_bits=bits),
    "fp8": lambda bits, dtype: Fp8Verifier(tiny_model(dtype), tiny_setup(), kv_bits=bits),
    "pruned": lambda bits, dtype: PrunedVerifier(tiny_model(dtype), tiny_setup(), heads=True, ratio=0.3, kv_bits=bits),
}


@BITS
@pytest.mark.parametrize("name", VERIFIERS)
def test_conformance(name: str, bits: int) -> None:
    """Float32 matmuls of blocks of other sizes may differ in the last bit, which changes a code now and then."""
    check_verifier(VERIFIERS[name](bits, torch.float32), tolerance=0.02)


@with_kernels
@BITS
@pytest.mark.parametrize("name", [name for name in VERIFIERS if name != "fp8"])  # which is emulated by PyTorch
def test_rows_have_the_same_bits_in_every_pass(name: str, bits: int) -> None:
    verifier = VERIFIERS[name](bits, torch.bfloat16)
    assert isinstance(verifier.executor, CpuTapeExecutor)
    check_verifier(verifier, tolerance=0.0)


@with_kernels
@BITS
def test_recorded_passes_equal_the_models_own(bits: int) -> None:
    recorded, plain = (FP16Verifier(tiny_model(torch.bfloat16), Setup(), kv_bits=bits) for _ in range(2))
    plain.executor = EagerExecutor(plain.model, plain.cache)
    for verifier in (plain, recorded):
        verifier.prefill(torch.arange(60))
    for draft, path in (
        (TREE, [0, 2]),
        (scratched(), [0]),
        (Draft(), []),
        (WIDE, [0, 1]),
        (Draft.chain([1] * 80), [0]),
    ):
        ours, theirs = (verifier.verify(3, draft) for verifier in (recorded, plain))
        assert torch.equal(ours.logits, theirs.logits)
        for verifier in (plain, recorded):
            verifier.keep(path)
    assert torch.equal(recorded.draft_logits(4, 1, [0, 2]), plain.draft_logits(4, 1, [0, 2]))


DRAFTERS: dict[str, Callable[[TransformerVerifier], Drafter]] = {
    "ngram": lambda verifier: NgramDrafter(num_tokens=4),
    "tree": lambda verifier: RecyclingDrafter(),
    "lookahead": lambda verifier: LookaheadDrafter(),
    "layerskip": lambda verifier: _using(LayerSkipDrafter(num_tokens=3), verifier),
    "cascade": lambda verifier: _using(
        CascadeDrafter(inner="int8", block=5), VERIFIERS["int4"](verifier.cache.bits, torch.bfloat16)
    ),
}


def _using(drafter: LayerSkipDrafter | CascadeDrafter, verifier: TransformerVerifier) -> Drafter:
    drafter.use(verifier)
    return drafter


@with_kernels
@BITS
@pytest.mark.parametrize("name", DRAFTERS)
def test_speculative_output_is_autoregressive_output(name: str, bits: int) -> None:
    """Across the positions 128 and 256, at which the kernel's chunks of the context end."""
    verifier = VERIFIERS["fp16"](bits, torch.bfloat16)
    drafter = DRAFTERS[name](verifier)
    for length in (5, 112, 243):
        prompt = [token % 11 for token in range(length)]
        expected = generated(NoneDrafter(), verifier, prompt)
        found = generated(drafter, verifier, prompt)
        assert found == expected


def generated(drafter: Drafter, verifier: TransformerVerifier, prompt: list[int]) -> list[int]:
    limits = Limits(30, verifier.context_length, frozenset(), None)
    rule, generator = rule_for(Sampling()), torch.Generator().manual_seed(0)
    return decode(prompt, drafter, verifier, rule, Sampling(), limits, generator).tokens


def test_a_smaller_cache_makes_another_model() -> None:
    labels = [VERIFIERS[name](bits, torch.float32).label for name, bits in (("fp16", 8), ("int4", 4), ("int8", 16))]
    assert labels == ["reference with an 8-bit KV cache", "INT4 model with a 4-bit KV cache", "INT8 model"]
    assert VERIFIERS["fp16"](16, torch.float32).is_reference
    assert not VERIFIERS["fp16"](8, torch.float32).is_reference
    tokens = torch.arange(40)
    exact, eight, four = (VERIFIERS["fp16"](bits, torch.float32).teacher_forced(tokens, 0) for bits in (16, 8, 4))
    assert 1e-5 < relative_error(eight, exact) < 0.05
    assert relative_error(eight, exact) < relative_error(four, exact) < 0.5


def test_caches_of_other_bits_are_not_shared() -> None:
    owner, other, same = (
        VERIFIERS[name](bits, torch.float32) for name, bits in (("fp16", 8), ("int8", 16), ("int8", 8))
    )
    with pytest.raises(
        RequestError,
        match=r"the INT8 model cannot read the cache of the reference with an 8-bit KV cache, whose keys and values "
        r"have 8 bits instead of 16; set verifier\.kv_bits=16",
    ):
        LayerSkipDrafter().use(owner, other)
    LayerSkipDrafter().use(owner, same)
    assert same.cache is owner.cache


@pytest.mark.parametrize("value", ["6", "32", "null", "true", "8.5", "int8"])
def test_other_bits_are_refused(value: str) -> None:
    with pytest.raises(RequestError, match=r"verifier\.kv_bits=.*16, 8 or 4"):
        composed_run("verifier=int8", f"verifier.kv_bits={value}")


def test_verifiers_of_other_libraries_have_no_such_key() -> None:
    with pytest.raises(Exception, match="kv_bits"):
        composed_run("verifier=bnb_int8", "verifier.kv_bits=8")


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_in_a_key_is_named(bits: int, dtype: torch.dtype) -> None:
    model = random_transformer(tiny_config(vocab_size=64), 0, dtype)
    attention = model.blocks[1].attention
    with torch.no_grad():
        attention.qkv.weight[attention.num_heads * attention.head_dim + 3] = torch.nan
    verifier = FP16Verifier(model, Setup(), kv_bits=bits)
    with pytest.raises(QuasarError, match=r"NaN or infinite, first in the output of blocks\.1\.attention\.qkv"):
        verifier.prefill(torch.arange(5))


def test_an_export_says_that_the_cache_is_no_part_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model=tiny", "verifier=fp16", "verifier.dtype=float32"]
    export_verifier(tmp_path / "plain", overrides, Reporter())
    assert "kv_bits" not in "".join(capsys.readouterr())
    export_verifier(tmp_path / "small", [*overrides, "verifier.kv_bits=8"], Reporter())
    assert "verifier.kv_bits=8 is no part of a checkpoint" in " ".join("".join(capsys.readouterr()).split())
