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
OFFSETS = {"lora": (-8, -8), "lora-crops": (0, 10), "random-lomd": (11, -8), "meta-lora": (9, 9)}   # points


def new_figure(width: float, height: float) -> object:
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def line_of(axes: object, points: list[dict], metric: str, **style: object) -> None:
    """A metric with its errors against iterations."""
    points = sorted(points, key=lambda p: p["iterations"])
    errors = [100 * (p[metric]["error"] or 0) for p in points]
    axes.errorbar([p["iterations"] for p in points], [100 * p[metric]["mean"] for p in points], errors,
                  marker="o", markersize=4, capsize=3, **style)


def figures(methods: list[dict], quoted: dict | None, out: Path) -> None:
    """scores.png: R-FaceSim against CLIP-T with quadratic fits, and both against iterations at the lowest
    rank (Figure 3); ranks.png: both against iterations, a column for each rank (Figure 6)."""
    by_method = {}
    for method in methods:
        if method["r_facesim"] and method["clip_t"]:
            by_method.setdefault(method["method"], []).append(method)
    if not by_method:
        return
    colours = {method: f"C{i % 10}" for i, method in enumerate(by_method)}
    figure = new_figure(12, 5)
    grid = figure.add_gridspec(2, 2)
    plane, upper = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    panels = {"r_facesim": upper, "clip_t": figure.add_subplot(grid[1, 1], sharex=upper)}
    for method, points in by_method.items():
        x, y = (np.array([100 * p[metric]["mean"] for p in points]) for metric in ("clip_t", "r_facesim"))
        colour, trained = colours[method], points[0]["rank"] > 0
        plane.scatter(x, y, s=[20 + 6 * p["rank"] for p in points], marker="o" if trained else "*",
                      color=colour, label=METHODS.get(method, method), alpha=0.8)
        if len(set(x.tolist())) > 3:
            at = np.linspace(x.min(), x.max(), 50)
            fit = np.poly1d(np.polyfit(x - x.mean(), y, 2))
            plane.plot(at, fit(at - x.mean()), color=colour, linewidth=1)
        lowest = [p for p in points if p["rank"] == min(q["rank"] for q in points)]
        for metric, axes in panels.items():
            if trained:
                line_of(axes, lowest, metric, color=colour)
            else:
                axes.axhline(100 * points[0][metric]["mean"], color=colour, linestyle="--")
    for i, row in enumerate(quoted["table 5"] if quoted else []):
        plane.scatter(row["clip_t"], row["r_facesim"], marker=f"${i + 1}$", color="grey",
                      label=f"quoted: {row['method']}, {row['base']}")
    plane.set(xlabel=AXES["clip_t"], ylabel=AXES["r_facesim"], title="each rank (size) and iterations")
    for metric, axes in panels.items():
        axes.set(ylabel=AXES[metric], xlabel="iterations" if metric == "clip_t" else "")
    upper.set(title="the lowest rank")
    figure.legend(*plane.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, out / "scores.png")
    draw_ranks(by_method, colours, out / "ranks.png")


def draw_ranks(by_method: dict[str, list[dict]], colours: dict[str, str], path: Path) -> None:
    ranks = sorted({p["rank"] for points in by_method.values() for p in points if p["rank"]})
    if not ranks:
        return
    figure = new_figure(3.5 * len(ranks) + 1, 5)
    axes = figure.subplots(2, len(ranks), sharex=True, sharey="row", squeeze=False)
    for column, rank in enumerate(ranks):
        for row, metric in enumerate(AXES):
            for method, points in by_method.items():
                if some := [p for p in points if p["rank"] == rank]:
                    line_of(axes[row, column], some, metric, color=colours[method],
                            label=METHODS.get(method, method))
            axes[row, 0].set(ylabel=AXES[metric])
        axes[0, column].set(title=f"rank {rank}")
        axes[1, column].set(xlabel="iterations")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


def draw_rates(tried: dict, chosen: dict[str, float], floor: float, path: Path) -> None:
    """Likeness against text, a line for each method through its learning rates, which are written at the
    points in 1e-4, a ring around the chosen one; the dotted line is the model's own text score."""
    figure = new_figure(6, 4.5)
    axes = figure.subplots()
    for method, by_rate in tried.items():
        places = [(100 * own["clip_t"], 100 * own["r_facesim"]) for own in by_rate.values()]
        (line,) = axes.plot(*zip(*places), marker="o", markersize=4, label=METHODS[method])
        axes.plot(*places[[*map(float, by_rate)].index(chosen[method])], marker="o", markersize=10,
                  fillstyle="none", color=line.get_color())
        for rate, place in zip(by_rate, places):
            axes.annotate(f"{1e4 * float(rate):g}", place, textcoords="offset points", fontsize=8,
                          color=line.get_color(), xytext=OFFSETS[method], ha="center", va="center")
    axes.axvline(100 * floor, color="grey", linestyle=":", linewidth=1)
    axes.margins(0.08)
    axes.set(xlabel=AXES["clip_t"], ylabel=AXES["r_facesim"])
    axes.legend(fontsize=8, title="learning rates in 1e-4", title_fontsize=8)
    save_figure(figure, path)


def sheets(pictures: list[Picture], people: list[Person], out: Path, describe: Callable[[str], dict]) -> None:
    """For each gender people and prompts across, methods down (Figures 4, 7, 8); one person's seeds (Figure
    4, right). Of each method the lowest rank, and the iterations nearest the paper's."""
    chosen, settings = {}, {p.label: describe(p.label) for p in pictures}
    for label, setting in settings.items():
        method = setting["method"]
        wish = personalize.ITERATIONS["lora" if method.startswith("lora") else "meta-lora"]
        better = setting["rank"], abs(setting["iterations"] - wish)
        if method not in chosen or better < chosen[method][0]:
            chosen[method] = better, label
    at = {p[:4]: p.path for p in pictures}                         # (label, person, prompt, seed)
    of = {p.name: [q for q in pictures if q.person == p.name] for p in people}

    def lines(cells: list[tuple[Person, int, int]]) -> list[tuple[str, list[Path | None]]]:
        places = [(person.name, prompt, seed) for person, prompt, seed in cells]
        return [(settings[label]["title"], [at.get((label, *place)) for place in places])
                for _, label in chosen.values()]
    for gender in dict.fromkeys(p.gender for p in people):
        own, columns = [p for p in people if p.gender == gender and of[p.name]], {}
        for i in range(8 if own else 0):
            person = own[i % len(own)]
            seed = min(q.seed for q in of[person.name])
            there = sorted({(q.prompt, q.text) for q in of[person.name] if q.seed == seed})
            turn = i if len(own) < len(there) else i // len(own) + i
            prompt, text = there[turn % len(there)]
            columns[person, prompt, seed] = text, person.reference
        if columns:
            texts, photos = zip(*columns.values())
            sheet(out / f"sheet_{gender or 'people'}.png", texts, [("input", photos), *lines([*columns])])
    person = next(p for p in people if of[p.name])
    prompt, text = min((q.prompt, q.text) for q in of[person.name])
    seeds = sorted({q.seed for q in of[person.name] if q.prompt == prompt})[:6]
    sheet(out / "sheet_seeds.png", [f"seed {seed}: {text}" for seed in seeds],
          [("input", [person.reference] * len(seeds)), *lines([(person, prompt, seed) for seed in seeds])])
