"""Converts text to token ids and back, with the checkpoint's tokenizer, chat template and stop tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar.errors import RequestError
from quasar.model.sources import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Tokenizer:
    """A tokenizer with its chat template. stop_tokens: ids that end an answer, from the generation config."""

    def __init__(self, inner: PreTrainedTokenizerBase, stop_tokens: frozenset[int], template: dict[str, Any]) -> None:
        self._inner = inner
        self._template = template
        self.stop_tokens = stop_tokens

    @property
    def has_chat_template(self) -> bool:
        return self._inner.chat_template is not None

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, up to the place where the assistant's answer begins.

        For a base model without a chat template, every message becomes one paragraph.
        """
        if not self.has_chat_template:
            return list(self._inner.encode("\n\n".join(message["content"] for message in messages)))
        text = self._inner.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **self._template
        )
        return list(self._inner.encode(str(text), add_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._inner.decode(list(tokens), skip_special_tokens=True))

    def spell(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens in which special tokens are spelled, such as ``<end>``."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=False))


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Load the tokenizer of a checkpoint. Code in the checkpoint is never executed."""
    if checkpoint.folder is None:
        return Tokenizer(_byte_tokenizer(), frozenset({256}), {})
    folder = checkpoint.folder
    from transformers import AutoTokenizer, LlamaTokenizerFast

    try:
        if _read(folder / "config.json").get("model_type") == "PanguEmbedded":
            # The checkpoint's tokenizer class is remote code for a SentencePiece model. Llama's class reads it as well.
            inner = LlamaTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        else:
            inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: contains no usable tokenizer ({str(error).splitlines()[0]})") from None
    return Tokenizer(inner, _stop_tokens(folder, inner.eos_token_id), checkpoint.chat_template)


def _stop_tokens(folder: Path, default: int | None) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        stop = _read(folder / name).get("eos_token_id")
        if stop is not None:
            return frozenset(stop if isinstance(stop, list) else [stop])
    return frozenset() if default is None else frozenset({default})


def _read(file: Path) -> dict[str, object]:
    if not file.exists():
        return {}
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    """Build the tokenizer of the random model, which has 256 bytes and four special tokens."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>", "<system>", "<user>", "<assistant>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", chat_template=_TINY_CHAT_TEMPLATE)
