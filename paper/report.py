"""Figures and contact sheets of finished scores: the paper's Figures 3, 4, 6 to 8.

Source: "Meta-LoRA" (Topal et al. 2025).
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import personalize
from eval_rfacesim import Person, Picture
from support import photos
from support.common import save_figure, save_png

METHODS = {"meta-lora": "Meta-LoRA", "lora": "LoRA", "lora-crops": "LoRA + augmented inputs",
           "random-lomd": "Meta-LoRA, random LoMD", "none": "no LoRA"}


def grouped(methods: list[dict]) -> dict[str, list[dict]]:
    """{method: its ranks and iterations} of those that have both scores."""
    by_method = {}
    for method in methods:
        if method["r_facesim"] and method["clip_t"]:
            by_method.setdefault(method["method"], []).append(method)
    return by_method


def line_of(axes, points: list[dict], metric: str, **style) -> None:
    points = sorted(points, key=lambda p: p["iterations"])
    errors = [100 * (p[metric]["error"] or 0) for p in points]
    axes.errorbar([p["iterations"] for p in points], [100 * p[metric]["mean"] for p in points], errors, marker="o",
                  markersize=4, capsize=3, **style)


def figures(methods: list[dict], quoted: dict | None, out: Path) -> None:
    """scores.png: R-FaceSim against CLIP-T with quadratic fits, and both against iterations at the lowest rank (Figure 3);
    ranks.png: both against iterations, a column for each rank (Figure 6)."""
    from matplotlib.figure import Figure
    by_method, names = grouped(methods), {"r_facesim": "R-FaceSim (%)", "clip_t": "CLIP-T (%)"}
    if not by_method:
        return
    colours = {method: f"C{i % 10}" for i, method in enumerate(by_method)}
    figure = Figure(figsize=(12, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    plane, upper = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    panels = {"r_facesim": upper, "clip_t": figure.add_subplot(grid[1, 1], sharex=upper)}
    for method, points in by_method.items():
        x, y = (np.array([100 * p[metric]["mean"] for p in points]) for metric in ("clip_t", "r_facesim"))
        label, trained = METHODS.get(method, method), points[0]["rank"] > 0
        plane.scatter(x, y, s=[20 + 6 * p["rank"] for p in points], marker="o" if trained else "*", color=colours[method],
                      label=label, alpha=0.8)
        if len(set(x.tolist())) > 3:
            at = np.linspace(x.min(), x.max(), 50)
            plane.plot(at, np.poly1d(np.polyfit(x - x.mean(), y, 2))(at - x.mean()), color=colours[method], linewidth=1)
        for metric, axes in panels.items():
            if trained:
                lowest = min(p["rank"] for p in points)
                line_of(axes, [p for p in points if p["rank"] == lowest], metric, color=colours[method])
            else:
                axes.axhline(100 * points[0][metric]["mean"], color=colours[method], linestyle="--")
    for i, row in enumerate(quoted["table 5"] if quoted else []):
        plane.scatter(row["clip_t"], row["r_facesim"], marker=f"${i + 1}$", color="grey",
                      label=f"quoted: {row['method']}, {row['base']}")
    plane.set(xlabel=names["clip_t"], ylabel=names["r_facesim"], title="each rank (size of the dot) and number of iterations")
    for metric, axes in panels.items():
        axes.set(ylabel=names[metric], xlabel="iterations" if metric == "clip_t" else "")
    upper.set(title="the lowest rank")
    figure.legend(*plane.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, out / "scores.png")
    ranks = sorted({p["rank"] for points in by_method.values() for p in points if p["rank"]})
    if not ranks:
        return
    figure = Figure(figsize=(3.5 * len(ranks) + 1, 5), layout="constrained")
    axes = figure.subplots(2, len(ranks), sharex=True, sharey="row", squeeze=False)
    for column, rank in enumerate(ranks):
        for row, metric in enumerate(names):
            for method, points in by_method.items():
                if some := [p for p in points if p["rank"] == rank]:
                    line_of(axes[row, column], some, metric, color=colours[method], label=METHODS.get(method, method))
        axes[0, column].set(title=f"rank {rank}")
        axes[1, column].set(xlabel="iterations")
    for row, metric in enumerate(names):
        axes[row, 0].set(ylabel=names[metric])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, out / "ranks.png")


def sheet(path: Path, columns: list[tuple[str, Path | None]], rows: list[tuple[str, list[Path | None]]], side: int = 144):
    """A contact sheet: over each column its prompt and the input, before each row the method's name."""
    font, left, head = ImageFont.load_default(12), 130, 84
    given = any(photo for _, photo in columns)
    lines = ([("input", [photo for _, photo in columns])] if given else []) + rows
    picture = Image.new("RGB", (left + side * len(columns), head + side * len(lines)), "white")
    draw = ImageDraw.Draw(picture)

    def write(text, x, y, width, height):
        text, line = " ".join(text.split()), ""
        for word in [*text.split(), None]:
            if word is None or draw.textlength(f"{line} {word}", font) > width - 8:
                draw.text((x + 4, y + 2), line, "black", font)
                y, height, line = y + 14, height - 14, ""
                if height < 14:
                    break
            line = f"{line} {word}".strip()
    for i, (text, _) in enumerate(columns):
        write(text, left + side * i, 0, side, head)
    for j, (name, paths) in enumerate(lines):
        write(name, 0, head + side * j, left, side)
        for i, file in enumerate(paths):
            try:
                photo = file and photos.read_photo(file)
            except ValueError:
                photo = None
            if photo:
                picture.paste(ImageOps.pad(photo, (side, side), color="white"), (left + side * i, head + side * j))
    save_png(picture, path, {})


