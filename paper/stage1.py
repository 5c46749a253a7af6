"""What stage 1 costs: how good a LoMD is after how much of it, and what one from gradients is worth.

    python -m paper.stage1 --subset        # minutes: few people and iterations; shows that it runs
    python -m paper.stage1                 # hours: all LoMDs on 12 people, four of them on 48

  LoMDs      a random one; after 100 to 5,000 iterations on 12, 50 and 200 people; from gradients, and what
             stage 1 makes of those
  rates      of each LoMD: from a guess to the neighbour that is better on the CHOOSE people, until none is
  curve      all LoMDs on 12 people never seen, stage 2 at 250 and 375 iterations
  decision   random, gradients, stage 1 at the same cost and at 5,000 iterations, on 48, with 2 seeds

A score is the sum of R-FaceSim, a picture without a face counting as 0, and CLIP-T; a rate's is that of both
numbers of iterations. Stopped, it goes on where it was. Writes stage1.json and stage1.png to --out.
"""
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import support  # before torch: how its threads wait
import eval_rfacesim as evaluation
import meta_train
from baby import faces
from paper.report import draw_stage_1
from paper.reproduce import (SCORES, common_words, difference, draw_meta, draw_people, evaluate, model_words,
                             options, run_folder, side_by_side, workers)
from support.checkpoints import find_targets, load_flux
from support.common import run_script, write_whole
from support.finding import find_model
from support.lora_files import random_lomd, save_lomd
from support.sheets import percent

GRID = tuple(6e-4 * 2 ** (i / 2) for i in range(10))                     # learning rates of stage 2
FULL = dict(budgets={12: (500, 1000, 5000), 50: (2500, 5000), 200: (100, 250, 500, 1000, 2500, 5000)},
            gradients=(0, 100, 250, 500, 1000), iters=(250, 375), choose=4, curve=12, people=48, seeds=2)
SUBSET = dict(budgets={5: (10,)}, gradients=(0, 10), iters=(10, 15), choose=2, curve=2, people=3, seeds=1)
COST = 1000                                # iterations of stage 1 that cost what the gradients do
PICTURES, PHOTOS = 10, 6                   # of a person in stage 1; of one never seen
SEED = faces.TEST.start + 6000             # of the first of those


class Lomd(NamedTuple):
    start: str                             # "random" or "gradients"
    people: int = 0                        # in stage 1
    iterations: int = 0

    @property
    def name(self) -> str:
        return f"{self.start} {self.people} {self.iterations}".replace(" 0 0", "")

    @property
    def guess(self) -> int:
        """A place in GRID: the longer A's rows, the smaller the rate."""
        if self.start == "gradients":
            return 2
        return 2 + sum(self.iterations < more for more in (1000, 500, 250, 100))


def chains(size: SimpleNamespace) -> list[list[Lomd]]:
    """All LoMDs; of one chain each begins where the one before ended."""
    usual = max(size.budgets)
    found = [[Lomd("random", count, i) for i in own] for count, own in size.budgets.items()]
    return [[Lomd("random")], [Lomd("gradients", usual, i) for i in size.gradients], *found]


def file_of(lomd: Lomd, run: Path) -> Path:
    return run / "lomds" / f"{lomd.name}.safetensors"


def train(chain: list[Lomd], run: Path, args: SimpleNamespace) -> None:
    """Makes the LoMDs of a chain, each once."""
    for lomd in chain:
        out = file_of(lomd, run)
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_file():
            continue
        if not lomd.people:
            targets = find_targets(load_flux(find_model(args.model)))
            save_lomd(out, random_lomd(targets, 16), {"start": "random"})
            continue
        words = ["--data", run / f"meta{lomd.people}", "--iters", lomd.iterations, "--preview-every", 0,
                 "--out", out, "--run", run / f"{lomd.start} {lomd.people}", *model_words(args)]
        words += ["--from-gradients"] * (lomd.start == "gradients")
        meta_train.meta_train([str(word) for word in words])


def climb(score: Callable[[int], float], place: int) -> int:
    """From a place in GRID to the neighbour that is better, until none is."""
    while True:
        best = max(range(max(0, place - 1), min(len(GRID), place + 2)), key=score)
        if best == place:
            return place
        place = best


def scores_of(lomd: Lomd, place: int, people: str, run: Path, args: SimpleNamespace, iters: tuple[int, ...],
              seed: int = 0) -> dict:
    """Of stage 2 on the people in a folder of `run`, at a learning rate of GRID."""
    out = run / people / lomd.name / f"{GRID[place]:.2g} seed {seed}"
    return evaluate(None, out, ["meta-lora"], [1], *common_words(args), "--data", run / f"{people} people",
                    "--lomd", file_of(lomd, run), "--lr", GRID[place], "--iters", *iters, "--seeds", 1,
                    "--seed", seed)


def choose(lomd: Lomd, run: Path, args: SimpleNamespace, size: SimpleNamespace) -> int:
    """Its place in GRID."""
    tried = {}

    def score(place: int) -> float:
        if place not in tried:
            found = scores_of(lomd, place, "choose", run, args, size.iters)["methods"]
            tried[place] = sum(row[name]["mean"] for row in found for name in SCORES)
        return tried[place]
    return climb(score, lomd.guess)


