"""What a LoMD from invented people is worth: the table of docs/STAGE1.md.

    python -m paper.reproduce                  # first: the people, the shipped LoMD, the random A
    python -m paper.lomds                      # hours; the same --run

A LoMD is made from each of these, with two seeds of everything (other people, another stage 1):
  invented-50, -100, -200   people of paper/invent.py, filtered
  unfiltered-50             all the pictures of as many invented people
  drawn-50, -200            people of baby/faces.py, 10 pictures each
  nobody-50                 as many pictures, each from a start noise of its own
For each, the learning rate of stage 2 with the highest sum at 375 steps is found on 16 people, with
the LoMD of the first seed. Both are then measured on 48 others; the seed of stage 2 is that of stage 1.

Rerun the command to resume. Everything is in <run>/lomds/, the table in lomds.md there.
"""
import argparse
import copy
import sys
from itertools import product
from pathlib import Path

import support  # before torch: how its threads wait
import numpy as np

import meta_train
from baby import faces
from paper import invent
from paper.report import people_values, percent
from paper.reproduce import (FULL, Trial, choose_rates, measure, parse, side_by_side)
from support.common import run_script, write_whole
from support.sheets import table

KINDS = ("invented-50", "invented-100", "invented-200", "unfiltered-50", "drawn-50", "drawn-200",
         "nobody-50")
SEEDS = 0, 1
PEOPLE = 200                                     # of each seed that are invented, and drawn
PICTURES = 10                                    # of a person in stage 1
ITERATIONS = 1000                                # of stage 1
STEPS = 250, 375                                 # of stage 2; the rate is chosen for the last
DRAWN = 105_000                                  # seed of the first person of baby/faces.py


def home(run: Path, kind: str, seed: int) -> Path:
    return run / "lomds" / f"{kind}_s{seed}"


# --------------------------------------------------------------------------------------------------
# Folders of people


def invent_all(run: Path, seed: int) -> None:
    """PEOPLE invented people, filtered, and what they were chosen from."""
    out = home(run, "people", seed) / "invented"
    out.parent.mkdir(parents=True, exist_ok=True)
    invent.invent(["--model", "baby", "--out", str(out), "--people", str(PEOPLE),
                   "--pictures", str(PICTURES), "--seed", str(seed)])


def draw_nobody(run: Path, seed: int) -> None:
    """The pictures of 50 invented people, each from a start noise of its own."""
    out = home(run, "people", seed) / "nobody"
    out.parent.mkdir(parents=True, exist_ok=True)
    args = invent.parse(["--model", "baby", "--out", str(out), "--no-filter"])
    rng = np.random.default_rng([seed, 1])
    shots = []
    for person in invent.invent_people(50, PICTURES, seed, baby=True):
        for shot in person:
            shots.append(shot._replace(seed=int(rng.integers(2 ** 62))))
    invent.draw_pictures(args, shots, out)
    for shot in shots:
        write_whole((out / shot.path).with_suffix(".txt"), shot.caption)


def draw_people(run: Path, seed: int) -> None:
    out = home(run, "people", seed) / "drawn"
    faces.main(["--identities", str(PEOPLE), "--images", str(PICTURES), "--out", str(out),
                "--seed", str(DRAWN + 1000 * seed)])


def link_people(run: Path, kind: str, seed: int) -> Path:
    """A folder of links to the people of one kind -> the folder."""
    data = home(run, kind, seed) / "data"
    data.mkdir(parents=True, exist_ok=True)
    source, number = kind.split("-")
    people = home(run, "people", seed)
    if source == "unfiltered":
        shots = invent.invent_people(300, 15, seed, baby=True)       # as paper.invent draws for 200
        for person in shots[:int(number)]:
            for shot in person[:PICTURES]:
                picture = people / "invented-drawn" / shot.path
                target = data / shot.path
                target.parent.mkdir(exist_ok=True)
                write_whole(target, picture.read_bytes())
                write_whole(target.with_suffix(".txt"), shot.caption)
        return data
    folders = sorted(path for path in (people / source).rglob("*") if any(path.glob("*.png")))
    for folder in folders[:int(number)]:
        link = data / folder.name
        if not link.exists():
            link.symlink_to(folder.resolve())
    return data


# --------------------------------------------------------------------------------------------------
# LoMDs, rates, scores


