"""Checks the files of a tokenizer in a model folder before a library reads them. Errors name the file and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from quasar.config.inputs import open_regular
from quasar.errors import RequestError
from quasar.model.json_files import read_checked, warn_once

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""The files with which transformers can build the tokenizers of the supported models."""

MAX_TEMPLATE_BYTES = 1 << 20


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARIES)


def check_tokenizer_files(folder: Path) -> None:
    """Check the small JSON files and the chat template.

    Raises RequestError if there is no vocabulary, or if a file is damaged or has a value of a wrong type.
    """
    if not has_tokenizer(folder):
        raise RequestError(f"{folder}: contains no tokenizer; it needs one of {', '.join(VOCABULARIES)}")
    for name, kind in _FILES.items():
        if (folder / name).exists():
            read_checked(kind, folder / name)
    template = folder / "chat_template.jinja"
    if template.exists():
        if template.stat().st_size > MAX_TEMPLATE_BYTES:
            raise RequestError(f"{template}: has more than {MAX_TEMPLATE_BYTES} bytes")
        with open_regular(template) as stream:
            try:
                stream.read().decode()
            except (UnicodeDecodeError, OSError) as error:
                raise RequestError(f"{template}: cannot be read ({error}); download the checkpoint again") from None


def check_vocabulary_files(folder: Path) -> None:
    """Check the large files. A library has failed to read one of them, and its error does not say which or where."""
    large: dict[str, type[BaseModel]] = {"tokenizer.json": _TokenizerJson, "vocab.json": _Vocabulary}
    for name, kind in large.items():
        if (folder / name).exists():
            read_checked(kind, folder / name)


def stop_tokens(folder: Path, vocab_size: int, default: int | None) -> frozenset[int]:
    """Return the ids that end an answer, as transformers 5 chooses them.

    They are those of generation_config.json, if the file exists, else those of config.json. If config.json names none,
    it is ``default``, the tokenizer's. Raises RequestError for an id beyond the vocabulary.
    """
    file = folder / "generation_config.json"
    if file.exists():
        found = read_checked(_Eos, file).eos_token_id
        if found is None:
            warn_once(f"{file}: names no eos_token_id, so that, as in transformers, no token ends an answer")
            return frozenset()
    else:
        file = folder / "config.json"
        found = read_checked(_Eos, file).eos_token_id
        found = default if found is None else found
    ids = frozenset(found if isinstance(found, list) else () if found is None else (found,))
    for token in sorted(ids):
        if token >= vocab_size:
            raise RequestError(
                f"{file}: eos_token_id={token} is beyond the model's vocab_size={vocab_size}; correct the file"
            )
    return ids


class _Loose(BaseModel):
    """Only the keys that are named are checked."""

    model_config = ConfigDict(strict=True, extra="ignore")


_TokenId = Annotated[int, Field(ge=0)]


class _Eos(_Loose):
    eos_token_id: _TokenId | list[_TokenId] | None = None


class _AddedToken(_Loose):
    content: str


_Token = str | _AddedToken | None


class _NamedTemplate(_Loose):
    name: str
    template: Annotated[str, Field(max_length=MAX_TEMPLATE_BYTES)]


class _SpecialTokens(_Loose):
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None
    sep_token: _Token = None
    cls_token: _Token = None
    mask_token: _Token = None
    additional_special_tokens: list[_Token] | None = None


class _TokenizerConfig(_SpecialTokens):
    chat_template: Annotated[str, Field(max_length=MAX_TEMPLATE_BYTES)] | list[_NamedTemplate] | None = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], _AddedToken] | None = None
    extra_special_tokens: dict[str, _Token] | list[_Token] | None = None
    tokenizer_class: str | None = None
    model_max_length: int | float | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    legacy: bool | None = None
    use_default_system_prompt: bool | None = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None


class _ChatTemplate(_Loose):
    chat_template: Annotated[str, Field(max_length=MAX_TEMPLATE_BYTES)]


class _Vocabulary(RootModel[dict[str, _TokenId]]):
    model_config = ConfigDict(strict=True)


class _CoreModel(_Loose):
    type: str | None = None
    vocab: dict[str, _TokenId] | list[Any]
    merges: list[Any] | None = None


class _CoreToken(_AddedToken):
    id: _TokenId


class _TokenizerJson(_Loose):
    model: _CoreModel
    added_tokens: list[_CoreToken] | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


_FILES: dict[str, type[BaseModel]] = {
    "tokenizer_config.json": _TokenizerConfig,
    "special_tokens_map.json": _SpecialTokens,
    "added_tokens.json": _Vocabulary,
    "chat_template.json": _ChatTemplate,
    "generation_config.json": _Eos,
}
