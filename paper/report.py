"""Figures and contact sheets of paper/compare.py and paper/reproduce.py, and the latter's tables.

Source: "Meta-LoRA" (Topal et al. 2025), Figures 3, 4, and 6 to 8.
"""
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.common import save_figure
from support.people import Person
from support.sheets import sheet, table

METHODS = {"meta-lora": "Meta-LoRA", "lora": "LoRA", "lora-crops": "LoRA + augmented inputs",
           "random-lomd": "Meta-LoRA, random LoMD", "none": "no LoRA"}
AXES = {"likeness": "R-FaceSim (%)", "text": "CLIP-T (%)"}
METRICS = "likeness", "text", "sum", "found", "background", "move"
LEVELS = 0.60, 0.65, 0.70                        # likeness at which CLIP-T is compared
RESAMPLES = 2000                                 # of the bootstrap over people


class Line(NamedTuple):
    """The scores of a method after several step counts."""
    method: str
    name: str                                    # what tells it from the method's other lines
    steps: list[int]                             # [0] without a LoRA
    likeness: list                               # mean and standard error at each step count
    text: list


def draw_scores(path: Path, all_lines: list[Line], lines: list[Line]) -> None:
    """R-FaceSim against CLIP-T of `all_lines`, with their names at the ends; then both against the
    number of steps, with error bars, of `lines`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 5), layout="constrained")
    plane, *panels = figure.subplots(1, 3)
    colors = {method: f"C{i}" for i, method in enumerate(METHODS)}
    for line in all_lines:
        text, likeness = 100 * np.array([line.text, line.likeness])[:, :, 0]
        plane.plot(text, likeness, marker="o", color=colors[line.method])
        plane.annotate(line.name, (text[-1], likeness[-1]), fontsize=7)
    plane.set(xlabel=AXES["text"], ylabel=AXES["likeness"])

    for axes, metric in zip(panels, AXES):
        for line in lines:
            means, errors = 100 * np.array(getattr(line, metric)).T
            axes.errorbar(
                line.steps,
                means,
                errors,
                marker="o",
                capsize=3,
                color=colors[line.method],
                label=f"{METHODS[line.method]} {line.name}",
            )
        axes.set(xlabel="steps", ylabel=AXES[metric])
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


def draw_sheet(
    path: Path,
    people: list[Person],
    prompts: dict[str, list[str | None]],
    folders: dict[str, Path],
) -> None:
    """A contact sheet: eight people across, each with another prompt; the photo and rows of images
    down. folders: {name of a row: folder that holds <person>/<number of the prompt>_0.png}."""
    people = people[::max(1, len(people) // 8)]
    columns, photos = [], []
    rows = {name: [] for name in folders}
    for i in range(8):
        # fewer people take several prompts each
        turn, at = divmod(i, len(people))
        person = people[at]
        numbers = [k for k, text in enumerate(prompts[person.name]) if text]
        number = numbers[(turn + at) % len(numbers)]
        columns.append(prompts[person.name][number])
        photos.append(person.reference)
        for name, folder in folders.items():
            rows[name].append(folder / person.name / f"{number}_0.png")
    sheet(path, columns, [("the photo", photos), *rows.items()])


# --------------------------------------------------------------------------------------------------
# Tables and figure of paper/reproduce.py


class Found(NamedTuple):
    """All scores at one rank: the step counts, {method: {step count: {"rate": ..}}} as chosen on
    other people, and {method: {rate: [the result of `measure` for each training seed]}}."""
    steps: list[int]
    rates: dict[str, dict[int, dict]]
    scores: dict[str, dict[float, list[dict]]]

    def average(self, method: str, rate: float) -> dict[str, np.ndarray]:
        """{metric: per step count and person (S, P), averaged over training seeds}."""
        seeds = self.scores[method][rate]
        read = itemgetter(*METRICS)
        rows = []
        for scores in seeds:
            for people in scores.values():
                rows.append([read(people[name]) for name in sorted(people)])
        by_seed = np.reshape(rows, (len(seeds), -1, len(rows[0]), len(METRICS)))
        return dict(zip(METRICS, np.moveaxis(by_seed.mean(axis=0), -1, 0)))

    def curve(self, method: str, metric: str) -> np.ndarray:
        """A metric per step count and person (S, P), each at the rate chosen for it."""
        rows = []
        for i, count in enumerate(self.steps):
            rate = self.rates[method][count]["rate"]
            rows.append(self.average(method, rate)[metric][i])
        return np.stack(rows)


def mean_error(values: list[float] | np.ndarray) -> list[float]:
    """Mean and standard error over the people who have a value."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    error = values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean()), float(error)]


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


