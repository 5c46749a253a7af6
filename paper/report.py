"""Figures and contact sheets of paper/compare.py (the paper's Figures 3, 4, 6 to 8) and of
paper/reproduce.py.

Source: "Meta-LoRA" (Topal et al. 2025).
"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import personalize
from support.common import save_figure
from support.judges import Picture
from support.people import Person
from support.sheets import sheet, table

METHODS = {"meta-lora": "Meta-LoRA", "lora": "LoRA", "lora-crops": "LoRA + augmented inputs",
           "random-lomd": "Meta-LoRA, random LoMD", "none": "no LoRA"}
AXES = {"r_facesim": "R-FaceSim (%)", "clip_t": "CLIP-T (%)"}
OTHERS = "lora", "lora-crops", "random-lomd"     # the methods that Meta-LoRA is compared with
METRICS = "likeness", "text", "sum", "found", "background", "move"
LEVELS = 0.60, 0.65, 0.70                        # likeness at which CLIP-T is compared
RESAMPLES = 2000                                 # of the bootstrap over people


def new_figure(width: float, height: float) -> object:
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def line_of(axes: object, points: list[dict], metric: str, **style: object) -> None:
    """A metric against iterations, with error bars."""
    iterations, means, errors = [], [], []
    for point in sorted(points, key=lambda point: point["iterations"]):
        score = point[metric]
        iterations.append(point["iterations"])
        means.append(100 * score["mean"])
        errors.append(100 * (score["error"] or 0))
    axes.errorbar(
        iterations,
        means,
        errors,
        marker="o",
        markersize=4,
        capsize=3,
        **style,
    )


def figures(methods: list[dict], quoted: dict | None, out: Path) -> None:
    """scores.png: R-FaceSim against CLIP-T with quadratic fits, and both against iterations at the
    lowest rank (Figure 3). ranks.png: both against iterations, one column per rank (Figure 6)."""
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
    colors = {}
    for i, (method, points) in enumerate(by_method.items()):
        colors[method] = f"C{i % 10}"
        draw_plane(plane, method, points, colors[method])
        first = min(point["rank"] for point in points)
        lowest = [point for point in points if point["rank"] == first]
        for metric, axes in panels.items():
            if first > 0:
                line_of(axes, lowest, metric, color=colors[method])
            else:
                level = 100 * points[0][metric]["mean"]
                axes.axhline(level, color=colors[method], linestyle="--")
    for i, row in enumerate(quoted["table 5"] if quoted else []):
        label = f"quoted: {row['method']}, {row['base']}"
        marker = f"${i + 1}$"
        plane.scatter(row["clip_t"], row["r_facesim"], marker=marker, color="gray", label=label)
    plane.set(
        xlabel=AXES["clip_t"],
        ylabel=AXES["r_facesim"],
        title="all ranks (size) and iterations",
    )
    upper.set(ylabel=AXES["r_facesim"], title="the lowest rank")
    lower.set(ylabel=AXES["clip_t"], xlabel="iterations")
    handles = plane.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, out / "scores.png")
    draw_ranks(by_method, colors, out / "ranks.png")


def draw_plane(axes: object, method: str, points: list[dict], color: str) -> None:
    """R-FaceSim against CLIP-T of a method, with a quadratic fit if there are more than three
    points."""
    x = np.array([100 * point["clip_t"]["mean"] for point in points])
    y = np.array([100 * point["r_facesim"]["mean"] for point in points])
    sizes = [20 + 6 * point["rank"] for point in points]
    trained = points[0]["rank"] > 0
    axes.scatter(
        x, y,
        s=sizes,
        marker="o" if trained else "*",
        color=color,
        label=METHODS.get(method, method),
        alpha=0.8,
    )
    if len(np.unique(x)) > 3:
        fit = np.poly1d(np.polyfit(x - x.mean(), y, 2))
        at = np.linspace(x.min(), x.max(), 50)
        axes.plot(at, fit(at - x.mean()), color=color, linewidth=1)


def draw_ranks(by_method: dict[str, list[dict]], colors: dict[str, str], path: Path) -> None:
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
                at_rank = [point for point in points if point["rank"] == rank]
                if at_rank:
                    label = METHODS.get(method, method)
                    line_of(axes, at_rank, metric, color=colors[method], label=label)
        upper.set(title=f"rank {rank}")
        lower.set(xlabel="iterations")
    for metric, axes in zip(AXES, grid[:, 0]):
        axes.set(ylabel=AXES[metric])
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# Tables and figures of paper/reproduce.py


class Found(NamedTuple):
    """All scores at one rank: the step counts, {method: {steps: {"rate": ..}}} as chosen on other
    people, and {(method, rate): [the result of `measure` for each training seed]}."""
    steps: list[int]
    rates: dict[str, dict[int, dict]]
    scores: dict[tuple[str, float], list[dict]]

    def rate(self, method: str, count: int) -> float:
        return self.rates[method][count]["rate"]

    def curve(self, method: str, metric: str) -> np.ndarray:
        """A metric per step count and person (S, P), each at the rate chosen for it."""
        rows = []
        for count in self.steps:
            found = self.scores[method, self.rate(method, count)]
            rows.append(of_people(found, count, metric))
        return np.stack(rows)

    def lines(self, method: str) -> dict[float, np.ndarray]:
        """{rate: likeness and CLIP-T per step count and person (2, S, P)}."""
        lines = {}
        for (name, rate), found in self.scores.items():
            if name == method:
                counts = sorted(map(int, found[0]))
                likeness = [of_people(found, count, "likeness") for count in counts]
                text = [of_people(found, count, "text") for count in counts]
                lines[rate] = np.array([likeness, text])
        return lines


def of_people(found: list[dict], count: int, metric: str) -> np.ndarray:
    """A metric per person (P,) after `count` steps, averaged over training seeds."""
    seeds = []
    for scores in found:
        people = scores[str(count)]
        seeds.append([people[name][metric] for name in sorted(people)])
    return np.mean(seeds, axis=0)


def mean_error(values: list[float] | np.ndarray) -> list[float]:
    """Mean and standard error over the people who have a value."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    mean = values.mean()
    error = values.std(ddof=1) / len(values) ** 0.5
    return [float(mean), float(error)]


