"""Width pruning: removes the least important MLP channels and KV groups with torch-pruning's dependency graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quasar.errors import RequestError
from quasar.model.transformer import Transformer
from quasar.pruning.allocation import Amount, Removal, removals
from quasar.pruning.importance import Importance, input_means, scores
from quasar.pruning.separate import SeparateAttention, SeparateBlock, SeparateTransformer
from quasar.quantization.statistics import Calibration, Progress


def prune_width(
    model: Transformer,
    amount: Amount,
    importance: Importance,
    calibration: Callable[[], Calibration],
    progress: Progress,
) -> Transformer:
    """Remove the least important structures of the decoder blocks and return the pruned model.

    See `scores` for ``importance``. With flap, the mean contribution of the removed structures is added as a bias (An
    et al. 2024, section 3.4). If the ratio is too small to remove anything, the model is returned as it is.

    Raises RequestError for heads of a model that normalizes those of a token together (OLMo 2).
    """
    if amount.heads and model.config.qk_norm_whole:
        raise RequestError(
            "verifier.heads=true: this model normalizes the queries and keys of all heads together, so that removing "
            "heads changes the others; pass verifier.heads=false, or verifier.method=depth"
        )
    found = scores(model, importance, calibration, progress)
    chosen = removals(model, found, amount)
    if not any(removal.channels or removal.groups for removal in chosen):
        return model
    means: list[tuple[Tensor, Tensor]] | None = None
    if importance == "flap":
        statistics = calibration().statistics(model, progress)
        means = [input_means(statistics, index) for index in range(len(chosen))]
    return remove(model, chosen, means, progress)


def remove(
    model: Transformer,
    chosen: Sequence[Removal],
    means: Sequence[tuple[Tensor, Tensor]] | None,
    progress: Progress,
) -> Transformer:
    """Return the model without the chosen structures of each block.

    means: for every block, the mean inputs of its output and down projections. The contribution of the removed inputs
        is added as a bias; None if it is not
    """
    separate = SeparateTransformer(model)
    blocks = [block for block in separate.blocks if isinstance(block, SeparateBlock)]
    if means is not None:
        for block, removal, (attention_mean, mlp_mean) in zip(blocks, chosen, means, strict=True):
            _compensate(block.attention.output, _query_columns(block.attention, removal.groups), attention_mean)
            _compensate(block.mlp.down, removal.channels, mlp_mean)
    couplings = _Couplings(separate)
    for done, (block, removal) in enumerate(zip(blocks, chosen, strict=True)):
        progress(done, len(blocks))
        if removal.channels:
            mlp = block.mlp
            couplings.prune(
                {mlp.gate: removal.channels, mlp.up: removal.channels, mlp.down: removal.channels}, mlp.down
            )
        if removal.groups:
            attention = block.attention
            queries, keys = _query_columns(attention, removal.groups), _head_rows(attention, removal.groups)
            dimensions = {attention.q: queries, attention.k: keys, attention.v: keys, attention.output: queries}
            couplings.prune(dimensions, attention.output)
    progress(len(blocks), len(blocks))
    return separate.fused()


class _Couplings:
    """torch-pruning's dependency graph of the model. It says which layers must be pruned together."""

    def __init__(self, model: SeparateTransformer) -> None:
        import torch_pruning

        self._library = torch_pruning
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        tokens = torch.arange(8, device=model.embedding.weight.device)
        # torch-pruning traces with autograd, which the caller may have disabled.
        with torch.enable_grad(), warnings.catch_warnings():
            # torch-pruning warns about the weights of the norms, but it handles them correctly.
            warnings.simplefilter("ignore", UserWarning)
            self._graph = torch_pruning.DependencyGraph().build_dependency(
                model, example_inputs=tokens, forward_fn=lambda traced, example: traced(example, rotate_heads=False)
            )

    def prune(self, dimensions: dict[nn.Linear, list[int]], last: nn.Linear) -> None:
        """Remove dimensions of ``last``'s inputs and of the layers that produce them.

        The graph is used to check that ``dimensions`` has all these layers. The caller says which dimensions belong
        together, because the graph cannot follow indices through grouped-query attention.
        """
        group = self._graph.get_pruning_group(
            last, self._library.prune_linear_in_channels, idxs=sorted(dimensions[last])
        )
        coupled = {
            dependency.target.module for dependency, _ in group if isinstance(dependency.target.module, nn.Linear)
        }
        if coupled != set(dimensions):
            raise RuntimeError(f"torch-pruning couples {len(coupled)} layers, but {len(dimensions)} share dimensions")
        for layer, indices in dimensions.items():
            prune = self._library.prune_linear_in_channels if layer is last else self._library.prune_linear_out_channels
            prune(layer, idxs=indices)


def _compensate(linear: nn.Linear, columns: list[int], mean: Tensor) -> None:
    weight = linear.weight.data
    bias = torch.zeros(weight.shape[0], device=weight.device) if linear.bias is None else linear.bias.data.float()
    bias = bias + weight[:, columns].float() @ mean.to(weight.device)[columns]
    linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)


def _head_rows(attention: SeparateAttention, groups: Sequence[int]) -> list[int]:
    """Return the rows of the k and v projections that belong to the KV groups."""
    size = attention.head_dim
    return [row for group in groups for row in range(group * size, (group + 1) * size)]


def _query_columns(attention: SeparateAttention, groups: Sequence[int]) -> list[int]:
    """Return the rows of the q projection, which are also the columns of output, that belong to the KV groups."""
    size = attention.q.out_features // (attention.k.out_features // attention.head_dim)
    return [column for group in groups for column in range(group * size, (group + 1) * size)]
