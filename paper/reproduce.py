"""The paper's comparison in miniature: does a meta-learned LoMD beat a plain LoRA on people never seen?

    python -m paper.reproduce --subset         # minutes: 8 people, rank 1, one seed of each kind
    python -m paper.reproduce                  # hours: 48 people, 3 and 2 seeds; then a sweep

Stages, each by paper/compare.py, each going on where it was stopped:
  people    drawn TEST and CHOOSE identities, 6 photos of each, with a face in every one
  rates     every method at several learning rates on the CHOOSE people       -> rates.json, rates.png
  main      every method at rank 1, at 250, 375 and 625 iterations, all seeds       -> --out
  sweep     12 of the people at ranks 4 and 16                                      -> --out/sweep

The learning rate of a method is the one with the highest sum of R-FaceSim (a picture without a face counts as
0) and CLIP-T. random-lomd is Meta-LoRA over a random frozen A of the same r1; `none` is the floor.

Source: "Meta-LoRA" (Topal et al. 2025), section 4 and appendices D, F and I.
"""
import argparse
import atexit
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import support  # before torch: how its threads wait
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import eval_rfacesim as evaluation
from baby import faces
from paper import compare
from paper.report import draw_rates, figures, sheets
from support import photos
from support.common import JsonFile, Parser, pick_device, positive, run_script, save_png, write_whole

METHODS = ("lora", "lora-crops", "random-lomd", "meta-lora")
GUIDANCE = 3.5          # the paper's
STEPS = 10              # against 30: R-FaceSim up to 1.6 points off, of five methods' 160 pictures, one order
RATES = dict.fromkeys(METHODS, (3e-4, 6e-4, 1.2e-3, 2.4e-3))
RATES |= {"random-lomd": tuple(4 * rate for rate in RATES["lora"])}                     # its rows are shorter
FEW = dict.fromkeys(METHODS, (6e-4, 1.2e-3)) | {"random-lomd": (2.4e-3, 4.8e-3)}
FULL = dict(people=48, choose=8, rates=RATES, iters=(250, 375, 625), sweep=12, ranks=(4, 16), noises=3,
            trainings=2)
SUBSET = FULL | dict(people=8, choose=4, rates=FEW, iters=(375, 625), sweep=0, noises=1, trainings=1)
PHOTOS, SIDE = 6, 384                                     # of each person, the first is the reference; pixels
SCORES = "r_facesim", "clip_t"


def draw_people(judges: evaluation.Judges, folder: Path, first: int, count: int, pictures: int) -> None:
    """`count` identities from seed `first`, photo style; a picture without a face is drawn anew. The
    reference is nearly frontal, as one would choose it."""
    for seed in tqdm(range(first, first + count), f"people in {folder.name}", disable=None, leave=False):
        person, index = folder / faces.identity(seed)["gender"] / f"{seed}", 0
        frontal = {"yaw": float(np.random.default_rng([seed, 8]).uniform(-8, 8))}
        for i in range(pictures):
            path = person / f"{i}.png"
            while not path.is_file():
                options = {"style": "photo", **({} if i else frontal)}
                pixels, _ = faces.sample(seed, 1000 * i + index, SIDE, SIDE, **options)
                index += 1
                if judges.crop(image := Image.fromarray(pixels)) is not None:
                    save_png(image, path)


def workers(args: argparse.Namespace) -> concurrent.futures.Executor | None:
    """--jobs processes, by itself one for each core of a CPU, at most 8; None where this one does all."""
    jobs = args.jobs or (min(8, os.cpu_count()) if pick_device(args.device).type == "cpu" else 1)
    context = multiprocessing.get_context("spawn")       # a fork of a process with threads may wait for ever
    threads = max(1, os.cpu_count() // jobs)
    if jobs == 1:
        return None
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, set_up, (threads,))
    atexit.register(pool.shutdown)           # else the interpreter may end first: "Bad file descriptor"
    return pool


