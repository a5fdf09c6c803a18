"""Writes a configuration as YAML."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import DictConfig

from quasar.config.hash import config_hash
from quasar.config.rules import settled


def config_yaml(config: DictConfig, command: Sequence[str]) -> str:
    """Return the text of a run's config.yaml: its hash and its command line as comments, then all values."""
    header = f"# config hash: {config_hash(config)}\n# command: {command_line(command)}\n"
    return header + yaml.dump(settled(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def command_line(command: Sequence[str]) -> str:
    """Return a command on one line, as a shell reads it. A line break in an argument becomes ``$'\\n'``."""
    return " ".join(_quoted(argument) for argument in command)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that PyYAML would write so that a reader takes them for something else.

    These are texts such as ``7e3``, which other readers take for a number, and texts with line breaks such as U+0085,
    which PyYAML itself reads back as a space unless they are escaped.
    """

    def represent_text(self, text: str) -> yaml.Node:
        style = "'" if _is_number(text) else None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _quoted(argument: str) -> str:
    if argument.isprintable():
        return shlex.quote(argument)
    named: dict[str, Any] = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", "'": "\\'"}
    return (
        "$'" + "".join(named.get(mark) or (mark if mark.isprintable() else _escaped(mark)) for mark in argument) + "'"
    )


def _escaped(mark: str) -> str:
    code = ord(mark)
    if 0xDC80 <= code <= 0xDCFF:
        # Python reads a byte of an argument that is no UTF-8 as a surrogate.
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
