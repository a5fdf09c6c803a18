"""Every command in README.md and docs/ is one that the program accepts, and the documentation builds."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import open_dict
from typer.core import TyperGroup

from quasar.cli import app, model_names
from quasar.config.rules import check
from quasar.config.schema import CONF, DataConfig, register
from quasar.evaluation.prompts import load_prompts
from quasar.experiment.reproduce import experiment_names

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("python run.py", "python -m", "quasar", "make", "scripts/", "eval")
NOT_SHELL = ("python", "yaml", "json", "text", "bibtex")
_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"^[A-Z_]+=\S+ ")


def shell_lines(text: str) -> Iterator[str]:
    """Yield the lines of indented and fenced code blocks, and inline code."""
    for fence in _FENCE.finditer(text):
        if fence["language"] not in NOT_SHELL:
            yield from fence["code"].splitlines()
    prose = []
    for line in _FENCE.sub("", text).splitlines():
        if line.startswith("    "):
            yield line
        else:
            prose.append(line)
    for code in re.findall(r"`([^`]+)`", "\n".join(prose)):
        yield code.replace("\n", " ")


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a page that start one of our programs, without assignments, comments and placeholders."""
    for line in shell_lines(text):
        for part in re.split(r" && | \|\| ", line.strip()):
            command = re.sub(r"\s+#.*", "", part)
            while _ASSIGNMENT.match(command):
                command = _ASSIGNMENT.sub("", command)
            if any(
                command == program or command.startswith(f"{program} ") for program in PROGRAMS
            ) or command.startswith("scripts/"):
                yield command.replace(" …", "")


COMMANDS = sorted(
    {(file.relative_to(ROOT).as_posix(), command) for file in PAGES for command in commands(file.read_text("utf-8"))}
)


def test_commands_are_found_in_every_form() -> None:
    page = (
        "Say `make test` or `quasar collect\nFOLDER`, but not `quasar.testing`.\n\n"
        "    A=1 python run.py -m … verifier=int8 # comment\n\n```yaml\nmake no\n```\n```\nmake run && make lint\n```\n"
    )
    found = ["make run", "make lint", "python run.py -m verifier=int8", "make test", "quasar collect FOLDER"]
    assert list(commands(page)) == found


def test_the_pages_have_commands() -> None:
    assert {"README.md", "docs/how-to/gpu.md", "docs/tutorial/first-sweep.md"} <= {page for page, _ in COMMANDS}
    assert len(COMMANDS) > 60


@pytest.fixture(autouse=True)
def examples_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (EXAMPLES, ROOT / "examples" / "my_drafter_package"):
        monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_is_accepted(page: str, command: str) -> None:
    require_valid(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "python run.py verifier=int9",
        "python run.py verifier.no_such_key=1",
        "python run.py -m drafter=ngram,nosuch",
        "python run.py drafter.num_tokens=0",
        "python run.py --no-such-flag",
        "quasar no-such-command",
        "quasar plot FOLDER --no-such-option",
        "quasar models fetch nosuch",
        "make nosuch",
        "make reproduce EXPERIMENT=nosuch",
        "make run NOSUCH=1",
        'make run ARGS="verifier=int9"',
        "scripts/nosuch.sh",
        "python -m scripts.nosuch",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - each program has its own kind of error
        require_valid(shlex.split(command))


def require_valid(arguments: list[str]) -> None:
    """Raise an error if a program would refuse the arguments. Nothing is run."""
    program, *rest = arguments
    if program == "python" and rest[0] == "run.py":
        require_run(rest[1:])
    elif program == "python":
        assert importlib.util.find_spec(rest[1]) is not None, f"{rest[1]} is no module"
    elif program == "quasar":
        require_quasar(rest)
    elif program == "make":
        require_make(rest)
    else:
        script = shlex.split(rest[0].strip("$()"))[0] if program == "eval" else program
        assert os.access(ROOT / script, os.X_OK), f"{script} is not executable"


def require_run(arguments: list[str]) -> None:
    """Compose the configuration of a run or of the jobs of a sweep, and check it as a run does."""
    overrides = []
    folder = EXAMPLES / "conf"
    for argument in arguments:
        if argument.startswith("--config-dir="):
            folder = ROOT / argument.partition("=")[2]
            assert folder.is_dir(), argument
        elif argument not in ("-m", "--help", "--cfg", "job"):
            overrides.append(argument)
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in OverridesParser.create().parse_overrides(overrides)
    ]
    # As many jobs as the longest list, so that every value is in one of them.
    for job in range(max(map(len, choices), default=1)):
        require_job([values[job % len(values)] for values in choices], folder)


def require_job(overrides: list[str], folder: Path = EXAMPLES / "conf") -> None:
    """Compose and check one configuration. folder: further YAML files, as ``--config-dir`` adds them"""
    register()
    paths = f"hydra.searchpath=[file://{folder}]"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[paths, *overrides], return_hydra_config=True)
        chosen = dict(config.hydra.runtime.choices)
        with open_dict(config):
            del config["hydra"]
        check(config, chosen)


