"""Grading of math answers and generated code. What generated code can reach is in test_sandbox.py."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from quasar.evaluation.accuracy import final_number, graded
from quasar.evaluation.prompts import Prompt, load_prompts
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
        ("", False),
        ("```python\npass\n```", False),
        ("[" * 5000, False),
        ("```python\ndef double(x):\n    return " + "-" * 20000 + "x\n```", False),
    ],
)
def test_code_is_graded_by_its_examples(output: str, correct: bool) -> None:
    assert graded(prompt(f"Complete this:\n\n{FUNCTION}"), output) is correct


@pytest.mark.parametrize(
    "output",
    [
        f"Install:\n```bash\npip install x\n```\nThen:\n```python\n{FUNCTION}    return 2 * x\n```\n",
        f"```python\n{FUNCTION}```\nThe body is:\n```python\n    return 2 * x\n```",
        f"```python\n{FUNCTION}    pass\n```\nNow whole:\n```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef double(x):\n    return 2 * x\n```\nUse:\n```python\nassert double(unknown) == 5\n```",
        "```python\ndef twice(x):\n    return x + x\n```\n```python3\ndef double(x):\n    return twice(x)\n```",
        f"```python\n{FUNCTION}    return 2 * x\n```\n".replace("\n", "\r\n"),
        "    y = x\r\n    return y + x\r\n",
        "\n    return 2 * x\n\nThis function doubles x.\n",
        "\n\n    return 2 * x\n\nDone\n",
        "    if x:\n        return 2 * x\n    return 0\n\n\ndef unfinished(:\n",
        "return 2 * x",
        "y = 2\n    return y * x",  # the indent of the first line was stripped
        "  y = 2\n  return y * x",  # another indent than the prompt's
        "\treturn 2 * x",
        "Here it is:\n\n    return 2 * x\n\nOk?",
        "Sure!\n\ndef double(x):\n    return 2 * x\n\nThis works because it's good.",
        "1. Do this:\n   ```python\n   def double(x):\n       return 2 * x\n   ```\n2. Done.",
        "Sure: ```python\ndef double(x):\n    return 2 * x```",
        "```\ndef double(x):\n    '''\n    ```\n    x\n    ```\n    '''\n    return 2 * x\n```",
        "~~~python\ndef double(x):\n    return 2 * x\n~~~",
        "```python\ndef double(x):\n    return 2 * x\n",
        "```python\ndouble = lambda x: 2 * x\n```",
        "```python\ndef double(x):\n    return 2 * x\n\nif __name__ == '__main__':\n    raise SystemExit(1)\n```",
        "```python\nfrom __future__ import annotations\ndef double(x: Unknown):\n    return 2 * x\n```",
    ],
)
def test_a_correct_answer_is_found_in_every_form(output: str) -> None:
    assert graded(prompt(f"Complete this:\n\n{FUNCTION}"), output) is True


LIAR = "    def __repr__(self): return '4'\n    def __eq__(self, other): return True\n    __str__ = __repr__\n"


@pytest.mark.parametrize(
    "output",
    [
        "import os\nos._exit(57)\ndef double(x):\n    return 2 * x",
        "def double(x):\n    import os\n    os._exit(57)",
        "def double(x):\n    import sys\n    sys.exit(57)",
        "def double(x):\n    raise KeyboardInterrupt",
        f"class Liar:\n{LIAR}def double(x):\n    return Liar()",
        f"class Liar(int):\n{LIAR}def double(x):\n    return Liar(x)",
        "class Liar(str):\n    def __repr__(self): return '4'\ndef double(x):\n    return Liar('x')",
        "import doctest\ndoctest.DocTestRunner.run = lambda *a, **k: None\ndef double(x):\n    return x",
        "import builtins, sys\nbuiltins.print = sys.displayhook = lambda *a: None\ndef double(x):\n    return x",
        "import sys\nsys.modules['__main__'] = None\nsys.addaudithook(print)\ndef double(x):\n    return x",
        "import os\nfor f in range(64):\n    try:\n        os.write(f, b'{}')\n    except OSError:\n        pass\n"
        "def double(x):\n    return x",
    ],
)
def test_a_wrong_answer_cannot_pass_itself(output: str) -> None:
    assert graded(prompt(f"Complete this:\n\n{FUNCTION}"), f"```python\n{output}\n```") is False


SUM = "def total(x: list):\n    '''The sum.'''\n"
SUM_TEST = (
    "def check(candidate):\n    given = [1, 2]\n    assert candidate(given) == 3 and given == [1, 2]\n"
    "    assert abs(candidate([0.5]) - 0.5) < 1e-6\n    assert 2 < candidate([2.5]) < 3\n\ncheck(total)"
)
ALL = "".join(
    f"    def __{name}__(self, *other): return {value}\n"
    for name, value in {"eq": True, "lt": True, "gt": True, "sub": 0.0, "abs": 0.0, "bool": True}.items()
)


@pytest.mark.parametrize(
    ("output", "correct"),
    [
        ("return sum(x)", True),
        ("return sum(x)\n\n\ndef check(candidate):\n    pass", True),
        ("return len(x)\n\n\ndef check(candidate):\n    pass", False),
        ("import numpy\n    return numpy.sum(numpy.array(x))", True),
        ("x.append(0)\n    return sum(x)", False),  # changes its argument
        (f"return Liar()\n\n\nclass Liar:\n{ALL}", False),
        (f"return Liar(1)\n\n\nclass Liar(float):\n{ALL}", False),
    ],
)
def test_the_test_sees_plain_values_only(output: str, correct: bool) -> None:
    assert graded(prompt(SUM, test=SUM_TEST), f"    {output}\n") is correct


@pytest.mark.parametrize(
    ("given", "test", "output"),
    [
        ("def upto(n):\n    pass", "assert list(upto(2)) == [0, 1]\nassert next(upto(1)) == 0", "yield from range(n)"),
        (
            "def compose(f, g):\n    pass",
            "assert compose(lambda x: x + 1, lambda x: 2 * x)(3) == 7\n"
            "try:\n    compose(None, None)(1)\nexcept TypeError as error:\n    assert 'callable' in str(error)\n"
            "else:\n    raise AssertionError",
            "return lambda x: f(g(x))",
        ),
        ("def clear(x):\n    pass", "given = {1: [2]}\nclear(given)\nassert given == {}", "x.clear()"),
        (
            "from collections import Counter\ndef count(x):\n    pass",
            "assert repr(count('aab')) == \"Counter({'a': 2, 'b': 1})\"",
            "return Counter(x)",
        ),
        (
            "class BadError(ValueError): ...\ndef fail(x):\n    pass",
            "try:\n    fail(1)\nexcept BadError as error:\n    assert str(error) == 'no 1'\n",
            "raise BadError(f'no {x}')",
        ),
        (
            "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n\n"
            "def chain(*values):\n    return Node(values[0], chain(*values[1:])) if values else None\n\n"
            "def last(node):\n    pass",
            "node = chain(1, 2, 3)\nassert last(node).value == 3 and last(node) == node.next.next\n"
            "node.next.next.value = 4\nassert last(node).value == 4 and last(node).next is None",
            "return node if node.next is None else last(node.next)",
        ),
        (
            "import enum\nclass Color(enum.Enum):\n    RED = 1\n    BLUE = 2\n\ndef other(color):\n    pass",
            "assert other(Color.RED) == Color.BLUE and other(Color.BLUE) == Color.RED",
            "return Color.RED if color is Color.BLUE else Color.BLUE",
        ),
        ("def big(n):\n    pass", "assert big(20000) == 10 ** 20000", "return 10 ** n"),
    ],
)
def test_values_of_every_kind_reach_the_test(given: str, test: str, output: str) -> None:
    assert graded(prompt(given, test=test), f"{given.replace('    pass', '    ')}{output}\n") is True


def test_a_class_decides_what_its_objects_equal() -> None:
    given = (
        "class Point:\n    '''A point.\n\n    >>> Point(1, 2)\n    Point(1, 2)\n    >>> Point(1, 2) == Point(1, 2)\n"
    )
    given += "    True\n    '''\n"
    body = "    def __init__(self, *at): self.at = at\n    def __repr__(self): return f'Point{self.at}'\n"
    equal = "    def __eq__(self, other): return self.at == other.at\n"
    problem = prompt(f"```python\n{given}```")
    assert graded(problem, f"```python\nclass Point:\n{body}{equal}```") is True
    assert graded(problem, f"```python\nclass Point:\n{body}```") is False


def test_a_test_uses_the_functions_of_the_prompt() -> None:
    """A test may call the prompt's other functions; an answer that redefines them cannot change the test."""
    given = "def square(x):\n    return x * x\n\ndef root(x):\n    pass\n"
    problem = prompt(given, test="assert square(root(9.0)) == 9.0")
    assert graded(problem, "```python\ndef root(x):\n    return x ** 0.5\n```") is True
    cheat = "```python\ndef square(x):\n    return 9.0\ndef root(x):\n    return 0\n```"
    assert graded(problem, cheat) is False


def test_finished_code_may_be_changed_everywhere() -> None:
    given = "```python\ndef one():\n    return 2\n\ndef two():\n    return 2 * one()\n```"
    problem = prompt(f"Fix it.\n\n{given}", test="assert one() == 1\nassert two() == 2")
    assert graded(problem, given) is False
    assert graded(problem, given.replace("return 2\n\n", "return 1\n\n")) is True


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
