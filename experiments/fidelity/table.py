"""The fidelity table and figure from the runs of sweep.sh: ``python experiments/fidelity/table.py OUTPUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from quasar.results.collect import Collector, tabulate

HERE = Path(__file__).parent
COLUMNS = {
    "kl_to_reference": ("KL", "{:.4f}"),
    "top1_agreement": ("top-1", "{:.3f}"),
    "exact_match_length": ("match length", "{:.1f}"),
    "mean_acceptance_length_ref": ("τ_ref", "{:.2f}"),
    "mean_acceptance_length": ("τ free", "{:.2f}"),
    "distinct_4gram_ratio": ("distinct 4-grams", "{:.2f}"),
}


def main(output: Path) -> None:
    runs = tabulate(Collector(output).runs(), output)
    runs = runs[runs["status"] == "done"].copy()
    runs["label"] = [describe(row) for row in runs.to_dict("records")]
    runs = runs.drop_duplicates("label")
    runs[["label", "verifier", "weight_bytes", *COLUMNS]].to_csv(HERE / "results.csv", index=False)
    (HERE / "table.md").write_text(markdown(runs), encoding="utf-8")
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


def markdown(runs: pd.DataFrame) -> str:
    lines = [
        f"| verifier | weights MB | {' | '.join(title for title, _ in COLUMNS.values())} |",
        f"| --- |{' ---: |' * (len(COLUMNS) + 1)}",
    ]
    for run in runs.to_dict("records"):
        cells = [form.format(run[column]) for column, (_, form) in COLUMNS.items()]
        lines.append(f"| {run['label']} | {run['weight_bytes'] / 1e6:.0f} | {' | '.join(cells)} |")
    floor = runs.iloc[0]
    lines.append("")
    lines.append(
        f"Noise floor, the reference against itself in one pass and step by step: KL {floor['kl_noise_floor']:.4f}, "
        f"top-1 {floor['top1_noise_floor']:.3f}. Distinct 4-grams of the reference's own answers: "
        f"{floor['distinct_4gram_ratio_reference']:.2f}."
    )
    return "\n".join(lines) + "\n"


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
