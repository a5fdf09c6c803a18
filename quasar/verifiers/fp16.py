"""The reference: the original model in 16 bit or float32."""

from quasar.verifiers.transformer import TransformerVerifier


class FP16Verifier(TransformerVerifier):
    """The unquantized, unpruned model. ``verifier.dtype=auto`` is BF16 on CPUs and recent GPUs, FP16 on older GPUs."""

    label = "reference"
    is_reference = True
