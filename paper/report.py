"""Figures and contact sheets of finished scores: the paper's Figures 3, 4, 6 to 8, and the miniature's.

Source: "Meta-LoRA" (Topal et al. 2025).
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np

import personalize
from support.common import save_figure
from support.identities import Person, Picture
from support.sheets import sheet

METHODS = {"meta-lora": "Meta-LoRA", "lora": "LoRA", "lora-crops": "LoRA + augmented inputs",
           "random-lomd": "Meta-LoRA, random LoMD", "none": "no LoRA"}
AXES = {"r_facesim": "R-FaceSim (%)", "clip_t": "CLIP-T (%)"}
OTHERS = "lora", "lora-crops", "random-lomd"     # what Meta-LoRA is compared with
METRICS = "likeness", "text", "sum", "found", "background", "move"
LEVELS = 0.60, 0.65, 0.70                        # of likeness, at which text is compared
RESAMPLES = 2000


def new_figure(width: float, height: float) -> object:
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def line_of(axes: object, points: list[dict], metric: str, **style: object) -> None:
    """A metric with its errors against iterations."""
    points = sorted(points, key=lambda point: point["iterations"])
    iterations = [point["iterations"] for point in points]
    means = [100 * point[metric]["mean"] for point in points]
    errors = [100 * (point[metric]["error"] or 0) for point in points]
    axes.errorbar(iterations, means, errors, marker="o", markersize=4, capsize=3, **style)


def figures(methods: list[dict], quoted: dict | None, out: Path) -> None:
    """scores.png: R-FaceSim against CLIP-T with quadratic fits, and both against iterations at the lowest
    rank (Figure 3); ranks.png: both against iterations, a column for each rank (Figure 6)."""
    by_method = {}
    for method in methods:
        if method["r_facesim"] and method["clip_t"]:
            by_method.setdefault(method["method"], []).append(method)
    if not by_method:
        return
    figure = new_figure(12, 5)
    grid = figure.add_gridspec(2, 2)
    plane = figure.add_subplot(grid[:, 0])
    upper = figure.add_subplot(grid[0, 1])
    lower = figure.add_subplot(grid[1, 1], sharex=upper)
    panels = {"r_facesim": upper, "clip_t": lower}
    colours = {}
    for i, (method, points) in enumerate(by_method.items()):
        colours[method] = f"C{i % 10}"
        draw_plane(plane, method, points, colours[method])
        first = min(point["rank"] for point in points)
        lowest = [point for point in points if point["rank"] == first]
        for metric, axes in panels.items():
            if first > 0:
                line_of(axes, lowest, metric, color=colours[method])
            else:
                level = 100 * points[0][metric]["mean"]
                axes.axhline(level, color=colours[method], linestyle="--")
    for i, row in enumerate(quoted["table 5"] if quoted else []):
        label = f"quoted: {row['method']}, {row['base']}"
        plane.scatter(row["clip_t"], row["r_facesim"], marker=f"${i + 1}$", color="grey", label=label)
    plane.set(xlabel=AXES["clip_t"], ylabel=AXES["r_facesim"], title="each rank (size) and iterations")
    upper.set(ylabel=AXES["r_facesim"], title="the lowest rank")
    lower.set(ylabel=AXES["clip_t"], xlabel="iterations")
    handles = plane.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, out / "scores.png")
    draw_ranks(by_method, colours, out / "ranks.png")


def draw_plane(axes: object, method: str, points: list[dict], colour: str) -> None:
    """A method's points of likeness against text, and a quadratic through more than three."""
    x = np.array([100 * point["clip_t"]["mean"] for point in points])
    y = np.array([100 * point["r_facesim"]["mean"] for point in points])
    sizes = [20 + 6 * point["rank"] for point in points]
    marker = "o" if points[0]["rank"] > 0 else "*"
    label = METHODS.get(method, method)
    axes.scatter(x, y, s=sizes, marker=marker, color=colour, label=label, alpha=0.8)
    if len(np.unique(x)) > 3:
        at = np.linspace(x.min(), x.max(), 50)
        fit = np.poly1d(np.polyfit(x - x.mean(), y, 2))
        axes.plot(at, fit(at - x.mean()), color=colour, linewidth=1)


