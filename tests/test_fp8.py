"""FP8: the format against its definition bit by bit, the matmul in float64, the verifier and its emulation."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from quasar_kernels import Fp8Weight, linear_fp8, reference
from quasar_kernels.ops.linear_fp8 import OP
from torch import Tensor

from quasar.decoding.draft import Draft
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.transformer import Transformer
from quasar.quantization.layers import Fp8Linear, W8A16Linear
from quasar.verifiers.base import Setup
from quasar.verifiers.fp8 import Fp8Verifier
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.transformer import EMULATED


def e4m3(code: int) -> float:
    """The number of an 8-bit code: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa; all ones is a NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))


POSITIVE = [e4m3(code) for code in range(0x7F)]
"""All numbers from 0 to 448, in the order of their codes."""


def nearest(value: float) -> float:
    """The nearest E4M3 number, of two equally near ones that with an even code; saturates."""
    magnitude = abs(value)
    code = min(range(len(POSITIVE)), key=lambda code: (abs(POSITIVE[code] - magnitude), code % 2))
    return math.copysign(POSITIVE[code], value)


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tiny(dtype: torch.dtype = torch.bfloat16) -> Transformer:
    return random_transformer(tiny_config(vocab_size=64), 0, dtype)


def test_the_largest_number_and_the_step_of_the_format() -> None:
    assert POSITIVE[-1] == reference.FP8_MAX
    assert POSITIVE[1] == 2**-9
    assert sorted(POSITIVE) == POSITIVE


def test_tokens_are_rounded_to_the_nearest_number_of_the_format() -> None:
    x = torch.cat([normal(5, 64), normal(1, 64) * 1e-30, normal(1, 64) * 1e30])
    # Ties: halfway between neighbours, when the largest value makes the scale 1.
    ties = [(low + high) / 2 for low, high in itertools.pairwise(POSITIVE)][-63:]
    x = torch.cat([x, torch.tensor([[448.0, *ties]])])
    values, scales = reference.quantize_tokens_fp8(x)
    assert scales[-1] == 1
    for row, found, scale in zip(x, values, scales, strict=True):
        assert float(scale) == float(row.abs().max() / torch.tensor(448.0))
        quotients = (row / scale).tolist()
        assert found.float().tolist() == [nearest(value) for value in quotients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 192), (40, 100), (33, 256)])
def test_the_matmul_is_the_exact_sum_of_rounded_numbers(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    """With the compiled kernels where the shape allows them, and with PyTorch's operations."""
    x, bias = normal(70, inputs, dtype=dtype), normal(outputs, dtype=dtype, seed=1)
    weight = Fp8Weight.rounded(normal(outputs, inputs, seed=2))
    tokens, token_scales = reference.quantize_tokens_fp8(x)
    sums = tokens.double() @ weight.values.double().T
    expected = sums * token_scales.double() * weight.scales.double() + bias.double()
    for found in (linear_fp8(x, weight, bias), OP.plain(x, weight, bias)):
        assert found.dtype == dtype
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def test_weights_have_a_scale_per_channel_and_come_back_bit_for_bit() -> None:
    dense = normal(64, 96) * torch.logspace(-3, 3, 64).unsqueeze(1)
    dense[5] = 0
    weight = Fp8Weight.rounded(dense)
    expected = torch.tensor(
        [[nearest(float(one)) for one in row / scale] for row, scale in zip(dense, weight.scales, strict=True)]
    )
    assert torch.equal(weight.values.float(), expected)
    assert weight.scales[5] == 1
    assert torch.equal(weight.scales[6:], dense[6:].abs().amax(1) / 448)
    assert weight.nbytes == 64 * 96 + 4 * 64
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        Fp8Weight(torch.zeros(4, 32, dtype=torch.int8), torch.ones(4))
    with pytest.raises(ValueError, match="scales"):
        Fp8Weight(weight.values, torch.ones(63))


def test_a_row_depends_on_no_other_row() -> None:
    x = normal(64, 576, dtype=torch.bfloat16)
    x[3] *= 100
    weight = Fp8Weight.rounded(normal(160, 576, seed=1))
    if weight.packed_for_cpu is None:
        pytest.skip("holds for the kernels, and this machine cannot compile them")
    alone = torch.cat([linear_fp8(x[row : row + 1], weight) for row in range(64)])
    for rows in range(1, 65):
        assert torch.equal(linear_fp8(x[:rows], weight), alone[:rows])
        assert torch.equal(linear_fp8(x[-rows:], weight), alone[-rows:])


def test_broken_inputs_stay_broken_in_their_row_alone() -> None:
    x = normal(5, 96, dtype=torch.bfloat16)
    weight = Fp8Weight.rounded(normal(64, 96, seed=1))
    clean = linear_fp8(x, weight)
    x[1, 7], x[2, 9], x[3] = math.nan, math.inf, 0.0
    for found in (linear_fp8(x, weight), OP.plain(x, weight)):
        assert found[1].isnan().all()
        assert found[2].isnan().all()
        assert (found[3] == 0).all()
        assert torch.allclose(found[[0, 4]], clean[[0, 4]])
    with pytest.raises(ValueError, match="expected bfloat16, float32"):
        linear_fp8(x[:, :64], weight)


def test_the_verifier_is_fp8_throughout_and_says_that_it_is_emulated() -> None:
    model = tiny()
    dense = model.blocks[1].mlp.down.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # op by op is what an emulation does, and no accident to warn of
        verifier = Fp8Verifier(model, Setup(), lm_head_bits=8)
    layers = [module for module in verifier.model.blocks.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 4 * 4
    assert isinstance(verifier.model.lm_head, W8A16Linear)
    restored = layers[0].weight.values
    assert restored.dtype == torch.float8_e4m3fn
    down = verifier.model.blocks[1].mlp.down.weight
    assert (
        (down.values.float() * down.scales.unsqueeze(1) - dense.float()).abs()
        <= dense.float().abs() / 16 + down.scales.unsqueeze(1) * 2**-10
    ).all()
    assert verifier.emulated
    assert verifier.details == (EMULATED,)
    shapes = [(layer.weight.outputs, layer.weight.inputs) for layer in layers]
    head, norms = 64 * 128 + 4 * 64, 2 * 128 * (2 * 4 + 1)
    assert verifier.cost.weight_bytes == sum(n * k + 4 * n for n, k in shapes) + head + norms
    assert not FP16Verifier(tiny(), Setup()).emulated


def test_the_verifiers_blocks_equal_its_single_steps_bit_for_bit() -> None:
    verifier = Fp8Verifier(tiny(), Setup())
    if verifier.model.blocks[0].mlp.down.weight.packed_for_cpu is None:
        pytest.skip("holds for the kernels, and this machine cannot compile them")
    verifier.prefill(torch.tensor([1, 2, 3]))
    block = verifier.verify(4, Draft.chain([5, 6, 7, 8])).logits.clone()
    verifier.prefill(torch.tensor([1, 2, 3]))
    for place, token in enumerate([4, 5, 6, 7, 8]):
        assert torch.equal(verifier.verify(token, Draft()).logits[0], block[place])
        verifier.keep([])


def test_it_is_read_from_the_cache_as_it_was_made(calibration) -> None:
    setup = Setup(identity="tiny", calibration=lambda: calibration)
    first, second = (Fp8Verifier(tiny(), setup).teacher_forced(torch.arange(30), 0) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, FP16Verifier(tiny(), Setup()).teacher_forced(torch.arange(30), 0))
