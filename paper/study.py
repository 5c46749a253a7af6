"""What the paper leaves open: how many people, which ranks and which warm-up stage 1 wants, and more photos.

    python -m paper.study --subset         # minutes: 4 people, LoMDs of 100 iterations; shows that it runs
    python -m paper.study                  # hours: a LoMD for each variant, rates on CHOOSE people, 12 others

Every variant differs from the base in one thing. Its learning rate is chosen as in reproduce.py, and its
scores are compared with the base's person by person. Stopped, it goes on where it was. Writes study.json and
study.png to --out, and a line for each variant to the screen.
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
from paper.report import draw_study
from paper.reproduce import (SCORES, choose_rates, common_words, difference, draw_meta, draw_people,
                             evaluate, model_words, options, run_folder, side_by_side, workers)
from support.common import run_script, write_whole
from support.sheets import percent

FULL = dict(meta=(50, 200, 800), iters=1500, people=12, choose=4, rates=(4.2e-4, 6e-4, 8.5e-4, 1.2e-3),
            rates_photos=(1.2e-3, 2.4e-3, 4.8e-3))
SUBSET = dict(meta=(5, 10, 20), iters=100, people=4, choose=2, rates=(1.2e-3,), rates_photos=(1.2e-3,))
PHOTOS = 9                                 # of each person: 5 references and 4 to compare with at most
PICTURES = 10                              # of each person of stage 1


class Variant(NamedTuple):
    question: str
    value: str
    people: int                            # in stage 1
    words: tuple = ()                      # for meta_train.py
    warmup: float = 0.0                    # share of all iterations of stage 1
    photos: int = 1                        # in stage 2
    rates: tuple = ()                      # learning rates to choose from

    @property
    def name(self) -> str:
        return f"{self.question} {self.value}".replace(" ", "_").replace(",", "")


def variants(size: SimpleNamespace) -> list[Variant]:
    """The base first. All have the same number of iterations."""
    few, usual, many = size.meta
    one = [Variant("base", "r1 16, r2 1, no warm-up", usual)]
    one += [Variant("people in stage 1", str(count), count) for count in (few, many)]
    one += [Variant("r1", str(r1), usual, ("--r1", r1)) for r1 in (4, 64)]
    one += [Variant("r2 of stage 1", str(r2), usual, ("--r2", r2)) for r2 in (4, 16)]
    one += [Variant("warm-up", str(share), usual, warmup=share) for share in (0.2, 0.4)]
    return [variant._replace(rates=size.rates) for variant in one] + \
        [Variant("photos", str(count), usual, photos=count, rates=size.rates_photos) for count in (2, 5)]


def stage_1(variant: Variant, size: SimpleNamespace, run: Path, lomd: Path) -> list[str]:
    """Words of meta_train.py. Everybody is in one bucket, so that all are drawn, however many there are; its
    pass may be longer than the run, and the share of warm-up is of the run."""
    pictures, batch = variant.people * PICTURES, 4
    length = -(-meta_train.USES * pictures // batch)
    words = ("--data", run / f"meta{variant.people}", "--iters", size.iters, "--batch-size", batch,
             "--identities-per-bucket", variant.people, "--preview-every", 0, "--out", lomd,
             "--warmup", min(1.0, variant.warmup * min(size.iters, length) / length),
             "--run", lomd.parent / "run", *variant.words)
    return [str(word) for word in words]


def measure(variant: Variant, size: SimpleNamespace, run: Path,
            args: argparse.Namespace) -> tuple[float, dict]:
    """Its LoMD, made once for all variants with the same one, its learning rate and its scores."""
    own, name = run / variant.name, "_".join(map(str, (variant.people, variant.warmup, *variant.words)))
    lomd = run / "lomds" / name / "lomd.safetensors"
    if not lomd.is_file():
        lomd.parent.mkdir(parents=True, exist_ok=True)
        meta_train.meta_train([*stage_1(variant, size, run, lomd), *model_words(args)])
    words = [*common_words(args), "--photos", variant.photos, "--lomd", lomd]
    rate = choose_rates(None, words, run / "choose", own, {"meta-lora": variant.rates})["meta-lora"]
    return rate, evaluate(None, own / f"scores at {rate:g}", ["meta-lora"], [1], *words, "--data",
                          run / "people", "--seeds", 1, "--lr", rate)


def study(argv: list[str] | None = None) -> None:
    parser = options("paper.study", "What the paper leaves open, asked of the baby.",
                     "4 people, LoMDs of 100 iterations, one learning rate", lomd=False)
    args = parser.parse_args(argv)
    size, run = SimpleNamespace(**(SUBSET if args.subset else FULL)), run_folder(args, "study")
    judges, pool, out = evaluation.Judges(args.model), workers(args), args.out or run / "report"
    draw_people(judges, run / "people", faces.TEST.start + 4000, size.people, PHOTOS)
    draw_people(judges, run / "choose", faces.CHOOSE.start + 700, size.choose, PHOTOS)
    draw_meta(run, size.meta, PICTURES)
    people, rows, pictures = evaluation.read_people([run / "people"]), [], []
    out.mkdir(parents=True, exist_ok=True)
    for more in (False, True) if pool else ():            # the base before those that share its LoMD
        calls = [(measure, v, size, run, args) for v in variants(size) if (v.photos > 1) == more]
        side_by_side(pool, calls, "variants")
    for variant in variants(size):
        rate, scores = measure(variant, size, run, args)
        pictures.append(scores["pictures"])
        both, row = {"base": pictures[0], "own": pictures[-1]}, {}
        for metric in SCORES:
            gap = {"less base": difference(both, people, "own", "base", metric)}
            row[metric] = scores["methods"][0][metric] | gap
        rows.append({"question": variant.question, "value": variant.value, "learning rate": rate} | row)
        print(f"{variant.question}: {variant.value}: lr {rate:g}, " + ", ".join(
            f"{metric} {percent(own)}, less the base's {percent(own['less base'])}"
            for metric, own in row.items()))
        write_whole(out / "study.json", json.dumps(rows, indent=1).encode())
        draw_study(rows, out / "study.png")


if __name__ == "__main__":
    sys.exit(run_script("paper.study", study))