def draw_ranks(by_method: dict[str, list[dict]], colours: dict[str, str], path: Path) -> None:
    ranks = set()
    for points in by_method.values():
        ranks |= {point["rank"] for point in points if point["rank"] > 0}
    if not ranks:
        return
    figure = new_figure(3.5 * len(ranks) + 1, 5)
    grid = figure.subplots(2, len(ranks), sharex=True, sharey="row", squeeze=False)
    for rank, (upper, lower) in zip(sorted(ranks), grid.T):
        for metric, axes in zip(AXES, (upper, lower)):
            for method, points in by_method.items():
                own = [point for point in points if point["rank"] == rank]
                if own:
                    label = METHODS.get(method, method)
                    line_of(axes, own, metric, color=colours[method], label=label)
        upper.set(title=f"rank {rank}")
        lower.set(xlabel="iterations")
    for metric, axes in zip(AXES, grid[:, 0]):
        axes.set(ylabel=AXES[metric])
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


# The miniature: scores {(method, rate): one `measure` for each seed of training} -------------------------


def mean_error(values: list[float] | np.ndarray) -> list[float]:
    """Mean and standard error over people, without those that have no value."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    return [float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)]


def of_people(found: list[dict], count: int, metric: str) -> np.ndarray:
    """A metric of each person (P,) after so many steps, averaged over seeds of training."""
    people = sorted(found[0][str(count)])
    seeds = []
    for one in found:
        seeds.append([one[str(count)][name][metric] for name in people])
    return np.mean(seeds, axis=0)


def curve(steps: list[int], rates: dict, scores: dict, method: str, metric: str) -> np.ndarray:
    """A metric of each person at each number of steps, at the rate chosen for it (S, P)."""
    rows = []
    for count in steps:
        rate = rates[method][count]["rate"]
        rows.append(of_people(scores[method, rate], count, metric))
    return np.stack(rows)


def steps_to_reach(target: float, steps: list[int], sums: np.ndarray) -> float:
    """Where a curve (S,) first reaches `target`, interpolated in the logarithm of the number of steps; the
    first number where it begins above, infinite where it never gets there."""
    above = np.flatnonzero(sums >= target)
    if not len(above):
        return np.inf
    i = above[0]
    if i == 0:
        return steps[0]
    return float(np.exp(np.interp(target, sums[i - 1:i + 1], np.log(steps[i - 1:i + 1]))))


def resamples(count: int) -> list[np.ndarray]:
    """Indices of people: everybody, then RESAMPLES draws with replacement."""
    rng = np.random.default_rng(0)
    return [np.arange(count), *rng.integers(count, size=(RESAMPLES, count))]


def steps_needed(own: np.ndarray, other: np.ndarray, i: int, steps: list[int]) -> dict:
    """How many steps a method needs for the sum that another has at steps[i], both (S, P), with the
    interval of 68 % of resamples of people, and the share of these in which it gets there."""
    needed = []
    for people in resamples(own.shape[1]):
        target = other[i, people].mean()
        needed.append(steps_to_reach(target, steps, own[:, people].mean(axis=1)))
    low, high = np.quantile(needed[1:], [0.16, 0.84], method="nearest")
    reached = np.isfinite(needed[1:]).mean()
    return {"needed": needed[0], "low": low, "high": high, "reached": reached}


def text_at(level: float, lines: list[np.ndarray]) -> float:
    """The highest text at a likeness on any of the lines (2, S) of likeness and text, interpolated; nan
    where none of them crosses it."""
    texts = [np.nan]
    for likeness, text in lines:
        for i in range(len(likeness) - 1):
            ends = likeness[i:i + 2]
            if min(ends) <= level <= max(ends) and ends[0] != ends[1]:
                share = (level - ends[0]) / (ends[1] - ends[0])
                texts.append(text[i] + share * (text[i + 1] - text[i]))
    return np.nanmax(texts) if np.isfinite(texts).any() else np.nan


def lines_of(scores: dict, method: str) -> list[np.ndarray]:
    """For each rate of a method, likeness and text of everybody at each number of steps (2, S, P)."""
    lines = []
    for (name, _), found in scores.items():
        if name == method:
            counts = sorted(map(int, found[0]))
            line = []
            for metric in ("likeness", "text"):
                line.append([of_people(found, count, metric) for count in counts])
            lines.append(np.array(line))
    return lines


def text_at_levels(lines: list[np.ndarray]) -> np.ndarray:
    """Text at each of LEVELS, for everybody and for each resample of people (1 + RESAMPLES, levels)."""
    found = []
    for people in resamples(lines[0].shape[2]):
        means = [line[:, :, people].mean(axis=2) for line in lines]
        found.append([text_at(level, means) for level in LEVELS])
    return np.array(found)


def with_error(mean: float, error: float, sign: str = "") -> str:
    """As percent, the error in brackets; a dash for what does not exist."""
    return f"{100 * mean:{sign}.1f} ({100 * error:.1f})" if np.isfinite(mean) else "–"


def percent(values: np.ndarray, sign: str = "") -> str:
    return with_error(*mean_error(values), sign)


def number_of_steps(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "more than tried"


def write_report(steps: list[int], rates: dict, scores: dict) -> str:
    """The tables of a rank, as Markdown; mean over people, and in brackets its standard error."""
    parts = [score_table, difference_table, level_table, front_table, rate_table]
    return "\n".join(part(steps, rates, scores) for part in parts)


def score_table(steps: list[int], rates: dict, scores: dict) -> str:
    floor = {metric: of_people(scores["none", 0.0], 0, metric) for metric in METRICS}
    rows = [[f"n = {len(floor['text'])}", "steps", "rate", "R-FaceSim", "CLIP-T", "sum", "faces found",
             "background copied", "head moves"]]
    shown = "likeness", "text", "sum", "found"
    rows.append([METHODS["none"], "", "", *(percent(floor[metric]) for metric in shown), "",
                 percent(floor["move"])])
    for method in rates:
        curves = {metric: curve(steps, rates, scores, method, metric) for metric in METRICS}
        for i, count in enumerate(steps):
            cells = [percent(curves[metric][i]) for metric in shown]
            copied = 1 - curves["background"][i] / floor["background"]
            rows.append([METHODS[method], f"{count}", f"{rates[method][count]['rate']:g}", *cells,
                         percent(copied), percent(curves["move"][i])])
    return markdown(rows)


def difference_table(steps: list[int], rates: dict, scores: dict) -> str:
    rows = [["Meta-LoRA less", "steps", "R-FaceSim", "CLIP-T", "sum"]]
    for other in OTHERS:
        for i, count in enumerate(steps):
            cells = []
            for metric in ("likeness", "text", "sum"):
                own = curve(steps, rates, scores, "meta-lora", metric)[i]
                cells.append(percent(own - curve(steps, rates, scores, other, metric)[i], "+"))
            rows.append([METHODS[other], f"{count}", *cells])
    return markdown(rows)


def level_table(steps: list[int], rates: dict, scores: dict) -> str:
    rows = [["for the sum of", "at steps", "Meta-LoRA needs", "16 % quantile", "84 %", "reached in"]]
    own = curve(steps, rates, scores, "meta-lora", "sum")
    for other in OTHERS:
        theirs = curve(steps, rates, scores, other, "sum")
        for i, count in enumerate(steps):
            found = steps_needed(own, theirs, i, steps)
            cells = [number_of_steps(found[name]) for name in ("needed", "low", "high")]
            rows.append([METHODS[other], f"{count}", *cells, f"{found['reached']:.0%}"])
    return markdown(rows)


def front_table(steps: list[int], rates: dict, scores: dict) -> str:
    rows = [["CLIP-T at a likeness of"]]
    for level in LEVELS:
        rows[0] += [f"{100 * level:.0f}", "Meta-LoRA's lead"]
    own = text_at_levels(lines_of(scores, "meta-lora"))
    for method in rates:
        texts = text_at_levels(lines_of(scores, method))
        cells = []
        for text, lead in zip(texts.T, (own - texts).T):
            cells += [with_error(text[0], np.nanstd(text)), with_error(lead[0], np.nanstd(lead), "+")]
        rows.append([METHODS[method], *cells])
    return markdown(rows)


def rate_table(steps: list[int], rates: dict, scores: dict) -> str:
    rows = [["rate chosen for", "steps", "rate", "second best", "lead in the sum"]]
    for method in rates:
        for count in steps:
            own = rates[method][count]
            rows.append([METHODS[method], f"{count}", f"{own['rate']:g}", f"{own['second']:g}",
                         with_error(*own["lead"])])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{' --- |' * len(rows[0])}")
    return "\n".join(lines) + "\n"


def draw_steps(steps: list[int], rates: dict, scores: dict, path: Path) -> None:
    """Likeness, text and their sum against the number of steps, a line for each method."""
    figure = new_figure(12, 3.8)
    panels = {"likeness": AXES["r_facesim"], "text": AXES["clip_t"], "sum": "sum of both"}
    for axes, (metric, name) in zip(figure.subplots(1, 3), panels.items()):
        for method in rates:
            points = [mean_error(own) for own in curve(steps, rates, scores, method, metric)]
            means, errors = 100 * np.array(points).T
            axes.errorbar(steps, means, errors, marker="o", markersize=4, capsize=3,
                          label=METHODS[method])
        axes.set_xscale("log")
        axes.set_xticks(steps, steps)
        axes.minorticks_off()
        axes.set(xlabel="steps", ylabel=name)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_front(rates: dict, scores: dict, path: Path) -> None:
    """Likeness against text, a line through the numbers of steps for each method and rate, the rate in 1e-4
    at its end."""
    figure = new_figure(7, 5)
    axes = figure.subplots()
    for i, method in enumerate(rates):
        label = METHODS[method]
        tried = [rate for name, rate in scores if name == method]
        for rate, line in zip(tried, lines_of(scores, method)):
            likeness, text = 100 * line.mean(axis=2)
            axes.plot(text, likeness, marker="o", markersize=4, color=f"C{i}", label=label)
            label = None                         # one entry of the legend for all rates
            end = text[-1], likeness[-1]
            axes.annotate(f"{1e4 * rate:g}", end, textcoords="offset points", xytext=(4, 3), fontsize=7,
                          color=f"C{i}")
    axes.set(xlabel=AXES["clip_t"], ylabel=AXES["r_facesim"])
    axes.legend(fontsize=8, title="a point a number of steps; at its end the rate in 1e-4")
    save_figure(figure, path)


# Contact sheets --------------------------------------------------------------------------------------


def labels_shown(pictures: list[Picture], describe: Callable[[str], dict]) -> dict[str, str]:
    """{label: title}: for each method the lowest rank, and the iterations nearest to the paper's."""
    best = {}
    for label in dict.fromkeys(picture.label for picture in pictures):
        setting = describe(label)
        method = setting["method"]
        paper = personalize.ITERATIONS["lora" if method.startswith("lora") else "meta-lora"]
        order = setting["rank"], abs(setting["iterations"] - paper)
        if method not in best or order < best[method][0]:
            best[method] = order, label, setting["title"]
    return {label: title for _, label, title in best.values()}


