"""Are several photos of a person better than one? Captions, ranks, iterations, rates; on people never seen.

    python -m paper.several --subset         # minutes: 2 people, two ways; shows that it runs
    python -m paper.several                  # every way on 8 people; the best of five photos on 24 others

One photo and five are judged by the same four others. A way's captions stand beside its photos, as
personalize.py reads them: they name clothes and background. The best way is that with the highest sum of
R-FaceSim and CLIP-T. Stopped, it goes on where it was. Writes several.json and several.md to --out.
"""
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import support  # before torch: how its threads wait
import eval_rfacesim as evaluation
from baby import faces
from paper.reproduce import (SCORES, common_words, difference, draw_people, evaluate, options, rows_of,
                             run_folder, side_by_side, workers)
from support.common import run_script, write_whole
from support.sheets import percent

MANY, TESTS = 5, 4                          # photos to train on; photos to judge by


class Way(NamedTuple):
    photos: int
    captions: bool
    rank: int = 1
    rate: float = 1.2e-3
    iters: tuple[int, ...] = (375, 1000)

    @property
    def name(self) -> str:
        return f"{self.photos} {'captions' if self.captions else 'prompt'} r{self.rank} {self.rate:g}"


ONE = Way(1, False, iters=(375,))           # what a user with one photo gets
WAYS = (ONE, Way(1, True, iters=(375, 625)), Way(MANY, False), Way(MANY, True), Way(MANY, True, rate=2.4e-3),
        Way(MANY, True, 4), Way(MANY, True, 4, 2.4e-3), Way(MANY, True, 16))
FULL = dict(choose=8, people=24, ways=WAYS)
SUBSET = dict(choose=2, people=2, ways=(ONE._replace(iters=(20,)), Way(MANY, True, iters=(20, 40))))


def draw(judges: evaluation.Judges, run: Path, name: str, first: int, count: int) -> None:
    """The same people in four folders: one photo and TESTS, or MANY and TESTS, with captions or without."""
    draw_people(judges, run / name / "5 captions", first, count, MANY + TESTS, captions=True)
    for picture in sorted((run / name / "5 captions").glob("*/*/*.png")):
        place, number = picture.relative_to(run / name / "5 captions"), int(picture.stem)
        for folder in ("5 prompt", "1 captions", "1 prompt"):
            if folder[0] == "5" or number == 0 or number >= MANY:
                copy = run / name / folder / place
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, copy)
                if folder.endswith("captions"):
                    shutil.copyfile(picture.with_suffix(".txt"), copy.with_suffix(".txt"))


def measure(way: Way, name: str, run: Path, words: list) -> dict:
    """paper/compare.py's scores of a way, on the people of run / name."""
    return evaluate(None, run / name / "scores" / way.name, ["meta-lora"], [way.rank], *words, "--photos",
                    way.photos, "--data", run / name / " ".join(way.name.split()[:2]), "--lr", way.rate,
                    "--iters", *way.iters, "--seeds", 1)


def rows(way: Way, scores: dict, name: str) -> list[dict]:
    """A row of the table for each number of iterations."""
    return [{"people": name, "way": way._asdict(), "iterations": own["iterations"], "label": own["label"],
             **{metric: own[metric] for metric in SCORES}}
            for own in scores["methods"]]


def table(found: list[dict]) -> str:
    """Markdown, in percent, standard errors in brackets."""
    heads = ["people", "photos", "caption", "rank", "learning rate", "iterations", "R-FaceSim", "CLIP-T"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in found:
        way = Way(**row["way"])
        cells = [row["people"], way.photos, "its own" if way.captions else "the prompt", way.rank,
                 f"{way.rate:g}", row["iterations"], *(percent(row[metric]) for metric in SCORES)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def several(argv: list[str] | None = None) -> None:
    parser = options("paper.several", "Are several photos of a person better than one?",
                     "2 people to choose by and 2 others, two ways, few iterations")
    parser.add_argument("--lomd", type=Path, help="weights of stage 1 (default: the model's own)")
    args = parser.parse_args(argv)
    size, run = SimpleNamespace(**(SUBSET if args.subset else FULL)), run_folder(args, "several")
    judges, pool, out = evaluation.Judges(args.model), workers(args), args.out or run / "report"
    words = common_words(args) + (["--lomd", args.lomd] if args.lomd else [])
    draw(judges, run, "choose", faces.CHOOSE.start + 500, size.choose)
    draw(judges, run, "people", faces.TEST.start + 6000, size.people)
    if pool:
        calls = [(measure, way, "choose", run, words) for way in size.ways]
        side_by_side(pool, calls, "ways")
    found = [row for way in size.ways for row in rows(way, measure(way, "choose", run, words), "choose")]
    best = max((row for row in found if row["way"]["photos"] == MANY),
               key=lambda row: sum(row[metric]["mean"] for metric in SCORES))
    ways = [size.ways[0], Way(**best["way"])._replace(iters=(best["iterations"],))]
    if pool:
        side_by_side(pool, [(measure, way, "people", run, words) for way in ways], "one and the best of five")
    scores = [measure(way, "people", run, words) for way in ways]
    found += [row for way, own in zip(ways, scores) for row in rows(way, own, "people")]
    pictures = {name: [row for rows in rows_of(own).values() for row in rows]
                for name, own in zip(("one", "five"), scores)}
    people = evaluation.read_people([run / "people" / "1 prompt"])
    gaps = {metric: difference(pictures, people, "five", "one", metric) for metric in SCORES}
    text = f"{table(found)}\n\nFive photos less one, person by person, n = {len(people)}: " + ", ".join(
        f"{metric} {percent(gap)}" for metric, gap in gaps.items()) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "several.json", json.dumps({"rows": found, "five less one": gaps}, indent=1).encode())
    write_whole(out / "several.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(run_script("paper.several", several))
