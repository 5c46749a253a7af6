"""The paper's comparison in miniature: how many steps does each method need, at its best rate?

    python -m paper.reproduce --subset         # 8 people, one training seed, one noise seed
    python -m paper.reproduce                  # hours: 48 people, 2 seeds each; also rank 4

Rerun the command to resume. The stages, all of which call paper/compare.py:
  people    draws people that no part of the baby was trained on, six photos each
  rates     for each method and step count, finds the learning rate with the highest sum of
            R-FaceSim and CLIP-T, on a separate set of people     -> rates_r1.json
  measure   trains and samples each method at these rates, on other people
  report    tables, figures, and the steps that Meta-LoRA needs to match the others
                                                                  -> report_r1.md, *_r1.png
The result of every call is kept in --run/scores, one small file each, and is never recomputed.

random-lomd is Meta-LoRA over a random frozen A of the same r1; `none` is the model without a LoRA.
An image without a face counts with a likeness of 0.

Source: "Meta-LoRA" (Topal et al. 2025), section 4 and appendices D, F, and I.
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
GUIDANCE = 3.5                                   # guidance input of sampling, as in the paper
EULER_STEPS = 10                                 # R-FaceSim is within 1.6 points of 30 steps
PHOTOS = 6                                       # per person; the first is the reference
SIDE = 384                                       # width and height of a photo, in pixels
SHEET_STEPS = 250                                # training steps of the LoRAs on the contact sheet

RANK_1 = dict(rank=1, steps=(100, 175, 250, 375, 625), people=48)
RANK_4 = dict(rank=4, steps=(100, 250, 625), people=24)
FULL = dict(choose=16, sweeps=(RANK_1, RANK_4), trainings=2, noises=2)
SUBSET = dict(choose=4, sweeps=(dict(rank=1, steps=(100, 250), people=8),), trainings=1, noises=1)


class Trial(NamedTuple):
    """One training run for everybody in a folder of people."""
    people: str
    method: str
    rank: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}_r{self.rank}_s{self.seed}_{self.rate:g}"


# --------------------------------------------------------------------------------------------------
# People


def draw_people(
    judges: evaluation.Judges,
    folder: Path,
    first: int,
    count: int,
    pictures: int,
) -> None:
    """Draws `count` identities, from seed `first` on, in the style of a photo.

    The first picture is nearly frontal, as a user would choose a reference. A picture in which the
    judges find no face is drawn again."""
    seeds = range(first, first + count)
    for seed in tqdm(seeds, f"people in {folder.name}", disable=None, leave=False):
        person = folder / faces.identity(seed)["gender"] / f"{seed}"
        rng = np.random.default_rng([seed, 8])
        frontal = {"yaw": float(rng.uniform(-8, 8))}
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


# --------------------------------------------------------------------------------------------------
# Processes side by side


def workers(args: argparse.Namespace) -> concurrent.futures.Executor | None:
    """A pool of --jobs processes; None if there is only one."""
    on_cpu = pick_device(args.device).type == "cpu"
    jobs = args.jobs or (min(8, os.cpu_count()) if on_cpu else 1)
    if jobs == 1:
        return None
    threads = max(1, os.cpu_count() // jobs)
    context = multiprocessing.get_context("spawn")     # a fork of a process with threads may hang
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, set_up, (threads,))
    atexit.register(pool.shutdown)           # else "Bad file descriptor" when the interpreter ends
    return pool


def set_up(threads: int) -> None:
    """Gives a worker its share of the cores and silences it: progress bars would overlap."""
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def work(function: Callable[..., object], *args: object) -> object:
    try:
        return function(*args)
    except KeyboardInterrupt:              # its work is saved; a pool would give it the next call
        os._exit(130)


def side_by_side(
    pool: concurrent.futures.Executor | None,
    calls: list[tuple],
    name: str,
) -> list:
    """The results of the calls (function, *arguments), in order, computed by the pool's workers."""
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


# --------------------------------------------------------------------------------------------------
# One trial


def measure(
    args: argparse.Namespace,
    trial: Trial,
    steps: list[int],
    noises: int,
    copies: bool = False,
) -> dict[str, dict[str, dict[str, float]]]:
    """{step count: {person: {metric: value}}} of a trial; computes only the missing step counts.

    copies: also measure what the scores do not see, see `copy_of`."""
    path = args.run / "scores" / trial.people / f"{trial.name}.json"
    known = dict(JsonFile(path)) if path.is_file() else {}
    missing = [count for count in steps if str(count) not in known]
    if not missing:
        return known
    out = args.run / "trials" / trial.people / trial.name
    data = args.run / trial.people
    options = {
        "--data": data,
        "--out": out,
        "--model": args.model,
        "--methods": trial.method,
        "--seed": trial.seed,
        "--seeds": noises,
        "--steps": EULER_STEPS,
        "--guidance": GUIDANCE,
        "--device": args.device,
        "--lomd": args.lomd,
    }
    words = ["--no-face-as-zero"]
    for option, value in options.items():
        if value is not None:
            words += [option, value]
    if trial.rank:
        every = sorted({*map(int, known), *missing})
        words += ["--ranks", trial.rank, "--lr", trial.rate, "--iters", *every]
    compare.compare([str(word) for word in words], quiet=True)

    people = evaluation.read_people([data])
    rows = JsonFile(out / "scores.json")["pictures"]
    for count in missing:
        label = trial.method
        if trial.rank:
            label = compare.Setting(trial.method, trial.rank, count).label
        known[str(count)] = {}
        for person in people:
            key = label, person.name
            values = scores_of([r for r in rows if (r["method"], r["identity"]) == key], person)
            if copies:
                values |= copy_of(args, out / "images" / label / person.name, person)
            known[str(count)][person.name] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(known).encode())
    return known


