"""The installed wheel outside the repository, and the packages together with Hugging Face's `kernels`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel; its dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def call(site: Path, folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "QUASAR_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_says_that_its_packages_have_types(site: Path) -> None:
    assert (site / "quasar" / "py.typed").is_file()
    assert (site / "quasar_kernels" / "py.typed").is_file()


def test_models_are_listed_from_the_configuration_in_the_wheel(site: Path, tmp_path: Path) -> None:
    listed = call(site, tmp_path, str(site / "bin" / "quasar"), "models", "list")
    names = {line.split()[0] for line in listed.splitlines()}
    assert names == {file.stem for file in (ROOT / "conf" / "model").glob("*.yaml")}


def test_a_run_from_the_wheel(site: Path, tmp_path: Path) -> None:
    """Kernels are compiled from the wheel's sources, prompts and configuration come from the wheel."""
    request = ["model=tiny", "verifier=int8", "verifier.method=rtn", "drafter=ngram", "data.limit=1", "threads=1"]
    brief = ["decode.max_new_tokens=8", "evaluate.fidelity=false", "hydra.run.dir=out"]
    call(site, tmp_path, str(site / "bin" / "quasar"), "run", *request, *brief)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["verifier"], summary["drafter"], summary["prompts"]) == ("int8", "ngram", 5)
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["git_commit"] is None, "the wheel lies in no repository"


def test_both_packages_come_from_the_wheel_and_the_kernels_compile(site: Path, tmp_path: Path) -> None:
    code = (
        "import quasar, quasar_kernels, torch; from quasar_kernels.cpu import backend\n"
        "print(quasar.__file__); print(quasar_kernels.__file__)\n"
        "x, gates = torch.ones(2, 64, dtype=torch.bfloat16), torch.ones(2, 128, dtype=torch.bfloat16)\n"
        "print(backend() is not None, quasar_kernels.silu_mul(gates)[0, 0].item())"
    )
    package, kernels, found = call(site, tmp_path, sys.executable, "-c", code).splitlines()
    assert Path(package).is_relative_to(site)
    assert Path(kernels).is_relative_to(site)
    assert found == "True 0.73046875"


@pytest.mark.parametrize("installed", [True, False])
def test_the_folder_kernels_hides_no_package_of_that_name(installed: bool, tmp_path: Path) -> None:
    """transformers and bitsandbytes import Hugging Face's `kernels`; the repository has a folder of that name."""
    if not installed and "kernels" in packages_distributions():
        pytest.skip("it is installed in this environment")
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): return name\n__version__ = '0.17.2'\n")
    code = (
        "from transformers import LlamaForCausalLM\nimport quasar_kernels\n"
        "try:\n    from kernels import get_kernel\n    print(get_kernel('found'))\n"
        "except ImportError:\n    print('missing')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["found" if installed else "missing"]
