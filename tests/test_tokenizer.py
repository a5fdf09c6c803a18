"""The special tokens that a tokenizer puts before a text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from quasar.model.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("template", "wanted"),
    [(None, []), ("<bos> $A", [1]), ("$A <eos>", []), ("<bos> <eos> $A <eos>", [1, 2])],
)
def test_the_beginning_of_a_text(template: str | None, wanted: list[int]) -> None:
    backend = Backend(WordLevel({"<unk>": 0, "<bos>": 1, "<eos>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if template is not None:
        backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset(), {})
    assert tokenizer.beginning == wanted
    assert tokenizer.encode("a b") == [3, 4]
