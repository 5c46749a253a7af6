"""The paper's comparison in miniature: how many steps does each method need, at its own best learning rate?

    python -m paper.reproduce --subset         # 8 people, one seed of training and of noise
    python -m paper.reproduce                  # hours: 48 people, 2 seeds of training and of noise; rank 4

Rerun the command to resume. Its stages, each of which calls paper/compare.py:
  people    draws people that no part of the baby was trained on, six photos of each
  rates     for each method and number of steps, climbs to the learning rate with the highest sum of
            R-FaceSim and CLIP-T, on people of its own                            -> rates.json
  measure   trains and draws each method at these rates, on other people          -> steps.json
  report    tables, figures, and the steps that Meta-LoRA needs to draw level     -> report.md, *.png
What a call found lies in --run/scores, a small file a call, and is not computed again.

random-lomd is Meta-LoRA over a random frozen A of the same r1; `none` is the model without a LoRA.
A picture without a face has the likeness 0.

Source: "Meta-LoRA" (Topal et al. 2025), section 4 and appendices D, F and I.
"""
import argparse
import atexit
import concurrent.futures
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import support  # before torch: how its threads wait
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import eval_rfacesim as evaluation
from baby import faces
from paper import compare
from paper.report import METHODS as TITLES
from paper.report import Found, draw_front, draw_steps, mean_error, write_report
from support import photos
from support.checkpoints import find_model, model_defaults
from support.common import (JsonFile, Parser, pick_device, positive, run_script, save_png,
                            write_whole)
from support.sheets import sheet

METHODS = ("lora", "lora-crops", "random-lomd", "meta-lora")
FIRST_RATES = {"lora": 1.2e-3, "lora-crops": 1.2e-3, "random-lomd": 9.6e-3, "meta-lora": 1.2e-3}
GUIDANCE = 3.5                                   # the paper's
EULER_STEPS = 10                                 # R-FaceSim differs from 30 steps by up to 1.6 points
PHOTOS = 6                                       # of each person; the first is the reference
SIDE = 384                                       # of a photo, in pixels
SHEET_STEPS = 250                                # of the LoRAs in the sheet of pictures

RANK_1 = dict(rank=1, steps=(100, 175, 250, 375, 625), people=48)
RANK_4 = dict(rank=4, steps=(100, 250, 625), people=24)
FULL = dict(choose=16, sweeps=(RANK_1, RANK_4), trainings=2, noises=2)
SUBSET = dict(choose=4, sweeps=(dict(rank=1, steps=(100, 250), people=8),), trainings=1, noises=1)


class Trial(NamedTuple):
    """One run of training for everybody in a folder of people."""
    people: str
    method: str
    rank: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}_r{self.rank}_s{self.seed}_{self.rate:g}"


# ----------------------------------------------------------------------------------------------------
# People


def draw_people(judges: evaluation.Judges, folder: Path, first: int, count: int, pictures: int) -> None:
    """Draws `count` identities from seed `first` in the style of a photo. A picture in which the judges
    find no face is drawn anew. The first picture is nearly frontal, as one would choose a reference."""
    seeds = range(first, first + count)
    for seed in tqdm(seeds, f"people in {folder.name}", disable=None, leave=False):
        person = folder / faces.identity(seed)["gender"] / f"{seed}"
        frontal = {"yaw": float(np.random.default_rng([seed, 8]).uniform(-8, 8))}
        index = 0
        for i in range(pictures):
            path = person / f"{i}.png"
            pose = frontal if i == 0 else {}
            while not path.is_file():
                pixels, _ = faces.sample(seed, 1000 * i + index, SIDE, SIDE, style="photo", **pose)
                index += 1
                image = Image.fromarray(pixels)
                if judges.crop(image) is not None:
                    save_png(image, path)


# ----------------------------------------------------------------------------------------------------
# Processes side by side


def workers(args: argparse.Namespace) -> concurrent.futures.Executor | None:
    """--jobs processes, by default one for each core of a CPU, at most 8; None where one is enough."""
    on_cpu = pick_device(args.device).type == "cpu"
    jobs = args.jobs or (min(8, os.cpu_count()) if on_cpu else 1)
    if jobs == 1:
        return None
    threads = max(1, os.cpu_count() // jobs)
    context = multiprocessing.get_context("spawn")     # a fork of a process with threads may hang
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, set_up, (threads,))
    atexit.register(pool.shutdown)           # else the interpreter may end first: "Bad file descriptor"
    return pool


def set_up(threads: int) -> None:
    """Gives a worker its share of the cores, and silences it: bars would overwrite each other."""
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def work(function: Callable[..., object], *args: object) -> object:
    try:
        return function(*args)
    except KeyboardInterrupt:              # its work is saved; a pool would give it the next call
        os._exit(130)


def side_by_side(pool: concurrent.futures.Executor | None, calls: list[tuple], name: str) -> list:
    """Results of the calls (function, *arguments), in their order, computed by the workers of `pool`."""
    if pool is None:
        return [function(*args) for function, *args in calls]
    with tqdm(total=len(calls), desc=name, disable=None, leave=False) as bar:
        futures = [pool.submit(work, *call) for call in calls]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


