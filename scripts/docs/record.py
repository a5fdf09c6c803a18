"""Records what a run prints, for README.md and the tutorial: ``python -m scripts.docs.record``.

It starts the commands in `RECORDED` and writes their output to docs/recorded/, without the lines that show progress, as
text and as a picture of a terminal. Speeds and speedups are those of the machine that recorded them; use one with
nothing else to do.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "recorded"
RECORDED = {"first_run": "python run.py verifier=int8 drafter=ngram"}
"""The commands by the names of their files."""
RUN = Path("outputs/default/DATE_TIME")
COLUMNS = 80
PROGRESS = ("decoding ", "loading ", "preparing ")


def record(name: str) -> str:
    """Run a command and return its output. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, *shlex.split(RECORDED[name])[1:], f"hydra.run.dir={folder}/run"]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
        lines = done.stdout.replace(f"{folder}/run", str(RUN)).splitlines()
        return "\n".join(line.rstrip() for line in lines if not line.startswith(PROGRESS)) + "\n"


def recorded_text(name: str) -> str:
    """Return the recorded output of a command, below the command itself."""
    return f"$ {RECORDED[name]}\n{(FOLDER / f'{name}.txt').read_text(encoding='utf-8')}"


def picture(name: str) -> str:
    """Return the recorded output of a command as an SVG picture of a terminal."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO())
    console.print(Text(recorded_text(name).rstrip()))
    drawn = console.export_svg(title=RECORDED[name], unique_id=name)
    # rich names fonts of another server, which must not be asked when the picture is shown.
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


if __name__ == "__main__":
    for name in RECORDED:
        (FOLDER / f"{name}.txt").write_text(record(name), encoding="utf-8")
        (FOLDER / f"{name}.svg").write_text(picture(name), encoding="utf-8")
