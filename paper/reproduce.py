"""The paper's comparison in miniature: how many steps does each method need, at its best rate?

    python -m paper.reproduce --subset         # 8 people, one training seed, one noise seed
    python -m paper.reproduce                  # hours: 48 people, 2 seeds each; also rank 4

Rerun the command to resume. The stages, all of which call paper/compare.py:
  people    draws people that no part of the baby was trained on, six photos each
  rates     for each method and step count, finds the learning rate with the highest sum of
            R-FaceSim and CLIP-T, on a separate set of people
  measure   trains and samples each method at these rates, on other people
  report    tables, figures, and the steps that Meta-LoRA needs to match the others; after the
            rates, and again after each training seed             -> report_r1.md, *_r1.png
The result of every call is kept in --run/scores, one small file each, and is never recomputed: a
copy of that folder is enough to resume, and for `--report`, which trains nothing.

random-lomd is Meta-LoRA over a random frozen A of the same r1; `none` is the model without a LoRA.
An image without a face counts with a likeness of 0.

Source: "Meta-LoRA" (Topal et al. 2025), section 4 and appendices D, F, and I.
"""
import collections
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import support  # before torch: how its threads wait
import numpy as np
import torch
from PIL import Image

import eval_rfacesim as evaluation
from baby import faces
from paper import compare
from paper.report import (METHODS, Curve, Found, draw_found, draw_sheet, mean_error,
                          report_text)
from support import photos
from support.checkpoints import flux_fingerprint
from support.common import (JsonFile, Parser, check_settings, note, pick_device, positive,
                            progress, run_script, save_png, save_settings, write_whole)
from support.finding import find_model
from support.lora_files import read_lomd

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


class Missing(ValueError):
    """A result that --report needs and does not find."""


class Trial(NamedTuple):
    """One training run for everybody in a folder of people."""
    people: str                                  # their folder in --run
    method: str
    rank: int = 0
    rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}_r{self.rank}_s{self.seed}_{self.rate:g}"


# --------------------------------------------------------------------------------------------------
# People


def draw_people(judges: evaluation.Judges, folder: Path, first: int, count: int):
    """Draws `count` identities, from seed `first` on, in the style of a photo.

    The first picture is nearly frontal, as a user would choose a reference. A picture in which the
    judges find no face is drawn again."""
    seeds = range(first, first + count)
    for seed in progress(seeds, f"people in {folder.name}"):
        person = folder / faces.identity(seed)["gender"] / f"{seed}"
        yaw = np.random.default_rng([seed, 8]).uniform(-8, 8)
        if (person / f"{PHOTOS - 1}.png").is_file():
            continue
        index = 0                                # of all draws of a person
        for i in range(PHOTOS):
            pose = {"yaw": yaw} if i == 0 else {}
            found = False
            while not found:
                pixels, _ = faces.sample(seed, 1000 * i + index, SIDE, SIDE, style="photo", **pose)
                index += 1
                image = Image.fromarray(pixels)
                found = judges.embed(image) is not None
            save_png(image, person / f"{i}.png")


# --------------------------------------------------------------------------------------------------
# Processes side by side


def set_up(threads: int):
    """Gives a worker its share of the cores and silences it: progress bars would overlap."""
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def work(function: Callable[..., object], *args: object) -> object:
    try:
        return function(*args)
    except KeyboardInterrupt:              # its work is saved; a pool would give it the next call
        os._exit(130)


def side_by_side(
    args: Namespace,
    function: Callable[..., object],
    calls: list[tuple],
    name: str,
) -> list:
    """The results of the calls, in order, by --jobs processes."""
    if args.jobs == 1:
        return [function(*call) for call in calls]
    threads = max(1, os.cpu_count() // args.jobs)
    context = multiprocessing.get_context("spawn")     # a fork of a process with threads may hang
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context, set_up, (threads,)) as pool:
        # an error cancels the calls after it
        results = pool.map(work, itertools.repeat(function), *zip(*calls))
        try:
            return [*progress(results, name, total=len(calls))]
        except KeyboardInterrupt:                # `kill` reaches this process alone
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        except concurrent.futures.BrokenExecutor:
            raise OSError("a process was killed, perhaps for lack of memory: try a smaller --jobs"
                          ) from None


# --------------------------------------------------------------------------------------------------
# One trial


def measure(args: Namespace, trial: Trial, steps: list[int]) -> Curve:
    """The scores of a trial, people in the order of their names; computes only the missing step
    counts."""
    path = args.run / "scores" / trial.people / f"{trial.name}.json"
    known = dict(JsonFile(path)) if path.is_file() else {}
    missing = [count for count in steps if str(count) not in known]
    if missing:
        if args.report:
            raise Missing(f"{path} does not hold {missing[0]} steps yet")
        known |= run_trial(args, trial, missing)
        write_whole(path, json.dumps(known))
    curve = {}
    for count in steps:
        people = [scores for _, scores in sorted(known[str(count)].items())]
        curve[count] = {}
        for metric in people[0]:
            curve[count][metric] = np.array([scores[metric] for scores in people])
    return curve


