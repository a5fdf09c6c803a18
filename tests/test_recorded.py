"""Recorded passes on a CPU compute what the model's own forward pass does, bit for bit."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import replace

import pytest
import torch
from quasar_kernels import cpu
from quasar_kernels.cpu import NotRecordableError, Tape
from quasar_kernels.cpu.calls import first_maxima, rms_norm
from quasar_kernels.cpu.functions import FUNCTIONS, Signature, read_signatures
from torch import Tensor, nn

from quasar.decoding.draft import Draft
from quasar.model.config import LayerShape, ModelConfig
from quasar.model.execution.choose import executor_for
from quasar.model.execution.cpu_tape import MAX_ROWS, CpuTapeExecutor
from quasar.model.execution.eager import EagerExecutor
from quasar.model.kv_cache import KVCache
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.int4 import Int4Verifier
from quasar.verifiers.int8 import Int8Verifier
from quasar.verifiers.pruned import PrunedVerifier
from quasar.verifiers.transformer import TransformerVerifier
from tests.test_graphs import CONTEXT, TREE, scratched

pytestmark = pytest.mark.skipif(cpu.backend() is None, reason="this machine cannot compile the CPU kernels")
WIDE = Draft([7] * 40, [-1, *[node // 2 for node in range(39)]])


VERIFIERS: dict[str, Callable[[Transformer], TransformerVerifier]] = {
    "fp16": lambda model: FP16Verifier(model, Setup()),
    "int8": lambda model: Int8Verifier(model, Setup(), method="rtn"),
    "int8-head": lambda model: Int8Verifier(model, Setup(), method="rtn", lm_head_bits=8),
    "int4": lambda model: Int4Verifier(model, Setup(), method="rtn", group_size=32),
    "int4-a8": lambda model: Int4Verifier(model, Setup(), method="rtn", symmetric=False, activation_bits=8),
    "pruned": lambda model: PrunedVerifier(model, Setup(), ratio=0.2, importance="magnitude"),
}


def llama() -> ModelConfig:
    return tiny_config(vocab_size=64)


def qwen3() -> ModelConfig:
    """Head normalization, biases, and heads that together are wider than the residual stream."""
    shape = LayerShape(num_heads=4, num_kv_heads=1, intermediate_size=192)
    return ModelConfig(64, 128, 64, (shape,) * 3, qk_norm=True, qkv_bias=True, output_bias=True, down_bias=True)


def bfloat16_model(config: ModelConfig, verifier: str) -> Transformer:
    return VERIFIERS[verifier](random_transformer(config, 0, torch.bfloat16)).model


def caches(model: Transformer, capacity: int = 128) -> tuple[KVCache, KVCache]:
    """Two caches with the same context."""
    pair = tuple(KVCache(model.config, capacity, model.dtype, "cpu") for _ in range(2))
    for cache in pair:
        with torch.inference_mode():
            model(torch.arange(CONTEXT) % 7, cache)
        cache.commit(range(CONTEXT))
    return pair[0], pair[1]


@pytest.mark.parametrize("verifier", ["fp16", "int8", "int4"])
def test_a_tied_table_is_held_once(verifier: str) -> None:
    """Rows are read from the packed weight of the output layer, and the logits are those of two separate tables."""
    tied, separate = (
        random_transformer(replace(llama(), tie_word_embeddings=tied), 0, torch.bfloat16) for tied in (True, False)
    )
    separate.load_state_dict(tied.state_dict())
    table, held = tied.embedding.weight.detach().clone(), weakref.ref(tied.embedding.weight)
    once, twice = VERIFIERS[verifier](tied), VERIFIERS[verifier](separate)
    del tied
    gc.collect()
    assert held() is None
    tokens = torch.tensor([0, 17, 63, 5, 5, 16, 15])
    assert torch.equal(once.model.embedding(tokens), table[tokens])
    for built in (once, twice):
        built.prefill(tokens)
    assert torch.equal(once.verify(3, TREE).logits, twice.verify(3, TREE).logits)
    assert once.cost == twice.cost


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_every_verifier_is_recorded_from_the_start(verifier: str) -> None:
    """The first matmul has nothing left to pack."""
    built = VERIFIERS[verifier](random_transformer(llama(), 0, torch.bfloat16))
    assert isinstance(built.executor, CpuTapeExecutor)


def passes_of(model: Transformer, cache: KVCache) -> CpuTapeExecutor:
    passes = executor_for(model, cache)
    assert isinstance(passes, CpuTapeExecutor)
    return passes


def inputs(draft: Draft) -> tuple[Tensor, Tensor, Tensor]:
    return draft.row_tokens(3), draft.offsets(), draft.block_mask()


@torch.inference_mode()
def both(model: Transformer, own: KVCache, passes: CpuTapeExecutor, draft: Draft) -> tuple[Tensor, Tensor]:
    tokens, offsets, mask = inputs(draft)
    return model(tokens, own, offsets=offsets, block_mask=mask), passes(tokens, offsets, mask)


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("config", [llama, qwen3])
def test_recorded_passes_equal_the_models_own(config: Callable[[], ModelConfig], verifier: str) -> None:
    """One recording is used for blocks of every size, in any order."""
    model = bfloat16_model(config(), verifier)
    own, recorded = caches(model)
    passes = passes_of(model, recorded)
    for draft in (TREE, Draft(), WIDE, Draft.chain([5, 6]), scratched(), Draft.chain([1] * (MAX_ROWS - 1))):
        expected, actual = both(model, own, passes, draft)
        assert torch.equal(actual, expected)
        assert passes.last_was_finite
        end = CONTEXT + draft.rows
        for stored, wanted in zip((*recorded.keys, *recorded.values), (*own.keys, *own.values), strict=True):
            assert torch.equal(stored[:, :end], wanted[:, :end])
    assert recorded.length == CONTEXT


def test_fewer_layers_a_later_start_and_some_outputs() -> None:
    model = bfloat16_model(llama(), "int8")
    own, recorded = caches(model)
    passes = passes_of(model, recorded)
    tokens, offsets, mask = inputs(TREE)
    where = {"start": CONTEXT - 2, "layers": [0, 2], "outputs": torch.tensor([1, 4])}
    with torch.inference_mode():
        expected = model(tokens, own, offsets=offsets, block_mask=mask, **where)
        assert torch.equal(passes(tokens, offsets, mask, **where), expected)
        assert torch.equal(passes(tokens, offsets, mask, layers=[]), model(tokens, own, layers=[]))


def test_recording_follows_the_cache_and_the_number_of_threads() -> None:
    model = bfloat16_model(llama(), "fp16")
    own, recorded = caches(model, capacity=CONTEXT + 2)
    passes = passes_of(model, recorded)
    before = recorded.keys[0].data_ptr()
    own.reserve(WIDE.rows)
    recorded.reserve(2 * recorded.capacity)
    assert recorded.keys[0].data_ptr() != before
    assert torch.equal(*both(model, own, passes, WIDE))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(*both(model, own, passes, TREE))
    finally:
        torch.set_num_threads(threads)


def test_models_with_other_operations_are_run_op_by_op_after_a_warning_that_names_the_layer() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = bfloat16_model(llama(), "fp16")
    config = model.config
    doubled = Doubled(config.layers[1].intermediate_size, config.hidden_size, dtype=torch.bfloat16)
    model.set_submodule("blocks.1.mlp.down", doubled)
    cache = KVCache(config, 64, model.dtype, "cpu")
    with pytest.warns(RuntimeWarning, match=r"op by op and slower.*aten\.\w+\.\w+ in blocks\.1\.mlp\.down"):
        executor = executor_for(model, cache)
    assert type(executor) is EagerExecutor
    tokens, offsets, mask = inputs(TREE)
    with torch.inference_mode():
        expected = model(tokens, cache, offsets=offsets, block_mask=mask)
    assert torch.equal(executor(tokens, offsets, mask), expected)


def test_float32_and_machines_without_kernels_are_not_worth_a_warning() -> None:
    config = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = random_transformer(config, 0, torch.float32)
        assert type(executor_for(exact, KVCache(config, 64, exact.dtype, "cpu"))) is EagerExecutor
        cpu.use_level("torch")
        try:
            model = random_transformer(config, 0, torch.bfloat16)
            assert type(executor_for(model, KVCache(config, 64, model.dtype, "cpu"))) is EagerExecutor
        finally:
            cpu.use_level(None)


def test_verifier_decodes_with_recorded_passes_as_without() -> None:
    """The verifier returns the same logits and scratch outputs, and commits the same path."""
    plain, recorded = (FP16Verifier(bfloat16_model(llama(), "fp16"), Setup()) for _ in range(2))
    assert isinstance(recorded.executor, CpuTapeExecutor)
    plain.executor = EagerExecutor(plain.model, plain.cache)
    for verifier in (plain, recorded):
        verifier.prefill(torch.arange(9))
    for draft, path in ((TREE, [0, 2]), (scratched(), [0]), (Draft(), []), (Draft.chain([1] * 80), [0, 1])):
        ours, theirs = (verifier.verify(3, draft) for verifier in (recorded, plain))
        assert torch.equal(ours.logits, theirs.logits)
        assert (ours.scratch is None) == (theirs.scratch is None) == (draft.scratch is None)
        assert ours.scratch is None or torch.equal(ours.scratch, theirs.scratch)
        for verifier in (plain, recorded):
            verifier.keep(path)
    results = [verifier.draft_logits(4, 1, [0, 1]) for verifier in (plain, recorded)]
    assert torch.equal(*results)


def test_a_tape_uses_memory_again_when_its_tensor_is_gone() -> None:
    """A chain of normalizations of one shape needs three buffers: the last result, the next, and the sum kept."""
    library = cpu.backend()
    assert library is not None
    x = torch.randn(8, 64).bfloat16()
    weight = torch.ones(64, dtype=torch.bfloat16)

    def chain() -> tuple[Tensor, Tensor]:
        rows, kept = rms_norm(library, x, weight, 1e-5, x)
        for _ in range(10):
            rows, _ = rms_norm(library, rows, weight, 1e-5)
        return rows, kept

    with torch.inference_mode():
        tape = Tape(library, 8, chain)
        expected = chain()
        tape.replay(8)
        assert all(torch.equal(*pair) for pair in zip(tape.results, expected, strict=True))
        assert len(tape.memory) == 3
        # With fewer rows the others stay unchanged, and the inputs are read again.
        before = tape.results[0].clone()
        x.copy_(torch.randn(8, 64))
        tape.replay(3)
        assert torch.equal(tape.results[0][:3], chain()[0][:3])
        assert torch.equal(tape.results[0][3:], before[3:])
    with pytest.raises(ValueError, match="9 rows: recorded for 1 to 8"):
        tape.replay(9)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: (x + 1,), "aten.add"),
        (lambda x: (x[:2],), "aten.slice"),
        (lambda x: rms_norm(cpu.backend(), x, torch.ones(64).bfloat16(), 1e-5), "aten"),
    ],
)
def test_other_operations_cannot_be_recorded(run: object, message: str) -> None:
    library = cpu.backend()
    assert library is not None
    functions = library.rms_norm
    x = torch.randn(8, 64).bfloat16()
    with torch.inference_mode(), pytest.raises(NotRecordableError, match=message):
        Tape(library, 8, lambda: run(x))  # type: ignore[operator]
    assert library.rms_norm is functions


def test_every_listed_function_is_called_and_recorded_with_its_own_arguments() -> None:
    """The header, ctypes and the tape use one list. A float in an integer register would be noticed."""
    assert FUNCTIONS["rms_norm"].arguments == (*[c_void_p] * 7, *[c_int64] * 3, c_float, c_int32, c_int32)
    rows = {name: signature.rows for name, signature in FUNCTIONS.items()}
    matmuls = dict.fromkeys(name for name in rows if name.startswith("linear_"))
    assert len(matmuls) == 6
    assert rows == dict.fromkeys(matmuls, 5) | {
        "rms_norm": 7, "silu_mul": 4, "gelu_mul": 4, "add_scaled": 3, "first_maxima": 2, "select_inputs": 3,
        "rotary_write": 11, "attention": 8, "advise_huge_pages": None,
    }  # fmt: skip
    library = cpu.backend()
    assert library is not None
    assert len({library.replayed(name) for name in FUNCTIONS}) == len(FUNCTIONS)
    x = torch.randn(4, 64).bfloat16()
    with torch.inference_mode():
        tape = Tape(library, 4, lambda: (first_maxima(library, x),))
        x.copy_(torch.randn(4, 64))
        tape.replay(4)
    assert tape.results[0].tolist() == x.float().argmax(1).tolist()
    assert read_signatures("FUNCTION(f, float a,\n  int64_t rows)")["f"] == Signature((c_float, c_int64), 1)
    with pytest.raises(KeyError, match="double"):
        read_signatures("FUNCTION(f, double x)")


def test_functions_without_rows_cannot_be_recorded() -> None:
    library = cpu.backend()
    assert library is not None
    memory = torch.empty(4 << 20, dtype=torch.uint8)
    with pytest.raises(NotRecordableError, match="advise_huge_pages, which does not work on rows"):
        Tape(library, 4, lambda: library.ask_for_huge_pages(memory))  # type: ignore[arg-type, return-value]


def test_rows_other_than_the_recorded_ones_cannot_be_recorded() -> None:
    library = cpu.backend()
    assert library is not None
    x, weight = torch.randn(4, 64).bfloat16(), torch.ones(64, dtype=torch.bfloat16)
    with torch.inference_mode(), pytest.raises(NotRecordableError, match="rms_norm of 4 rows instead of 8"):
        Tape(library, 8, lambda: rms_norm(library, x, weight, 1e-5))