def resamples(count: int) -> list[np.ndarray]:
    """Indices of people: everybody, then RESAMPLES draws with replacement."""
    rng = np.random.default_rng(0)
    draws = rng.integers(count, size=(RESAMPLES, count))
    return [np.arange(count), *draws]


def steps_to_reach(target: float, steps: list[int], sums: np.ndarray) -> float:
    """The step count at which a curve (S,) first reaches `target`, interpolated in log steps. The
    first count if the curve starts above it, infinity if it never gets there."""
    above = np.flatnonzero(sums >= target)
    if not len(above):
        return np.inf
    last = above[0] + 1
    if last == 1:
        return steps[0]
    between = np.log(steps[last - 2:last])
    return float(np.exp(np.interp(target, sums[last - 2:last], between)))


def steps_needed(sums: np.ndarray, target: np.ndarray, steps: list[int]) -> dict:
    """How many steps a method with the sums (S, P) needs to reach the mean of target (P,).

    With the 16 % and 84 % quantiles over resamples of people, and the share of resamples in which
    the method gets there at all."""
    needed = []
    for people in resamples(len(target)):
        means = sums[:, people].mean(axis=1)
        mean_target = target[people].mean()
        needed.append(steps_to_reach(mean_target, steps, means))
    everybody, *resampled = needed
    low, high = np.quantile(resampled, [0.16, 0.84], method="nearest")
    return {
        "needed": everybody,
        "low": low,
        "high": high,
        "reached": np.isfinite(resampled).mean(),
    }


def text_at(level: float, lines: list[np.ndarray]) -> float:
    """The highest CLIP-T at a likeness of `level` on any of the lines (2, S), interpolated; nan if
    none of them crosses it."""
    best = np.nan
    for likeness, text in lines:
        for i in range(1, len(likeness)):
            start, end = likeness[i - 1:i + 1]
            if min(start, end) <= level <= max(start, end) and start != end:
                share = (level - start) / (end - start)
                found = text[i - 1] + share * (text[i] - text[i - 1])
                best = np.fmax(best, found)
    return best


def text_at_levels(lines: list[np.ndarray]) -> np.ndarray:
    """CLIP-T at each of LEVELS: everybody, then each resample (1 + RESAMPLES, levels)."""
    found = []
    for people in resamples(lines[0].shape[2]):
        means = [line[:, :, people].mean(axis=2) for line in lines]
        found.append([text_at(level, means) for level in LEVELS])
    return np.array(found)