def train(run: Path, kind: str, seed: int) -> None:
    """Stage 1, once."""
    folder = home(run, kind, seed)
    out = folder / "lomd.safetensors"
    if not out.is_file():
        words = ["--data", link_people(run, kind, seed), "--model", "baby", "--out", out, "--run",
                 folder / "run", "--iters", ITERATIONS, "--warmup", 0, "--preview-every", 0,
                 "--seed", seed]
        meta_train.meta_train([str(word) for word in words])


def own_args(args: argparse.Namespace, kind: str, seed: int) -> argparse.Namespace:
    """The arguments of paper.reproduce for one LoMD, on the same people."""
    own = copy.copy(args)
    own.run = home(args.run, kind, seed)
    own.lomd = own.run / "lomd.safetensors"
    for people in ("choose", "people48"):
        link = own.run / people
        if not link.exists():
            link.symlink_to((args.run / people).resolve())
    return own


def choose(args: argparse.Namespace, kind: str) -> float:
    rates, _ = choose_rates(own_args(args, kind, 0), "meta-lora", 1, STEPS[-1:])
    return rates[STEPS[-1]]


def score(args: argparse.Namespace, kind: str, seed: int, rate: float) -> dict[str, dict]:
    trial = Trial("people48", "meta-lora", 1, rate, seed)
    return measure(own_args(args, kind, seed), trial, list(STEPS))


def score_base(args: argparse.Namespace, method: str) -> tuple[float, list[dict]]:
    """The rate of the shipped LoMD ("meta-lora") or the random A, and the scores of both seeds, from
    paper.reproduce."""
    steps = FULL["sweeps"][0]["steps"]
    rates, _ = choose_rates(args, method, 1, steps)
    found = []
    for seed in SEEDS:
        scores = {}
        for count in STEPS:
            trial = Trial("people48", method, 1, rates[count], seed)
            scores |= measure(args, trial, [count])
        found.append(scores)
    return rates[STEPS[-1]], found


def write_table(rates: dict[str, float], found: dict[str, list[dict]]) -> str:
    """found: of each kind, {step count: scores of people} for each seed."""
    def values(kind: str, count: int, metric: str) -> np.ndarray:
        return np.mean([people_values(scores[str(count)], metric) for scores in found[kind]], axis=0)

    header = ["LoMD", "rate"]
    for count in STEPS:
        header.append(f"{count} steps: R-FaceSim, CLIP-T, sum")
    header += ["sum at 375 minus random A", "each seed", "minus drawn-50: R-FaceSim, CLIP-T"]
    rows = []
    for kind in found:
        cells = [kind, f"{rates[kind]:g}"]
        for count in STEPS:
            scores = [percent(values(kind, count, name)) for name in ("likeness", "text", "sum")]
            cells.append(", ".join(scores))
        last = STEPS[-1]
        cells.append(percent(values(kind, last, "sum") - values("random A", last, "sum"), "+"))
        leads = []
        for mine, theirs in zip(found[kind], found["random A"]):
            lead = people_values(mine[str(last)], "sum") - people_values(theirs[str(last)], "sum")
            leads.append(percent(lead, "+"))
        cells.append(", ".join(leads))
        others = []
        for metric in ("likeness", "text"):
            others.append(values(kind, last, metric) - values("drawn-50", last, metric))
        cells.append(", ".join(percent(other, "+") for other in others))
        rows.append(cells)
    return table(header, rows)


def lomds(argv: list[str] | None = None) -> None:
    args = parse(argv)
    vars(args).update(FULL)
    args.run = args.run or Path(faces.__file__).parent / "run" / "reproduce"
    args.jobs = args.jobs or 2
    run = args.run
    for maker in (invent_all, draw_nobody, draw_people):
        side_by_side(args, maker, [(run, seed) for seed in SEEDS], maker.__name__)
    every = [*product(KINDS, SEEDS)]
    side_by_side(args, train, [(run, kind, seed) for kind, seed in every], "stage 1")
    rates = side_by_side(args, choose, [(args, kind) for kind in KINDS], "rates")
    rates = dict(zip(KINDS, rates))
    calls = [(args, kind, seed, rates[kind]) for kind, seed in every]
    results = side_by_side(args, score, calls, "scores")
    found = {kind: [] for kind in KINDS}
    for (kind, _), result in zip(every, results):
        found[kind].append(result)
    for title, method in (("random A", "random-lomd"), ("shipped", "meta-lora")):
        rates[title], found[title] = score_base(args, method)
    text = write_table(rates, found)
    write_whole(run / "lomds" / "lomds.md", text)
    print(text)


if __name__ == "__main__":
    sys.exit(run_script("paper.lomds", lomds))
