"""Finds the program in a model's answer, and what a prompt asks for.

The choice never looks at the test, so that an answer has one try (pass@1).
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

ANSWER_CHARACTERS = 200_000
"""Longer answers are cut, so that the search for code ends."""

_CODE_START = re.compile(r"^(?:from |import |def |async def |class |@)")
_OPENING = re.compile(r"^(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)[^`\n]*$")
_PYTHON = ("", "python", "py", "python3", "python2", "pycon", "ipython", "sage")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)
_DEMONSTRATIONS = (ast.Expr, ast.Assert)


@dataclass(frozen=True)
class Task:
    """The code of a prompt.

    code: all of it
    name: the function or class to be written: the last one in ``code``, or HumanEval's entry point
    is_class: whether it is a class
    context: imports and finished definitions beside it, which the answer may use
    own: names whose definition is the answer's. If nothing is left to be completed, the answer may change all of them;
        otherwise a test that uses the prompt's other functions gets them as the prompt has them
    """

    code: str
    name: str
    is_class: bool
    context: str
    own: tuple[str, ...]


def task_of(text: str, name: str | None = None) -> Task | None:
    """Return the task of a prompt: its fenced code, or everything from the first line of code on; None without code.

    name: the function to be written, if it is known
    """
    code = _code_in(_lines_of(text))
    if code is None:
        return None
    found = re.findall(r"^(?:async +def|def|class) +(\w+)", code, re.MULTILINE)
    if not found:
        return None
    wanted = name if name is not None and name in found else str(found[-1])
    is_class = re.search(rf"^class +{wanted}\b", code, re.MULTILINE) is not None
    tree = _parsed(code)
    defined = [] if tree is None else [node for node in tree.body if isinstance(node, _DEFINITIONS)]
    finished = any(node.name == wanted and not _is_stub(node) for node in defined)
    own = [node.name for node in defined] if finished else []
    return Task(code, wanted, is_class, _context(code, wanted), (wanted, *own))


def program_of(task: Task, output: str) -> str | None:
    """Return the program that an answer gives for the task, or None if it gives none.

    The answer may define the function in a fence or in plain text, with prose around it, or only continue the code of
    the prompt. Several fences are read like the cells of a notebook: of two definitions the later one counts, unless
    it is a mere stub. Statements that only demonstrate the function, such as a call or an assert, cannot fail it.

    >>> program_of(task_of("def double(x):\\n    '''Twice x.'''\\n"), "    return 2 * x\\n\\nThis doubles x.")
    "def double(x):\\n    'Twice x.'\\n    return 2 * x"
    """
    text = _lines_of(output)[:ANSWER_CHARACTERS]
    for blocks in (_fenced(text, strict=True), _fenced(text, strict=False)):
        cells = [cell for block in blocks if (cell := _longest_program(block)) is not None]
        if any(_defines(cell, task.name) for cell in cells):
            return _assembled(task, cells)
        continued = [found for block in blocks if (found := _continuation(task, block)) is not None]
        if continued:
            # A block that returns something is the body; others are commands and examples.
            return _assembled(task, [max(continued, key=_returns)])
    plain = _plain_program(text, task.name)
    if plain is None and not blocks:
        plain = _continuation(task, text)
    return None if plain is None else _assembled(task, [plain])


def _lines_of(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _code_in(text: str) -> str | None:
    fenced = [block for block in _fenced(text, strict=True) if re.search(r"^ *(?:async +)?(?:def|class) ", block, re.M)]
    if fenced:
        return fenced[0]
    lines = text.split("\n")
    start = next((number for number, line in enumerate(lines) if _CODE_START.match(line)), None)
    return None if start is None else "\n".join(lines[start:])


def _context(code: str, name: str) -> str:
    """All definitions of the code but the one to be written, and only its imports if there is prose in between."""
    tree = _parsed(code)
    if tree is None:
        # The function to be completed may lack a body, and prose may stand between it and the imports.
        start = [m.start() for m in re.finditer(rf"^(?:@.*\n)*(?:async +def|def|class) +{name}\b", code, re.MULTILINE)]
        tree = _parsed(code[: start[-1]])
    if tree is None:
        return "\n".join(re.findall(r"^(?:from|import) .*$", code, re.MULTILINE))
    kept = [node for node in tree.body if getattr(node, "name", None) != name and not _is_stub(node)]
    return "\n".join(ast.unparse(node) for node in kept if not isinstance(node, _DEMONSTRATIONS))


def _fenced(text: str, strict: bool) -> list[str]:
    """The Python blocks of a Markdown text; an open last one ends with the text.

    strict: a fence stands on a line of its own. Otherwise it may also follow or end a line.
    """
    blocks: list[str] = []
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        opening = _OPENING.match(lines[number])
        number += 1
        if opening is None or (strict and opening["before"].strip()):
            continue
        fence, indent = opening["fence"], len(opening["before"]) if not opening["before"].strip() else 0
        block: list[str] = []
        while number < len(lines):
            line = lines[number]
            number += 1
            closed = line.strip() == fence[0] * len(line.strip()) and len(line.strip()) >= len(fence)
            if closed and len(line) - len(line.lstrip()) <= indent + 3:
                break
            if not strict and line.rstrip().endswith(fence):
                block.append(line.rstrip().rstrip(fence[0]))
                break
            block.append(line[indent:] if not line[:indent].strip() else line)
        if opening["language"].lower() in _PYTHON:
            blocks.append("\n".join(block))
    return blocks


def _longest_program(code: str) -> ast.Module | None:
    """The code up to the first line that is no Python, if anything is left of it."""
    lines = textwrap.dedent(code).split("\n")
    while lines:
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse("\n".join(lines))
        except SyntaxError as error:
            # An open bracket is found at the end of the code; the line to blame is then any before it.
            bad = error.lineno if error.lineno is not None and 0 < error.lineno <= len(lines) else len(lines)
            lines = lines[: min(bad, len(lines)) - 1]
        except (ValueError, RecursionError, MemoryError):
            return None
        else:
            return tree if tree.body else None
    return None


def _plain_program(text: str, name: str) -> ast.Module | None:
    """The program in an answer without fences: from the first line of code from which on the function is defined."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if _CODE_START.match(line):
            found = _longest_program("\n".join(lines[number:]))
            if found is not None and _defines(found, name):
                return found
    return None


