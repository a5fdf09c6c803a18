"""The reference: the model as it was trained, in 16 bit (or float32)."""

from quasar.verifiers.transformer import TransformerVerifier


class FP16Verifier(TransformerVerifier):
    """BF16 on CPU and recent GPUs, FP16 on older ones, float32 by ``verifier.dtype``; changes no weight."""

    label = "reference"
    is_reference = True
