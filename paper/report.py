"""Figures and contact sheets of paper/compare.py and paper/reproduce.py, and the latter's tables.

Source: "Meta-LoRA" (Topal et al. 2025), Figures 3, 4, and 6 to 8.
"""
from collections.abc import Collection, Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.common import save_figure
from support.judges import Prompts
from support.people import Person
from support.sheets import sheet, table

METHODS = {"meta-lora": "Meta-LoRA", "lora": "LoRA", "lora-crops": "LoRA + augmented inputs",
           "random-lomd": "Meta-LoRA, random LoMD", "none": "no LoRA"}
AXES = {"likeness": "R-FaceSim (%)", "text": "CLIP-T (%)", "sum": "R-FaceSim + CLIP-T (%)"}
LEVELS = 0.60, 0.65, 0.70                        # likeness at which CLIP-T is compared
RESAMPLES = 2000                                 # of the bootstrap over people

# {(method, its rank where there are several): {step count: {metric: mean, error}}}
Lines = dict[tuple[str, str], dict[int, dict[str, tuple[float, float]]]]
# {step count, ascending: {metric: values of each person (P,)}}
Curve = dict[int, dict[str, np.ndarray]]
Table = tuple[list[str], list[list[object]]]     # header, rows


def draw_scores(path: Path, metrics: Collection[str], lines: Lines):
    """R-FaceSim against CLIP-T, with step counts at the points; then each metric against the number
    of steps, with error bars. A color for each method, a marker for each name."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5 + 4.5 * len(metrics), 5), layout="constrained")
    plane, *panels = figure.subplots(1, 1 + len(metrics))
    methods = [*METHODS]
    names = [*dict.fromkeys(name for _, name in lines)]
    for (method, name), points in lines.items():
        style = {
            "color": f"C{methods.index(method)}",
            "marker": "os^Dv"[names.index(name) % 5],
        }
        values = {}                              # {metric: means and errors, in percent}
        for metric in {"text", "likeness", *metrics}:
            values[metric] = 100 * np.array([point[metric] for point in points.values()]).T
        x, y = values["text"][0], values["likeness"][0]
        plane.plot(x, y, **style)
        for at in zip(points, zip(x, y)):
            plane.annotate(*at, xytext=(4, 4), textcoords="offset points", fontsize=8)
        for axes, metric in zip(panels, metrics):
            label = f"{METHODS[method]} {name}"
            axes.errorbar([*points], *values[metric], capsize=3, label=label, **style)

    plane.set(xlabel=AXES["text"], ylabel=AXES["likeness"])
    for axes, metric in zip(panels, metrics):
        axes.set(xlabel="steps", ylabel=AXES[metric])
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


def draw_sheet(
    path: Path,
    people: list[Person],
    prompts: Prompts,
    folders: dict[str, Path],
):
    """A contact sheet: eight people across, each with another prompt; the photo and rows of images
    down. folders: {name of a row: folder that holds <person>/<number of the prompt>_0.png}."""
    people = [person for person in people if prompts[person.name]]   # all are for the other gender
    people = people[::max(1, len(people) // 8)]
    columns, photos = [], []
    rows = {name: [] for name in folders}
    for i in range(8):
        # fewer people take several prompts each
        turn, at = divmod(i, len(people))
        person = people[at]
        numbers = [*prompts[person.name]]
        number = numbers[(turn + at) % len(numbers)]
        columns.append(prompts[person.name][number])
        photos.append(person.reference)
        for name, folder in folders.items():
            rows[name].append(folder / person.name / f"{number}_0.png")
    sheet(path, columns, [("the photo", photos), *rows.items()])


# --------------------------------------------------------------------------------------------------
# Tables and figure of paper/reproduce.py


def mean_of(found: list) -> dict | np.ndarray:
    """The mean of arrays, or of nested dicts of such: their keys in order, a mean for each."""
    if not isinstance(found[0], dict):
        return np.mean(found, axis=0)
    means = {}
    for key in sorted(found[0]):
        means[key] = mean_of([each[key] for each in found])
    return means


class Found(NamedTuple):
    """All scores at one rank."""
    steps: list[int]
    rates: dict[str, dict[int, float]]           # {method: {step count: the rate chosen for it}}
    tried: dict[str, dict[float, Curve]]         # {method: {rate: scores of the people on whom the
                                                 # rates were chosen}}
    trainings: list[dict[str, Curve]]            # of each training seed so far {method: scores of
                                                 # other people at the chosen rates}

    @property
    def scores(self) -> dict[str, Curve]:
        """The mean of all trainings; {} if there are none yet."""
        return mean_of(self.trainings) if self.trainings else {}


def stacked(curve: Curve, metric: str) -> np.ndarray:
    """A metric per step count and person (S, P)."""
    return np.stack([scores[metric] for scores in curve.values()])


def mean_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error over the people who have a value."""
    count = np.isfinite(values).sum()
    return np.nanmean(values), np.nanstd(values, ddof=1) / count ** 0.5