# ----------------------------------------------------------------------------------------------------
# One trial


def measure(args: argparse.Namespace, trial: Trial, steps: list[int], noises: int,
            copies: bool = False) -> dict[str, dict[str, dict[str, float]]]:
    """{number of steps: {person: {metric: value}}} of a trial, as far as it has not been found before.

    copies: also what the scores do not see (`copy_of`), for people that a result is about."""
    path = args.run / "scores" / trial.people / f"{trial.name}.json"
    known = dict(JsonFile(path)) if path.is_file() else {}
    missing = [count for count in steps if str(count) not in known]
    if not missing:
        return known
    out = args.run / "trials" / trial.people / trial.name
    data = args.run / trial.people
    every = sorted({*map(int, known), *missing})
    words = ["--data", data, "--out", out, "--model", args.model, "--methods", trial.method,
             "--seed", trial.seed, "--seeds", noises, "--steps", EULER_STEPS, "--guidance", GUIDANCE,
             "--no-face-as-zero"]
    if trial.rank:
        words += ["--ranks", trial.rank, "--lr", trial.rate, "--iters", *every]
    words += ["--device", args.device] if args.device else []
    words += ["--lomd", args.lomd] if args.lomd else []
    compare.compare([str(word) for word in words], quiet=True)

    people = evaluation.read_people([data])
    rows = JsonFile(out / "scores.json")["pictures"]
    for count in missing:
        label = compare.Setting(trial.method, trial.rank, count).label if trial.rank else trial.method
        known[str(count)] = {}
        for person in people:
            own = [row for row in rows if (row["method"], row["identity"]) == (label, person.name)]
            values = scores_of(own, person)
            if copies:
                values |= copy_of(args, out / "images" / label / person.name, person)
            known[str(count)][person.name] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(known).encode())
    return known


def scores_of(rows: list[dict], person: evaluation.Person) -> dict[str, float]:
    """One person's likeness, and text, and their sum, and the share of pictures with a face."""
    robust = evaluation.summarise(rows, [person], "r_facesim", no_face_as_zero=True)
    facesim = evaluation.summarise(rows, [person], "facesim", no_face_as_zero=True)
    text = evaluation.summarise(rows, [person], "clip_t")
    return {"likeness": robust["mean"], "text": text["mean"], "sum": robust["mean"] + text["mean"],
            "facesim": facesim["mean"], "found": robust["found"]}


def copy_of(args: argparse.Namespace, images: Path, person: evaluation.Person) -> dict[str, float]:
    """How much of the photo itself comes through, in pictures (prompt, seed) of one person.

    background: mean difference to the crop that was trained on, outside of its head, of 1; the smaller,
    the more is copied. move: how far the face's centre moves among the first three prompts and all seeds,
    as standard deviation over the picture's side; nan with fewer than two faces."""
    defaults = model_defaults(find_model(args.model))
    crop = photos.load_crops([person.reference], [defaults["resolution"]], True, defaults["aspects"],
                             defaults["scales"])[0]
    photo = np.asarray(crop.picture, dtype=np.float32)
    outside = np.asarray(crop.head) < 128
    differences, centres = [], []
    for path in sorted(images.glob("*.png")):
        picture = photos.read_photo(path)
        pixels = np.asarray(picture.resize(crop.picture.size), dtype=np.float32)
        differences.append(np.abs(pixels - photo)[outside].mean() / 255)
        if int(path.stem.split("_")[0]) < 3:
            centres += [centre(face, picture) for face in photos.find_faces(picture)[:1]]
    move = np.linalg.norm(np.std(centres, axis=0, ddof=1)) if len(centres) > 1 else np.nan
    return {"background": float(np.mean(differences)), "move": float(move)}


def centre(face: tuple[float, ...], picture: Image.Image) -> tuple[float, float]:
    """The centre of a face's box, as a share of the picture's sides."""
    x0, y0, x1, y1 = face[:4]
    return (x0 + x1) / 2 / picture.width, (y0 + y1) / 2 / picture.height


# ----------------------------------------------------------------------------------------------------
# Learning rates


def climb(score: Callable[[int], float], start: int) -> int:
    """The best place of a ladder: from `start` in strides of two, until the best has a worse one on either
    side; then its two neighbours are tried as well."""
    best = start
    while True:
        here = max((best, best - 2, best + 2), key=score)
        if here == best:
            return max((best, best - 1, best + 1), key=score)
        best = here


def rate_at(method: str, place: int) -> float:
    """The rate of a place of the ladder, whose rungs are a factor of 1.4 apart."""
    return float(f"{FIRST_RATES[method] * 2 ** (place / 2):.2g}")


