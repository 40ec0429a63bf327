"""Draw the README's figure from the committed tables: `python tools/draw_figures.py`.

Reads docs/measurements/accuracy-and-depth.csv and written-out.csv, writes docs/figures/findings.png.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

DOCS = Path(__file__).parent.parent / "docs"
MEASUREMENTS = DOCS / "measurements"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY, PINK = "#0072B2", "#D55E00", "#009E73", "#777777", "#CC79A7"
CONDITIONS = ["no exits", "exits, λ = 0", "total, λ = 1", "mean, λ = 1", "max, λ = 1", "cap of 2 layers"]


def draw_depth(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Accuracy against mean depth on the test split: the teacher, policies before and after RL, simpler exit rules."""
    table = table[(table.study == "accuracy-target") & (table.split == "test")]
    teacher = table[table.policy == "teacher"].iloc[0]
    axes.axhspan(teacher.accuracy_low, teacher.accuracy_high, color=GREY, alpha=0.15, lw=0)
    axes.plot(1.0, teacher.accuracy, "s", color="black", label="teacher, full depth (band: 95 %)")
    for policy, colour, label in (("calibrated", BLUE, "calibrated, 3 seeds"), ("rl", ORANGE, "after RL, 3 seeds")):
        early = table[(table.policy == policy) & table.exits.str.startswith("threshold", na=False)]
        full = table[(table.policy == policy) & (table.exits == "full depth")]
        for row in early.itertuples():
            at_full = full[full.seed == row.seed].iloc[0]
            # The same weights without exits.
            axes.plot([row.depth, 1], [row.accuracy, at_full.accuracy], ":", color=colour, lw=0.8, alpha=0.7)
        error = [early.accuracy - early.accuracy_low, early.accuracy_high - early.accuracy]
        axes.errorbar(early.depth, early.accuracy, yerr=error, fmt="o", color=colour, label=label, capsize=2, lw=1)
        axes.plot(full.depth, full.accuracy, "o", mfc="white", color=colour, ms=4)
    # Beside each other, where they would cover each other.
    rules = {
        "confidence": ("^", "confidence", -0.012),
        "entropy": ("v", "entropy", 0.012),
        "calibrated gates": ("D", "calibrated, without RL", 0),
        "trained at full depth": ("X", "RL at full depth, then exits", 0),
    }
    for rule, (marker, label, shift) in rules.items():
        rows = table[table.policy.str.startswith(f"control: {rule}") & table.policy.str.endswith("by depth")]
        axes.plot(rows.depth + shift, rows.accuracy, marker, color=GREEN, label=label, ls="")
    axes.set(xlabel="mean depth (share of layers)", ylabel="accuracy, %", title="SmolLM2-135M: accuracy and depth")
    axes.legend(fontsize=7, loc="lower right", frameon=False, bbox_to_anchor=(1, 0.05))


def draw_written(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Share of answers written out step by step, by what RL penalises; a dot is a base model, a line the forecast."""
    table = table[(table.task == "hops") & (table.hops == "3") & (table.tokens_per_step == 1)]
    for place, condition in enumerate(CONDITIONS):
        rows = table[table.condition == condition]
        axes.bar(place, rows.share_of_steps.mean(), color=ORANGE if place > 1 else GREY, alpha=0.35)
        axes.plot([place] * len(rows), rows.share_of_steps, "o", color=ORANGE if place > 1 else GREY, ms=4)
        axes.plot([place - 0.35, place + 0.35], [rows.forecast.iloc[0]] * 2, color="black", lw=1.2)
    labels = [
        "no exits",
        "exits,\nλ = 0",
        "λ on the\ntotal",
        "λ on the\nmean",
        "λ on the\ndeepest",
        "2 layers\nat most",
    ]
    axes.set_xticks(range(len(CONDITIONS)), labels, fontsize=7)
    axes.set(
        ylim=(0, 1.05), ylabel="share of answers written out", title="Tiny models, 3-hop problems: what is written"
    )


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    draw_depth(left, pd.read_csv(MEASUREMENTS / "accuracy-and-depth.csv"))
    draw_written(right, pd.read_csv(MEASUREMENTS / "written-out.csv"))
    figure.tight_layout()
    figure.savefig(DOCS / "figures" / "findings.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
