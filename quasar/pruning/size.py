"""How many parameters a decoder's blocks hold: what a pruning ratio is a fraction of."""

from torch import nn


def block_parameters(model: nn.Module) -> int:
    """Parameters of all decoder blocks; embedding, final norm and head do not count."""
    blocks = model.get_submodule("blocks")
    return sum(parameter.numel() for parameter in blocks.parameters())