def choose_rates(args: argparse.Namespace, method: str, rank: int, steps: tuple[int, ...]) -> dict:
    """{number of steps: rate, its lead over the second best with an error, all sums that were tried}.

    A run of more steps passes through the smaller numbers, so the search begins with the largest."""
    chosen, place = {}, 0
    for count in sorted(steps, reverse=True):
        tried = {}

        def score(place: int) -> float:
            rate = rate_at(method, place)
            if rate not in tried:
                trial = Trial("choose", method, rank, rate, seed=0)
                found = measure(args, trial, [n for n in steps if n <= count], noises=1)
                tried[rate] = [own["sum"] for own in found[str(count)].values()]
            return float(np.mean(tried[rate]))

        place = climb(score, place)
        rate = rate_at(method, place)
        others = [other for other in tried if other != rate]
        second = max(others, key=lambda other: np.mean(tried[other]))
        lead = mean_error(np.subtract(tried[rate], tried[second]))
        sums = {f"{other:g}": mean_error(values) for other, values in sorted(tried.items())}
        chosen[count] = {"rate": rate, "second": second, "lead": lead, "sums": sums}
        place -= place % 2                       # the next search goes in whole strides again
    return chosen


# ----------------------------------------------------------------------------------------------------
# The command


def run_sweep(args: argparse.Namespace, size: SimpleNamespace, pool: concurrent.futures.Executor | None,
              rank: int, steps: tuple[int, ...], people: int) -> None:
    """Rates, measurement and report at one rank."""
    calls = [(choose_rates, args, method, rank, steps) for method in METHODS]
    rates = dict(zip(METHODS, side_by_side(pool, calls, f"rates, rank {rank}")))
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / f"rates_r{rank}.json", json.dumps(rates, indent=1).encode())

    folder = f"people{people}"
    trials = {Trial(folder, "none", 0, 0.0, seed=0): [0]}
    for method in METHODS:
        for count in sorted(steps, reverse=True):
            for seed in range(size.trainings):
                trial = Trial(folder, method, rank, rates[method][count]["rate"], seed)
                trials.setdefault(trial, [n for n in steps if n <= count])
    calls = [(measure, args, trial, counts, size.noises, True) for trial, counts in trials.items()]
    found = side_by_side(pool, calls, f"people, rank {rank}")

    scores = {}
    for trial, own in zip(trials, found):
        scores.setdefault((trial.method, trial.rate), []).append(own)
    everything = Found(list(steps), rates, scores)
    text = write_report(everything)
    write_whole(args.out / f"report_r{rank}.md", text.encode())
    draw_steps(everything, args.out / f"steps_r{rank}.png")
    draw_front(everything, args.out / f"front_r{rank}.png")
    draw_sheet(args, folder, rank, rates, args.out / f"sheet_r{rank}.png")
    print(text)


def draw_sheet(args: argparse.Namespace, folder: str, rank: int, rates: dict, path: Path) -> None:
    """Eight people across, each with a prompt of its own; the photo and the methods down."""
    people = evaluation.read_people([args.run / folder])
    people = people[::max(1, len(people) // 8)][:8]
    prompts = evaluation.prompts_for(people, None, evaluation.own_folder(args.model))
    columns = [prompts[person.name][i] for i, person in enumerate(people)]
    rows = [("the photo", [person.reference for person in people])]
    for method in ("none", *METHODS):
        trial, label = Trial(folder, "none", 0, 0.0, seed=0), "none"
        if method != "none":
            trial = Trial(folder, method, rank, rates[method][SHEET_STEPS]["rate"], seed=0)
            label = compare.Setting(method, rank, SHEET_STEPS).label
        images = args.run / "trials" / folder / trial.name / "images" / label
        files = [images / person.name / f"{i}_0.png" for i, person in enumerate(people)]
        rows.append((TITLES[method], files))
    sheet(path, columns, rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="paper.reproduce", allow_abbrev=False,
                    description="Compares the methods, each at its own best rate, on people never seen.")
    add = parser.add_argument
    add("--subset", action="store_true", help="8 people, 100 and 250 steps, one seed of each kind")
    add("--model", default="baby", help="baby (default), or a folder like it")
    add("--lomd", type=Path, help="weights of stage 1 (default: the model's own)")
    add("--run", type=Path, help="folder of everything made on the way (default: one in baby/run)")
    add("--out", type=Path, help="folder of tables and figures (default: report in --run)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--jobs", type=positive, help="processes (default: on a CPU one for each core, up to 8; else 1)")
    return parser.parse_args(argv)


def reproduce(argv: list[str] | None = None) -> None:
    args = parse(argv)
    size = SimpleNamespace(**(SUBSET if args.subset else FULL))
    root = Path(__file__).resolve().parents[1]
    args.run = args.run or root / "baby" / "run" / ("reproduce-subset" if args.subset else "reproduce")
    args.out = args.out or args.run / "report"
    judges, pool = evaluation.Judges(args.model), workers(args)
    draw_people(judges, args.run / "choose", faces.CHOOSE.start + 500, size.choose, PHOTOS)
    for sweep in size.sweeps:
        people = sweep["people"]
        draw_people(judges, args.run / f"people{people}", faces.TEST.start + 3000, people, PHOTOS)
    for sweep in size.sweeps:
        run_sweep(args, size, pool, **sweep)


if __name__ == "__main__":
    sys.exit(run_script("paper.reproduce", reproduce))
