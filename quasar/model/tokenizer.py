"""Converts text to token ids and back, with the checkpoint's tokenizer, chat template and stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar.errors import RequestError, first_line
from quasar.model.config_file import read_config
from quasar.model.json_files import read_object
from quasar.model.sources import Checkpoint
from quasar.model.template_probe import probe
from quasar.model.tokenizer_files import check_tokenizer_files, check_vocabulary_files, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Tokenizer:
    """A tokenizer with its chat template.

    stop_tokens: ids that end an answer, from the generation config
    template:    arguments of the chat template
    folder:      where the tokenizer comes from, for messages
    vocab_size:  number of tokens of the model; None if every id of the tokenizer is below it
    """

    def __init__(
        self,
        inner: PreTrainedTokenizerBase,
        stop_tokens: frozenset[int],
        template: dict[str, Any],
        folder: Path | None = None,
        vocab_size: int | None = None,
    ) -> None:
        _switch_off_word_cache(inner)
        self._inner = inner
        self._template = template
        self._folder, self._vocab_size = folder, vocab_size
        self.stop_tokens = stop_tokens

    @property
    def inner(self) -> PreTrainedTokenizerBase:
        """The tokenizer of transformers, for what works with its interface."""
        return self._inner

    @property
    def has_chat_template(self) -> bool:
        return self._inner.chat_template is not None

    @property
    def beginning(self) -> list[int]:
        """The special tokens that the model expects before a text, such as Gemma's ``<bos>``; often none."""
        whole, text = self._inner.encode("a"), self._inner.encode("a", add_special_tokens=False)
        places = (place for place in range(len(whole)) if whole[place : place + len(text)] == text)
        return list(whole[: next(places, 0)])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, up to the place where the assistant's answer begins.

        For a base model without a chat template, every message becomes one paragraph. Raises RequestError if the
        template fails, or if a token is not in the model's vocabulary.
        """
        if not self.has_chat_template:
            return self._known(self._inner.encode("\n\n".join(message["content"] for message in messages)))
        try:
            text = self._inner.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **self._template
            )
        except Exception as error:  # a template is a program, which can raise anything
            raise RequestError(
                f"{self._folder}: the chat template fails on this conversation ({type(error).__name__}: "
                f"{first_line(error)}); see also model.chat_template"
            ) from None
        return self._known(self._inner.encode(str(text), add_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        return self._known(self._inner.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._inner.decode(list(tokens), skip_special_tokens=True))

    def spell(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens in which special tokens are spelled, such as ``<end>``."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=False))

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Return the ids. Raises RequestError for an id beyond the model's embedding."""
        ids = list(tokens)
        if self._vocab_size is not None and ids and max(ids) >= self._vocab_size:
            text = self._inner.convert_ids_to_tokens(max(ids))
            raise RequestError(
                f"{self._folder}: the tokenizer gives {text!r} the id {max(ids)}, but config.json has "
                f"vocab_size={self._vocab_size}; tokenizer and model do not belong together"
            )
        return ids


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Load the tokenizer of a checkpoint. Code in the checkpoint is never executed.

    Raises RequestError if the tokenizer is missing or damaged, or if its chat template takes too much time or memory.
    """
    if checkpoint.folder is None:
        return Tokenizer(_byte_tokenizer(), frozenset({256}), {})
    folder = checkpoint.folder
    # Checked first: transformers computes whatever a wrong config makes it compute.
    config = read_config(folder)
    check_tokenizer_files(folder)
    inner = _load(folder)
    templates = inner.chat_template
    for template in templates.values() if isinstance(templates, dict) else (templates,):
        if template is not None and (problem := probe(template, checkpoint.chat_template)) is not None:
            raise RequestError(f"{folder}: its chat template {problem}, so it is not used")
    stop = stop_tokens(folder, config.vocab_size, inner.eos_token_id)
    return Tokenizer(inner, stop, checkpoint.chat_template, folder, config.vocab_size)


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, LlamaTokenizerFast

    try:
        # A local folder has no revision.
        if read_object(folder / "config.json").get("model_type") == "PanguEmbedded":
            # The checkpoint's tokenizer class is remote code for a SentencePiece model. Llama's class reads it as well.
            inner = LlamaTokenizerFast.from_pretrained(folder, trust_remote_code=False)  # nosec B615
        else:
            inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # nosec B615
        if not inner.encode("a", add_special_tokens=False):
            raise ValueError("it makes no token of the text 'a'")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # damaged files make the libraries raise anything, even PanicException of Rust
        check_vocabulary_files(folder)
        raise RequestError(f"{folder}: contains no usable tokenizer ({first_line(error)})") from None
    return inner


def _switch_off_word_cache(inner: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer remember no words that it has split into tokens.

    The library ``tokenizers`` never frees these words, not even with their tokenizer, so that the memory of a process
    would grow with every prompt and with every job of a sweep. Prompts are too short for the cache to save time.
    """
    model = getattr(getattr(inner, "backend_tokenizer", None), "model", None)
    resize = getattr(model, "_resize_cache", None)
    if resize is not None:
        resize(0)


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
