"""The reference model that a configuration names, before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quasar.config.component import class_named
from quasar.config.schema import RunConfig
from quasar.errors import RequestError
from quasar.model.devices import choose_device, choose_dtype
from quasar.model.sources import Checkpoint, locate
from quasar.model.tokenizer import Tokenizer, load_tokenizer
from quasar.model.transformer import Transformer
from quasar.quantization.packed import load_reference
from quasar.results.console import Reporter


@dataclass(frozen=True)
class Reference:
    """Where the reference's weights are, and where and in which dtype the verifier runs."""

    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    def load(self, dtype: torch.dtype, reporter: Reporter) -> Transformer:
        """Load the weights in ``dtype``, which is that of the verifier or float32."""
        with reporter.progress("loading weights") as advance:
            return load_reference(self.checkpoint, dtype, self.device, advance)


def locate_reference(settings: RunConfig, reporter: Reporter) -> Reference:
    """Find the checkpoint, which may be downloaded, and load its tokenizer.

    Raises RequestError if the drafter, the verifier or the model does not fit this machine.
    """
    device = choose_device(settings.device)
    require_device(settings, device)
    dtype = choose_dtype(settings.verifier["dtype"], device)
    with reporter.stages() as stage:
        checkpoint = locate(settings.model, stage)
    return Reference(device, dtype, checkpoint, load_tokenizer(checkpoint))


def require_device(settings: RunConfig, device: torch.device) -> None:
    """Raise RequestError if the drafter or the verifier does not work on this type of device."""
    for group, node in (("drafter", settings.drafter), ("verifier", settings.verifier)):
        devices: tuple[str, ...] = getattr(class_named(node["_target_"], f"{group}._target_"), "devices", ())
        if device.type not in devices:
            raise RequestError(
                f"{group}={node['name']}: does not work on device={device.type}, only on {' and '.join(devices)}"
            )
