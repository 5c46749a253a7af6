"""What should stage 2 see? Crops, captions and several photos of a person, each tried on people never seen.

    python -m paper.inputs --subset         # minutes: 2 people, three ways; shows that it runs
    python -m paper.inputs                  # every way on 8 people; the paper's crops, and the best of five
                                            # photos, on 24 others

All ways are judged by the same four photos, which none of them saw. A way's captions stand beside its
photos, as personalize.py reads them: they name clothes and background. The best way is that with the highest
sum of R-FaceSim and CLIP-T. Stopped, it goes on where it was. Writes inputs.json and inputs.md to --out.
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
from support.checkpoints import find_model
from support.common import JsonFile, run_script, write_whole
from support.sheets import percent

MANY, TESTS = 5, 4                          # photos to train on; photos to judge by
PAPER = "aspects", "scales", "background", "mirror"       # without them a model has the paper's
CROPS = {"the model's": {}, "the paper's": dict.fromkeys(PAPER),       # entries of defaults.json; None: none
         "mirror image too": {"mirror": True}, "five sizes": {"scales": None}}


class Way(NamedTuple):
    photos: int = 1
    captions: bool = False
    crops: str = "the model's"
    rank: int = 1
    rate: float = 1.2e-3
    iters: tuple[int, ...] = (375, 1000)

    @property
    def name(self) -> str:
        return f"{self.people}, {self.crops} crops, rank {self.rank}, {self.rate:g}"

    @property
    def people(self) -> str:
        return f"{self.photos} {'captions' if self.captions else 'prompt'}"


ONE = Way(iters=(375,))                     # what a user with one photo gets
WAYS = (ONE, Way(captions=True, iters=(375, 625)), Way(crops="mirror image too"), Way(crops="five sizes"),
        Way(crops="the paper's"), Way(crops="the paper's", captions=True),
        Way(crops="the paper's", rank=4, rate=2.4e-3), Way(MANY), Way(MANY, True), Way(MANY, True, rank=4),
        Way(MANY, True, rank=4, rate=2.4e-3, iters=(375, 1000, 1875)))
FULL = dict(choose=8, people=24, ways=WAYS)
SUBSET = dict(choose=2, people=2, ways=(ONE._replace(iters=(20,)), Way(crops="the paper's", iters=(20,)),
                                        Way(MANY, True, iters=(20, 40))))


def draw(judges: evaluation.Judges, run: Path, name: str, first: int, count: int) -> None:
    """The same people in four folders: one photo and TESTS, or MANY and TESTS, with captions or without."""
    every = run / name / "5 captions"
    draw_people(judges, every, first, count, MANY + TESTS, captions=True)
    for picture in sorted(every.glob("*/*/*.png")):
        number = int(picture.stem)
        for folder in ("5 prompt", "1 captions", "1 prompt"):
            if folder[0] == "5" or number == 0 or number >= MANY:
                copy = run / name / folder / picture.relative_to(every)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, copy)
                if folder.endswith("captions"):
                    shutil.copyfile(picture.with_suffix(".txt"), copy.with_suffix(".txt"))


def model_with(crops: str, model: str, run: Path) -> Path:
    """A folder that is the model but for the crops that its defaults.json names."""
    home, folder = find_model(model).resolve(), run / "models" / crops
    folder.mkdir(parents=True, exist_ok=True)
    for path in home.iterdir():
        if path.name != "defaults.json" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    own = JsonFile(home / "defaults.json") | CROPS[crops]
    facts = {name: value for name, value in own.items() if value is not None}
    write_whole(folder / "defaults.json", json.dumps(facts, indent=1).encode())
    return folder


def measure(way: Way, name: str, run: Path, model: Path, words: list) -> dict:
    """paper/compare.py's scores of a way, by a model with its crops, on the people of run / name."""
    return evaluate(None, run / name / "scores" / way.name, ["meta-lora"], [way.rank], *words, "--model",
                    model, "--data", run / name / way.people, "--photos", way.photos, "--lr", way.rate,
                    "--iters", *way.iters, "--seeds", 1)


def rows(way: Way, scores: dict, name: str) -> list[dict]:
    """A row of the table for each number of iterations."""
    return [way._asdict() | {"people": name, "iterations": own["iterations"],
                             **{metric: own[metric] for metric in SCORES}} for own in scores["methods"]]


def table(found: list[dict]) -> str:
    """Markdown, in percent, standard errors in brackets."""
    heads = ["people", "photos", "crops", "caption", "rank", "rate", "iterations", "R-FaceSim", "CLIP-T"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in found:
        cells = [row["people"], row["photos"], row["crops"], "its own" if row["captions"] else "the prompt",
                 row["rank"], f"{row['rate']:g}", row["iterations"], *(percent(row[m]) for m in SCORES)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def best_of(found: list[dict], fits: dict) -> Way:
    """The way with the highest sum of both scores, of those with these values; at its best iterations."""
    fitting = [row for row in found if all(row[name] == value for name, value in fits.items())]
    best = max(fitting, key=lambda row: sum(row[metric]["mean"] for metric in SCORES))
    return Way(**{name: best[name] for name in Way._fields})._replace(iters=(best["iterations"],))


def inputs(argv: list[str] | None = None) -> None:
    parser = options("paper.inputs", "What should stage 2 see?",
                     "2 people to choose by and 2 others, three ways, few iterations")
    args = parser.parse_args(argv)
    size, run = SimpleNamespace(**(SUBSET if args.subset else FULL)), run_folder(args, "inputs")
    judges, pool, out = evaluation.Judges(args.model), workers(args), args.out or run / "report"
    words = common_words(args)
    draw(judges, run, "choose", faces.CHOOSE.start + 500, size.choose)
    draw(judges, run, "people", faces.TEST.start + 6000, size.people)

    # made here: two workers would make the same one at once
    models = {crops: model_with(crops, args.model, run) for crops in CROPS}

    def measured(ways: list[Way], name: str) -> list[dict]:
        calls = [(measure, way, name, run, models[way.crops], words) for way in ways]
        if pool:
            side_by_side(pool, calls, f"ways, {name}")
        return [measure(*call[1:]) for call in calls]

    found = [row for way, scores in zip(size.ways, measured(size.ways, "choose"))
             for row in rows(way, scores, "choose")]
    ways = [size.ways[0], best_of(found, {"crops": "the paper's"}), best_of(found, {"photos": MANY})]
    final, gaps = measured(ways, "people"), {}
    found += [row for way, scores in zip(ways, final) for row in rows(way, scores, "people")]
    people = evaluation.read_people([run / "people" / "1 prompt"])
    pictures = [[row for own in rows_of(scores).values() for row in own] for scores in final]
    for way, own in zip(ways[1:], pictures[1:]):
        both = {"own": own, "one": pictures[0]}
        gaps[f"{way.name}, {way.iters[0]} iterations, less {ways[0].name}"] = {
            metric: difference(both, people, "own", "one", metric) for metric in SCORES}
    lines = [f"{name}, person by person, n = {len(people)}: " + ", ".join(
        f"{metric} {percent(own)}" for metric, own in gap.items()) for name, gap in gaps.items()]
    text = "\n\n".join([table(found), *lines]) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "inputs.json", json.dumps({"rows": found, "differences": gaps}, indent=1).encode())
    write_whole(out / "inputs.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(run_script("paper.inputs", inputs))
