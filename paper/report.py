"""Figures and contact sheets of paper/compare.py and paper/reproduce.py, and the latter's tables.

Source: "Meta-LoRA" (Topal et al. 2025), Figures 3, 4, and 6 to 8.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.common import save_figure
from support.people import Person
from support.sheets import sheet, table

METHODS = {"meta-lora": "Meta-LoRA", "lora": "LoRA", "lora-crops": "LoRA + augmented inputs",
           "random-lomd": "Meta-LoRA, random LoMD", "none": "no LoRA"}
AXES = {"likeness": "R-FaceSim (%)", "text": "CLIP-T (%)", "sum": "R-FaceSim + CLIP-T (%)"}
METRICS = "likeness", "text", "sum", "found", "background", "move"
LEVELS = 0.60, 0.65, 0.70                        # likeness at which CLIP-T is compared
RESAMPLES = 2000                                 # of the bootstrap over people


class Line(NamedTuple):
    """The scores of a method after several step counts."""
    method: str
    name: str                                    # what tells it from the method's other lines
    steps: list[int]                             # [0] without a LoRA
    points: dict[str, list]                      # {metric: (mean, standard error) at each count}


def draw_scores(path: Path, all_lines: list[Line], lines: list[Line]) -> None:
    """R-FaceSim against CLIP-T of `all_lines`, with their names at the ends; then each metric of
    `lines` against the number of steps, with error bars."""
    from matplotlib.figure import Figure
    metrics = list(lines[0].points)
    figure = Figure(figsize=(5 + 4.5 * len(metrics), 5), layout="constrained")
    plane, *panels = figure.subplots(1, 1 + len(metrics))
    colors = {method: f"C{i}" for i, method in enumerate(METHODS)}
    for line in all_lines:
        text = 100 * np.array(line.points["text"])[:, 0]
        likeness = 100 * np.array(line.points["likeness"])[:, 0]
        plane.plot(text, likeness, marker="o", color=colors[line.method])
        plane.annotate(line.name, (text[-1], likeness[-1]), fontsize=7)
    plane.set(xlabel=AXES["text"], ylabel=AXES["likeness"])

    for axes, metric in zip(panels, metrics):
        for line in lines:
            means, errors = 100 * np.array(line.points[metric]).T
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
    """All scores at one rank. Scores of a step count are {person: {metric: value}}."""
    steps: list[int]
    rates: dict[str, dict[int, float]]           # {method: {step count: the rate chosen for it}}
    tried: dict[str, dict[float, dict]]          # {method: {rate: {step count: scores}}}, of the
                                                 # people on whom the rates were chosen
    scores: dict[str, dict[int, list[dict]]]     # {method: {step count: scores of each training}},
                                                 # of other people; {} if there are none yet

    def values(self, method: str, count: int, metric: str) -> np.ndarray:
        """A metric of each person (P,) at the chosen rate, averaged over training seeds."""
        return np.mean([people_values(scores, metric) for scores in self.scores[method][count]],
                       axis=0)

    def curve(self, method: str, metric: str) -> np.ndarray:
        """A metric per step count and person (S, P), each at the rate chosen for it."""
        return np.stack([self.values(method, count, metric) for count in self.steps])


def people_values(scores: dict[str, dict], metric: str) -> np.ndarray:
    """A metric of each person (P,), in the order of their names."""
    return np.array([scores[name][metric] for name in sorted(scores)])


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
    parts = [rate_table, front_of_all_rates]
    if found.scores:
        parts += [score_table, lead_table, front_table]
    texts = []
    for part in parts:
        header, *rows = part(found)
        texts.append(table(header, rows))
    return "\n".join(texts)


def rate_table(found: Found) -> list[list[str]]:
    """R-FaceSim / CLIP-T (sum) of every rate that was tried, the chosen one in bold, and its lead
    in the sum over the second best."""
    first = found.rates["meta-lora"][found.steps[0]]
    people = len(found.tried["meta-lora"][first][found.steps[0]])
    columns = [f"{count} steps" for count in found.steps]
    rows = [[f"rates, chosen on {people} people", "rate", *columns]]
    for method, rates in found.tried.items():
        leads = {}
        for count in found.steps:
            sums = {}
            for rate, by_count in rates.items():
                if count in by_count:
                    sums[rate] = people_values(by_count[count], "sum")
            mine = sums.pop(found.rates[method][count])
            second = max(sums.values(), key=np.mean)
            leads[count] = percent(mine - second, "+")
        for rate in sorted(rates):
            cells = []
            for count in found.steps:
                cell = ""
                if count in rates[rate]:
                    likeness, text, total = (
                        100 * people_values(rates[rate][count], metric).mean() for metric in AXES)
                    cell = f"{likeness:.1f} / {text:.1f} ({total:.1f})"
                if rate == found.rates[method][count]:
                    cell = f"**{cell}**"
                cells.append(cell)
            rows.append([METHODS[method], f"{rate:g}", *cells])
        rows.append([METHODS[method], "lead", *leads.values()])
    return rows


def score_table(found: Found) -> list[list[str]]:
    people = len(found.values("none", 0, "text"))
    trainings = len(found.scores["meta-lora"][found.steps[0]])
    rows = [[
        f"people: {people}, trainings of each: {trainings}",
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
    scores = [percent(found.values("none", 0, metric)) for metric in shown]
    moves = percent(found.values("none", 0, "move"))
    rows.append([METHODS["none"], "", "", *scores, "", moves])
    floor = found.values("none", 0, "background")
    for method, rates in found.rates.items():
        for count in found.steps:
            scores = [percent(found.values(method, count, metric)) for metric in shown]
            copied = percent(1 - found.values(method, count, "background") / floor)
            moves = percent(found.values(method, count, "move"))
            rows.append([METHODS[method], count, rates[count], *scores, copied, moves])
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


def front_of_all_rates(found: Found) -> list[list[str]]:
    """`front_rows` over all rates and step counts, on the people on whom rates were chosen."""
    lines = {}
    for method, rates in found.tried.items():
        lines[method] = []
        for by_count in rates.values():
            likeness, text = [], []
            for count in sorted(by_count):
                likeness.append(people_values(by_count[count], "likeness"))
                text.append(people_values(by_count[count], "text"))
            lines[method].append(np.array([likeness, text]))
    return front_rows("CLIP-T, best of all rates, at a likeness of", lines)


def front_table(found: Found) -> list[list[str]]:
    """`front_rows` along the chosen rates."""
    lines = {}
    for method in found.rates:
        curves = [found.curve(method, metric) for metric in ("likeness", "text")]
        lines[method] = [np.stack(curves)]
    return front_rows("CLIP-T, at the chosen rates, at a likeness of", lines)


def front_rows(title: str, lines: dict[str, list[np.ndarray]]) -> list[list[str]]:
    """CLIP-T at equal likeness. lines: of each method, likeness and text (2, S, P)."""
    head = [title]
    for level in LEVELS:
        head += [f"{100 * level:.0f}", "Meta-LoRA's lead"]
    texts = {}                                   # (levels, 1 + RESAMPLES)
    for method, of_method in lines.items():
        means = [resampled(line) for line in of_method]
        texts[method] = np.stack([text_at(level, means) for level in LEVELS])
    rows = [head]
    for method, of_method in texts.items():
        cells = []
        for text, best in zip(of_method, texts["meta-lora"]):
            cells += [percent_resampled(text), percent_resampled(best - text, "+")]
        rows.append([METHODS[method], *cells])
    return rows


def draw_found(path: Path, found: Found) -> None:
    """`draw_scores` with a line for each rate that was tried, and each method at its best rates."""
    all_lines, lines = [], []
    for method, rates in found.tried.items():
        for rate, by_count in rates.items():
            steps = sorted(by_count)
            points = {}
            for metric in AXES:
                points[metric] = [mean_error(people_values(by_count[n], metric)) for n in steps]
            all_lines.append(Line(method, f"{rate:g}", steps, points))

        points = {metric: [] for metric in AXES}
        for count in found.steps:
            for metric in AXES:
                if found.scores:
                    values = found.values(method, count, metric)
                else:
                    values = people_values(rates[found.rates[method][count]][count], metric)
                points[metric].append(mean_error(values))
        lines.append(Line(method, "", found.steps, points))
    draw_scores(path, all_lines, lines)
