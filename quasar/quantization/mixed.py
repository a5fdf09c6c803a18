"""Chooses which layers of a 4-bit model have 8 bits instead, for a given mean number of bits per weight.

The KL divergence of the output that a small change ``dW`` of one layer's weight causes is, to second order, half of the
expected square of ``sum_t g_t · (dW x_t)``: x_t are the layer's inputs, and g_t the gradient of the log-likelihood of
text drawn from the model's own distribution with respect to the layer's outputs. This is the Fisher information, which
weighs the output error that GPTQ minimizes by how much the output matters. The errors of different tokens are taken to
be independent, so that the squares are summed token by token. One backward pass gives the value of every layer:

    layer                      more bytes in 8 bit   KL in 4 bit - KL in 8 bit   gain per byte
    blocks.0.mlp.down          442k                  0.020                       4.5e-8           first
    blocks.9.mlp.down          442k                  0.001                       0.2e-8           third
    blocks.9.attention.output  166k                  0.002                       1.2e-8           second

The layers with the most gain per byte get 8 bits. One that does not fit what is left of the budget is passed over.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from quasar_kernels import Int4Weight
from quasar_kernels.reference import pack_int4
from torch import Tensor, nn

from quasar.cache import json_store
from quasar.errors import RequestError
from quasar.model.transformer import Block, Transformer
from quasar.quantization.recipes import Int4Format
from quasar.quantization.rotation import Rotation
from quasar.quantization.rounding import grid_int4, int8_scales, quantize_int8, round_int4
from quasar.quantization.smoothing import LAYERS
from quasar.quantization.statistics import Calibration, Progress

SEED = 0


@dataclass(frozen=True)
class Candidate:
    """A linear layer of the decoder blocks.

    weights: number of its weights
    bytes4, bytes8: its size in 4 and in 8 bit, with scales and zero points
    gain: estimated KL divergence in nats per token that 8 bits avoid
    """

    name: str
    weights: int
    bytes4: int
    bytes8: int
    gain: float

    @property
    def gain_per_byte(self) -> float:
        return self.gain / max(self.bytes8 - self.bytes4, 1)


def mean_bits(candidates: Sequence[Candidate], in_8bit: frozenset[str]) -> float:
    """Return the mean number of bits per weight, scales and zero points included."""
    size = sum(layer.bytes8 if layer.name in in_8bit else layer.bytes4 for layer in candidates)
    return 8 * size / sum(layer.weights for layer in candidates)


def choose(candidates: Sequence[Candidate], bits: float, in_8bit: frozenset[str]) -> frozenset[str]:
    """Return the names of the layers that get 8 bits: those in ``in_8bit``, and others by their gain per byte.

    bits: largest mean number of bits per weight, scales and zero points included

    Raises RequestError if the layers need more bits without any further layer in 8 bit; the message says how many.
    """
    least = mean_bits(candidates, in_8bit)
    if bits < least:
        raise RequestError(
            f"verifier.bits={bits:g}: the layers have {least:.4g} bits per weight before any is chosen, with scales "
            "and zero points; choose more bits, or larger groups"
        )
    chosen = in_8bit
    for layer in sorted(candidates, key=lambda layer: layer.gain_per_byte, reverse=True):
        if layer.gain > 0 and mean_bits(candidates, chosen | {layer.name}) <= bits:
            chosen |= {layer.name}
    return chosen


def candidates(
    model: Transformer, form: Int4Format, rotated: bool, calibration: Calibration, progress: Progress
) -> list[Candidate]:
    """Return all linear layers of the decoder blocks with their gains, from the cache if they are there.

    rotated: whether the model will be rotated before it is quantized, see `quasar.quantization.rotation`
    """
    key = {
        **calibration.key,
        "group_size": form.group_size,
        "symmetric": form.symmetric,
        "rotated": rotated,
        "seed": SEED,
    }

    def measured() -> list[dict[str, object]]:
        on_cpu = model.device.type == "cpu"
        measured_on = copy.deepcopy(model) if rotated or on_cpu else model
        if rotated:
            _rotate(measured_on)
        if on_cpu:
            # Processors without 16-bit arithmetic compute the gradients of 16-bit layers many times slower.
            measured_on.float()
        return [vars(layer) for layer in _measure(measured_on, form, calibration.sequences, progress)]

    return [Candidate(**layer) for layer in STORE.get(key, model.device, model.dtype, measured)]


def _rotate(model: Transformer) -> None:
    dtype = model.dtype
    with torch.no_grad():
        rotation = Rotation(model)
        for block in model.blocks:
            assert isinstance(block, Block)
            block.float()
            rotation.rotate(block)
            block.to(dtype)


def _measure(model: Transformer, form: Int4Format, sequences: Sequence[Tensor], progress: Progress) -> list[Candidate]:
    watchers = {name: _Watcher(linear, form) for name, linear in _linears(model)}
    generator = torch.Generator(model.device).manual_seed(SEED)
    embedded = model.embedding.register_forward_hook(lambda module, arguments, output: output.requires_grad_())
    hooks = [embedded, *(linear.register_forward_hook(watchers[name].watch) for name, linear in _linears(model))]
    try:
        for done, sequence in enumerate(sequences):
            progress(done, len(sequences))
            with torch.enable_grad():
                likelihoods = model(sequence.to(model.device)).float().log_softmax(-1)
                drawn = torch.multinomial(likelihoods.detach().exp(), 1, generator=generator)
                likelihoods.gather(1, drawn).sum().backward()
        progress(len(sequences), len(sequences))
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(map(len, sequences))
    return [watcher.candidate(name, tokens) for name, watcher in watchers.items()]


def _linears(model: Transformer) -> Iterator[tuple[str, nn.Linear]]:
    for index, block in enumerate(model.blocks):
        for layer in LAYERS:
            linear = block.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            yield f"blocks.{index}.{layer}", linear


class _Watcher:
    """Sums the squared change of the log-likelihood that rounding one layer to nearest causes, token by token.

    In 4 bit this takes the change of the weight. In 8 bit it is its expected value: rounding errors are uniform within
    a step s of an output channel, so their variance is s²/12.
    """

    def __init__(self, linear: nn.Linear, form: Int4Format) -> None:
        weight = linear.weight.detach()
        grid = grid_int4(weight, form.group_size, form.symmetric)
        rounded = Int4Weight(pack_int4(round_int4(weight, grid)), grid.scales, grid.zeros, form.symmetric, form.dtype)
        self._change = (rounded.dequantize() - weight.float()).to(weight.dtype)
        self._variances = int8_scales(weight).square() / 12
        self._weights, self._bytes4, self._bytes8 = weight.numel(), rounded.nbytes, quantize_int8(weight).nbytes
        self._in4bit = self._in8bit = 0.0

    def watch(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x = arguments[0].detach()

        def add(gradient: Tensor) -> None:
            gradient = gradient.float()
            self._in4bit += float((gradient * (x @ self._change.T).float()).sum(-1).square().sum())
            self._in8bit += float(((gradient.square() @ self._variances) * x.float().square().sum(-1)).sum())

        output.register_hook(add)

    def candidate(self, name: str, tokens: int) -> Candidate:
        gain = (self._in4bit - self._in8bit) / 2 / tokens
        return Candidate(name, self._weights, self._bytes4, self._bytes8, gain)


STORE = json_store("sensitivity")
