"""What the documentation takes from the program: configuration keys, metrics, pairs, memory, numbers, formulas."""

from __future__ import annotations

import re
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from annotated_types import Ge
from pydantic import Field, PositiveInt

from quasar.config.schema import CONF
from quasar.errors import RequestError
from quasar.experiment.catalogue import description
from quasar.results.metrics import METRICS

pytest.importorskip("griffe", reason="pip install -e .[docs]")
pytest.importorskip("latex2mathml", reason="pip install -e .[docs]")

from scripts.docs import command_line, config_keys, memory, metrics_table, pairs, parts, record
from scripts.docs.docstrings import listed
from scripts.docs.formulas import with_mathml
from scripts.docs.hints import allowed
from scripts.docs.numbers import with_numbers
from scripts.docs.yaml_keys import Key, keys

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"
ALL_FILES = [file for file in sorted(CONF.rglob("*.yaml")) if file.parent.name != "experiment"]


def rows(page: str) -> dict[str, list[str]]:
    """Return the rows of all tables of a page by the text of their first cell."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("|")]
    return {cells[0].strip().strip("`"): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_keys_of_a_file_with_their_defaults_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "# @package _global_\n# What it is,\n# in two lines.\ndefaults:\n  - other\n\n"
        'a: "x # y"   # first | second\n'
        "b:            # a mapping\n"
        "  c: [1, 2]   # a list\n"
        "              # that goes on\n"
        "d: {e: 1}\n"
    )
    assert description(file) == "What it is, in two lines."
    assert list(keys(file)) == [
        Key("a", '"x # y"', "first | second"),
        Key("b", "", "a mapping"),
        Key("b.c", "[1, 2]", "a list that goes on"),
        Key("d", "{e: 1}", ""),
    ]


@pytest.mark.parametrize("file", ALL_FILES, ids=lambda file: file.relative_to(CONF).as_posix())
def test_every_key_has_a_comment(file: Path) -> None:
    if file.name == "wandb_sweep.yaml":
        pytest.skip("a file of W&B, with W&B's keys")
    own = [key for key in keys(file) if key.path not in ("_target_", "name") and not key.path.startswith("hydra")]
    assert [key.path for key in own if not key.meaning] == []


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (bool, "true or false"),
        (Literal["lookup", "suffix_automaton"], "lookup | suffix_automaton"),
        (PositiveInt | None, "integer > 0 or null"),
        (Annotated[int, Ge(1)], "integer ≥ 1"),
        (Annotated[float, Field(ge=0, lt=1)], "number ≥ 0, < 1"),
        (list[Literal["a"]], "list of: a"),
    ],
)
def test_annotations_in_words(hint: object, text: str) -> None:
    assert allowed(hint) == text


def test_the_configuration_page_has_defaults_from_conf_and_ranges_from_the_checks() -> None:
    found = rows(config_keys.page())
    assert found["drafter.n_max"] == ["`3`", "integer > 0", "tokens of the longest suffix, which is tried first"]
    assert found["verifier.ratio"][:2] == ["`0.1`", "number ≥ 0, < 1"]
    assert found["decode.temperature"][1] == "0 (greedy) or more: from 1e-06 to 1e+06"
    assert found["evaluate.passes.repetitions"][:2] == ["`0`", "at least 0 (none)"]
    assert found["hydra.launcher.partition"][0] == "`null`"
    assert set(found) >= {file.stem for file in (CONF / "experiment").glob("*.yaml")}


def test_every_metric_is_explained() -> None:
    found = rows(metrics_table.page())
    for metric in METRICS:
        assert metrics_table.meaning(metric), metric.name
    assert found["kl_to_reference"][1:3] == ["nats/token", "lower"]
    assert found["weight_bytes"][3] == "bytes of weights that every verification pass reads"


def test_every_command_is_on_its_page() -> None:
    page = command_line.page()
    for name in ("run", "collect", "plot", "reproduce", "models fetch", "cache clear", "wandb push"):
        assert f"## quasar {name}\n" in page
    assert rows(page)["--watch, --no-watch"] == ["refresh a table of states until every run has ended"]


def test_the_matrix_says_whose_output_a_pair_writes() -> None:
    lines = [line.strip("| ").split(" | ") for line in pairs.matrix().splitlines()]
    verifiers = [name.strip("`") for name in lines[0][1:]]
    assert verifiers[0] == "fp16"
    assert sorted(verifiers) == sorted(file.stem for file in (CONF / "verifier").glob("*.yaml"))
    found = {row[0].strip("`"): dict(zip(verifiers, row[1:], strict=True)) for row in lines[2:]}
    assert set(found) == {file.stem for file in (CONF / "drafter").glob("*.yaml")}
    assert found["ngram"]["fp16"] == found["chain"]["fp16"] == "exact"
    assert found["ngram"]["int8"] == found["layerskip"]["pruned"] == "own"
    assert set(found["replay"].values()) == {"simulated"}


def test_generated_parts_are_current() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in parts.pages()}
    for page, text in texts.items():
        assert parts.refreshed(text) == text, f"{page}: run python -m scripts.docs.parts"
    assert all(any(f"<!-- generated: {name} -->" in text for text in texts.values()) for name in parts.PARTS)
    with pytest.raises(KeyError):
        parts.refreshed("<!-- generated: nosuch -->\n<!-- end -->")


def test_memory_follows_from_published_sizes() -> None:
    qwen = memory.MODELS["Qwen3-8B"]
    assert memory.parameters(qwen) == 8_190_735_360  # as the model's checkpoint has
    assert memory.parameters(memory.MODELS["Qwen3-0.6B"]) == 596_049_920
    assert memory.weight_bytes(qwen, 16) == 2 * 8_190_735_360
    assert memory.kv_bytes(qwen) == 36 * 8 * 128 * 2 * 2
    # One block: q and o 4096 x 4096, k and v 1024 x 4096, three of 12288 x 4096.
    block, outputs = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 12288 * 4096, 4096 + 2 * 1024 + 4096 + 2 * 12288 + 4096
    assert memory.weight_bytes(qwen, 16) - memory.weight_bytes(qwen, 8) == 36 * (block - 4 * outputs)
    assert memory.weight_bytes(qwen, 16) - memory.weight_bytes(qwen, 4) == 36 * (block * 3 // 2 - 2 * block // 64)


def test_numbers_come_from_the_committed_table(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "one"
    folder.mkdir(parents=True)
    (folder / "table.md").write_text(
        "## A\n\n| arm | KL |\n| --- | ---: |\n| int8 (paper) | 0.01 (0.00 to 0.02) |\n\n## B\n\n| arm | τ |\n"
        "| --- | ---: |\n| int8 (paper) | 1.5 |\n"
    )
    text = "{{ one | int8 (paper) | KL }} and {{ one | int8 (paper) | τ }}"
    assert with_numbers(text, tmp_path) == "0.01 and 1.5"
    with pytest.raises(RequestError, match="has no arm 'int8' with a column 'KL'"):
        with_numbers("{{ one | int8 | KL }}", tmp_path)


def test_arguments_become_a_list() -> None:
    text = "It does this.\n\nrows: how many\n    of them\na, b: two\n\nExample: it is a sentence."
    assert listed(text) == "It does this.\n\n- `rows`: how many of them\n- `a`, `b`: two\n\nExample: it is a sentence."


def test_formulas_become_mathml() -> None:
    found = with_mathml(r'<p><span class="arithmatex">\(a &lt; \frac{1}{2}\)</span> costs $5</p>')
    assert re.search(r"<math[^>]*display=\"inline\".*<mfrac>.*</math> costs \$5</p>", found)
    assert "arithmatex" not in found


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert f"\n## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={versions[0]},<3.{int(versions[-1].partition('.')[2]) + 1}"


@pytest.mark.parametrize("name", record.RECORDED)
def test_a_picture_of_a_recorded_run_shows_its_text_and_asks_no_other_server(name: str) -> None:
    committed = (record.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == record.picture(name), "run python -m scripts.docs.record"
    assert not re.search(r"@font-face|url\(\W*http", committed)
    shown = "".join(element.text or "" for element in ElementTree.fromstring(committed).iter(f"{SVG}text"))
    title, *lines = (line.rstrip() for line in shown.replace("\N{NO-BREAK SPACE}", " ").splitlines())
    assert title.startswith(record.RECORDED[name])
    assert [title.removeprefix(record.RECORDED[name]), *lines] == record.recorded_text(name).splitlines()
