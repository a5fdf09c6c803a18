"""The page of the command line, made from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from quasar.cli import app
from scripts.docs.markdown import escaped, row, table_head

_INTRODUCTION = """# Command line

`python run.py` in a checkout and `quasar run` in an installed package are the same program. Its arguments are
overrides of the [configuration](configuration.md), in the syntax of Hydra:

| argument | effect |
| --- | --- |
| `GROUP=NAME` | choose a file of `conf/GROUP` |
| `KEY=VALUE` | set a key |
| `-m` | run every combination of values separated by commas |
| `hydra.run.dir=FOLDER` | the folder of a run; the same folder continues the run |
| `hydra.sweep.dir=FOLDER` | the folder of a sweep |
| `--config-dir=FOLDER` | add a folder with further YAML files |
| `--cfg job` | print the composed configuration and run nothing |
| `--help` | print the groups and their choices |

Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted. `HYDRA_FULL_ERROR=1` shows tracebacks.
`QUASAR_CACHE` is the folder of the cache.
"""


def page() -> str:
    """Return the page in Markdown."""
    root = typer.main.get_command(app)
    return "\n".join([_INTRODUCTION, *(_section(name, command) for name, command in commands(root))])


def commands(command: Any, name: str = "quasar") -> Iterator[tuple[str, TyperCommand]]:
    """Yield the commands below a command, by their full names."""
    if isinstance(command, TyperGroup):
        for key, found in command.commands.items():
            yield from commands(found, f"{name} {key}")
    else:
        yield name, command


def _section(name: str, command: TyperCommand) -> str:
    lines = [f"## {name}\n", inspect.cleandoc(command.help or "") + "\n"]
    parameters = [entry for entry in command.params if isinstance(entry, TyperArgument | TyperOption)]
    if parameters:
        lines.append(table_head("argument", "meaning"))
        lines += [row(f"`{_written(entry)}`", escaped(entry.help or "")) for entry in parameters]
    return "\n".join(lines) + "\n"


def _written(parameter: TyperArgument | TyperOption) -> str:
    if isinstance(parameter, TyperArgument):
        name = (parameter.name or "").upper()
        return name if parameter.required else f"[{name}]"
    return ", ".join([*parameter.opts, *parameter.secondary_opts])
