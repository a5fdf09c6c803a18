"""Counts the parameters of the decoder blocks. A pruning ratio is a fraction of this number."""

from torch import nn


def block_parameters(model: nn.Module) -> int:
    """Return the number of parameters of all decoder blocks, without embedding, final norm and head."""
    blocks = model.get_submodule("blocks")
    return sum(parameter.numel() for parameter in blocks.parameters())