def percent(values: np.ndarray, sign: str = "") -> str:
    """Mean over people, in percent, with its standard error in parentheses."""
    mean, error = mean_error(values)
    return f"{100 * mean:{sign}.1f} ({100 * error:.1f})"


def percent_resampled(values: np.ndarray, sign: str = "") -> str:
    """The value of everybody, in percent, with the standard deviation of all resamples; a dash for
    a missing value."""
    if np.isnan(values[0]):
        return "–"
    return f"{100 * values[0]:{sign}.1f} ({100 * np.nanstd(values):.1f})"


def write_report(found: Found) -> str:
    """The tables of a rank, as Markdown: mean over people (standard error)."""
    texts = []
    for part in (score_table, lead_table, front_table):
        header, *rows = part(found)
        texts.append(table(header, rows))
    return "\n".join(texts)


def score_table(found: Found) -> list[list[str]]:
    floor = {metric: values[0] for metric, values in found.average("none", 0.0).items()}
    trainings = max(len(seeds) for seeds in found.scores["meta-lora"].values())
    rows = [[
        f"people: {len(floor['text'])}, trainings of each: {trainings}",
        "steps",
        "rate",
        "R-FaceSim",
        "CLIP-T",
        "sum",
        "faces found",
        "background copied",
        "head moves",
    ]]
    shown = "likeness", "text", "sum", "found"
    scores = [percent(floor[metric]) for metric in shown]
    rows.append([METHODS["none"], "", "", *scores, "", percent(floor["move"])])
    for method, rates in found.rates.items():
        curves = {metric: found.curve(method, metric) for metric in METRICS}
        copied = 1 - curves["background"] / floor["background"]
        for i, count in enumerate(found.steps):
            start = [METHODS[method], count, rates[count]["rate"]]
            scores = [percent(curves[metric][i]) for metric in shown]
            moves = percent(curves["move"][i])
            rows.append([*start, *scores, percent(copied[i]), moves])
    return rows


def lead_table(found: Found) -> list[list[str]]:
    """Meta-LoRA's lead over each other method at the same number of steps, and how many steps it
    needs for the mean sum of the other. The quantiles are over resamples of people, and so is the
    share in which it gets there at all."""
    rows = [[
        "Meta-LoRA less",
        "steps",
        "R-FaceSim",
        "CLIP-T",
        "sum",
        "Meta-LoRA needs",
        "16 % quantile",
        "84 %",
        "reached in",
    ]]
    metrics = "likeness", "text", "sum"
    ours = np.stack([found.curve("meta-lora", metric) for metric in metrics])
    sums = resampled(ours[-1])
    for other in found.rates:
        if other == "meta-lora":
            continue
        theirs = np.stack([found.curve(other, metric) for metric in metrics])
        for i, count in enumerate(found.steps):
            leads = [percent(lead, "+") for lead in (ours - theirs)[:, i]]
            everybody, *draws = steps_to_reach(resampled(theirs[-1, i]), found.steps, sums)
            quantiles = np.quantile(draws, [0.16, 0.84], method="nearest")
            needs = []
            for needed in (everybody, *quantiles):
                needs.append(f"{needed:.0f}" if np.isfinite(needed) else "more")
            share = f"{np.isfinite(draws).mean():.0%}"
            rows.append([METHODS[other], count, *leads, *needs, share])
    return rows


def front_table(found: Found) -> list[list[str]]:
    head = ["CLIP-T at a likeness of"]
    for level in LEVELS:
        head += [f"{100 * level:.0f}", "Meta-LoRA's lead"]
    texts = {}                                   # (levels, 1 + RESAMPLES)
    for method in found.rates:
        lines = []
        for rate in found.scores[method]:
            scores = found.average(method, rate)
            lines.append(resampled(np.stack([scores["likeness"], scores["text"]])))
        texts[method] = np.stack([text_at(level, lines) for level in LEVELS])
    rows = [head]
    for method, of_method in texts.items():
        cells = []
        for text, best in zip(of_method, texts["meta-lora"]):
            cells += [percent_resampled(text), percent_resampled(best - text, "+")]
        rows.append([METHODS[method], *cells])
    return rows


def draw_found(path: Path, found: Found) -> None:
    """`draw_scores` with a line for each rate, and each method at the rates chosen for it."""
    all_lines, lines = [], []
    for method in found.rates:
        for rate in found.scores[method]:
            scores = found.average(method, rate)
            points = ([*map(mean_error, scores[metric])] for metric in AXES)
            steps = found.steps[:len(scores["sum"])]
            all_lines.append(Line(method, f"{rate:g}", steps, *points))
        points = ([*map(mean_error, found.curve(method, metric))] for metric in AXES)
        lines.append(Line(method, "", found.steps, *points))
    draw_scores(path, all_lines, lines)
