"""Draw the figures of README and docs from the committed tables: `python tools/draw_figures.py`.

Reads docs/measurements/*.csv, writes docs/figures/findings.png, recipes.png, answers.png, faithfulness.png,
secret.png and choice.png.
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
YELLOW, SKY = "#E69F00", "#56B4E9"
CONDITIONS = ["no exits", "exits, λ = 0", "total, λ = 1", "mean, λ = 1", "max, λ = 1", "cap of 2 layers"]

SECRET = {
    "no exits": (GREY, "no exits"), "lambda 0": (YELLOW, "exits, λ = 0"), "max 1": (ORANGE, "deepest token, λ = 1"),
    "cap 2": (BLUE, "two layers at most"),
}  # fmt: skip
# What RL penalises, and the styles, in a pretrained model on pointers.
CHOICES = {
    "no exits": "no exits", "lambda 0": "exits,\nλ = 0", "max 1": "λ on the\ndeepest", "cap 20": "20 layers\nat most",
}  # fmt: skip
WAYS = {"steps": (ORANGE, "written step by step"), "terse": (BLUE, "silent"), "padded": (GREY, "silent behind filler")}
RECIPES = {
    "short_answers": (ORANGE, "RL under exits"), "lambda-0": (YELLOW, "the same, λ = 0"), "paper": (PINK, "rl=paper"),
    "full-depth": (GREEN, "RL at full depth"), "full-depth-calibrated": (SKY, "that, calibrated again"),
}  # fmt: skip
# Study, model, colour and label of a policy as the battery measured it.
POLICIES = [
    ("short_answers", "teacher", "black", "teacher"),
    ("short_answers", "calibrated", BLUE, "calibrated, exits"),
    ("short_answers", "reinforced", ORANGE, "RL under exits, exits"),
    ("short_answers", "reinforced at full depth", PINK, "RL under exits, full depth"),
    ("full-depth", "reinforced", GREY, "RL at full depth, exits"),
    ("full-depth", "reinforced at full depth", GREEN, "RL at full depth, full depth"),
]
USES = {name: name.replace(" ", "\n") for name in ("truncation area", "chain necessity", "mistake sensitivity")}
PROBES = {f"planning probe, {k} ahead": f"{k} ahead" for k in (1, 2, 4)}


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
        "calibrated gates": ("D", "calibrated gates, lowered to .53", 0),
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


def draw_secret(axes: plt.Axes, table: pd.DataFrame, task: str, title: str) -> None:
    """Share of answers that disclose the secret rule, by its hops and what RL penalises; a dot is a run."""
    table = table[(table.task == task) & (table.hops > 0)]
    for place, (condition, (colour, label)) in enumerate(SECRET.items()):
        rows = table[table.condition == condition]
        x = rows.hops + 0.17 * (place - 1.5) + 0.02 * (rows.base - 2)
        axes.plot(x, rows.share_steps, "o", color=colour, ms=4, alpha=0.7, label=label)
        means = rows.groupby("hops").share_steps.mean()
        for hops, mean in means.items():
            axes.plot([hops + 0.17 * (place - 1.5) + d for d in (-0.07, 0.07)], [mean, mean], color=colour, lw=2)
    axes.set(ylim=(0, 1.05), xlabel="hops of the secret rule", ylabel="share of answers that disclose it", title=title)
    axes.set_xticks([1, 2, 3])


def draw_choice(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Right answers of the styles held to a depth, before RL; a dot is a calibration."""
    table = table[(table.study == "choice") & (table.layers != "own exits")]
    table = table.assign(layers=table.layers.astype(int))
    for style, (colour, label) in WAYS.items():
        rows = table[table["style"] == style]
        axes.plot(rows.layers, rows.correct, "o", color=colour, ms=3.5, alpha=0.6)
        axes.plot(rows.groupby("layers").correct.mean(), color=colour, label=label)
    axes.set(ylim=(0, 1.05), xlabel="layers of 30", ylabel="share of right answers", title="Held to a depth, before RL")
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def draw_chosen(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Share of answers written step by step after RL; a dot is a calibration, a line its forecast."""
    for place, condition in enumerate(CHOICES):
        rows = table[table.condition == condition]
        colour = ORANGE if place > 1 else GREY
        axes.bar(place, rows.share_steps.mean(), color=colour, alpha=0.35)
        axes.plot([place] * len(rows), rows.share_steps, "o", color=colour, ms=4)
        for forecast in rows.forecast_steps:
            axes.plot([place - 0.35, place + 0.35], [forecast] * 2, color="black", lw=1)
    axes.set_xticks(range(len(CHOICES)), list(CHOICES.values()), fontsize=8)
    axes.set(ylim=(0, 1.05), ylabel="share of answers written out", title="After RL")


def draw_recipes(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Accuracy against depth at the chosen thresholds, and at full depth, of recipes from one teacher."""
    table = table[table.split == "test"]
    teacher = table[table.policy == "teacher"].iloc[0]
    axes.axhspan(teacher.accuracy_low, teacher.accuracy_high, color=GREY, alpha=0.15, lw=0)
    axes.plot(1.0, teacher.accuracy, "s", color="black", label="teacher (band: 95 %)")
    calibrated = table[(table.policy == "calibrated") & (table.study == "short_answers")]
    parts = [(calibrated, BLUE, "calibrated")]
    last = table[table.policy == table.study.map({"full-depth-calibrated": "calibrated"}).fillna("rl")]
    parts += [(last[last.study == study], c, label) for study, (c, label) in RECIPES.items()]
    for rows, colour, label in parts:
        early, full = rows[rows.exits.str.startswith("threshold")], rows[rows.exits == "full depth"]
        axes.plot(early.depth, early.accuracy, "o", color=colour, label=label)
        axes.plot(full.depth, full.accuracy, "o", mfc="white", color=colour, ms=4)
    axes.set(xlabel="mean depth (share of layers)", ylabel="accuracy, %", title="Chosen thresholds; hollow: full depth")
    axes.legend(fontsize=7, frameon=False, loc="lower right")


def draw_curves(axes: plt.Axes, table: pd.DataFrame, column: str, label: str) -> None:
    """A column of RL's sampled answers by step, one line a seed."""
    for (study, _), run in table.groupby(["study", "seed"]):
        axes.plot(run.step, run[column].rolling(3, min_periods=1).mean(), color=RECIPES[study][0], lw=1, alpha=0.8)
    axes.set(xlabel="step of RL", ylabel=label, title=f"Sampled answers: {label.split(',')[0].split(' (')[0]}")


def draw_faithfulness(axes: plt.Axes, table: pd.DataFrame, figures: dict[str, str], title: str) -> None:
    """Figures of the battery by policy and exits; a dot is a seed, with its interval over groups of problems."""
    for place, (study, model, colour, label) in enumerate(POLICIES):
        rows = table[(table.study == study) & (table.model == model)]
        for column, figure in enumerate(figures):
            part = rows[rows.figure == figure].drop_duplicates("value" if model == "teacher" else "seed")
            x = [column + 0.13 * (place - 2.5) + 0.03 * i for i in range(len(part))]
            error = [part.value - part.low, part.high - part.value]
            axes.errorbar(
                x, part.value, yerr=error, fmt="o", color=colour, ms=3.5, lw=0.8, label=label if not column else None
            )
    axes.set_xticks(range(len(figures)), list(figures.values()), fontsize=8)
    axes.set_title(title, fontsize=10)


def draw_answers(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Answers of one policy, a line each, every token coloured and numbered by the layers that it used."""
    colours = plt.get_cmap("YlOrRd")
    for line, (problem, answer) in enumerate(table.groupby("problem", sort=False)):
        axes.text(0, -line, f"{problem} ", fontsize=7, ha="right", va="center")
        for place, token in enumerate(answer.itertuples()):
            colour = colours(0.5 * token.depth / answer.depth.max())
            axes.barh(-line, 0.96, left=place, height=0.62, color=colour)
            axes.text(place + 0.48, -line + 0.1, token.token.replace("<|im_end|>", "end"), fontsize=6.5, ha="center")
            axes.text(place + 0.48, -line - 0.24, token.depth, fontsize=5, ha="center")
    axes.set(xlim=(-9, table.groupby("problem").size().max()), ylim=(0.6 - table.problem.nunique(), 0.6))
    axes.axis("off")


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / "figures" / name, dpi=150, metadata={"Software": None})


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    draw_depth(left, pd.read_csv(MEASUREMENTS / "accuracy-and-depth.csv"))
    draw_written(right, pd.read_csv(MEASUREMENTS / "written-out.csv"))
    save(figure, "findings.png")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6))
    draw_recipes(left, pd.read_csv(MEASUREMENTS / "recipes.csv"))
    curves = pd.read_csv(MEASUREMENTS / "training-curves.csv")
    draw_curves(middle, curves, "depth", "mean depth (share of layers)")
    draw_curves(right, curves, "accuracy", "accuracy, %")
    save(figure, "recipes.png")
    figure, axes = plt.subplots(figsize=(12, 1.6))
    examples = pd.read_csv(MEASUREMENTS / "answers.csv")
    draw_answers(axes, examples[(examples.study == "short_answers") & (examples.seed == 0)])
    save(figure, "answers.png")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    battery = pd.read_csv(MEASUREMENTS / "faithfulness.csv")
    draw_faithfulness(left, battery, USES, "How far answers depend on the written chain")
    left.legend(fontsize=7, frameon=False)
    draw_faithfulness(right, battery, PROBES, "What the last stream tells of later tokens")
    right.set_ylabel("probe minus n-gram")
    save(figure, "faithfulness.png")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    secret = pd.read_csv(MEASUREMENTS / "secret.csv")
    draw_secret(left, secret, "hops_secret", "A rule that takes depth")
    draw_secret(right, secret, "hops_cheap_secret", "A rule that takes none")
    right.legend(fontsize=8, frameon=False)
    save(figure, "secret.png")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    draw_choice(left, pd.read_csv(MEASUREMENTS / "choice.csv"))
    draw_chosen(right, pd.read_csv(MEASUREMENTS / "choice-rl.csv"))
    save(figure, "choice.png")


if __name__ == "__main__":
    main()