def measure(lomd: Lomd, run: Path, args: SimpleNamespace, size: SimpleNamespace) -> None:
    """What comes of it on the people of the curve; found again in its files."""
    scores_of(lomd, choose(lomd, run, args, size), "curve", run, args, size.iters)


def stage_1(argv: list[str] | None = None) -> None:
    parser = options("paper.stage1", "What stage 1 costs, and a LoMD from gradients, on the baby.",
                     "5 people, LoMDs of 10 iterations, stage 2 of 15", lomd=False)
    args = parser.parse_args(argv)
    size, run = SimpleNamespace(**(SUBSET if args.subset else FULL)), run_folder(args, "stage1")
    judges, pool, out = evaluation.Judges(args.model), workers(args), args.out or run / "report"
    for name, first, count in (("curve", SEED, size.curve), ("decision", SEED, size.people),
                               ("choose", faces.CHOOSE.start + 900, size.choose)):
        draw_people(judges, run / f"{name} people", first, count, PHOTOS)
    draw_meta(run, [*size.budgets], PICTURES)
    every = chains(size)
    for calls in ([(train, chain, run, args) for chain in every],
                  [(measure, lomd, run, args, size) for chain in every for lomd in chain]):
        if pool:
            side_by_side(pool, calls, calls[0][0].__name__)
        for function, *words in calls:
            function(*words)
    out.mkdir(parents=True, exist_ok=True)
    found = {"curve": curve(every, run, args, size)}
    draw_stage_1(found["curve"], out / "stage1.png")
    write_whole(out / "stage1.json", json.dumps(found, indent=1).encode())         # the decision takes hours
    found["decision"] = decide(every, run, args, size, pool)
    write_whole(out / "stage1.json", json.dumps(found, indent=1).encode())


def rows_with_sum(scores: dict) -> dict[int, list[dict]]:
    """Scores of all pictures, by iterations of stage 2, with the sum of both as one more."""
    return {row["iterations"]: [own | {"sum": (own["r_facesim"] or 0) + own["clip_t"]}
                                for own in scores["pictures"] if own["method"] == row["label"]]
            for row in scores["methods"]}


def compared(people: list, own: list[dict], other: list[dict]) -> dict:
    """Each score's mean and error, and how much more that is than the other's, person by person."""
    both = {"own": own, "other": other}
    return {name: evaluation.summarise(own, people, name, True) | {
        "more": difference(both, people, "own", "other", name)} for name in (*SCORES, "sum")}


def tell(row: dict, other: str) -> None:
    values = ", ".join(f"{name} {percent(row[name])}, {percent(row[name]['more'])} more"
                       for name in (*SCORES, "sum"))
    print(f"{row['lomd']}, lr {row['rate']:.2g}, stage 2 {row['stage 2']}: {values} than {other}")


def curve(every: list[list[Lomd]], run: Path, args: SimpleNamespace, size: SimpleNamespace) -> list[dict]:
    """Each LoMD on the people of the curve, beside the last one, which is the full stage 1."""
    people, rows, found = evaluation.read_people([run / "curve people"]), [], {}
    for lomd in (lomd for chain in every for lomd in chain):
        place = choose(lomd, run, args, size)
        found[lomd] = place, rows_with_sum(scores_of(lomd, place, "curve", run, args, size.iters))
    full = found[every[-1][-1]][1]
    for lomd, (place, scores) in found.items():
        for count, own in scores.items():
            rows.append(lomd._asdict() | {"lomd": lomd.name, "rate": GRID[place], "stage 2": count} |
                        compared(people, own, full[count]))
            tell(rows[-1], "the full one")
    return rows


def decide(every: list[list[Lomd]], run: Path, args: SimpleNamespace, size: SimpleNamespace,
           pool: object) -> list[dict]:
    """The LoMD from gradients beside each of three others, both seeds of training together."""
    usual, rows = max(size.budgets), []
    cost = min(size.budgets[usual], key=lambda budget: abs(budget - COST))
    four = [Lomd("gradients", usual), every[-1][-1], Lomd("random", usual, cost), Lomd("random")]
    calls = {(lomd, seed): (scores_of, lomd, choose(lomd, run, args, size), "decision", run, args, size.iters,
                            seed) for seed in range(size.seeds) for lomd in four}
    if pool:
        side_by_side(pool, [*calls.values()], "decision")
    found = {lomd: {} for lomd in four}
    for (lomd, seed), (function, *words) in calls.items():
        for count, own in rows_with_sum(function(*words)).items():
            found[lomd].setdefault(count, []).extend(
                row | {"identity": f"{row['identity']} seed {seed}"} for row in own)
    people = evaluation.read_people([run / "decision people"])
    persons = [p._replace(name=f"{p.name} seed {seed}") for seed in range(size.seeds) for p in people]
    for other in four[1:]:
        for count, own in found[other].items():
            rows.append(other._asdict() | {"lomd": other.name, "rate": GRID[choose(other, run, args, size)],
                                           "stage 2": count} | compared(persons, own, found[four[0]][count]))
            tell(rows[-1], "the one from gradients")
    return rows


if __name__ == "__main__":
    sys.exit(run_script("paper.stage1", stage_1))
