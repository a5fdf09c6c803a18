"""Grading of math answers and generated code, and what the sandbox stops."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from quasar.evaluation.accuracy import final_number, graded
from quasar.evaluation.prompts import Prompt, load_prompts
from quasar.evaluation.sandbox import passes
from tests.compose import composed_run

FUNCTION = '''def double(x: int) -> int:
    """Twice x.

    >>> double(2)
    4
    >>> for x in (1, 2):
    ...     print(double(x))
    2
    4
    """
'''


def prompt(turn: str, reference: str = "", test: str | None = None) -> Prompt:
    return Prompt("1", "task", (turn,), (reference,) if reference else (), "file:1", test)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7 apples.", "7"),
        ("#### 1,234", "1234"),
        ("It costs $1,200.50 in 2024.\n#### 1200.5 dollars for 3", "3"),
        ("The answer is -5.", "-5"),
        ("no number", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_math_is_graded_by_the_number() -> None:
    problem = prompt("How many?", "First 6, then 7.\n#### 42")
    assert graded(problem, "6 times 7 is 42.") is True
    assert graded(problem, "42.0") is True
    assert graded(problem, "It is 41.") is False
    assert graded(problem, "many") is False


@pytest.mark.parametrize(
    ("output", "correct"),
    [
        (f"Sure:\n```python\n{FUNCTION}    return 2 * x\n```\nDone.", True),
        ("    return x + x", True),  # only continues what was given
        ("```python\nreturn x + x\n```", True),
        (f"```python\n{FUNCTION}    return x\n```", False),
        ("```python\ndef double(x):\n    import sys\n    sys.exit(0)\n```", False),  # leaves before the examples
        ("I do not know.", False),
    ],
)
def test_code_is_graded_by_its_examples(output: str, correct: bool) -> None:
    assert graded(prompt(f"Complete this:\n\n{FUNCTION}"), output) is correct


def test_code_with_a_test_is_graded_by_it(tmp_path: Path) -> None:
    file = tmp_path / "humaneval.jsonl"
    file.write_text(
        '{"question_id": 1, "turns": ["def one():\\n    \\"\\"\\"One.\\"\\"\\"\\n"], '
        '"test": "def check(f):\\n    assert f() == 1", "entry_point": "one"}\n'
    )
    (problem,) = load_prompts(composed_run("data=specbench", f"data.path={file}").data)
    assert graded(problem, "    return 1") is True
    assert graded(problem, "    return 2") is False


def test_a_whole_function_finds_what_stands_above_it() -> None:
    given = "import math\n\ndef half(x):\n    return x / 2\n\ndef root(x):\n    pass\n"
    problem = prompt(given, test="assert root(8) == 2.0")
    assert graded(problem, "```python\ndef root(x):\n    return math.sqrt(half(x))\n```") is True
    assert graded(problem, "```python\ndef root(x):\n    return math.sqrt(x)\n```") is False


def test_prose_above_a_function_is_not_run() -> None:
    problem = prompt("import math\nWrite this function:\ndef root(x):\n    pass\n", test="assert root(4) == 2.0")
    assert graded(problem, "```python\ndef root(x):\n    return math.sqrt(x)\n```") is True


def test_other_tasks_are_not_graded() -> None:
    assert graded(prompt("Write a poem.", "Roses are red."), "Violets are blue.") is None


def test_built_in_references_pass_their_own_grading() -> None:
    prompts = load_prompts(composed_run("data.limit=null").data)
    found = {p.key: graded(p, p.reference[0]) for p in prompts if p.family in ("code", "math")}
    assert [key for key, correct in found.items() if correct is False] == []
    assert sum(correct is True for correct in found.values()) >= 17
    wrong = [graded(p, "```python\npass\n```") for p in prompts if p.family == "code"]
    assert True not in wrong


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "x = bytearray(2 << 30)",
        "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "def broken(:",
    ],
)
def test_the_sandbox_stops(program: str) -> None:
    assert not passes(program, seconds=2)


def test_the_sandbox_keeps_writing_in_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_text("kept")
    assert not passes(f"open({str(outside)!r}, 'w').write('gone')")
    assert not passes(f"import os; os.remove({str(outside)!r})")
    assert outside.read_text() == "kept"
    assert passes("open('here', 'w').write('fine'); assert open('here').read() == 'fine'; import os; os.remove('here')")
