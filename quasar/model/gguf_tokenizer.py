"""The tokenizer of a GGUF file, which transformers builds, with the split of texts that the file names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quasar.errors import RequestError, first_line
from quasar.model.gguf_metadata import Values
from quasar.model.json_files import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Values of tokenizer.ggml.pre with which llama.cpp splits a text as GPT-2 does, after it has isolated every digit."""

AS_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion")
"""Values with which llama.cpp splits a text as GPT-2 does, which is also what transformers does without a name."""


def gguf_tokenizer(path: Path, metadata: Values) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the file at ``path``.

    Raises RequestError if the vocabulary is missing or damaged, or if the file names a split that is not known.
    """
    from transformers import AutoTokenizer

    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and split not in (None, *DIGIT_BY_DIGIT, *AS_GPT2, *_splits_of_transformers()):
        raise RequestError(
            f"{path}: tokenizer.ggml.pre={split} is not known, and it decides which tokens a text becomes; pass the "
            "folder of the checkpoint that the file was made of"
        )
    try:
        # A local folder, which has no revision.
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)  # nosec B615
    except Exception as error:  # the libraries below raise whatever a damaged vocabulary makes them raise
        raise RequestError(f"{path}: contains no usable tokenizer ({first_line(error)})") from error
    if kind == "gpt2" and split is None:
        warn_once(f"{path}: tokenizer.ggml.pre is missing, so that texts are split as for GPT-2")
    if kind == "gpt2" and split in DIGIT_BY_DIGIT:
        _isolate_digits(tokenizer)
    return tokenizer


def _splits_of_transformers() -> frozenset[str]:
    """Return the names that transformers knows."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    return frozenset(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS)


def _isolate_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import pre_tokenizers

    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