def with_error(mean: float, error: float, sign: str = "") -> str:
    """In percent, the error in parentheses; a dash for a missing value."""
    if not np.isfinite(mean):
        return "–"
    return f"{100 * mean:{sign}.1f} ({100 * error:.1f})"


def percent(values: np.ndarray, sign: str = "") -> str:
    return with_error(*mean_error(values), sign)


def write_report(found: Found) -> str:
    """The tables of a rank, as Markdown: mean over people (standard error)."""
    parts = [score_table, difference_table, level_table, front_table, rate_table]
    texts = []
    for part in parts:
        header, *rows = part(found)
        texts.append(table(header, rows))
    return "\n".join(texts)


def score_table(found: Found) -> list[list[str]]:
    floor = {metric: of_people(found.scores["none", 0.0], 0, metric) for metric in METRICS}
    count = len(floor["text"])
    shown = "likeness", "text", "sum", "found"
    rows = [[
        f"n = {count}",
        "steps",
        "rate",
        "R-FaceSim",
        "CLIP-T",
        "sum",
        "faces found",
        "background copied",
        "head moves",
    ]]
    scores = [percent(floor[metric]) for metric in shown]
    rows.append([METHODS["none"], "", "", *scores, "", percent(floor["move"])])
    for method in found.rates:
        curves = {metric: found.curve(method, metric) for metric in METRICS}
        copied = 1 - curves["background"] / floor["background"]
        for i, count in enumerate(found.steps):
            rate = f"{found.rate(method, count):g}"
            scores = [percent(curves[metric][i]) for metric in shown]
            moves = percent(curves["move"][i])
            rows.append([METHODS[method], f"{count}", rate, *scores, percent(copied[i]), moves])
    return rows


def difference_table(found: Found) -> list[list[str]]:
    rows = [["Meta-LoRA less", "steps", "R-FaceSim", "CLIP-T", "sum"]]
    for other in OTHERS:
        leads = []
        for metric in ("likeness", "text", "sum"):
            leads.append(found.curve("meta-lora", metric) - found.curve(other, metric))
        for i, count in enumerate(found.steps):
            cells = [percent(lead[i], "+") for lead in leads]
            rows.append([METHODS[other], f"{count}", *cells])
    return rows


def level_table(found: Found) -> list[list[str]]:
    rows = [[
        "for the sum of",
        "at steps",
        "Meta-LoRA needs",
        "16 % quantile",
        "84 %",
        "reached in",
    ]]
    meta_lora = found.curve("meta-lora", "sum")
    for other in OTHERS:
        for count, target in zip(found.steps, found.curve(other, "sum")):
            needed = steps_needed(meta_lora, target, found.steps)
            row = [METHODS[other], f"{count}"]
            for name in ("needed", "low", "high"):
                row.append(f"{needed[name]:.0f}" if np.isfinite(needed[name]) else "more")
            rows.append([*row, f"{needed['reached']:.0%}"])
    return rows


def front_table(found: Found) -> list[list[str]]:
    head = ["CLIP-T at a likeness of"]
    for level in LEVELS:
        head += [f"{100 * level:.0f}", "Meta-LoRA's lead"]
    rows = [head]
    texts = {}
    for method in found.rates:
        texts[method] = text_at_levels([*found.lines(method).values()])
    for method, of_method in texts.items():
        leads = texts["meta-lora"] - of_method
        cells = []
        for text, lead in zip(of_method.T, leads.T):
            cells.append(with_error(text[0], np.nanstd(text)))
            cells.append(with_error(lead[0], np.nanstd(lead), "+"))
        rows.append([METHODS[method], *cells])
    return rows


def rate_table(found: Found) -> list[list[str]]:
    rows = [["rate chosen for", "steps", "rate", "second best", "lead in the sum"]]
    for method, rates in found.rates.items():
        for count in found.steps:
            chosen = rates[count]
            rate = f"{chosen['rate']:g}"
            second = f"{chosen['second']:g}"
            rows.append([METHODS[method], f"{count}", rate, second, with_error(*chosen["lead"])])
    return rows


