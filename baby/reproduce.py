"""The paper's comparison in miniature: does a meta-learned LoMD beat a plain LoRA on people never seen?

    python baby/reproduce.py --subset                 # minutes: 8 people, rank 1, one seed of noise and of training
    python baby/reproduce.py                          # hours: 48 people, ranks 1 to 16, 3 seeds of noise, 2 of training

Stages, each by eval_rfacesim.py, each going on where it was stopped:
  people    48 TEST identities and 8 CHOOSE identities, 6 photos of each, in every one of which MTCNN finds a face
  rates     every method at several learning rates on the CHOOSE people                     -> run/rates, rates.json
  runs      every method, rank and number of iterations, for each seed of training          -> run/seed0, run/seed1
  report    both seeds together: tables, figures, contact sheets                            -> --out

The learning rate of a method is the one with the highest R-FaceSim (a picture without a face counts as 0) among those that
keep KEEP of the text score that the model has without any LoRA. random-lomd is Meta-LoRA over a random frozen A, at r1 of
the learned one; `none` is the floor, the reference photo itself the ceiling.

Source: "Meta-LoRA" (Topal et al. 2025), section 4 and appendices D, F and I.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_rfacesim as evaluation  # noqa: E402
import faces  # noqa: E402
from flux_model import JsonFile, Parser, find_model, run_script  # noqa: E402
from meta_train import write_whole  # noqa: E402
from personalize import ITERATIONS  # noqa: E402

METHODS = ("lora", "lora-crops", "random-lomd", "meta-lora")
RATES, KEEP = (3e-4, 1e-3, 3e-3, 1e-2), 0.85
FULL = dict(people=48, choose=8, ranks=(1, 2, 4, 8, 16), iters=(250, 375, 500, 625, 750), noises=3, trainings=2)
SUBSET = dict(people=8, choose=4, ranks=(1,), iters=(250, 375, 625), noises=1, trainings=1)
PHOTOS, SIDE = 6, 384                                     # of each person, the first as the reference; pixels


def draw_people(judges, folder: Path, first: int, count: int):
    """`count` identities from seed `first`, PHOTOS photo-style pictures each; a picture without a face is drawn anew. The
    reference is nearly frontal, as one would choose it."""
    for seed in tqdm(range(first, first + count), f"people in {folder.name}", disable=None, leave=False):
        who, index = faces.identity(seed), 0
        person = folder / who["gender"] / f"{seed}"
        person.mkdir(parents=True, exist_ok=True)
        for i in range(PHOTOS):
            path = person / f"{i}.png"
            while not path.is_file():
                options = dict(style="photo", yaw=float(np.random.default_rng([seed, 8]).uniform(-8, 8))) if i == 0 else dict(style="photo")
                image = Image.fromarray(faces.sample(seed, 1000 * i + index, SIDE, SIDE, **options)[0])
                index += 1
                if judges.crop(image) is not None:
                    evaluation.save_png(image, path, {})


def evaluate(*words):
    """eval_rfacesim.py with these words -> its scores.json. Its own table is not shown."""
    words = [str(word) for word in words]
    evaluation.evaluate(words, quiet=True)
    return JsonFile(Path(words[words.index("--out") + 1]) / "scores.json")


def choose_rates(common: list, data: Path, run: Path, methods: tuple) -> dict[str, float]:
    """The learning rate of each method, by people of their own; what was seen goes to rates.json."""
    tried = {}
    for rate in RATES:
        scores = evaluate(*common, "--data", data, "--methods", "none", *methods, "--lr", rate, "--seeds", 1, "--no-face-as-zero",
                          "--out", run / "rates" / f"{rate:g}")
        for row in scores["methods"]:
            tried.setdefault(row["method"], {})[f"{rate:g}"] = {name: row[name]["mean"] for name in ("r_facesim", "clip_t")}
    floor = next(iter(tried.pop("none").values()))["clip_t"]
    chosen = {}
    for method, by_rate in tried.items():
        kept = {rate: own for rate, own in by_rate.items() if own["clip_t"] >= KEEP * floor} or \
            {rate: own for rate, own in by_rate.items() if own["clip_t"] == max(o["clip_t"] for o in by_rate.values())}
        chosen[method] = float(max(kept, key=lambda rate: kept[rate]["r_facesim"]))
    write_whole(run / "rates.json", json.dumps({"chosen": chosen, "text score without a LoRA": floor, "tried": tried}, indent=1).encode())
    return chosen


def together(people: list, runs: list[dict]) -> tuple[list, dict[str, list[dict]]]:
    """Scores of several seeds of training as of one evaluation: everybody is there once for each seed, as one identity."""
    persons = [person._replace(name=f"{person.name} seed {seed}") for seed in range(len(runs)) for person in people]
    rows = {}
    for seed, scores in enumerate(runs):
        for row in scores["pictures"]:
            rows.setdefault(row["method"], []).append(row | {"identity": f"{row['identity']} seed {seed}"})
    return persons, rows


def difference(rows: dict, people: list, one: str, other: str, metric: str) -> dict:
    """Mean over identities of one method's score less another's, its standard error and n: the same people, so paired."""
    identities, gaps = sorted({p.identity for p in people}), []
    for identity in identities:
        own = [p for p in people if p.identity == identity]
        names = {p.name for p in own}
        a, b = (evaluation.summarise([r for r in rows[label] if r["identity"] in names], own, metric, True) for label in (one, other))
        gaps.append(a["mean"] - b["mean"])
    return {"mean": float(np.mean(gaps)), "error": float(np.std(gaps, ddof=1) / len(gaps) ** 0.5), "identities": len(gaps)}


def reproduce(argv=None):
    parser = Parser(prog="reproduce.py", description="LoRA, LoRA + crops and Meta-LoRA on people never seen.", allow_abbrev=False)
    add = parser.add_argument
    add("--subset", action="store_true", help="8 people, rank 1, 250, 375 and 625 iterations, one seed of noise and of training")
    add("--model", default="baby", help="baby (default), or a folder like it")
    add("--lomd", type=Path, help="weights of stage 1 (default: the model's own)")
    add("--run", type=Path, help="all that is made on the way (default: baby/run/reproduce, with --subset baby/run/subset)")
    add("--out", type=Path, help="tables, figures and scores.json (default: report in --run)")
    add("--people", type=int, help="of the comparison (default: 48)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    size = SimpleNamespace(**(SUBSET if args.subset else FULL))
    size.people = args.people or size.people
    run = args.run or Path(__file__).parent / "run" / ("subset" if args.subset else "reproduce")
    if not 2 <= size.people <= 500:
        raise ValueError(f"--people is 2 to 500, not {size.people}")

    judges = evaluation.Judges(args.model)
    draw_people(judges, run / "people", faces.TEST.start + 3000, size.people)
    draw_people(judges, run / "choose", faces.CHOOSE.start + 500, size.choose)
    common = ["--model", args.model, *(["--lomd", args.lomd] if args.lomd else []), *(["--device", args.device] if args.device else [])]
    rates = choose_rates(common, run / "choose", run, METHODS)
    print(f"learning rates: {', '.join(f'{method} {rate:g}' for method, rate in rates.items())}")
    runs = [evaluate(*common, "--data", run / "people", "--methods", "none", *METHODS, "--ranks", *size.ranks, "--iters", *size.iters,
                     "--seeds", size.noises, "--seed", seed, "--lr", *(f"{method}={rate}" for method, rate in rates.items()),
                     "--out", run / f"seed{seed}") for seed in range(size.trainings)]
    report(args, run, size, rates, runs, judges)


def report(args, run: Path, size, rates: dict, runs: list[dict], judges):
    """All seeds of training together, and the one difference that the paper is about, with its standard error."""
    people = evaluation.read_people([run / "people"])
    persons, rows = together(people, runs)
    prompts, real = evaluation.prompts_for(people, None, find_model(args.model)), evaluation.embed_real(judges, people)
    pictures = [evaluation.Picture(label, p.name, i, seed, run / "seed0" / "images" / label / p.name / f"{i}_{seed}.png", text)
                for label in rows for p in people for seed in range(size.noises) for i, text in enumerate(prompts[p.name])]
    ours, theirs = (f"{method}_r1_i{ITERATIONS[kind]}" for method, kind in (("meta-lora", "meta-lora"), ("lora-crops", "lora")))
    gaps = {metric: difference(rows, persons, ours, theirs, metric) for metric in ("r_facesim", "clip_t")}
    settings = {"learning rates": rates, "seeds of training": size.trainings, "seeds of noise": size.noises, f"{ours} less {theirs}": gaps}
    evaluation.report(SimpleNamespace(out=args.out or run / "report", images=None, model=args.model, reference="first",
                                      no_face_as_zero=True, paper=False, settings=settings),
                      persons, pictures, rows, {p.name: real[name] for p in persons for name in [p.name.split()[0]]}, judges, [], people)
    for metric, gap in gaps.items():
        print(f"{metric}: {ours} less {theirs}: {100 * gap['mean']:+.2f} ({100 * gap['error']:.2f}), n = {gap['identities']}")


if __name__ == "__main__":
    sys.exit(run_script("reproduce.py", reproduce))