def set_up(threads: int) -> None:
    """Of a worker: its share of the cores; silent, since bars would overwrite each other."""
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def work(function: Callable[..., object], *args: object) -> None:
    try:
        function(*args)
    except KeyboardInterrupt:              # its work is saved; a pool would give it the next call
        os._exit(130)


def side_by_side(pool: concurrent.futures.Executor, calls: list[tuple], name: str) -> None:
    """Calls (function, *arguments) in the workers of `pool`; what they find they leave in files."""
    with tqdm(total=len(calls), desc=name, disable=None, leave=False) as bar:
        futures = [pool.submit(work, *call) for call in calls]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def evaluate(pool: concurrent.futures.Executor | None, out: Path, methods: list[str], ranks: list[int],
             *words: object) -> dict:
    """paper/compare.py with these words -> its scores.json. With a pool each method at each rank is a call of
    its own, and one more puts together what they leave in `out`."""
    call = lambda methods, ranks: [str(word) for word in (*words, "--out", out, "--methods", *methods,
                                                          "--ranks", *ranks)]
    if pool:                                             # without a LoRA there is no rank
        calls = [call([m], [r]) for m, r in itertools.product(methods, ranks) if m != "none" or r == ranks[0]]
        side_by_side(pool, [(compare.compare, own, True) for own in calls], f"methods of {out.name}")
    compare.compare(call(methods, ranks), quiet=True)
    return JsonFile(out / "scores.json")


def choose_rates(pool: concurrent.futures.Executor | None, common: list, data: Path, run: Path,
                 rates: dict[str, tuple]) -> dict[str, float]:
    """The learning rate of each method, of those in `rates`, by the people in `data`; goes to rates.json."""
    tried = {}
    for rate in sorted({rate for own in rates.values() for rate in own}):
        methods = ["none", *(method for method, own in rates.items() if rate in own)]
        scores = evaluate(pool, run / "rates" / f"{rate:g}", methods, [1], *common, "--data", data, "--lr",
                          rate, "--seeds", 1)
        for row in scores["methods"]:
            tried.setdefault(row["method"], {})[f"{rate:g}"] = {name: row[name]["mean"] for name in SCORES}
    floor = next(iter(tried.pop("none").values()))["clip_t"]
    chosen = {method: float(max(by_rate, key=lambda rate: sum(by_rate[rate].values())))
              for method, by_rate in tried.items()}
    facts = {"chosen": chosen, "text score without a LoRA": floor, "tried": tried}
    write_whole(run / "rates.json", json.dumps(facts, indent=1).encode())
    draw_rates(tried, chosen, floor, run / "rates.png")
    return chosen


def together(people: list[evaluation.Person],
             runs: dict[int, dict]) -> tuple[list[evaluation.Person], dict[str, list[dict]]]:
    """Scores {seed of training: {method: rows}} as of one evaluation: each seed is a person of the same
    identity."""
    persons = [person._replace(name=f"{person.name} seed {seed}") for seed in runs for person in people]
    rows = {}
    for seed, methods in runs.items():
        for method, own in methods.items():
            rows.setdefault(method, []).extend(r | {"identity": f"{r['identity']} seed {seed}"} for r in own)

    def order(label: str) -> tuple[int, int, int]:
        setting = compare.Setting.read(label)
        return ("none", *METHODS).index(setting.method), setting.rank, setting.iterations
    return persons, {label: rows[label] for label in sorted(rows, key=order)}


def difference(rows: dict, people: list[evaluation.Person], one: str, other: str, metric: str) -> dict:
    """Mean over identities of one method's score less another's, its standard error and n: paired."""
    gaps = []
    for identity in sorted({p.identity for p in people}):
        own = [p for p in people if p.identity == identity]
        names = {p.name for p in own}
        a, b = (evaluation.summarise([r for r in rows[label] if r["identity"] in names], own, metric, True)
                for label in (one, other))
        gaps.append(a["mean"] - b["mean"])
    return mean_error(gaps) | {"identities": len(gaps)}