def run_trial(args: Namespace, trial: Trial, steps: list[int]) -> dict[str, dict]:
    """Trains, samples, and scores -> {step count: {person: {metric: value}}}.

    likeness is R-FaceSim, text is CLIP-T, found the share of images with a face. The people on whom
    rates are chosen have one image per prompt, and no scores by `copy_of`."""
    choosing = trial.people == "choose"
    words = [
        "--data", args.run / trial.people,
        "--out", args.run / "trials" / trial.people / trial.name,
        "--model", args.model,
        "--methods", trial.method,
        "--seed", trial.seed,
        "--seeds", 1 if choosing else args.noises,
        "--steps", EULER_STEPS,
        "--guidance", GUIDANCE,
        "--no-face-as-zero",
    ]
    if trial.rank:
        words += ["--ranks", trial.rank, "--lr", trial.rate, "--iters", *steps]
    if args.lomd and trial.method in compare.WITH_LOMD:
        words += ["--lomd", args.lomd]
    if args.device:
        words += ["--device", args.device]
    settings, scores = compare.compare([str(word) for word in words])

    found = {str(count): {} for count in steps}
    for person in settings.people:
        rows = [row for row in scores["pictures"] if row["identity"] == person.name]
        for summary in evaluation.summarise_methods(rows, [person], no_face_as_zero=True):
            label = summary["label"]
            likeness = summary["r_facesim"]
            text = summary["clip_t"]["mean"]
            values = {
                "likeness": likeness["mean"],
                "text": text,
                "sum": likeness["mean"] + text,
                "facesim": summary["facesim"]["mean"],
                "found": likeness["found"],
            }
            if not choosing:
                images = settings.out / "images" / label / person.name
                values |= copy_of(settings, images, person)
            count = settings.rows[label]["iterations"]
            found[str(count)][person.name] = values
    return found


def copy_of(
    settings: Namespace,
    images: Path,
    person: evaluation.Person,
) -> dict[str, float]:
    """How much of the photo itself is copied into one person's images.

    background: mean absolute difference, in [0, 1], to a training crop outside its head; smaller
    means more is copied. move: the standard deviation of the face's center over the first three
    prompts and all seeds, as a share of the image's side; nan with fewer than two faces."""
    crop = photos.load_crops(
        [person.reference],
        settings.resolution,
        aspects=settings.aspects,
        scales=settings.scales,
    )[0]
    photo = np.asarray(crop.picture, dtype=np.float32)
    outside = np.asarray(crop.head) < 128
    differences, centers = [], []
    for path in sorted(images.glob("[!.]*.png")):
        picture = photos.read_photo(path)
        resized = picture.resize(crop.picture.size)
        difference = np.abs(np.asarray(resized, dtype=np.float32) - photo)
        differences.append(difference[outside].mean() / 255)
        if path.name[:2] in ("0_", "1_", "2_"):
            for face in photos.find_faces(picture)[:1]:
                corners = np.reshape(face[:4], (2, 2))
                centers.append(corners.mean(axis=0) / picture.size)
    move = np.nan
    if len(centers) > 1:
        move = np.linalg.norm(np.std(centers, axis=0, ddof=1))
    return {"background": float(np.mean(differences)), "move": float(move)}


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
    args: Namespace,
    method: str,
    rank: int,
    steps: tuple[int, ...],
) -> tuple[dict[int, float], dict[float, Curve]]:
    """{step count: the best rate}, and {rate: scores} of all rates that were tried.

    A longer run passes through the smaller step counts, so the search begins with the largest. The
    rate of a larger count is kept where the best is not ahead of it by more than the standard
    error: one training then serves both."""
    chosen = {}                                  # {step count: rung}
    tried = {}
    best = 0
    for count in sorted(steps, reverse=True):

        def sums(rung: int) -> np.ndarray:
            """Of each person, at a rate of the ladder."""
            rate = rate_at(method, rung)
            if count not in tried.get(rate, {}):
                trial = Trial("choose", method, rank, rate)
                tried[rate] = measure(args, trial, [n for n in steps if n <= count])
            return tried[rate][count]["sum"]

        start = best - best % 2                  # each search takes strides of two again
        best = climb(lambda rung: sums(rung).mean(), start)
        for used in reversed(chosen.values()):
            ahead, error = mean_error(sums(best) - sums(used))
            if ahead <= error:                   # both are 0 where the rate is the same
                best = used
                break
        chosen[count] = best
    return {count: rate_at(method, chosen[count]) for count in steps}, tried