def _continuation(task: Task, text: str) -> ast.Module | None:
    """The program that the text makes of the prompt's code by continuing it, or None if it adds no statement."""
    lines = text.split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    indented = [number for number, line in enumerate(lines) if line[:1] in (" ", "\t") and line.strip()]
    if not lines:
        return None
    last = task.code.rstrip().split("\n")[-1]
    indent = last[: len(last) - len(last.lstrip())] or "    "
    dedented = textwrap.dedent("\n".join(lines)).split("\n")
    readings = [lines, [f"{indent}{lines[0]}", *lines[1:]], [f"{indent}{line}" for line in dedented]]
    if indented and indented[0] > 0:  # prose in front of an indented body
        readings.append(lines[indented[0] :])
    best: ast.Module | None = None
    size = 0
    for reading in readings:
        found = _continued(task, reading)
        if found is not None and (length := len(ast.unparse(found))) > size:
            best, size = found, length
    return best


def _continued(task: Task, lines: list[str]) -> ast.Module | None:
    given = task.code.rstrip().split("\n")
    # What is added is cut from its end, the prompt's code is not.
    while lines:
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse("\n".join([*given, *lines]))
        except SyntaxError as error:
            bad = (error.lineno or 0) - len(given)
            lines = lines[: (bad if 0 < bad <= len(lines) else len(lines)) - 1]
        except (ValueError, RecursionError, MemoryError):
            return None
        else:
            return tree if _defines(tree, task.name) else None
    return None


def _assembled(task: Task, cells: list[ast.Module]) -> str | None:
    """One program: the prompt's other definitions, then those of the answer, with ``__future__`` imports in front."""
    context = ast.parse(task.context)
    nodes = [node for tree in [context, *cells] for node in tree.body if not _is_main(node)]
    whole = {node.name for node in nodes if isinstance(node, _DEFINITIONS) and not _is_stub(node)}
    kept = [node for node in nodes if not (_is_stub(node) and getattr(node, "name", None) in whole)]
    future = [node for node in kept if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    body = [*future, *(_shielded(node) for node in kept if node not in future)]
    try:
        return ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
    except (ValueError, RecursionError):
        return None


def _shielded(node: ast.stmt) -> ast.stmt:
    """The statement, in a ``try`` if it only demonstrates the program, since it may use what is not there."""
    if not isinstance(node, _DEMONSTRATIONS) or _is_text(node):
        return node
    handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
    return ast.Try([node], [handler], [], [])


def _defines(tree: ast.Module, name: str) -> bool:
    """Whether the program gives the name a value: by a definition that is no stub, an assignment or an import."""
    for node in tree.body:
        if isinstance(node, _DEFINITIONS) and node.name == name and not _is_stub(node):
            return True
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return True
    return False


def _is_stub(node: ast.AST) -> bool:
    """Whether a definition has no body yet: only a docstring, ``...`` or ``pass``, or ``raise NotImplementedError``."""
    if not isinstance(node, _FUNCTIONS):
        return False
    return all(
        isinstance(part, ast.Pass)
        or _is_text(part)
        or (isinstance(part, ast.Raise) and "NotImplemented" in ast.dump(part))
        for part in node.body
    )


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.dump(node.test) and "__name__" in ast.dump(node.test)


def _returns(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) for node in _last_function(tree))


def _last_function(tree: ast.Module) -> Iterator[ast.AST]:
    functions = [node for node in tree.body if isinstance(node, _DEFINITIONS)]
    return ast.walk(functions[-1]) if functions else iter(())


def _parsed(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
