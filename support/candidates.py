"""The LoRAs of one person that eval_rfacesim.py --loras chooses among: files, photos, prompts, what is shown.

A candidate's iterations and the photos it was trained on are what its metadata say; of other trainers' files
the iterations are also looked for in kohya's and ai-toolkit's fields, and at the end of the name.
"""
import json
import re
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from flux_model import FluxConfig
from support.checkpoints import (add_speed_options, autoencoder_fingerprint, check_fit, find_model,
                                 flux_files, flux_fingerprint, is_small, model_defaults, pick_dtype,
                                 text_fingerprints)
from support.common import (check_apart, check_out_file, digest, free, note, pick_device, positive,
                            read_prompts, save_figure, side, use_threads, write_whole)
from support.finding import model_words
from support.folders import Captions, unused
from support.identities import GENDERS, Person, Picture, complain, faults, fill, own_folder
from support.lora_files import load_loras, read_metadata
from support.photos import image_files
from support.sheets import sheet
from support.speed import Work

BASE = "no LoRA"                                 # the label of what is drawn without one
LARGEST = 512                                    # pixels of a side: larger pictures are for later
STEPS = 15                                       # of 30
PROMPTS = (                                      # of Meta-PHD, those that are the same for men and women
    "A [man/woman] standing in a sunlit urban plaza, facing directly toward the camera with a fully "
    "visible, highly detailed face and direct eye contact.",
    "A [man/woman] in a relaxed, stylish ensemble, posed on a quiet beach at sunset, with a fully visible, "
    "richly detailed face and clear eye contact.",
    "A [man/woman] standing in the middle of a desert, wearing a long flowing scarf, looking at the camera "
    "as a sandstorm approaches.",
    "A pop-art style portrait of a [man/woman], bright colors and bold outlines.",
    "A painting of a [man/woman] in Van Gogh style, expressive brush strokes, looking at the viewer.",
    "A [man/woman] as an ink wash painting, traditional Asian art style, serene expression.")


class Candidate(NamedTuple):
    label: str                       # a row of the sheet
    path: Path | None = None         # None: the model as it is
    key: str = "none"                # of the file's bytes
    rank: int = 0
    iterations: int | None = None    # None: nobody says
    trained_on: tuple[str, ...] = () # digests of photos; empty: it does not say
    caption: str = ""                # of its crops

    @property
    def run(self) -> str:
        """What its name has in common with the others of its run: all but the number of iterations."""
        number = rf"[-_. ]*(i|steps?)?(0*{self.iterations}(?!\d)|\d{{6}}$)"
        return re.sub(number, "", self.label) or self.label


class Plan(NamedTuple):
    """All that is decided before anything is drawn."""
    candidates: list[Candidate]      # the base first, then in order of training
    person: Person
    likeness: str                    # what its numbers are
    pictures: list[Picture]
    settings: dict

# What is given ----------------------------------------------------------------------------------------------

def add_lora_options(add: Callable[..., object]) -> None:
    """For the parser of eval_rfacesim.py."""
    add("--out-lora", type=Path, metavar="FILE", help="copy the recommended one here; "
        "refused while eval_rfacesim.py has no RULE")
    add("--size", type=side, help="pixels of a side (default: the model's, at most 512)")
    add("--steps", type=positive, help="Euler steps (default: 15; schnell: 4)")
    add("--seed", type=int, default=0, help="the first, of the noise (default: 0)")
    add_speed_options(add, training=False, clip="--model-clip")


def which_command(args: Namespace) -> str:
    """A line with the command that compares what a run of personalize.py has saved; "" where that is one."""
    names = [args.out.with_name(f"{args.out.stem}-{i:06d}.safetensors") for i in sorted({*args.save_at})]
    names += [args.out] * (args.iters not in args.save_at)
    words = "--loras", *map(str, names), "--data", *map(str, args.photos)
    return f"\nwhich one?  python eval_rfacesim.py {model_words(args, 'model-clip')}" + shlex.join(words) \
        if args.save_at else ""


