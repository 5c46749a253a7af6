"""Which rule chooses best among the LoRAs of a run? Asked of people never seen.

    python -m paper.which --subset         # minutes: 4 people, 3 candidates of each; shows that it runs
    python -m paper.which                  # 24 people, 7 candidates of each

Everybody is personalised once, from one photo, and LoRAs are kept on the way. A rule sees what `python
eval_rfacesim.py --loras ... --data photo` finds by that photo, with its own prompts and noise. What it takes
is judged by paper/compare.py: by the person's other photos, with other prompts and other noise. A rule's
number is chosen on one half of the people and judged on the other, and the other way round.

Stopped, it goes on where it was. Writes which.json and which.md to --out.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import support  # before torch: how its threads wait
import numpy as np

import eval_rfacesim as evaluation
from baby import faces
from paper.compare import Setting
from paper.reproduce import (common_words, draw_people, evaluate, mean_error, model_words, options, rows_of,
                             run_folder, side_by_side, workers)
from personalize import ITERATIONS
from support.common import JsonFile, run_script, write_whole

FULL = dict(people=24, iters=(150, 225, 300, 375, 450, 525, 600), seeds=2)
SUBSET = dict(people=4, iters=(150, 375, 600), seeds=1)
FIRST, PHOTOS = faces.TEST.start + 5000, 5           # a rule sees the first photo, the judge the others
SEED = 1000                                          # of the noise that a rule sees; the judge's begin at 0
PROMPTS = """a photo of a [man/woman] in an orange shirt, in a city
a photo of a [man/woman] in a black suit, in a forest
a photo of a [man/woman] in a purple sweater, on a beach
a photo of a [man/woman] in a green jacket, in a desert
a photo of a [man/woman] in a white hoodie, against a yellow wall
a pencil drawing of a [man/woman] in a white shirt, in a city
an oil painting of a [man/woman] in a red suit, in a forest
a pop art picture of a [man/woman] in a blue sweater, at sunset
a black and white photo of a [man/woman] in a black jacket, in the snow
a photo of a [man/woman] in a green hoodie, on a beach at night
"""                                                  # the judge's: none is among the baby's own
ALWAYS = "iterations", ITERATIONS["meta-lora"]       # what all rules are compared with
RULES = {"iterations": "always the same number", "likeness": "the highest likeness",
         "sum": "the highest sum of both", "text": "the last with a share of the base's text",
         "early": "the earliest with a share of the best likeness"}
NUMBERS = {"text": (0.9, 0.95, 1.0, 1.05), "early": (0.85, 0.9, 0.95, 0.98)}
SCORES = "likeness", "text", "sum"


def measure(half: int, size: SimpleNamespace, run: Path, args: argparse.Namespace) -> list[dict]:
    """For each person of a half {"person", "base", "candidates"}: what a rule sees of the base and of each
    candidate, and of each also {"judge": scores}."""
    folder, people = run / f"half{half}", evaluation.read_people([run / f"half{half}" / "people"])
    scores = evaluate(None, folder / "judge", ["meta-lora"], [1], *common_words(args), "--data",
                      folder / "people", "--prompts", run / "prompts.txt", "--seeds", size.seeds, "--iters",
                      *size.iters)
    rows, found = rows_of(scores), []
    for person in people:
        labels = {i: Setting("meta-lora", 1, i).label for i in size.iters}
        loras = [folder / "judge" / "loras" / labels[i] / f"{person.name}.safetensors" for i in size.iters]
        if not (file := folder / "seen" / person.name / "scores.json").is_file():
            words = ["--loras", *loras, "--data", person.reference, "--gender", person.gender, "--seed", SEED,
                     "--out", file.parent, *model_words(args)]
            with contextlib.redirect_stdout(None):
                evaluation.evaluate([str(word) for word in words])
        seen = JsonFile(file)
        for candidate in seen["candidates"]:
            own = [row for row in rows[labels[candidate["iterations"]]] if row["identity"] == person.name]
            judged = evaluation.summary_of(own, [person], True)
            likeness, text = judged["r_facesim"]["mean"], judged["clip_t"]["mean"]
            candidate["judge"] = {"likeness": likeness, "text": text, "sum": likeness + text}
        found.append({"person": person.name, "base": seen["base"], "candidates": seen["candidates"]})
    return found


def chosen(person: dict, rule: str, number: float = 0.0) -> dict:
    """The candidate that a rule takes of a person's."""
    return evaluation.choose(person["candidates"], person["base"], rule, number)[0]


