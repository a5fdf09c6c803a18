"""The description of the code that a run is measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from quasar.results import environment


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one committed file in every place that the program's own has, which the module lies in."""
    module = Path("quasar/results/environment.py")
    for name in (module, *map(Path, ("run.py", "conf/config.yaml", "experiments/table.md", "README.md"))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / module))
    monkeypatch.setattr(environment, "copy_bandwidth", lambda device: 1.0)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [
        ([], False),
        (["experiments/table.md", "README.md"], False),  # results that were just published
        (["quasar/results/environment.py"], True),
        (["conf/config.yaml"], True),
        (["run.py", "experiments/table.md"], True),
    ],
)
def test_code_is_changed_if_a_file_that_a_run_is_made_of_is(repository: Path, changed: list[str], dirty: bool) -> None:
    for name in changed:
        (repository / name).write_text("second\n")
    found = environment.describe_machine(torch.device("cpu"))
    assert found.git_dirty is dirty
    assert found.git_commit is not None


def test_installed_code_has_no_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel may lie inside of a repository that does not track it."""
    installed = repository / "site-packages" / "environment.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(environment, "__file__", str(installed))
    found = environment.describe_machine(torch.device("cpu"))
    assert (found.git_commit, found.git_dirty) == (None, None)