def check_words(args: Namespace, parser: ArgumentParser, has_rule: bool) -> None:
    """ValueError for options of the other half of eval_rfacesim.py, and for what cannot be written."""
    others = ("reference", "paper") if args.loras else (
        "out_lora", "size", "steps", "seed", "fp8", "offload", "compile", "model_ae", "model_clip",
        "model_t5", "model_tokenizers")
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            option = name.replace("_", "-").replace("model-ae", "ae").replace("model-t", "t")
            raise ValueError(f"--{option} does nothing with --{'loras' if args.loras else 'images'}")
    if args.images and not args.images.is_dir():
        raise ValueError(f"no such folder: {args.images}")
    check_apart(args.out, "--out", args.data)
    if args.out_lora:
        check_out_file(args.out_lora, ".safetensors", "--out-lora")
        if args.out_lora.resolve() in {path.resolve() for path in args.loras}:
            raise ValueError(f"--out-lora would overwrite the candidate {args.out_lora}")
        if not has_rule:
            raise ValueError("--out-lora needs a recommendation, and there is none: look at the sheet")
    if args.loras and not 0 <= args.seed <= 2 ** 63 - (args.seeds or 1):
        raise ValueError(f"--seed is an integer from 0 to {2 ** 63 - 1}, not {args.seed}")


def iterations_of(path: Path, metadata: dict[str, str]) -> int | None:
    """Steps of training of a LoRA; None where neither metadata nor name tell."""
    step = re.search(r'"step": *(\d+)', metadata.get("training_info", ""))                    # of ai-toolkit
    name = re.search(r"[-_. ](?:steps?)?(\d{2,})$", path.stem) or re.search(r"[-_](\d+)$", path.parent.name)
    found = metadata.get("iterations"), metadata.get("ss_steps"), step and step[1], name and name[1]
    return next((int(text) for text in found if text and text.isdecimal()), None)


def labels_of(paths: list[Path]) -> list[str]:
    """Of each file as many of its last folders as tell it from the others, without the suffix."""
    parts = [path.absolute().with_suffix("").parts for path in paths] + [(BASE,)]
    tells = lambda own, n: sum(other[-n:] == own[-n:] for other in parts) == 1
    return ["/".join(own[-next(n for n in range(1, len(own) + 1) if tells(own, n) or n == len(own)):])
            for own in parts[:-1]]


def read_candidates(paths: list[Path], config: FluxConfig) -> list[Candidate]:
    """The base, then the LoRAs in order of training (of the command line, where one does not say), each
    content once. ValueError, after a line for each: files that are broken, or no LoRA of this model."""
    files, read, problems = {}, [], []
    for path in paths:
        try:
            key = digest(path.read_bytes()) if path.is_file() else str(path)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
            continue
        if (same := files.setdefault(key, path)).resolve() != path.resolve():
            note(f"{path} is the same as {same}, and drawn once")
    for key, path in tqdm(files.items(), "LoRAs", leave=False, disable=None):
        try:
            ((lora, _),) = load_loras([(str(path), 1.0)], config)
            read.append((key, path, max(len(A) for A, _ in lora.values()), read_metadata(path)))
        except ValueError as error:
            problems.append(str(error))
    complain(problems)
    labels = labels_of([path for _, path, *_ in read])
    found = [Candidate(label, path, key, rank, iterations_of(path, metadata),
                       tuple(metadata.get("photo_digests", "").split()),
                       metadata.get("prompt") or metadata.get("modelspec.trigger_phrase", ""))
             for label, (key, path, rank, metadata) in zip(labels, read)]
    if all(candidate.iterations is not None for candidate in found):
        found.sort(key=lambda candidate: candidate.iterations)
    return [Candidate(BASE), *found]


def read_person(data: list[Path], candidates: list[Candidate]) -> tuple[Person, str]:
    """The person, whose tests are the photos that no LoRA was trained on, if there are such, else all; what
    a likeness to these is called. ValueError, after a line for each: unreadable photos, copies, no photo."""
    files = []
    for place in data:
        files += (found := image_files(place) if place.is_dir() else [place])
        if not found:
            raise ValueError(f"--data {place} holds no picture: name photos of the person, or their folder")
        if place.is_dir():
            captions = Captions(place)
            captions.used.update(text for path in found for text in captions.candidates(path))
            if line := unused(place, captions, folders=True):
                note(line)
    files = [*{path.resolve(): path for path in files}.values()]
    complain(faults(files))
    trained_on = {own for candidate in candidates for own in candidate.trained_on}
    seen = [path for path in files if digest(path.read_bytes()) in trained_on]
    new, names = [path for path in files if path not in seen], ", ".join(path.name for path in seen)
    silent = [candidate.label for candidate in candidates[1:] if not candidate.trained_on]
    if silent and len(files) > 1:
        note(f"{', '.join(silent)}: it is not known on which photos; likeness may be to these")
    if len(files) == 1 or not new:
        likeness = f"FaceSim to {names or files[0].name}; with other photos in --data it would be to the " \
            "person, not to the photo"
    else:
        likeness = f"R-FaceSim on {len(new)} photos" + (f", without {names}, trained on" if seen else "")
    first = (seen or files)[0]
    return Person("person", "person", None, first, tuple(new or files)), likeness