def mean_sum(people: list[dict], rule: str, number: float) -> float:
    return float(np.mean([chosen(person, rule, number)["judge"]["sum"] for person in people]))


def row_of(name: str, people: list[dict], taken: list[dict], held_out: bool) -> dict:
    """What a rule gains over ALWAYS, and how far it stays behind the best that the judge sees, by person."""
    usual = [chosen(person, *ALWAYS) for person in people]
    gains = {score: mean_error([own["judge"][score] - other["judge"][score]
                                for own, other in zip(taken, usual)]) for score in SCORES}
    behind = mean_error([max(other["judge"]["sum"] for other in person["candidates"]) - own["judge"]["sum"]
                         for person, own in zip(people, taken)])
    return {"rule": name, "held out": held_out, "gains": gains, "behind the best": behind,
            "iterations": float(np.mean([own["iterations"] for own in taken]))}


def compare_rules(halves: list[list[dict]], iters: list[int]) -> list[dict]:
    """A row for each rule at each of its numbers; for one of several numbers first a row for the one that is
    best on the other half, which is fair to it. Last what the judge itself would take, which nobody can."""
    people, rows = [person for half in halves for person in half], []
    for rule, name in RULES.items():
        numbers = {"iterations": iters, **NUMBERS}.get(rule, (0.0,))
        if len(numbers) > 1:
            best = [max(numbers, key=lambda number: mean_sum(half, rule, number)) for half in halves]
            words = " and ".join(f"{number:g}" for number in dict.fromkeys(reversed(best)))
            taken = [chosen(person, rule, number) for half, number in zip(halves, reversed(best))
                     for person in half]
            own = row_of(f"{name}, chosen on the other half: {words}", people, taken, True)
            rows.append({"of": rule} | own)
        for number in numbers:
            taken = [chosen(person, rule, number) for person in people]
            own = row_of(f"{name}: {number:g}" if number else name, people, taken, not number)
            rows.append({"of": rule, "is": (rule, number)} | own)
    ideal = [max(person["candidates"], key=lambda own: own["judge"]["sum"]) for person in people]
    return [*rows, row_of("(the judge's own choice)", people, ideal, False)]


def verdict(rows: list[dict]) -> str:
    """What eval_rfacesim.RULE should be: of what was not chosen on the people it is judged on, what gains
    most, if that is more than two errors."""
    mean = lambda row: row["gains"]["sum"]["mean"]
    best = max((row for row in rows if row["held out"]), key=mean)
    rule = max((row for row in rows if "is" in row and row["of"] == best["of"]), key=mean)
    gain = best["gains"]["sum"]
    beats = gain["mean"] > 2 * gain["error"] > 0
    ends = f"more than two errors: RULE = {rule['is']}" if beats else "not more than two errors: RULE = None"
    return (f"Of what was not chosen on the people it is judged on, best is: {best['rule']}. It gains "
            f"{signed(gain)} over always {ALWAYS[1]}, {ends}.")


def signed(own: dict) -> str:
    return f"{100 * own['mean']:+.1f} ({100 * own['error']:.1f})"


def table(rows: list[dict]) -> str:
    """Markdown, in percent, standard errors in brackets."""
    heads = ["takes", f"likeness gained over always {ALWAYS[1]}", "text gained", "sum gained",
             "behind the best", "iterations, mean"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row["rule"], *(signed(row["gains"][score]) for score in SCORES),
                 signed(row["behind the best"]), f"{row['iterations']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def which(argv: list[str] | None = None) -> None:
    parser = options("paper.which", "Which rule chooses best among the LoRAs of a run?",
                     "4 people, 3 candidates of each, one seed of the judge's noise")
    args = parser.parse_args(argv)
    size, run = SimpleNamespace(**(SUBSET if args.subset else FULL)), run_folder(args, "which")
    judges, pool, out = evaluation.Judges(args.model), workers(args), args.out or run / "report"
    each = size.people // 2
    for half in range(2):
        draw_people(judges, run / f"half{half}" / "people", FIRST + half * each, each, PHOTOS)
    write_whole(run / "prompts.txt", PROMPTS.encode())
    if pool:
        side_by_side(pool, [(measure, half, size, run, args) for half in range(2)], "halves of the people")
    halves = [measure(half, size, run, args) for half in range(2)]
    rows = compare_rules(halves, list(size.iters))
    text = f"{table(rows)}\n\n{2 * each} people. {verdict(rows)}\n"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "which.json", json.dumps({"rules": rows, "people": halves, "verdict": verdict(rows)},
                                               indent=1).encode())
    write_whole(out / "which.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(run_script("paper.which", which))
