"""Task accuracy: whether the answer to a math problem is correct, and whether generated code passes its tests."""

from __future__ import annotations

import doctest
import re
from decimal import Decimal, InvalidOperation

from quasar.evaluation.extraction import program_of, task_of
from quasar.evaluation.prompts import Prompt
from quasar.evaluation.sandbox import passes

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_DOCSTRING = re.compile(r"(\"{3}|'{3})(.*?)\1", re.DOTALL)
_ENTRY_POINT = re.compile(r"^check\((\w+)\)\s*\Z", re.MULTILINE)


def graded(prompt: Prompt, output: str) -> bool | None:
    """Whether the output of the prompt's first turn solves its task; None if the task cannot be graded.

    If the reference answer ends in ``#### N`` (GSM8K, Cobbe et al. 2021), the output must end with the same number, see
    `final_number`. A code prompt with ``test`` or with docstring examples is graded by running the code (HumanEval,
    pass@1, Chen et al. 2021).
    """
    if prompt.reference and "####" in prompt.reference[0]:
        return final_number(output) == final_number(prompt.reference[0])
    entry_point = None if prompt.test is None else _ENTRY_POINT.search(prompt.test)
    task = task_of(prompt.turns[0], entry_point[1] if entry_point else None)
    if task is None:
        return None
    test = prompt.test if prompt.test is not None else examples_as_test(task.code)
    if test is None:
        return None
    program = program_of(task, output)
    if program is None:
        return False
    return passes(program, test, task.context, task.own, trusts=task.is_class)


def final_number(text: str) -> Decimal | None:
    """Return the last number of a text, or of the part after its last ``####`` if there is one. Commas are ignored."""
    numbers = _NUMBER.findall(text.rsplit("####", 1)[-1]) or _NUMBER.findall(text)
    try:
        return Decimal(numbers[-1].replace(",", "").rstrip(".")) if numbers else None
    except InvalidOperation:
        return None


def examples_as_test(given: str) -> str | None:
    """Return code that fails unless the docstring examples of ``given`` are correct; None if there are no examples."""
    texts = [text for _, text in _DOCSTRING.findall(given)]
    found = [example for text in texts for example in doctest.DocTestParser().get_examples(text)]
    examples = [example for example in found if example.want]
    if not examples:
        return None
    lines = "\n".join(f">>> {_continued(example.source)}{example.want}" for example in examples)
    return (
        "import doctest as _doctest\n"
        f"_test = _doctest.DocTestParser().get_doctest({lines!r}, dict(globals()), 'examples', None, 0)\n"
        "assert _doctest.DocTestRunner(verbose=False).run(_test, out=lambda text: None).failed == 0\n"
    )


def _continued(source: str) -> str:
    return source.rstrip("\n").replace("\n", "\n... ") + "\n"