def sheets(pictures: list[Picture], people: list[Person], out: Path,
           describe: Callable[[str], dict]) -> None:
    """For each gender people and prompts across, methods down (Figures 4, 7, 8); one person's seeds (Figure
    4, right)."""
    titles = labels_shown(pictures, describe)
    at, of = {}, {}
    for picture in pictures:
        at[picture.label, picture.person, picture.prompt, picture.seed] = picture.path
        of.setdefault(picture.person, []).append(picture)

    def rows(cells: list[tuple[Person, int, int]]) -> list[tuple[str, list[Path | None]]]:
        """The photos of people, then for each method the pictures of (person, prompt, seed)."""
        found = [("input", [person.reference for person, _, _ in cells])]
        for label, title in titles.items():
            files = [at.get((label, person.name, prompt, seed)) for person, prompt, seed in cells]
            found.append((title, files))
        return found

    for gender in dict.fromkeys(person.gender for person in people):
        own = [person for person in people if person.gender == gender and person.name in of]
        columns = {}
        for i in range(8 if own else 0):
            person = own[i % len(own)]
            seed = min(picture.seed for picture in of[person.name])
            drawn = {picture.prompt: picture.text for picture in of[person.name] if picture.seed == seed}
            # everybody with another prompt, and the next ones in the second round
            turn = i if len(own) < len(drawn) else i // len(own) + i
            prompt = sorted(drawn)[turn % len(drawn)]
            columns[person, prompt, seed] = drawn[prompt]
        if columns:
            sheet(out / f"sheet_{gender or 'people'}.png", [*columns.values()], rows([*columns]))

    person = next(person for person in people if person.name in of)
    prompt, text = min((picture.prompt, picture.text) for picture in of[person.name])
    seeds = sorted({picture.seed for picture in of[person.name] if picture.prompt == prompt})[:6]
    names = [f"seed {seed}: {text}" for seed in seeds]
    sheet(out / "sheet_seeds.png", names, rows([(person, prompt, seed) for seed in seeds]))