def mean_error(values: list[float]) -> dict:
    return {"mean": float(np.mean(values)), "error": float(np.std(values, ddof=1) / len(values) ** 0.5)}


def rows_of(scores: dict) -> dict[str, list[dict]]:
    """The pictures' scores of an evaluation, by method."""
    methods = {}
    for row in scores["pictures"]:
        methods.setdefault(row["method"], []).append(row)
    return methods


def compared(labels: list[str]) -> list[tuple[str, str]]:
    """What Meta-LoRA is compared with: at each rank each other method, at its own number of iterations where
    this is there; and at the same number."""
    pairs = []
    for label in labels:
        method, rank, iterations = compare.Setting.read(label)
        for other in METHODS[:-1] if method == "meta-lora" else ():
            pairs += [(label, name) for i in dict.fromkeys([*compare.iterations_of(other, None), iterations])
                      if (name := compare.Setting(other, rank, i).label) in labels]
    return pairs


@functools.cache
def centre(path: Path) -> tuple[float, float] | None:
    """Of the largest face, in parts of the picture's sides; None without a face."""
    image = photos.read_photo(path)
    boxes = [((x0 + x1) / 2 / image.width, (y0 + y1) / 2 / image.height)
             for x0, y0, x1, y1, _ in photos.find_faces(image)]
    return boxes[0] if boxes else None


def spread(pictures: list[evaluation.Picture]) -> dict[str, dict]:
    """How far the face's centre moves among seeds of noise, for the first prompt: {method: standard deviation
    over the picture's side, mean over people, its error, their number}. A LoRA that knows its photo by heart
    puts the face where the photo has it; face scores do not see that."""
    centres, found = {}, {}
    for picture in pictures:
        if picture.prompt == 0 and (own := centre(picture.path)):
            centres.setdefault(picture.label, {}).setdefault(picture.person, []).append(own)
    for label, people in centres.items():
        moves = [np.linalg.norm(np.std(own, axis=0, ddof=1)) for own in people.values() if len(own) > 1]
        if len(moves) > 1:
            found[label] = mean_error(moves) | {"people": len(moves)}
    return found


def report(args: argparse.Namespace, data: Path, run: Path, out: Path, rates: dict, runs: dict,
           judges: evaluation.Judges) -> None:
    """All seeds of training together, and the differences that the paper is about; pictures of `run`."""
    people = evaluation.read_people([data])
    persons, rows = together(people, runs)
    real, pictures = evaluation.embed_real(judges, people), []
    for row in (row for own in runs[0].values() for row in own):
        at = row["method"], row["identity"], row["number"], row["seed"]
        path = run / "images" / at[0] / at[1] / f"{at[2]}_{at[3]}.png"
        pictures.append(evaluation.Picture(*at, path, row["prompt"]))
    gaps = {f"{one} less {other}": {m: difference(rows, persons, one, other, m) for m in SCORES}
            for one, other in compared(list(rows))}
    moves = spread(pictures)
    settings = {"learning rates": rates, "seeds of training": len(runs), "Euler steps": STEPS,
                "differences": gaps, "spread": moves}
    real = {p.name: real[p.name.split()[0]] for p in persons}
    methods, quoted = evaluation.report(out, persons, rows, real, judges, [], True, False,
                                        Path(args.model).name, settings, compare.describe)
    figures(methods, quoted, out)
    sheets(pictures, people, out, compare.describe)
    print((out / "tables.md").read_text("utf-8"))
    for names, gap in gaps.items():
        values = (f"{m} {100 * own['mean']:+.2f} ({100 * own['error']:.2f})" for m, own in gap.items())
        print(f"{names}: {', '.join(values)}, n = {gap['clip_t']['identities']}")
    if moves:
        print("spread of the face over seeds of noise, % of the side: " + ", ".join(
            f"{label} {100 * own['mean']:.1f} ({100 * own['error']:.1f})" for label, own in moves.items()))


