"""Measure every drafter with the FP16 verifier, greedy and at temperature 1, and print the tables of README.md.

python experiments/drafters/measure.py PROMPTS [--output FOLDER] [--limit N] [--tokens N] [--only TEXT] [OVERRIDE ...]

Each configuration is one run below FOLDER; a finished one is not repeated, so the command can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from quasar.results.metrics import summarize

ROOT = Path(__file__).parents[2]
DRAFTERS = {
    "ngram": "drafter=ngram",
    "ngram, frequent": "drafter=ngram drafter.match=frequent",
    "ngram, 3 branches": "drafter=ngram drafter.branches=3",
    "automaton": "drafter=ngram drafter.method=suffix_automaton drafter.num_tokens=16",
    "automaton, session": "drafter=ngram drafter.method=suffix_automaton drafter.num_tokens=16 drafter.scope=session",
    "lookahead": "drafter=lookahead",
    "lookahead, window only": "drafter=lookahead drafter.pool_from_prompt=false",
    "layerskip": "drafter=layerskip",
    "layerskip, searched": "drafter=layerskip drafter.method=search drafter.confidence=0.5",
    "layerskip, INT4": "drafter=layerskip drafter.draft_verifier=int4 drafter.skip_ratio=0.1",
    "model: INT4": "drafter=model verifier@drafter.draft=int4",
    "model: pruned 25 %": "drafter=model drafter.draft.ratio=0.25",
    "chain: ngram, layerskip": "drafter=chain",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure every drafter.")
    parser.add_argument("prompts", type=Path, help="file or folder of Spec-Bench JSONL")
    parser.add_argument("--output", type=Path, default=Path("outputs/drafters"))
    parser.add_argument("--limit", default="null", help="prompts per task family")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per prompt")
    parser.add_argument("--only", default="", help="drafters whose name holds this text")
    arguments, overrides = parser.parse_known_args()
    common = [
        *(
            "verifier=fp16",
            "data=specbench",
            f"data.path={arguments.prompts.resolve()}",
            f"data.limit={arguments.limit}",
        ),
        *(f"decode.max_new_tokens={arguments.tokens}", "evaluate.fidelity=false", *overrides),
    ]

    def run(folder: str, settings: str) -> list[dict[str, Any]]:
        return records_of(arguments.output / folder, [*common, *settings.split()])

    drafters = {name: settings for name, settings in DRAFTERS.items() if arguments.only in name}
    for mode in ("greedy", "sampling"):
        print(f"\n### {'Greedy' if mode == 'greedy' else 'T = 1'}\n")
        print(row("drafter", "τ", "acceptance by position", "draft share of the step", "tokens/s", "vs AR"))
        print(row(*["---"] * 6))
        for name, settings in drafters.items():
            print(measured_row(name, run(f"{mode}/{slug(name)}", f"decode={mode} {settings}")), flush=True)


def measured_row(name: str, records: list[dict[str, Any]]) -> str:
    found = summarize(records)
    positions = " ".join(f"{share:.2f}".removeprefix("0") for share in found["acceptance_by_position"][:6])
    return row(
        name,
        f"{found['mean_acceptance_length']:.2f}",
        positions,
        f"{found['draft_ms'] / found['step_ms']:.1%}",
        f"{found['tokens_per_second']:.1f}",
        "-" if found["speedup_vs_ar_same"] is None else f"{found['speedup_vs_ar_same']:.2f}x",
    )


def records_of(folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """The records of a run, which is carried out where it has not finished yet."""
    status = folder / "status.json"
    if not status.exists() or json.loads(status.read_text())["status"] != "done":
        command = [sys.executable, str(ROOT / "run.py"), f"hydra.run.dir={folder}", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split()).lower()


if __name__ == "__main__":
    main()
