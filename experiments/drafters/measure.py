"""Measure every drafter with the FP16 verifier, greedy and at temperature 1, and print the tables of README.md.

python experiments/drafters/measure.py PROMPTS [--output FOLDER] [--limit N] [--tokens N] [--only TEXT] [OVERRIDE ...]

Each configuration is one run below FOLDER; a finished one is not repeated, so the command can be interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from quasar.results.metrics import named
from quasar.results.runs import read_run
from quasar.results.schema import Json

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
COLUMNS = ("mean_acceptance_length", "acceptance_by_position", "tokens_per_second", "speedup_vs_ar_same")


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

    def run(folder: str, settings: str) -> Json:
        return summary_of(arguments.output / folder, [*common, *settings.split()])

    drafters = {name: settings for name, settings in DRAFTERS.items() if arguments.only in name}
    for mode in ("greedy", "sampling"):
        print(f"\n### {'Greedy' if mode == 'greedy' else 'T = 1'}\n")
        headings = [named(name).heading for name in COLUMNS]
        print(row("drafter", *headings, "draft share of the step"))
        print(row(*["---"] * (2 + len(headings))))
        for name, settings in drafters.items():
            print(measured_row(name, run(f"{mode}/{slug(name)}", f"decode={mode} {settings}")), flush=True)


def measured_row(name: str, summary: Json) -> str:
    cells = [named(metric).text(summary[metric]) for metric in COLUMNS]
    return row(name, *cells, f"{summary['draft_ms'] / summary['step_ms']:.1%}")


def summary_of(folder: Path, overrides: list[str]) -> Json:
    """The metrics of a run, which is carried out where it has not finished yet."""
    if read_run(folder).status != "done":
        command = [sys.executable, str(ROOT / "run.py"), f"hydra.run.dir={folder}", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_run(folder).summary


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split()).lower()


if __name__ == "__main__":
    main()
