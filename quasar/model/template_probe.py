"""Renders a chat template in a process with little time and memory, because a template is a program from elsewhere.

`probe` runs this file as a script. It imports nothing of this program, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30
OUTPUT_CHARACTERS = 1 << 22
WALL_SECONDS = 120.0
"""Only for a process that hangs without computing; a busy machine must not make a good template fail."""

# Longer than it takes for a time that grows with the square of the length to be noticed.
_LONG_TEXT = "The quick brown fox jumps over the lazy dog. " * 45
_TOO_MUCH_MEMORY, _TOO_MUCH_OUTPUT = 3, 4


def probe(template: str, arguments: dict[str, Any]) -> str | None:
    """Return what is wrong with a template that takes too much time or memory; None if it is within the bounds.

    A template that fails for another reason is within the bounds.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps({"template": template, "arguments": arguments}, default=str),
            text=True,
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"does not end within {WALL_SECONDS:g} s"
    if done.returncode < 0:
        return f"takes more than {CPU_SECONDS} s for a short conversation"
    if done.returncode == _TOO_MUCH_MEMORY:
        return f"needs more than {MEMORY_BYTES >> 20} MiB for a short conversation"
    if done.returncode == _TOO_MUCH_OUTPUT:
        return f"makes more than {OUTPUT_CHARACTERS} characters of a short conversation"
    return None


def _main() -> int:
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        length = sum(map(len, _render(request["template"], request["arguments"])))
    except MemoryError:
        return _TOO_MUCH_MEMORY
    except OverflowError:
        return _TOO_MUCH_OUTPUT
    except Exception:  # it is rendered again where its errors are reported
        return 0
    return _TOO_MUCH_OUTPUT if length > OUTPUT_CHARACTERS else 0


def _render(source: str, arguments: dict[str, Any]) -> list[str]:
    """Render as transformers does, with the filters and functions that it adds to Jinja."""
    from datetime import datetime

    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around the assistant's tokens, which does not change the text."""

        tags = {"generation"}  # noqa: RUF012 (the form that Jinja documents)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def fail(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    messages = [
        {"role": "user", "content": _LONG_TEXT},
        {"role": "assistant", "content": _LONG_TEXT},
        {"role": "user", "content": _LONG_TEXT},
    ]
    template = environment.from_string(source)
    return [template.render(messages=messages, add_generation_prompt=True, **arguments)]


if __name__ == "__main__":
    sys.exit(_main())