def scores_of(rows: list[dict], person: evaluation.Person) -> dict[str, float]:
    """The likeness (R-FaceSim), CLIP-T, and their sum; the share of images with a face."""
    likeness = evaluation.summarise(rows, [person], "r_facesim", no_face_as_zero=True)
    facesim = evaluation.summarise(rows, [person], "facesim", no_face_as_zero=True)
    text = evaluation.summarise(rows, [person], "clip_t")
    return {
        "likeness": likeness["mean"],
        "text": text["mean"],
        "sum": likeness["mean"] + text["mean"],
        "facesim": facesim["mean"],
        "found": likeness["found"],
    }


def copy_of(
    args: argparse.Namespace,
    images: Path,
    person: evaluation.Person,
) -> dict[str, float]:
    """How much of the photo itself is copied into one person's images.

    background: mean absolute difference, in [0, 1], to a training crop outside its head; smaller
    means more is copied. move: the standard deviation of the face's center over the first three
    prompts and all seeds, as a share of the image's side; nan with fewer than two faces."""
    defaults = model_defaults(find_model(args.model))
    crops = photos.load_crops(
        [person.reference],
        [defaults["resolution"]],
        True,
        defaults["aspects"],
        defaults["scales"],
    )
    crop = crops[0]
    photo = np.asarray(crop.picture, dtype=np.float32)
    outside = np.asarray(crop.head) < 128
    differences, centers = [], []
    for path in sorted(images.glob("*.png")):
        picture = photos.read_photo(path)
        resized = picture.resize(crop.picture.size)
        difference = np.abs(np.asarray(resized, dtype=np.float32) - photo)
        differences.append(difference[outside].mean() / 255)
        prompt = int(path.stem.split("_")[0])
        if prompt < 3:
            for face in photos.find_faces(picture)[:1]:
                centers.append(center(face, picture))
    move = np.nan
    if len(centers) > 1:
        move = np.linalg.norm(np.std(centers, axis=0, ddof=1))
    return {"background": float(np.mean(differences)), "move": float(move)}


def center(face: tuple[float, ...], picture: Image.Image) -> tuple[float, float]:
    """The center of a face's box, as a share of the picture's width and height."""
    x0, y0, x1, y1 = face[:4]
    x = (x0 + x1) / 2
    y = (y0 + y1) / 2
    return x / picture.width, y / picture.height


# --------------------------------------------------------------------------------------------------
# Learning rates


def climb(score: Callable[[int], float], start: int) -> int:
    """The best rung of a ladder: from `start` in strides of two until both sides are worse, then
    the two neighbors are tried as well."""
    best = start
    while True:
        here = max((best, best - 2, best + 2), key=score)
        if here == best:
            return max((best, best - 1, best + 1), key=score)
        best = here


def rate_at(method: str, rung: int) -> float:
    """The learning rate of a rung; neighboring rungs differ by a factor of 1.4."""
    return float(f"{FIRST_RATES[method] * 2 ** (rung / 2):.2g}")


def choose_rates(
    args: argparse.Namespace,
    method: str,
    rank: int,
    steps: tuple[int, ...],
) -> dict:
    """{step count: the best rate, the second best, the lead with its error, all sums}.

    A longer run passes through the smaller step counts, so the search begins with the largest."""
    chosen = {}
    rung = 0
    for count in sorted(steps, reverse=True):
        tried = {}                               # {rate: the sum of each person}

        def score(rung: int) -> float:
            rate = rate_at(method, rung)
            if rate not in tried:
                trial = Trial("choose", method, rank, rate, seed=0)
                found = measure(args, trial, [n for n in steps if n <= count], noises=1)
                tried[rate] = [scores["sum"] for scores in found[str(count)].values()]
            return float(np.mean(tried[rate]))

        rung = climb(score, rung)
        rate = rate_at(method, rung)
        others = [other for other in tried if other != rate]
        second = max(others, key=lambda other: np.mean(tried[other]))
        chosen[count] = {
            "rate": rate,
            "second": second,
            "lead": mean_error(np.subtract(tried[rate], tried[second])),
            "sums": {f"{other:g}": mean_error(tried[other]) for other in sorted(tried)},
        }
        rung -= rung % 2                         # the next search takes strides of two again
    return chosen


