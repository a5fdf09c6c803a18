"""Lets two models use the same tensors for the layers that they have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator

import torch
from quasar_kernels import DenseWeight
from torch import Tensor, nn

from quasar.model.linear import Linear
from quasar.model.transformer import RMSNorm
from quasar.quantization.layers import PackedEmbedding, PackedLinear

PROBE = 8
"""Weights of a layer that are compared first, so that few layers have to be compared as a whole."""


def share_equal_layers(model: nn.Module, owner: nn.Module) -> int:
    """Replace every layer of ``model`` by an equal one of ``owner``, and return the bytes that are no longer stored.

    Two layers are equal if they do the same with the same 16-bit or float32 weights, bit for bit. They need not have
    the same name, because a model without some of its decoder blocks has the others at other places. Low-bit weights
    are not compared.

    Example: an int8 copy of a model has the embedding and the output layer of the original, so that only its decoder
    blocks remain its own.
    """
    known: dict[Hashable, list[nn.Module]] = defaultdict(list)
    for _, layer in _comparable(owner):
        known[_probe(layer)].append(layer)
    replaced: list[Tensor] = []
    for name, layer in list(_comparable(model)):
        twin = next((other for other in known.get(_probe(layer), []) if _equal(layer, other)), None)
        if twin is not None and twin is not layer:
            model.set_submodule(name, twin)
            replaced += _stored(layer)
    # A tied head and embedding are one tensor.
    return sum({id(tensor): tensor.nbytes for tensor in replaced}.values())


def _comparable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = (nn.Embedding, PackedEmbedding, nn.Linear, Linear, PackedLinear, RMSNorm)
    for name, layer in model.named_modules(remove_duplicate=False):
        if type(layer) in kinds:
            yield name, layer


def _probe(layer: nn.Module) -> Hashable:
    """Return what is the same for equal layers and rarely for others."""
    # An embedding is packed if it is tied to the head, but its rows are the same.
    kind = nn.Embedding if isinstance(layer, PackedEmbedding) else type(layer)
    if isinstance(layer, PackedEmbedding):
        shape: tuple[int, ...] = (layer.table.outputs, layer.table.inputs)
        first = layer.table.rows(torch.zeros(1, dtype=torch.int64, device=_stored(layer)[0].device))[0, :PROBE]
    else:
        shape = tuple(_stored(layer)[0].shape)
        first = _stored(layer)[0].flatten()[:PROBE]
    return kind, shape, first.dtype, str(first.device), tuple(first.tolist()), getattr(layer, "eps", None)


def _equal(layer: nn.Module, other: nn.Module) -> bool:
    if type(layer) is not type(other):
        return torch.equal(_table(layer), _table(other))
    ours, theirs = _stored(layer), _stored(other)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _table(embedding: nn.Module) -> Tensor:
    """Return the rows of an embedding, [V, hidden_size]."""
    return embedding.table.values if isinstance(embedding, PackedEmbedding) else _stored(embedding)[0]


def _stored(layer: nn.Module) -> list[Tensor]:
    """Return the tensors of a layer as they are in memory, the weight first."""
    if isinstance(layer, PackedEmbedding):
        return [_dense(layer.table)]
    weight = layer.weight
    bias = getattr(layer, "bias", None)
    assert isinstance(weight, Tensor | DenseWeight)
    return [_dense(weight) if isinstance(weight, DenseWeight) else weight, *([bias] if bias is not None else [])]


def _dense(weight: DenseWeight) -> Tensor:
    packed = weight.packed_for_cpu
    return weight.values if packed is None else packed.values
