"""The fidelity table and figure from the runs of sweep.sh: ``python experiments/fidelity/table.py OUTPUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from quasar.results.collect import Collector, tabulate
from quasar.results.markdown import markdown, rows_of
from quasar.results.metrics import named

HERE = Path(__file__).parent
COLUMNS = [
    *("weight_bytes", "kl_to_reference", "top1_agreement", "exact_match_length"),
    *("mean_acceptance_length_ref", "mean_acceptance_length", "distinct_4gram_ratio"),
]


def main(output: Path) -> None:
    runs = tabulate(Collector(output).runs(), output)
    runs = runs[runs["status"] == "done"].copy()
    kinds = runs["verifier"]
    runs["verifier"] = [describe(row) for row in runs.to_dict("records")]
    runs = runs.drop_duplicates("verifier")
    results = runs[["verifier", *COLUMNS]].rename(columns={"verifier": "label"})
    results.insert(1, "verifier", kinds[runs.index])
    results.to_csv(HERE / "results.csv", index=False)
    lines = [*markdown("verifier", rows_of(runs), COLUMNS), "", floor(rows_of(runs)[0])]
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(runs, HERE / "fidelity.png")


def describe(run: dict[str, object]) -> str:
    """The verifier and the options that tell it from its siblings."""

    def option(name: str) -> object:
        value = run.get(f"verifier.{name}")
        return None if pd.isna(value) else value

    kind, method = run["verifier"], option("method")
    head = ", 8-bit head" if str(option("lm_head_bits")) == "8" else ""
    if kind == "int8":
        # Beside numbers, a text is quoted in the table of runs.
        alpha = str(option("alpha")).strip('"')
        return f"int8 {method}" + (f", alpha {alpha}" if method == "smoothquant" else "") + head
    if kind == "int4":
        form = "symmetric" if str(option("symmetric")).lower() == "true" else "asymmetric"
        unclipped = ", unclipped" if str(option("clip")).lower() == "false" else ""
        inputs = ", int8 inputs" if str(option("activation_bits")) == "8" else ""
        return f"int4 {method}, groups of {option('group_size')}, {form}{unclipped}{inputs}{head}"
    if kind == "pruned":
        criterion = option("selection") if method == "depth" else option("importance")
        heads = " and KV groups" if method == "width" and str(option("heads")).lower() == "true" else ""
        return f"pruned {method}{heads}, {criterion}, {float(str(option('ratio'))):.0%}"
    return str(kind)


def floor(run: dict[str, object]) -> str:
    """What no verifier can be asked to beat, which is the same in every run."""
    kl, top1, distinct = (
        named(name).text(run[name]) for name in ("kl_noise_floor", "top1_noise_floor", "distinct_4gram_ratio_reference")
    )
    return (
        f"Noise floor, the reference against itself in one pass and step by step: KL {kl}, top-1 {top1}. "
        f"Distinct 4-grams of the reference's own answers: {distinct}."
    )


def draw(runs: pd.DataFrame, file: Path) -> None:
    """τ free and τ_ref over KL: a verifier far from the reference looks better in one and worse in the other."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    measured = runs[runs["kl_to_reference"] > 0]
    for column, marker, title in (
        ("mean_acceptance_length", "x", "τ, free-running"),
        ("mean_acceptance_length_ref", "o", "τ_ref, along the reference's answers"),
    ):
        axes.scatter(measured["kl_to_reference"], measured[column], marker=marker, label=title, alpha=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("KL(reference ‖ verifier), nats per token")
    axes.set_ylabel("acceptance length")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
