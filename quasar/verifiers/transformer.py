"""The base of all built-in verifiers: a `Transformer` with linear layers of any format, and a static KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from quasar.decoding.draft import Draft
from quasar.decoding.scores import Scores
from quasar.errors import QuasarError, RequestError
from quasar.model.execution.choose import executor_for
from quasar.model.kv_cache import KvBits, KVCache
from quasar.model.linear import QuantizedLinear
from quasar.model.transformer import Transformer
from quasar.quantization.layers import pack_linears
from quasar.verifiers._shared_layers import share_equal_layers
from quasar.verifiers.base import LayeredVerifier, Setup, Verifier, VerifierCost

# Long prompts are read in chunks, which bounds the memory of the attention mask and the activations.
PREFILL_CHUNK = 512

EMULATED = (
    "FP8 is emulated on this device, which has no instructions for it: fidelity is that of FP8, but times are those of "
    "the emulation. weight_bytes counts 1 byte per weight and 4 per scale, as a device with FP8 reads them"
)


class TransformerVerifier(LayeredVerifier):
    """A verifier for a `Transformer`. Subclasses quantize or prune the model before they call this constructor.

    kv_bits: bits of the keys and values in the KV cache, see `quasar.model.kv_cache.KVCache`; with fewer than 16 the
        verifier is another model, and its label says so
    executor: runs the passes of the model
    """

    def __init__(self, model: Transformer, setup: Setup, *, kv_bits: KvBits = 16) -> None:
        pack_linears(model)
        self.model = model
        if kv_bits != 16:
            self.label = f"{self.label} with {'an 8' if kv_bits == 8 else 'a 4'}-bit KV cache"
            self.is_reference = False
        self.cache = KVCache(model.config, setup.capacity, model.dtype, model.device, kv_bits)
        self.cost = VerifierCost(weight_bytes(model), self.cache.bytes_per_token)
        self.device, self.dtype, self.context_length = model.device, model.dtype, model.config.context_length
        self.executor = executor_for(model, self.cache)
        self.emulated = any(isinstance(module, QuantizedLinear) and module.emulated for module in model.modules())
        if self.emulated:
            self.details = (*self.details, EMULATED)

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    @property
    def num_layers(self) -> int:
        return self.model.config.num_layers

    def share_cache(self, owner: LayeredVerifier) -> None:
        if not isinstance(owner, TransformerVerifier):
            raise RequestError(
                f"the {self.label} cannot read the cache of {type(owner).__name__}, which is not a TransformerVerifier"
            )
        if self.cache is owner.cache:
            return
        if self.cache.bits != owner.cache.bits:
            raise RequestError(
                f"the {self.label} cannot read the cache of the {owner.label}, whose keys and values have "
                f"{owner.cache.bits} bits instead of {self.cache.bits}; set verifier.kv_bits={self.cache.bits}"
            )
        ours, theirs = ([keys.shape[::2] for keys in cache.keys] for cache in (self.cache, owner.cache))
        if (ours, self.dtype) != (theirs, owner.dtype):
            raise RequestError(
                f"the {self.label} cannot read the cache of the {owner.label}: their layers differ in number, width or "
                "precision; draft with the same layers in another precision"
            )
        self.cache = owner.cache
        self.executor = executor_for(self.model, self.cache)

    def share_weights(self, owner: Verifier) -> int:
        if not isinstance(owner, TransformerVerifier) or owner is self:
            return 0
        saved = share_equal_layers(self.model, owner.model)
        # Recorded and captured passes read the weights at their old addresses.
        self.executor = executor_for(self.model, self.cache)
        return saved

    def rewind(self, length: int) -> None:
        self.cache.rewind(length)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Scores:
        self.cache.clear()
        logits = torch.empty(0)
        for chunk in tokens.split(PREFILL_CHUNK):
            run = partial(self.executor.eagerly, chunk, outputs=slice(-1, None))
            logits = run()
            self._require_finite(run)
            self.cache.commit(range(len(chunk)))
        return Scores(logits)

    @torch.inference_mode()
    def verify(self, last: int, draft: Draft) -> Scores:
        size = len(draft) + 1
        block = draft.row_tokens(last), draft.offsets(), draft.block_mask()
        logits = self.executor(*block, outputs=self._outputs(draft))
        check = partial(self._require_finite, partial(self.executor.eagerly, *block))
        scratch = logits[size:] if draft.scratch else None
        return Scores(logits[:size], scratch, partial(self.executor.most_likely, size), check)

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        self.cache.commit([0, *(node + 1 for node in path)])

    def draft_bytes(self, layers: Sequence[int]) -> int:
        skipped = set(range(self.num_layers)) - set(layers)
        return self.cost.weight_bytes - sum(weight_bytes(self.model.blocks[layer]) for layer in skipped)

    @torch.inference_mode()
    def draft_logits(self, token: int, offset: int, layers: Sequence[int]) -> Tensor:
        one = torch.ones(1, 1, dtype=torch.bool)
        start = self.cache.length + offset
        return self.executor(torch.tensor([token]), torch.zeros(1, dtype=torch.int64), one, start, layers)[0]

    @torch.inference_mode()
    def teacher_forced(self, tokens: Tensor, first: int) -> Tensor:
        cache = None
        if self.cache.bits != 16:
            cache = KVCache(self.model.config, len(tokens), self.dtype, self.device, self.cache.bits)
        return self.model(tokens.to(self.device), cache, outputs=slice(first, None))

    def _outputs(self, draft: Draft) -> Tensor | slice:
        """Return the rows of a pass whose logits are needed: all rows except scratch rows that are not outputs."""
        if draft.scratch is None:
            return slice(None)
        size = 1 + len(draft)
        return torch.cat([torch.arange(size), draft.scratch.outputs + size]).to(self.device, non_blocking=True)

    def _require_finite(self, again: Callable[[], Tensor]) -> None:
        """Raise QuasarError if a logit of the last pass is NaN or infinite.

        The check reads a single checksum. If it fails, ``again`` repeats the pass op by op to name the first layer with
        such an output.
        """
        if not self.executor.last_was_finite:
            layer = first_broken_layer(self.model, again)
            raise QuasarError(f"logits of the {self.label} are NaN or infinite, first in the output of {layer}")


def first_broken_layer(model: Transformer, forward: Callable[[], Tensor]) -> str:
    """Run ``forward`` and return the name of the first layer, in order of execution, whose output is not finite."""
    broken: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not all(part.isfinite().all() for part in _tensors(output)):
                broken.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if name and not list(module.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return broken[0] if broken else "no single layer"


def _tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors in the output of a layer, which is a tensor or a nested tuple."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple):
        for part in output:
            yield from _tensors(part)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights that one pass reads; the embedding counts only if it is also the head."""
    total = 0
    for module in model.modules():
        own = getattr(module, "weight_bytes", None)
        if own is not None:
            total += own
        elif not isinstance(module, nn.Embedding):
            total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return total
