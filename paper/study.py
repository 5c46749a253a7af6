"""What the paper leaves open, asked of the baby: how many people, which ranks and which warm-up stage 1 wants, and more photos.

    python -m paper.study --subset         # minutes: 4 people, LoMDs of 100 iterations; shows that it runs, and no more
    python -m paper.study                  # hours: a LoMD for each variant, learning rates on CHOOSE people, scores on 12 others

Every variant differs from the base in one thing. Its learning rate is chosen as in reproduce.py, and its scores are compared
with the base's person by person. Stopped, it goes on where it was.

Writes study.json and study.png to --out, and a line for each variant to the screen.
"""
import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import support  # before torch: how its threads wait
import eval_rfacesim as evaluation
import meta_train
from baby import faces
from paper.reproduce import (choose_rates, common_words, difference, draw_people, evaluate, model_words, options, run_folder,
                             side_by_side, workers)
from support.common import run_script, save_figure, write_whole

FULL = dict(meta=(50, 200, 800), iters=1500, people=12, choose=4, rates=(4.2e-4, 6e-4, 8.5e-4, 1.2e-3),
            rates_photos=(1.2e-3, 2.4e-3, 4.8e-3))
SUBSET = dict(meta=(5, 10, 20), iters=100, people=4, choose=2, rates=(1.2e-3,), rates_photos=(1.2e-3,))
PHOTOS = 9                                                # of each person: as many as 5 references and 4 to compare with need


class Variant(NamedTuple):
    question: str
    value: str
    people: int                                           # in stage 1
    words: tuple = ()                                     # for meta_train.py
    photos: int = 1                                       # in stage 2
    rates: tuple = ()                                     # learning rates to choose from

    @property
    def name(self) -> str:
        return f"{self.question} {self.value}".replace(" ", "_").replace(",", "")


def variants(size) -> list[Variant]:
    """The base first. All have the same number of iterations, and the first two visits to each bucket, so that kept and fresh
    rows differ."""
    few, usual, many = size.meta
    one = [Variant("base", "r1 16, r2 1, no warm-up", usual)]
    one += [Variant("people in stage 1", str(count), count) for count in (few, many)]
    one += [Variant("r1", str(r1), usual, ("--r1", r1)) for r1 in (4, 64)]
    one += [Variant("r2 of stage 1", str(r2), usual, ("--r2", r2)) for r2 in (4, 16)]
    one += [Variant("warm-up", str(share), usual, ("--warmup", share)) for share in (0.2, 0.4)]
    one += [Variant("M and U", "fresh at each visit", usual, ("--fresh-identities",))]
    return [variant._replace(rates=size.rates) for variant in one] + \
        [Variant("photos", str(count), usual, photos=count, rates=size.rates_photos) for count in (2, 5)]


def measure(variant: Variant, size, run: Path, args: argparse.Namespace) -> tuple[float, dict]:
    """Its LoMD, made once for all variants with the same one, its learning rate and its scores."""
    data, folder = run / f"meta{variant.people}", run / "lomds" / "_".join(map(str, (variant.people, *variant.words)))
    lomd, bucket = folder / "lomd.safetensors", min(50, variant.people)
    if not lomd.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        meta_train.meta_train([str(word) for word in (
            "--data", data, *model_words(args), "--iters", size.iters, "--identities-per-bucket", bucket, "--preview-every", 0,
            "--bucket-iters", max(1, size.iters * bucket // variant.people // 2), "--run", folder / "run",
            "--cache", run / f"cache{variant.people}", "--out", lomd, *variant.words)])
    words, own = [*common_words(args), "--photos", variant.photos, "--lomd", lomd], run / variant.name
    rate = choose_rates(None, words, run / "choose", own, {"meta-lora": variant.rates})["meta-lora"]
    return rate, evaluate(None, own / f"scores at {rate:g}", ["meta-lora"], [1], *words, "--data", run / "people", "--seeds", 1, "--lr", rate)


def draw_study(rows: list[dict], path: Path):
    """One line for each variant, R-FaceSim left, CLIP-T right: the dotted line is the base's mean; the dots are that plus the
    mean of the differences person by person, with their standard errors."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 0.32 * len(rows) + 1.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, ("r_facesim", "clip_t")):
        base, (gaps, errors) = 100 * rows[0][metric]["mean"], ([100 * row[metric]["less base"][part] for row in rows] for part in ("mean", "error"))
        axes.errorbar([base + gap for gap in gaps], range(len(rows)), xerr=errors, fmt="o", capsize=3)
        axes.axvline(base, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel={"r_facesim": "R-FaceSim (%)", "clip_t": "CLIP-T (%)"}[metric])
    panels[0].set_yticks(range(len(rows)), [f"{row['question']}: {row['value']}" for row in rows])
    panels[0].invert_yaxis()
    save_figure(figure, path)


def study(argv: list[str] | None = None) -> None:
    parser = options("study.py", "What the paper leaves open: stage 1 with other ranks, warm-ups and numbers of people, stage 2 with more photos.",
                     "4 people, LoMDs of 100 iterations, one learning rate")
    args = parser.parse_args(argv)
    size, run = SimpleNamespace(**(SUBSET if args.subset else FULL)), run_folder(args, "study")
    judges, pool, out = evaluation.Judges(args.model), workers(args), args.out or run / "report"
    draw_people(judges, run / "people", faces.TEST.start + 4000, size.people, PHOTOS)
    draw_people(judges, run / "choose", faces.CHOOSE.start + 700, size.choose, PHOTOS)
    for count in size.meta:
        if not (run / f"meta{count}" / f"{faces.META.start + count - 1:06d}" / "0009.txt").is_file():                 # its last one
            faces.main(["--identities", str(count), "--images", "10", "--out", str(run / f"meta{count}"), "--seed", str(faces.META.start)])
    people, rows, pictures = evaluation.read_people([run / "people"]), [], []
    out.mkdir(parents=True, exist_ok=True)
    if pool:                                              # the base before those that share its LoMD
        for group in ([v for v in variants(size) if v.photos == 1], [v for v in variants(size) if v.photos > 1]):
            side_by_side(pool, [(measure, variant, size, run, args) for variant in group], "variants")
    for variant in variants(size):
        rate, scores = measure(variant, size, run, args)
        pictures.append(scores["pictures"])
        rows.append({"question": variant.question, "value": variant.value, "learning rate": rate} | {
            metric: scores["methods"][0][metric] | {"less base": difference({"base": pictures[0], "own": pictures[-1]}, people, "own", "base", metric)}
            for metric in ("r_facesim", "clip_t")})
        print(f"{variant.question}: {variant.value}: lr {rate:g}, " + ", ".join(
            f"{metric} {evaluation.percent(rows[-1][metric])}, less the base's {evaluation.percent(rows[-1][metric]['less base'])}"
            for metric in ("r_facesim", "clip_t")))
        write_whole(out / "study.json", json.dumps(rows, indent=1).encode())
        draw_study(rows, out / "study.png")


if __name__ == "__main__":
    sys.exit(run_script("study.py", study))