def read_words(args: Namespace, candidates: list[Candidate]) -> list[str]:
    """Prompts: of --prompts all, else six, evenly from the model's own or those above. [man/woman] is what
    --gender or the LoRAs' captions say, else a person."""
    captions = {candidate.caption for candidate in candidates if candidate.caption}
    told = {GENDERS[word] for text in captions for word in re.findall(r"[a-z]+", text.lower())
            if word in GENDERS}
    gender = args.gender or (told.pop() if len(told) == 1 else None)
    folder = own_folder(args.model)
    theirs = folder and folder / "prompts.txt"
    given = args.prompts or (theirs if theirs and theirs.is_file() else None)
    lines = read_prompts([], given) if given else PROMPTS
    filled = [fill(line.replace("[man/woman]", gender or "person"), gender) for line in lines]
    prompts = [*dict.fromkeys(text for text in filled if text)]
    if not args.prompts and len(prompts) > 6:
        prompts = [prompts[round(i * (len(prompts) - 1) / 5)] for i in range(6)]
    for text in sorted(captions):
        subject = re.sub(r"^.*?\bof (an? )?", "", text)
        if subject.lower() not in {"person", *GENDERS} and not any(subject in prompt for prompt in prompts):
            note(f"no prompt has the words {subject!r}, with which LoRAs were trained; --prompts FILE may")
    return prompts