def options(prog: str, description: str, subset: str) -> Parser:
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--subset", action="store_true", help=subset)
    add("--model", default="baby", help="baby (default), or a folder like it")
    add("--run", type=Path, help="all that is made on the way (default: a folder in baby/run)")
    add("--out", type=Path, help="tables, figures and scores (default: report in --run)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--lomd", type=Path, help="weights of stage 1 (default: the model's own)")
    add("--jobs", type=positive, help="processes (default: on a CPU one for each core, up to 8; else 1)")
    return parser


def run_folder(args: argparse.Namespace, name: str) -> Path:
    root = Path(__file__).resolve().parents[1]
    return args.run or root / "baby" / "run" / (f"{name}-subset" if args.subset else name)


def model_words(args: argparse.Namespace) -> list:
    return ["--model", args.model, *(["--device", args.device] if args.device else [])]


def common_words(args: argparse.Namespace) -> list:
    """What all calls of paper/compare.py here have in common."""
    lomd = ["--lomd", args.lomd] if args.lomd else []
    return [*model_words(args), *lomd, "--steps", STEPS, "--guidance", GUIDANCE, "--no-face-as-zero"]


def reproduce(argv: list[str] | None = None) -> None:
    parser = options("paper.reproduce", "LoRA, LoRA + crops and Meta-LoRA on people never seen.",
                     "8 people, rank 1, two learning rates, one seed of noise and of training")
    parser.add_argument("--people", type=int, help="of the comparison (default: 48, with --subset 8)")
    parser.add_argument("--sweep", type=int, metavar="PEOPLE", help="how many of them for ranks 4 "
                        "and 16, 0 for none (default: 12, with --subset 0)")
    args = parser.parse_args(argv)
    size, run = SimpleNamespace(**(SUBSET if args.subset else FULL)), run_folder(args, "reproduce")
    size.people = size.people if args.people is None else args.people
    size.sweep = min(size.sweep, size.people) if args.sweep is None else args.sweep
    if not 2 <= size.people <= 500:
        raise ValueError(f"--people is 2 to 500, not {size.people}")
    if not (size.sweep == 0 or 2 <= size.sweep <= size.people):
        raise ValueError(f"--sweep is 0 or 2 to {size.people}, not {size.sweep}")

    judges, pool, first = evaluation.Judges(args.model), workers(args), faces.TEST.start + 3000
    draw_people(judges, run / "people", first, size.people, PHOTOS)
    draw_people(judges, run / "choose", faces.CHOOSE.start + 500, size.choose, PHOTOS)
    common = common_words(args)
    rates = choose_rates(pool, common, run / "choose", run, size.rates)
    print(f"learning rates: {', '.join(f'{method} {rate:g}' for method, rate in rates.items())}")
    common += ["--lr", *(f"{method}={rate}" for method, rate in rates.items())]
    methods, runs, out = ["none", *METHODS], {}, args.out or run / "report"
    for seed in range(size.trainings):
        runs[seed] = rows_of(evaluate(pool, run / f"seed{seed}", methods, [1], *common, "--data",
                                      run / "people", "--seed", seed, "--seeds", size.noises, "--iters",
                                      *size.iters))
        report(args, run / "people", run / "seed0", out, rates, runs, judges)
    if size.sweep:
        people = run / "sweep people"
        draw_people(judges, people, first, size.sweep, PHOTOS)                                # the same again
        scores = evaluate(pool, run / "sweep", methods, size.ranks, *common, "--data", people, "--seeds", 1,
                          "--iters", *size.iters)
        report(args, people, run / "sweep", out / "sweep", rates, {0: rows_of(scores)}, judges)


if __name__ == "__main__":
    sys.exit(run_script("paper.reproduce", reproduce))
