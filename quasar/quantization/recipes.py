"""Quantizes whole models: folds scales into the preceding layers and replaces the linear layers, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from quasar_kernels import Fp8Weight, Int4Weight, Int8Weight
from quasar_kernels.reference import pack_int4
from torch import Tensor, nn

from quasar.errors import QuasarError, RequestError
from quasar.model.transformer import Block, ResidualStream, Transformer
from quasar.quantization.awq import awq_scales, clipped_grid
from quasar.quantization.gptq import gptq_int4, gptq_int8
from quasar.quantization.layers import Fp8Linear, W4Linear, W8A8Linear, W8A16Linear
from quasar.quantization.rotation import Rotation
from quasar.quantization.rounding import Grid4, grid_int4, int8_scales, quantize_int8, round_int4
from quasar.quantization.smoothing import LAYERS, best_smoothing, fold, foldable, smoothquant_scales
from quasar.quantization.statistics import Calibration, Progress


@dataclass(frozen=True)
class Int4Format:
    """How 4-bit weights are stored and multiplied.

    group_size: number of weights along K that share a scale
    symmetric: whether there are no zero points
    activation_bits: 16, or 8 to quantize the inputs too
    dtype: dtype of the activations
    keep_8bit: the layers that have int8 weights instead, by names such as ``blocks.3.mlp.down``
    """

    group_size: int
    symmetric: bool
    activation_bits: int
    dtype: torch.dtype
    keep_8bit: frozenset[str] = frozenset()

    @property
    def int8(self) -> Int8Format:
        """The format of the layers that have int8 weights."""
        return Int8Format(self.activation_bits, self.group_size if self.activation_bits == 8 else None)


@dataclass(frozen=True)
class Int8Format:
    """How the layers with int8 weights are multiplied.

    activation_bits: 8, or 16 to leave the inputs as they are
    activation_group: number of inputs of a token that share a scale; None if all of them do
    """

    activation_bits: int = 8
    activation_group: int | None = None


def rtn_w8(model: Transformer, form: Int8Format, progress: Progress) -> None:
    """Quantize all linear layers of the decoder blocks to int8 weights in place, rounding to nearest."""
    require_groups(model, form.activation_group, "verifier.activation_group")
    for _, block in _blocks(model, progress):
        for layer in LAYERS:
            _round_to_int8(block, layer, form)


def smoothquant_w8a8(
    model: Transformer, form: Int8Format, alpha: float | None, calibration: Calibration, progress: Progress
) -> dict[str, float]:
    """Quantize to W8A8 in place after SmoothQuant. Returns the alpha of every layer, 0 if no smoothing was best.

    alpha: smoothing strength, or None to search, for every layer, the one of least output error on calibration data
    """
    require_groups(model, form.activation_group, "verifier.activation_group")
    statistics = calibration.statistics(model, progress)
    chosen: dict[str, float] = {}
    for index, block in _blocks(model, progress):
        for layer in LAYERS:
            name = f"blocks.{index}.{layer}"
            weight = _linear(block, layer).weight
            if alpha is None:
                chosen[name], scales = best_smoothing(
                    statistics[name], weight, block, layer, form.activation_group or 0
                )
            else:
                chosen[name] = alpha
                scales = foldable(block, layer, smoothquant_scales(statistics[name], weight, alpha))
            fold(block, layer, scales)
        for layer in LAYERS:
            _round_to_int8(block, layer, form)
    return chosen


@torch.inference_mode()
def gptq_w8(model: Transformer, form: Int8Format, calibration: Calibration, progress: Progress) -> None:
    """Quantize to int8 weights in place with GPTQ. The inputs of a block come from the quantized blocks before it.

    Raises QuasarError, which names the layer, if the inputs of a layer are not finite.
    """
    require_groups(model, form.activation_group, "verifier.activation_group")
    for _, block, layer, hessian in _with_hessians(model, calibration, progress):
        _gptq_to_int8(block, layer, _linear(block, layer).weight, hessian, form)


def quantize_w4(model: Transformer, form: Int4Format, clip: bool, progress: Progress, rotated: bool = False) -> None:
    """Quantize to 4-bit weights in place, rounding to nearest.

    clip: whether the range of each group is clipped to minimize the squared error of its weights
    rotated: whether to rotate the model first, see `quasar.quantization.rotation`
    """
    _require_fit(model, form)
    for index, block in _blocks(model, progress, Rotation(model) if rotated else None):
        for layer in LAYERS:
            weight = _linear(block, layer).weight
            if f"blocks.{index}.{layer}" in form.keep_8bit:
                _round_to_int8(block, layer, form.int8)
                continue
            grid = grid_int4(weight, form.group_size, form.symmetric, clip=clip)
            _to_int4(block, layer, round_int4(weight, grid), grid, form)


def awq_w4(model: Transformer, form: Int4Format, clip: bool, calibration: Calibration, progress: Progress) -> None:
    """Quantize to 4-bit weights in place with AWQ: fold scales into the preceding layers, then round.

    clip: whether the range of each group is clipped to minimize its output error
    """
    _require_fit(model, form)
    statistics = calibration.statistics(model, progress)
    for index, block in _blocks(model, progress):
        samples: dict[str, Tensor] = {}
        for layer in LAYERS:
            weight = _linear(block, layer).weight
            of = statistics[f"blocks.{index}.{layer}"]
            scales = fold(block, layer, awq_scales(of, weight, form.group_size, form.symmetric, block, layer))
            samples[layer] = of.samples.to(scales.device) / scales
        for layer in LAYERS:
            weight = _linear(block, layer).weight
            if f"blocks.{index}.{layer}" in form.keep_8bit:
                _round_to_int8(block, layer, form.int8)
                continue
            if clip:
                grid = clipped_grid(weight, samples[layer], form.group_size, form.symmetric)
            else:
                grid = grid_int4(weight, form.group_size, form.symmetric, clip=False)
            _to_int4(block, layer, round_int4(weight, grid), grid, form)


@torch.inference_mode()
def gptq_w4(
    model: Transformer,
    form: Int4Format,
    clip: bool,
    calibration: Calibration,
    progress: Progress,
    rotated: bool = False,
) -> None:
    """Quantize to 4-bit weights in place with GPTQ. The inputs of a block come from the quantized blocks before it.

    rotated: whether to rotate the model first, see `quasar.quantization.rotation`

    Raises QuasarError, which names the layer, if the inputs of a layer are not finite.
    """
    _require_fit(model, form)
    rotation = Rotation(model) if rotated else None
    for index, block, layer, hessian in _with_hessians(model, calibration, progress, rotation):
        weight = _linear(block, layer).weight
        if f"blocks.{index}.{layer}" in form.keep_8bit:
            _gptq_to_int8(block, layer, weight, hessian, form.int8)
            continue
        grid = grid_int4(weight, form.group_size, form.symmetric, importance=hessian.diagonal(), clip=clip)
        _to_int4(block, layer, gptq_int4(weight, hessian, grid), grid, form)


def rtn_fp8(model: Transformer, progress: Progress) -> None:
    """Quantize all linear layers of the decoder blocks to FP8 weights and activations in place, rounding to nearest."""
    for _, block in _blocks(model, progress):
        for layer in LAYERS:
            linear = _linear(block, layer)
            block.set_submodule(layer, Fp8Linear(Fp8Weight.rounded(linear.weight), linear.bias))


def quantize_head(model: Transformer) -> None:
    """Quantize the weights of lm_head to int8 in place. A tied embedding keeps its 16-bit table for lookups.

    The inputs stay in 16 bit. Quantizing them would cost most of the fidelity, and it would save no time if the pass is
    bound by reading the weights.
    """
    with torch.no_grad():
        model.set_submodule("lm_head", W8A16Linear(quantize_int8(model.lm_head.weight), None))


def require_groups(model: Transformer, group_size: int | None, key: str) -> None:
    """Raise RequestError if groups of this size do not divide the input width of a layer; key: what chose the size."""
    if group_size is None:
        return
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear) and module.in_features % group_size:
            width = module.in_features
            divisors = [size for size in (16, 32, 64, 96, 128, 192, 256) if width % size == 0]
            raise RequestError(
                f"{key}={group_size} does not divide {width}, the input width of {name}; "
                f"group sizes that do: {', '.join(map(str, divisors)) or 'none of the usual ones'}"
            )


def _blocks(model: Transformer, progress: Progress, rotation: Rotation | None = None) -> Iterator[tuple[int, Block]]:
    """Yield every decoder block with its linear layers in float32, so that their weights are rounded only once."""
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        progress(index, len(model.blocks))
        for layer in LAYERS:
            _linear(block, layer).float()
        with torch.no_grad():
            if rotation is not None:
                rotation.rotate(block)
            yield index, block
    progress(len(model.blocks), len(model.blocks))


def _linear(block: Block, layer: str) -> nn.Linear:
    linear = block.get_submodule(layer)
    assert isinstance(linear, nn.Linear)
    return linear


def _require_fit(model: Transformer, form: Int4Format) -> None:
    require_groups(model, form.group_size, "verifier.group_size")


def _to_int8(block: Block, layer: str, weight: Int8Weight, form: Int8Format) -> None:
    kind = W8A8Linear if form.activation_bits == 8 else W8A16Linear
    block.set_submodule(layer, kind(weight, _linear(block, layer).bias))


def _round_to_int8(block: Block, layer: str, form: Int8Format) -> None:
    _to_int8(block, layer, quantize_int8(_linear(block, layer).weight, form.activation_group or 0), form)


def _gptq_to_int8(block: Block, layer: str, weight: Tensor, hessian: Tensor, form: Int8Format) -> None:
    scales = int8_scales(weight)
    values = gptq_int8(weight, hessian, scales)
    _to_int8(block, layer, Int8Weight(values, scales, form.activation_group or 0), form)


def _to_int4(block: Block, layer: str, values: Tensor, grid: Grid4, form: Int4Format) -> None:
    weight = Int4Weight(pack_int4(values), grid.scales, grid.zeros, form.symmetric, form.dtype)
    block.set_submodule(layer, W4Linear(weight, _linear(block, layer).bias, form.activation_bits))


def _with_hessians(
    model: Transformer, calibration: Calibration, progress: Progress, rotation: Rotation | None = None
) -> Iterator[tuple[int, Block, str, Tensor]]:
    """Yield every linear layer, to be replaced: the index of its block, the block, its name there and its Hessian.

    The Hessian is ``X^T X``, float32 [K, K], of its inputs X, which come from the replaced blocks before.
    """
    inputs = [model.embed(sequence.to(model.device)) for sequence in calibration.sequences]
    for index, block in _blocks(model, progress, rotation):
        hessians = _hessians(model, index, block, inputs)
        for layer in LAYERS:
            yield index, block, layer, hessians[layer]
        inputs = [_through(model, block, x) for x in inputs]


def _hessians(model: Transformer, index: int, block: Block, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Return ``X^T X``, float32 [K, K], of the inputs X of every linear layer of the decoder block."""
    sums: dict[str, Tensor] = {}

    def watch(layer: str) -> object:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].float()
            if not x.isfinite().all():
                raise QuasarError(f"blocks.{index}.{layer}: its input on calibration text is NaN or infinite")
            sums[layer] = sums[layer] + x.T @ x if layer in sums else x.T @ x

        return _linear(block, layer).register_forward_pre_hook(hook)

    hooks = [watch(layer) for layer in LAYERS]
    for x in inputs:
        _through(model, block, x.float())
    for hook in hooks:
        hook.remove()  # type: ignore[attr-defined]
    return sums


def _through(model: Transformer, block: Block, x: Tensor) -> Tensor:
    stream: ResidualStream = block(ResidualStream(x), model.rows(len(x)), None)
    return stream.total()