def sheets(pictures: list[Picture], people: list[Person], out: Path, describe: Callable[[str], dict]) -> None:
    """For each gender people and prompts across, methods down (Figures 4, 7 and 8); one person's seeds (Figure 4, right)."""
    settings = {p.label: describe(p.label) for p in pictures}
    chosen = {}                                     # of each method the lowest rank, and the iterations nearest the paper's
    for label, setting in settings.items():
        wish = personalize.ITERATIONS["lora" if setting["method"].startswith("lora") else "meta-lora"]
        better = (setting["rank"], abs(setting["iterations"] - wish))
        if setting["method"] not in chosen or better < chosen[setting["method"]][0]:
            chosen[setting["method"]] = better, label
    labels = [label for _, label in chosen.values()]
    at = {(p.label, p.person, p.prompt, p.seed): p for p in pictures}
    for gender in dict.fromkeys(p.gender for p in people):
        own = [p for p in people if p.gender == gender and any(q.person == p.name for q in pictures)]
        columns = []
        for i in range(8 if own else 0):
            person = own[i % len(own)]
            there = sorted({(q.seed, q.prompt, q.text) for q in pictures if q.person == person.name})
            first = [cell for cell in there if cell[0] == there[0][0]]
            cell = first[(i if len(own) < len(first) else i // len(own) + i) % len(first)]
            if (person, cell) not in columns:
                columns.append((person, cell))
        if columns:
            sheet(out / f"sheet_{gender or 'people'}.png", [(text, person.reference) for person, (_, _, text) in columns],
                  [(settings[label]["title"], [getattr(at.get((label, person.name, prompt, seed)), "path", None)
                                            for person, (seed, prompt, _) in columns]) for label in labels])
    person = next(p for p in people if any(q.person == p.name for q in pictures))
    prompt, text = min((q.prompt, q.text) for q in pictures if q.person == person.name)
    seeds = sorted({q.seed for q in pictures if (q.person, q.prompt) == (person.name, prompt)})[:6]
    sheet(out / "sheet_seeds.png", [(f"seed {seed}: {text}", person.reference) for seed in seeds],
          [(settings[label]["title"], [getattr(at.get((label, person.name, prompt, seed)), "path", None) for seed in seeds])
           for label in labels])