def require_quasar(arguments: list[str]) -> None:
    """Parse the arguments with the command that they name. Its name alone stands for the command as such."""
    command = typer.main.get_command(app)
    while isinstance(command, TyperGroup) and arguments and not arguments[0].startswith("-"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if not arguments:
        return
    if isinstance(command, TyperGroup):
        assert arguments[0] in {option for parameter in command.params for option in parameter.opts}
        return
    if command.name == "run":
        require_run(arguments)
        return
    found = command.make_context(command.name or "", list(arguments)).params
    names = {"fetch": ("name", model_names()), "reproduce": ("experiment", experiment_names())}
    if command.name in names:
        key, known = names[command.name]
        assert found[key] in known or found[key].isupper(), f"{found[key]} is not in conf/"


def require_make(arguments: list[str]) -> None:
    """Check the target and its variables against the Makefile, and the overrides of a run."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = dict(re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)*)", text, re.MULTILINE))
    targets = [argument for argument in arguments if "=" not in argument]
    for target in targets:
        assert target in rules, f"the Makefile has no target {target}"
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            continue
        assert any(f"$({name})" in rules[target] for target in targets), f"{targets} reads no {name}"
        if name == "EXPERIMENT":
            assert value in experiment_names() or value.isupper(), f"{value} is not in conf/experiment"
        elif name == "ARGS" and targets == ["run"]:
            require_run(shlex.split(value))


def fences(language: str) -> list[tuple[str, str]]:
    """Return the fenced code blocks of a language, with the names of their pages."""
    return [
        (file.name, fence["code"])
        for file in PAGES
        for fence in _FENCE.finditer(file.read_text(encoding="utf-8"))
        if fence["language"] == language
    ]


@pytest.mark.parametrize(("page", "code"), fences("python"))
def test_python_in_the_pages_is_python(page: str, code: str) -> None:
    ast.parse(code)


@pytest.mark.parametrize(("page", "code"), [found for found in fences("yaml") if "_target_" not in found[1]])
def test_experiments_and_models_in_the_pages_are_accepted(page: str, code: str, tmp_path: Path) -> None:
    name = yaml.safe_load(code)["name"]
    group = "experiment" if code.startswith("# @package") else "model"
    (tmp_path / group).mkdir()
    (tmp_path / group / f"{name}.yaml").write_text(code, encoding="utf-8")
    require_job([f"{group}={name}"], tmp_path)


def test_prompts_in_the_pages_can_be_read(tmp_path: Path) -> None:
    ((_, lines),) = fences("json")
    (tmp_path / "questions.jsonl").write_text(lines, encoding="utf-8")
    found = load_prompts(DataConfig(name="specbench", path=str(tmp_path / "questions.jsonl"), limit=None))
    assert [(prompt.family, len(prompt.turns), prompt.reference) for prompt in found] == [
        ("writing", 2, ()),
        ("math", 1, ("42",)),
    ]


@pytest.mark.slow
def test_the_documentation_builds_without_warnings_and_needs_no_other_server(tmp_path: Path) -> None:
    """One test, because building takes long, and parallel workers would build once for each test."""
    pytest.importorskip("mkdocs", reason="pip install -e .[docs]")
    # In a process of its own, because mkdocs configures logging and imports hooks from the current folder.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    require_pages(tmp_path)
    require_filled_in(tmp_path)
    require_own_resources(tmp_path)


def require_pages(site: Path) -> None:
    pages = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")}
    sources = {file.relative_to(ROOT / "docs").with_suffix("").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert sources <= pages
    assert {"reference/configuration", "reference/metrics", "reference/command-line", "reference/pairs"} <= pages


def require_filled_in(site: Path) -> None:
    """Formulas, numbers and tables of committed results, and computed tables are in the pages."""
    text = (site / "explanation" / "quantization.html").read_text(encoding="utf-8")
    assert text.count("<math") > 5
    assert "arithmatex" not in text
    assert "int4 rounding</td>" in text
    assert "8.19 billion" in (site / "how-to" / "gpu.html").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):
        assert not re.search(r"\{\{ \w+ \||<!-- memory", page.read_text(encoding="utf-8")), page


def require_own_resources(site: Path) -> None:
    """No page loads a script, a font, a style sheet or an image from another server."""
    loaded = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//")
    for page in itertools.chain(site.rglob("*.html"), site.rglob("*.svg")):
        assert not loaded.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://one.example/a.js"></script>',
        '<link rel="stylesheet" href=//one.example/a.css>',
        '<img alt="a" src="http://one.example/a.png">',
    ],
)
def test_a_resource_of_another_server_is_found(page: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="https://one.example">a link is allowed</a>')
    require_own_resources(tmp_path)
    (tmp_path / "b.html").write_text(page)
    with pytest.raises(AssertionError):
        require_own_resources(tmp_path)
