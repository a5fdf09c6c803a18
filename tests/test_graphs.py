"""The padded pass that CUDA graphs are captured from, run op by op on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from quasar_kernels import Int4Weight
from quasar_kernels.reference import pack_int4
from torch import Tensor, nn

from quasar.decoding.acceptance import RejectionSampling, Typical
from quasar.decoding.draft import Context, Draft, Scratch
from quasar.decoding.sampling import Sampling
from quasar.errors import QuasarError
from quasar.model.config import LayerShape, ModelConfig
from quasar.model.execution import cuda_graph
from quasar.model.execution.cuda_graph import BUCKETS, CudaGraphExecutor, PassInputs, bucket_for
from quasar.model.kv_cache import KVCache
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.quantization.layers import W4Linear, W8A8Linear
from quasar.quantization.rounding import quantize_int8
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier

CONTEXT = 11
TREE = Draft([1, 2, 3, 4, 5], [-1, 0, 0, -1, 3])


def qwen3_like() -> ModelConfig:
    """Head normalization, biases and a head dimension apart from the hidden size."""
    shape = LayerShape(num_heads=4, num_kv_heads=1, intermediate_size=192)
    return ModelConfig(64, 128, 48, (shape,) * 3, qk_norm=True, qkv_bias=True, output_bias=True, down_bias=True)


def with_linears(model: Transformer, kind: str) -> Transformer:
    """Replace the linear layers of the blocks by quantized ones."""
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, nn.Linear) and kind != "dense":
            model.blocks.set_submodule(name, quantized(module, kind))
    if kind == "int8":
        model.lm_head = quantized(model.lm_head, kind)  # type: ignore[assignment]
    return model


def quantized(linear: nn.Linear, kind: str) -> nn.Module:
    if kind == "int8":
        return W8A8Linear(quantize_int8(linear.weight), linear.bias)
    outputs, inputs = linear.weight.shape
    generator = torch.Generator().manual_seed(outputs + inputs)
    packed = pack_int4(torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8))
    scales = torch.full((outputs, inputs // 16), 0.02)
    weight = Int4Weight(packed, scales, torch.full_like(scales, 7), False, torch.float32)
    return W4Linear(weight, linear.bias, activation_bits=8 if kind == "w4a8" else 16)


def caches(model: Transformer) -> tuple[KVCache, KVCache]:
    """Two caches with the same context."""
    pair = tuple(KVCache(model.config, 64, model.dtype, "cpu") for _ in range(2))
    tokens = torch.arange(CONTEXT) % 7
    for cache in pair:
        with torch.inference_mode():
            model(tokens, cache)
        cache.commit(range(CONTEXT))
    return pair[0], pair[1]


def scratched() -> Draft:
    mask = torch.tensor([[True, False], [True, True]])
    return Draft([1, 2], [-1, 0], scratch=Scratch(torch.tensor([8, 9]), torch.tensor([1, 2]), mask, torch.tensor([1])))


@pytest.mark.parametrize(
    "draft", [Draft(), Draft.chain([5, 6]), TREE, scratched()], ids=["one", "chain", "tree", "scratch"]
)
@pytest.mark.parametrize("kind", ["dense", "int8", "w4a8", "w4a16"])
@pytest.mark.parametrize("config", [tiny_config(vocab_size=64), qwen3_like()], ids=["llama", "qwen3"])
def test_padded_pass_equals_the_models_own(config: ModelConfig, kind: str, draft: Draft) -> None:
    model = with_linears(random_transformer(config, 0, torch.float32), kind)
    own, padded = caches(model)
    committed = [stored[:, :CONTEXT].clone() for stored in (*padded.keys, *padded.values)]
    inputs = draft.row_tokens(3), draft.offsets(), draft.block_mask()
    with torch.inference_mode():
        expected = model(inputs[0], own, offsets=inputs[1], block_mask=inputs[2])
        actual = CudaGraphExecutor(model, padded)(*inputs)
    assert actual.shape == expected.shape
    # Integers after a quantizer may differ by one step if a float differs in its last bit.
    tolerance = 1e-4 if kind in ("dense", "w4a16") else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert padded.length == CONTEXT
    for stored, before in zip((*padded.keys, *padded.values), committed, strict=True):
        assert torch.equal(stored[:, :CONTEXT], before)
    end = CONTEXT + draft.rows
    for stored, wanted in zip((*padded.keys, *padded.values), (*own.keys, *own.values), strict=True):
        torch.testing.assert_close(stored[:, CONTEXT:end], wanted[:, CONTEXT:end], rtol=tolerance, atol=tolerance)


def test_fewer_layers_and_a_later_start(tiny: Transformer) -> None:
    own, padded = caches(tiny)
    with torch.inference_mode():
        expected = tiny(torch.tensor([9]), own, start=CONTEXT - 2, layers=[0, 2])
        actual = CudaGraphExecutor(tiny, padded)(
            torch.tensor([9]), torch.zeros(1, dtype=torch.int64), torch.ones(1, 1), CONTEXT - 2, [0, 2]
        )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_padding_makes_room_in_the_cache(tiny: Transformer) -> None:
    """Five rows take eight slots for a moment, more than this cache has."""
    cache = KVCache(tiny.config, 6, torch.float32, "cpu")
    chain = Draft.chain([1, 2, 3, 4])
    with torch.inference_mode():
        expected = tiny(chain.row_tokens(0), None)
        actual = CudaGraphExecutor(tiny, cache)(chain.row_tokens(0), chain.offsets(), chain.block_mask())
    assert cache.capacity >= 8
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_buckets() -> None:
    assert [bucket_for(rows) for rows in (1, 2, 3, 6, 9, 17, 33, 64)] == [1, 2, 4, 8, 16, 32, 64, 64]
    with pytest.raises(ValueError, match="65 rows"):
        bucket_for(BUCKETS[-1] + 1)


def test_padding_rows_see_themselves_and_are_not_seen() -> None:
    inputs = PassInputs(4, torch.device("cpu"))
    # A second filling leaves nothing of the first.
    inputs.fill(torch.tensor([7, 8, 9, 9]), 5, torch.arange(4), torch.ones(4, 4).tril())
    inputs.fill(torch.tensor([1, 2, 3]), 21, torch.tensor([0, 1, 1]), torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]))
    assert inputs.start.tolist() == [21]
    assert inputs.tokens.tolist() == [1, 2, 3, 0]
    assert inputs.offsets.tolist() == [0, 1, 1, 0]
    assert inputs.block_mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]


class FakeGraph:
    """Stands in for a CUDA graph: records what `capture` ran and runs it again on replay."""

    captured = 0

    def __init__(self, run: Any) -> None:
        FakeGraph.captured += 1
        self.run, self.logits = run, run()

    def replay(self) -> None:
        self.logits.copy_(self.run())


@pytest.fixture
def fake_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGraph.captured = 0

    def capture(run: Any) -> Any:
        fake = FakeGraph(run)
        return cuda_graph.CapturedPass(fake, fake.logits)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_graph, "capture", capture)


@pytest.mark.usefixtures("fake_capture")
def test_graphs_are_captured_once_per_bucket_and_again_when_the_cache_moves(tiny: Transformer) -> None:
    _, cache = caches(tiny)
    passes = CudaGraphExecutor(tiny, cache, capture=True)

    def run(draft: Draft) -> Tensor:
        return passes(draft.row_tokens(3), draft.offsets(), draft.block_mask())

    with torch.inference_mode():
        first = run(Draft.chain([1, 2]))
        kept = first.clone()
        second = run(Draft.chain([5, 6, 4]))
        assert FakeGraph.captured == 1  # both in the bucket of 4
        assert torch.equal(first, kept)  # the second replay left the first result alone
        assert not torch.equal(second[1], first[1])
        run(TREE)
        assert FakeGraph.captured == 2
        cache.reserve(cache.capacity)
        moved = run(Draft.chain([1, 2]))
    assert FakeGraph.captured == 3
    torch.testing.assert_close(moved, kept)


def test_failed_capture_falls_back_with_a_message(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(cuda_graph, "capture", fail)
    own, cache = caches(tiny)
    passes = CudaGraphExecutor(tiny, cache, capture=True)
    inputs = TREE.row_tokens(3), TREE.offsets(), TREE.block_mask()
    with torch.inference_mode():
        expected = tiny(inputs[0], own, offsets=inputs[1], block_mask=inputs[2])
        with pytest.warns(RuntimeWarning, match="8 rows.*not permitted when stream") as caught:
            actual = passes(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert "more lines" not in str(caught[0].message)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        passes(*inputs)  # says so once


def test_verifier_decodes_with_passes_as_without(tiny: Transformer) -> None:
    """The verifier's own wiring: logits, scratch outputs and the committed path."""
    plain, fused = (FP16Verifier(tiny, Setup()) for _ in range(2))
    fused.executor = CudaGraphExecutor(tiny, fused.cache)
    prompt = torch.arange(9)
    for verifier in (plain, fused):
        verifier.prefill(prompt)
    for draft, path in ((TREE, [0, 2]), (scratched(), [0]), (Draft(), [])):
        ours, theirs = (verifier.verify(3, draft) for verifier in (fused, plain))
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
        assert (ours.scratch is None) == (theirs.scratch is None) == (draft.scratch is None)
        if ours.scratch is not None:
            torch.testing.assert_close(ours.scratch, theirs.scratch, rtol=1e-4, atol=1e-4)
        for verifier in (plain, fused):
            verifier.keep(path)
        assert plain.cache.length == fused.cache.length
    results = [verifier.draft_logits(4, 0, [0, 1]) for verifier in (plain, fused)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_passes_find_the_most_likely_tokens_themselves(tiny: Transformer) -> None:
    verifier = FP16Verifier(tiny, Setup())
    verifier.executor = CudaGraphExecutor(tiny, verifier.cache)
    verifier.prefill(torch.arange(9))
    for draft in (TREE, scratched(), Draft()):
        size = 1 + len(draft)
        scores = verifier.verify(3, draft)
        assert scores.logits.shape == (size, 64)
        assert scores.argmax() == verifier.executor.most_likely(size) == scores.logits.argmax(-1).tolist()
    verifier.draft_logits(4, 0, [0, 1])  # a pass through some layers leaves them alone
    assert scores.argmax() == scores.logits.argmax(-1).tolist()
    # A block that is too large for the passes, whose tokens they do not know.
    scores = verifier.verify(3, Draft.chain([1] * BUCKETS[-1]))
    assert scores.argmax() == scores.logits.argmax(-1).tolist()


@pytest.mark.parametrize("layer", ["blocks.1.mlp_norm", "blocks.2.attention.qkv", "norm"])
def test_first_broken_layer_is_named_whatever_it_gives(tiny: Transformer, layer: str) -> None:
    """Norms give two tensors, linear layers one."""
    verifier = FP16Verifier(tiny, Setup())
    tiny.get_parameter(f"{layer}.weight").data.view(-1)[3] = torch.nan
    with pytest.raises(QuasarError, match=f"in the output of {layer}$".replace(".", r"\.")):
        verifier.prefill(torch.arange(5))


def test_broken_weights_are_reported_by_the_scores(tiny: Transformer) -> None:
    verifier = FP16Verifier(tiny, Setup())
    verifier.executor = CudaGraphExecutor(tiny, verifier.cache)
    verifier.prefill(torch.arange(5))
    tiny.get_submodule("blocks.1.mlp.down").weight.data[0, 0] = torch.nan  # type: ignore[union-attr]
    scores = verifier.verify(3, Draft())
    with pytest.raises(QuasarError, match=r"blocks\.1\.mlp\.down"):
        scores.require_finite()
    for rule in (RejectionSampling(Sampling(1.0)), Typical(Sampling(1.0), 0.3, 0.3)):
        # A distribution of NaN must not reach torch.multinomial.
        with pytest.raises(QuasarError, match=r"blocks\.1\.mlp\.down"):
            rule.accept(Draft(), scores, Context([1], 1, Sampling(), torch.Generator()))
