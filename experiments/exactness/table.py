"""The exactness table from the runs of sweep.sh: ``python experiments/exactness/table.py OUTPUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from quasar.results.collect import Collector, tabulate
from quasar.results.markdown import Column, markdown, rows_of

HERE = Path(__file__).parent
COLUMNS = [
    *("drafter", Column("state", lambda run: run["status"]), "prompts", "tokens_generated"),
    *("exact_match_to_self", "mean_acceptance_length", "acceptance_rate"),
]


def main(output: Path) -> None:
    runs = rows_of(tabulate(Collector(output).runs(), output))
    (HERE / "table.md").write_text("\n".join(markdown("verifier", runs, COLUMNS)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