def resampled(values: np.ndarray) -> np.ndarray:
    """Values of each person (.., P) -> the mean over everybody, then over each of RESAMPLES draws
    of people with replacement (.., 1 + RESAMPLES)."""
    count = values.shape[-1]
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    people = np.concatenate([[np.arange(count)], draws])
    return values[..., people].mean(axis=-1)


def crossings(level: float | np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y where the line through the points (x, y), (S, R) each, crosses x = level, interpolated: one
    row for each segment (S - 1, R), nan where it does not cross."""
    with np.errstate(all="ignore"):
        share = (level - x[:-1]) / np.diff(x, axis=0)
        found = y[:-1] + share * np.diff(y, axis=0)
    return np.where((share >= 0) & (share <= 1), found, np.nan)


def steps_to_reach(target: float | np.ndarray, steps: list[int], sums: np.ndarray) -> np.ndarray:
    """The step counts (R,) at which curves (S, R) first reach `target`, interpolated in log steps.
    The first count if a curve starts above it, infinity if it never gets there."""
    reached = np.fmin.reduce(crossings(target, sums, np.log(steps)[:, None]))
    counts = np.where(np.isnan(reached), np.inf, np.exp(reached))
    return np.where(sums[0] >= target, steps[0], counts)


def text_at(level: float, lines: list[np.ndarray]) -> np.ndarray:
    """The highest CLIP-T (R,) at a likeness of `level` on any of the lines (2, S, R), interpolated;
    nan if none of them crosses it."""
    return np.fmax.reduce(np.concatenate([crossings(level, *line) for line in lines]))


def percent(mean: float, error: float, sign: str = "") -> str:
    """In percent, with the error in parentheses."""
    return f"{100 * mean:{sign}.1f} ({100 * error:.1f})"


def in_short(scores: dict[str, np.ndarray]) -> str:
    """R-FaceSim / CLIP-T (sum) in percent."""
    likeness, text, total = (100 * scores[metric].mean() for metric in AXES)
    return f"{likeness:.1f} / {text:.1f} ({total:.1f})"


def report_text(found: Found) -> str:
    """The tables of a rank, as Markdown: mean over people (standard error)."""
    every = {method: curves.values() for method, curves in found.tried.items()}
    tables = [
        rate_table(found),
        front_table("CLIP-T, best of all rates, at a likeness of", every),
    ]
    if found.scores:
        chosen = {method: [found.scores[method]] for method in found.rates}
        tables += [
            score_table(found),
            lead_table(found),
            front_table("CLIP-T, at the chosen rates, at a likeness of", chosen),
        ]
    return "\n".join(table(header, rows) for header, rows in tables)


def rate_table(found: Found) -> Table:
    """R-FaceSim / CLIP-T (sum) of every rate that was tried, the chosen one in bold, and its lead
    in the sum over the second best."""
    rows = []
    for method, curves in found.tried.items():
        chosen = found.rates[method]
        leads = []
        for count in found.steps:
            sums = {rate: own[count]["sum"] for rate, own in curves.items() if count in own}
            best = sums.pop(chosen[count])
            second = max(sums.values(), key=np.mean)
            leads.append(percent(*mean_error(best - second), "+"))
        for rate, curve in sorted(curves.items()):
            cells = []
            for count in found.steps:
                cell = ""
                if count in curve:
                    cell = in_short(curve[count])
                if rate == chosen[count]:
                    cell = f"**{cell}**"
                cells.append(cell)
            rows.append([METHODS[method], f"{rate:g}", *cells])
        rows.append([METHODS[method], "lead", *leads])
    columns = [f"{count} steps" for count in found.steps]
    return [f"rates, chosen on {len(best)} people", "rate", *columns], rows


def score_table(found: Found) -> Table:
    means = found.scores
    floor = means["none"][0]["background"]
    rows = []
    for method, count in [("none", 0), *product(found.rates, found.steps)]:
        scores = means[method][count]
        rate = found.rates[method][count] if count else ""
        shown = [scores[metric] for metric in (*AXES, "found")]
        copied = 1 - scores["background"] / floor
        cells = [percent(*mean_error(values)) for values in (*shown, copied, scores["move"])]
        each = "; ".join(in_short(of_all[method][count]) for of_all in found.trainings)
        rows.append([METHODS[method], count, rate, *cells, each])
    header = [
        f"people: {len(floor)}, trainings of each: {len(found.trainings)}",
        "steps",
        "rate",
        "R-FaceSim",
        "CLIP-T",
        "sum",
        "faces found",
        "background copied",
        "head moves",
        "each training",
    ]
    return header, rows


def lead_table(found: Found) -> Table:
    """Meta-LoRA's lead over each other method at the same number of steps, and how many steps it
    needs for the mean sum of the other. The quantiles are over resamples of people, and so is the
    share in which it gets there at all."""
    header = [
        "Meta-LoRA less",
        "steps",
        "R-FaceSim",
        "CLIP-T",
        "sum",
        "Meta-LoRA needs",
        "16 % quantile",
        "84 %",
        "reached in",
    ]
    means = found.scores
    ours = means["meta-lora"]
    sums = resampled(stacked(ours, "sum"))
    rows = []
    for other, count in product(found.rates, found.steps):
        if other == "meta-lora":
            continue
        theirs = means[other][count]
        leads = [percent(*mean_error(ours[count][m] - theirs[m]), "+") for m in AXES]
        everybody, *draws = steps_to_reach(resampled(theirs["sum"]), found.steps, sums)
        quantiles = np.quantile(draws, [0.16, 0.84], method="nearest")
        needs = []
        for needed in (everybody, *quantiles):
            needs.append(f"{needed:.0f}" if np.isfinite(needed) else "more")
        share = f"{np.isfinite(draws).mean():.0%}"
        rows.append([METHODS[other], count, *leads, *needs, share])
    return header, rows


def front_table(title: str, curves: dict[str, Iterable[Curve]]) -> Table:
    """CLIP-T at equal likeness, the best on any curve of a method."""
    header = [title]
    for level in LEVELS:
        header += [f"{100 * level:.0f}", "Meta-LoRA's lead"]
    texts = {}                                   # {method: (levels, 1 + RESAMPLES)}
    for method, of_method in curves.items():
        lines = []
        for curve in of_method:
            lines.append([resampled(stacked(curve, metric)) for metric in ("likeness", "text")])
        texts[method] = np.stack([text_at(level, lines) for level in LEVELS])
    rows = []
    for method, of_method in texts.items():
        cells = []
        for text, best in zip(of_method, texts["meta-lora"]):
            for values, sign in ((text, ""), (best - text, "+")):
                cell = "–"
                if np.isfinite(values[0]):
                    cell = percent(values[0], np.nanstd(values), sign)
                cells.append(cell)
        rows.append([METHODS[method], *cells])
    return header, rows


def draw_found(path: Path, found: Found):
    """`draw_scores` of each method at its best rates."""
    lines = {}
    for method, rates in found.rates.items():
        curves = found.tried[method]
        best = {count: curves[rates[count]][count] for count in found.steps}
        points = {}
        for count, scores in found.scores.get(method, best).items():
            points[count] = {metric: mean_error(scores[metric]) for metric in AXES}
        lines[method, ""] = points
    draw_scores(path, AXES, lines)
