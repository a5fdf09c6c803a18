"""The exactness table from the runs of sweep.sh: ``python experiments/exactness/table.py OUTPUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from quasar.results.collect import Collector, tabulate

HERE = Path(__file__).parent


def main(output: Path) -> None:
    runs = tabulate(Collector(output).runs(), output)
    lines = [
        "| verifier | drafter | prompts | tokens | equal outputs | τ | accepted |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs.to_dict("records"):
        if run["status"] != "done":
            lines.append(f"| {run['verifier']} | {run['drafter']} | {run['prompts_done']} | | {run['status']} | | |")
            continue
        rate = "" if run["acceptance_rate"] is None else f"{run['acceptance_rate']:.3f}"
        lines.append(
            f"| {run['verifier']} | {run['drafter']} | {run['prompts']} | {run['tokens_generated']} "
            f"| {run['exact_match_to_self']:.0%} | {run['mean_acceptance_length']:.2f} | {rate} |"
        )
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