def prepare(args: Namespace) -> Plan:
    """From a checked command line to all that is to be drawn; fills in the model and its defaults."""
    args.device = pick_device(args.device)
    args.folder = find_model(args.model, args)
    config, defaults = flux_files(args.folder)[1], model_defaults(args.folder)
    args.dtype = pick_dtype(args.device, args.folder)
    use_threads(args.device.type == "cpu" and is_small(args.folder))
    final = 30 if config.guidance_embed else 4
    args.size = args.size or min(defaults["resolution"], LARGEST)
    args.steps = args.steps or min(final, STEPS)
    args.guidance, args.work = defaults["guidance"], Work(args.size ** 2 // 256 + 512)
    check_fit(args, args.device, args.work)
    candidates = read_candidates(args.loras, config)
    person, likeness = read_person(args.data, candidates)
    prompts, seeds = read_words(args, candidates), range(args.seed, args.seed + (args.seeds or 1))
    settings = {"model": flux_fingerprint(args.folder), "autoencoder": autoencoder_fingerprint(args.folder),
                "text encoders": text_fingerprints(args.folder),
                "dtype": str(args.dtype) + " fp8" * args.fp8, "size": args.size, "steps": args.steps,
                "guidance": args.guidance}
    pictures = []
    for candidate in candidates:
        for seed, (i, text) in ((seed, own) for seed in seeds for own in enumerate(prompts)):
            key = digest(json.dumps([settings, candidate.key, text, seed]).encode())[:8]
            path = args.out / "pictures" / candidate.label / f"{i}_{seed}_{key}.png"
            pictures.append(Picture(candidate.label, person.name, i, seed, path, text))
    several = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    print(f"{len(candidates) - 1} LoRAs and the model without one, {len(prompts)} prompts, {several}: "
          f"{len(pictures)} pictures of {args.size} x {args.size}, {args.steps} steps (a final picture has "
          f"{defaults['resolution']} x {defaults['resolution']}, {final} steps)\nlikeness: {likeness}")
    return Plan(candidates, person, likeness, pictures, settings)


# What is shown ----------------------------------------------------------------------------------------------

def row_of(candidate: Candidate, summary: dict) -> dict:
    """A candidate's numbers: likeness and text are means of cosines. What has no face is said."""
    likeness, label = summary["r_facesim"], candidate.label
    faces = round(likeness["found"] * likeness["of"])
    if faces < likeness["of"] and candidate.path:
        none = "any" if not faces else f"{likeness['of'] - faces}"
        note(f"{label}: no face found in {none} of its {likeness['of']} pictures; likeness 0 for each")
    return {"label": label, "file": str(candidate.path or ""), "iterations": candidate.iterations,
            "rank": candidate.rank, "likeness": likeness["mean"], "text": summary["clip_t"]["mean"],
            "faces": faces, "pictures": likeness["of"]}


def table(rows: list[dict], taken: str | None) -> str:
    """Markdown: a line for the base and each candidate, percent."""
    lines = ["| | iterations | rank | likeness | text | sum | faces found |", "| --- |" + " --- |" * 6]
    for row in rows:
        cells = [row["label"], row["iterations"] or "", row["rank"] or "",
                 *(f"{100 * value:.1f}" for value in (row["likeness"], row["text"],
                                                      row["likeness"] + row["text"])),
                 f"{row['faces']} of {row['pictures']}"]
        strong = "**" * (row["label"] == taken)
        lines.append("".join(f"| {strong}{cell}{strong} " if cell else "| " for cell in cells) + "|")
    return "\n".join(lines)


def draw_curve(rows: list[dict], runs: dict[str, str], taken: str | None, path: Path) -> None:
    """Likeness and text against iterations, or the order given where a LoRA does not say; a line for each
    run; dotted the text score without a LoRA, a ring around what is taken."""
    from matplotlib.figure import Figure
    base, *rows = rows
    known = all(row["iterations"] is not None for row in rows)
    at = {row["label"]: row["iterations"] if known else i for i, row in enumerate(rows, 1)}
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), ("likeness", "text")):
        for i, run in enumerate(dict.fromkeys(runs.values())):
            own = [row for row in rows if runs[row["label"]] == run]
            axes.plot([at[row["label"]] for row in own], [100 * row[score] for row in own], "o-",
                      markersize=4, color=f"C{i % 10}", label=run)
        if score == "text":                      # its likeness, about 0, would press all others together
            axes.axhline(100 * base[score], color="grey", linestyle=":", linewidth=1, label=BASE)
        for row in rows:
            if row["label"] == taken:
                axes.plot(at[taken], 100 * row[score], "o", markersize=11, fillstyle="none", color="black")
        axes.set(xlabel="iterations" if known else "in the order given", ylabel=f"{score} (%)")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def show(args: Namespace, plan: Plan, rows: list[dict], taken: str | None, why: str, more: dict) -> None:
    """Sheet, curve, table and numbers into --out, the copy to --out-lora. rows: the base's, then the others';
    more: for scores.json."""
    paths, lines = {}, []
    for picture in plan.pictures:
        paths.setdefault(picture.label, []).append(picture.path)
    several = "seed {}: " if len({picture.seed for picture in plan.pictures}) > 1 else ""
    columns = [plan.person.reference.name, *(several.format(picture.seed) + picture.text
                                             for picture in plan.pictures if picture.label == BASE)]
    for row in rows:
        text = f"{row['label']}\n" + (f"{row['iterations']} iterations\n" if row["iterations"] else "") + \
            f"likeness {100 * row['likeness']:.1f}\ntext {100 * row['text']:.1f}\n" + \
            (f"faces {row['faces']} of {row['pictures']}\n" if row["faces"] < row["pictures"] else "") + \
            ("RECOMMENDED" if row["label"] == taken else "")
        lines.append((text, [plan.person.reference, *paths[row["label"]]]))
    sheet(args.out / "which.png", columns, lines, min(args.size, 256))
    draw_curve(rows, {own.label: own.run for own in plan.candidates[1:]}, taken, args.out / "curve.png")
    text = f"Percent; likeness: {plan.likeness}. {why}\n\n{table(rows, taken)}\n"
    write_whole(args.out / "which.md", text.encode())
    facts = {"settings": plan.settings, "likeness": plan.likeness, "base": rows[0], "candidates": rows[1:],
             "recommended": taken, "why": why} | more
    write_whole(args.out / "scores.json", json.dumps(facts, indent=1).encode())
    print(f"\n{table(rows, taken)}\n\n{why}")
    if args.out_lora and taken:
        (path,) = [own.path for own in plan.candidates if own.label == taken]
        write_whole(args.out_lora, path.read_bytes())
        print(f"{args.out_lora}: a copy of {path}")