# --------------------------------------------------------------------------------------------------
# The command


def run_sweep(
    args: argparse.Namespace,
    size: SimpleNamespace,
    pool: concurrent.futures.Executor | None,
    rank: int,
    steps: tuple[int, ...],
    people: int,
) -> None:
    """Chooses rates, measures, and writes the report at one rank."""
    calls = [(choose_rates, args, method, rank, steps) for method in METHODS]
    rates = dict(zip(METHODS, side_by_side(pool, calls, f"rates, rank {rank}")))
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / f"rates_r{rank}.json", json.dumps(rates, indent=1).encode())

    folder = f"people{people}"
    trials = {Trial(folder, "none", 0, 0.0, seed=0): [0]}
    for method in METHODS:
        for count in sorted(steps, reverse=True):
            for seed in range(size.trainings):
                rate = rates[method][count]["rate"]
                trial = Trial(folder, method, rank, rate, seed)
                trials.setdefault(trial, [n for n in steps if n <= count])
    calls = []
    for trial, counts in trials.items():
        calls.append((measure, args, trial, counts, size.noises, True))
    found = side_by_side(pool, calls, f"people, rank {rank}")

    scores = {}
    for trial, of_trial in zip(trials, found):
        scores.setdefault((trial.method, trial.rate), []).append(of_trial)
    everything = Found(list(steps), rates, scores)
    text = write_report(everything)
    write_whole(args.out / f"report_r{rank}.md", text.encode())
    draw_steps(everything, args.out / f"steps_r{rank}.png")
    draw_front(everything, args.out / f"front_r{rank}.png")
    draw_sheet(args, folder, rank, rates, args.out / f"sheet_r{rank}.png")
    print(text)


def draw_sheet(
    args: argparse.Namespace,
    folder: str,
    rank: int,
    rates: dict,
    path: Path,
) -> None:
    """Eight people across, each with another prompt; the photo and the methods down."""
    people = evaluation.read_people([args.run / folder])
    people = people[::max(1, len(people) // 8)][:8]
    prompts = evaluation.prompts_for(people, None, evaluation.own_folder(args.model))
    columns = [prompts[person.name][i] for i, person in enumerate(people)]
    rows = [("the photo", [person.reference for person in people])]
    for method in ("none", *METHODS):
        if method == "none":
            trial = Trial(folder, "none", 0, 0.0, seed=0)
            label = "none"
        else:
            rate = rates[method][SHEET_STEPS]["rate"]
            trial = Trial(folder, method, rank, rate, seed=0)
            label = compare.Setting(method, rank, SHEET_STEPS).label
        images = args.run / "trials" / folder / trial.name / "images" / label
        files = [images / person.name / f"{i}_0.png" for i, person in enumerate(people)]
        rows.append((TITLES[method], files))
    sheet(path, columns, rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="paper.reproduce", allow_abbrev=False,
                    description="Compares the methods at their best learning rates, on new people.")
    add = parser.add_argument
    add("--subset", action="store_true",
        help="8 people, 100 and 250 steps, one training seed, one noise seed (default: 48 people)")
    add("--model", default="baby", help="baby, or a folder with such a model (default: baby)")
    add("--lomd", type=Path, help="weights of stage 1 (default: lomd.safetensors of the model)")
    add("--run", type=Path, help="folder for people, LoRAs, images, and scores "
        "(default: baby/run/reproduce, with --subset baby/run/reproduce-subset)")
    add("--out", type=Path, help="folder for tables and figures (default: report/ in --run)")
    add("--device", help="cuda, mps, or cpu (default: the best available)")
    add("--jobs", type=positive,
        help="parallel processes (default: on a CPU one per core, at most 8; else 1)")
    return parser.parse_args(argv)


def reproduce(argv: list[str] | None = None) -> None:
    args = parse(argv)
    size = SimpleNamespace(**(SUBSET if args.subset else FULL))
    if args.run is None:
        root = Path(__file__).resolve().parents[1]
        args.run = root / "baby" / "run" / ("reproduce-subset" if args.subset else "reproduce")
    args.out = args.out or args.run / "report"
    judges = evaluation.Judges(args.model)
    pool = workers(args)
    draw_people(judges, args.run / "choose", faces.CHOOSE.start + 500, size.choose, PHOTOS)
    for sweep in size.sweeps:
        folder = args.run / f"people{sweep['people']}"
        draw_people(judges, folder, faces.TEST.start + 3000, sweep["people"], PHOTOS)
    for sweep in size.sweeps:
        run_sweep(args, size, pool, **sweep)


if __name__ == "__main__":
    sys.exit(run_script("paper.reproduce", reproduce))