# --------------------------------------------------------------------------------------------------
# The command


def run_sweep(
    args: Namespace,
    rank: int,
    steps: tuple[int, ...],
    people: int,
):
    """Chooses rates, measures, and writes the report each time more of it is known, at one rank."""
    calls = [(args, method, rank, steps) for method in FIRST_RATES]
    results = side_by_side(args, choose_rates, calls, f"rates, rank {rank}")
    rates, tried = {}, {}
    for method, result in zip(FIRST_RATES, results):
        rates[method], tried[method] = result
    folder = f"people{people}"
    trainings = []
    report(args, folder, rank, Found(steps, rates, tried, trainings))

    for seed in range(args.trainings):
        trials = collections.defaultdict(list)   # {trial: step counts}
        trials[Trial(folder, "none")] = [0]
        for method, count in itertools.product(FIRST_RATES, steps):
            trials[Trial(folder, method, rank, rates[method][count], seed)].append(count)
        calls = [(args, *call) for call in trials.items()]
        results = side_by_side(args, measure, calls, f"people, rank {rank}, seed {seed}")
        curves = collections.defaultdict(dict)
        for trial, curve in zip(trials, results):
            curves[trial.method] |= curve
        trainings = [*trainings, curves]
        report(args, folder, rank, Found(steps, rates, tried, trainings))


def report(args: Namespace, folder: str, rank: int, found: Found):
    """Writes tables, figure, and, once there are images, the contact sheet."""
    text = report_text(found)
    print(text)
    write_whole(args.out / f"report_r{rank}.md", text)
    draw_found(args.out / f"scores_r{rank}.png", found)
    if not found.scores:
        return
    trials = [Trial(folder, "none")]
    for method, rates in found.rates.items():
        trials.append(Trial(folder, method, rank, rates[SHEET_STEPS]))
    rows = {}
    for trial in trials:
        label = compare.label_of(trial.method, trial.rank, SHEET_STEPS)
        images = args.run / "trials" / folder / trial.name / "images"
        rows[METHODS[trial.method]] = images / label
    if not all(folder.is_dir() for folder in rows.values()):     # a copy of the scores alone
        return
    people = evaluation.read_people([args.run / folder])
    prompts = evaluation.prompts_for(people, None, args.model)
    draw_sheet(args.out / f"sheet_r{rank}.png", people, prompts, rows)


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(prog="paper.reproduce",
                    description="Compares the methods at their best learning rates, on new people.")
    add = parser.add_argument
    add("--subset", action="store_true",
        help="8 people, 100 and 250 steps, one training seed, one noise seed (default: 48 people)")
    add("--model", default="baby", help="baby, or a folder with such a model (default: baby)")
    add("--lomd", type=Path, help="weights of stage 1 (default: lomd.safetensors of the model)")
    add("--run", type=Path, help="folder for people, LoRAs, images, and scores "
        "(default: baby/run/reproduce, with --subset baby/run/reproduce-subset)")
    add("--out", type=Path, help="folder for tables and figures (default: report/ in --run)")
    add("--report", action="store_true",
        help="train nothing: write the report from the scores in --run (default: train first)")
    add("--device", help="cuda, mps, or cpu (default: the best available)")
    add("--jobs", type=positive,
        help="parallel processes (default: on a CPU one per core, at most 8; else 1)")
    return parser.parse_args(argv)


def reproduce(argv: list[str] | None):
    args = parse(argv)
    vars(args).update(SUBSET if args.subset else FULL)
    name = "reproduce-subset" if args.subset else "reproduce"
    args.run = args.run or Path(faces.__file__).parent / "run" / name
    args.out = args.out or args.run / "report"
    if args.jobs is None:
        on_cpu = pick_device(args.device).type == "cpu"
        args.jobs = min(8, os.cpu_count()) if on_cpu and not args.report else 1
    model = find_model(args.model)
    _, lomd = read_lomd(model, args.lomd)
    settings = {"model": flux_fingerprint(model), "lomd": lomd}
    path = args.run / "scores" / "settings.json"
    check_settings(path, settings)
    save_settings(path, settings)
    judges = evaluation.Judges(args.model)
    draw_people(judges, args.run / "choose", faces.CHOOSE.start + 500, args.choose)
    for sweep in args.sweeps:
        folder = args.run / f"people{sweep['people']}"
        draw_people(judges, folder, faces.TEST.start + 3000, sweep["people"])
    try:
        for sweep in args.sweeps:
            run_sweep(args, **sweep)
    except Missing as error:
        note(error)


if __name__ == "__main__":
    sys.exit(run_script("paper.reproduce", reproduce))