def draw_steps(found: Found, path: Path) -> None:
    """R-FaceSim, CLIP-T, and their sum against the number of steps; one line per method."""
    figure = new_figure(12, 3.8)
    panels = {"likeness": AXES["r_facesim"], "text": AXES["clip_t"], "sum": "sum of both"}
    for axes, (metric, name) in zip(figure.subplots(1, 3), panels.items()):
        for method in found.rates:
            points = [mean_error(values) for values in found.curve(method, metric)]
            means, errors = 100 * np.array(points).T
            label = METHODS[method]
            axes.errorbar(found.steps, means, errors, marker="o", capsize=3, label=label)
        axes.set_xscale("log")
        axes.set_xticks(found.steps, found.steps)
        axes.minorticks_off()
        axes.set(xlabel="steps", ylabel=name)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_front(found: Found, path: Path) -> None:
    """R-FaceSim against CLIP-T: one line per method and rate through all step counts. Its end is
    labeled with the rate in units of 1e-4."""
    figure = new_figure(7, 5)
    axes = figure.subplots()
    for i, method in enumerate(found.rates):
        color = f"C{i}"
        axes.plot([], [], marker="o", color=color, label=METHODS[method])
        for rate, line in found.lines(method).items():
            likeness, text = 100 * line.mean(axis=2)
            axes.plot(text, likeness, marker="o", color=color)
            end = text[-1], likeness[-1]
            axes.annotate(f"{1e4 * rate:g}", end, fontsize=7, color=color)
    axes.set(xlabel=AXES["clip_t"], ylabel=AXES["r_facesim"])
    axes.legend(fontsize=8, title="one point per step count; labels: rate / 1e-4")
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# Contact sheets


def labels_shown(pictures: list[Picture], describe: Callable[[str], dict]) -> dict[str, str]:
    """{label: title}: the lowest rank of each method, and the iterations nearest to the paper's."""
    best = {}
    for label in dict.fromkeys(picture.label for picture in pictures):
        setting = describe(label)
        method = setting["method"]
        kind = "lora" if method.startswith("lora") else "meta-lora"
        distance = abs(setting["iterations"] - personalize.ITERATIONS[kind])
        order = setting["rank"], distance
        if method not in best or order < best[method][0]:
            best[method] = order, label, setting["title"]
    return {label: title for _, label, title in best.values()}


def sheets(
    pictures: list[Picture],
    people: list[Person],
    out: Path,
    describe: Callable[[str], dict],
) -> None:
    """For each gender: people and prompts across, methods down (Figures 4, 7, 8). One more sheet
    has one person at several seeds (Figure 4, right)."""
    titles = labels_shown(pictures, describe)
    paths = {}
    by_person = {}
    for picture in pictures:
        key = picture.label, picture.person, picture.prompt, picture.seed
        paths[key] = picture.path
        by_person.setdefault(picture.person, []).append(picture)

    def rows(cells: list[tuple[Person, int, int]]) -> list[tuple[str, list[Path | None]]]:
        """Input photos, then the images of (person, prompt, seed) from each method."""
        found = [("input", [person.reference for person, _, _ in cells])]
        for label, title in titles.items():
            files = []
            for person, prompt, seed in cells:
                files.append(paths.get((label, person.name, prompt, seed)))
            found.append((title, files))
        return found

    shown = [person for person in people if person.name in by_person]
    for gender in dict.fromkeys(person.gender for person in people):
        of_gender = [person for person in shown if person.gender == gender]
        columns = columns_of(of_gender, by_person)
        if columns:
            path = out / f"sheet_{gender or 'people'}.png"
            sheet(path, [*columns.values()], rows([*columns]))

    person = shown[0]
    images = by_person[person.name]
    prompt, text = min((image.prompt, image.text) for image in images)
    seeds = sorted({image.seed for image in images if image.prompt == prompt})[:6]
    names = [f"seed {seed}: {text}" for seed in seeds]
    cells = [(person, prompt, seed) for seed in seeds]
    sheet(out / "sheet_seeds.png", names, rows(cells))


def columns_of(
    people: list[Person],
    by_person: dict[str, list[Picture]],
) -> dict[tuple[Person, int, int], str]:
    """Up to eight columns {(person, prompt, seed): text of the prompt}, person after person."""
    columns = {}
    if not people:
        return columns
    for i in range(8):
        person = people[i % len(people)]
        images = by_person[person.name]
        seed = min(image.seed for image in images)
        prompts = {image.prompt: image.text for image in images if image.seed == seed}
        # another prompt for each person, and the next prompts in the second round
        turn = i
        if len(people) >= len(prompts):
            turn += i // len(people)
        prompt = sorted(prompts)[turn % len(prompts)]
        columns[person, prompt, seed] = prompts[prompt]
    return columns
