"""R-FaceSim: does it look like the person, or only like the photo?

    python eval_rfacesim.py --data people/ --images results/
    python eval_rfacesim.py --data face.jpg --images compare/        # what sample.py --compare has drawn

    people/[man|woman/]<identity>/<pictures>        real; one picture a person and no folders: CLIP-T alone
    results/<method>/<identity>/<prompt>_<seed>.png of any method; <prompt>: its number in --prompts, from 0

One picture of an identity is the reference, which the method was shown. R-FaceSim compares what is generated
with the *other* real pictures, FaceSim with the reference, CLIP-T with the prompt; all are cosines. Photos
themselves as --data, the reference first, are of the identity `person`; a single one has no R-FaceSim.

Sources: "Meta-LoRA" (Topal et al. 2025), Algorithm 3, appendix F, Tables 4 and 5; facenet-pytorch for MTCNN's
crop (160 pixels, no margin) and InceptionResnetV1 (VGGFace2); CLIP ViT-B/32. Deviation: Algorithm 3 does not
say what a picture without a face counts. Here it is left out of both face scores, and the share of faces
found is reported, or it counts as 0 (--no-face-as-zero).
"""
import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import support  # before torch: how its threads wait
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from support import photos
from support.common import (JsonFile, Parser, check_apart, digest, expand, note, pick_device, positive,
                            run_script, write_whole)
from support.finding import model_name
from support.judges import (CLIP, META_PHD, Judges, Picture, check_complete, find_pictures, own_folder,
                            prompts_for)
from support.people import Person, complain, read_people
from support.sheets import PROMPTS, tables

# Scores: Algorithm 3 ----------------------------------------------------------------------------------------


class Real(NamedTuple):
    """What is known of a person's real pictures."""
    reference: Tensor                # (E,)
    tests: Tensor                    # (n, E); n is 0 of a single photo
    key: str                         # of these files


def embed_real(judges: Judges, people: list[Person]) -> dict[str, Real]:
    """Of everybody with test pictures, or of the only person. ValueError names each without a face."""
    judged = [person for person in people if person.tests or len(people) == 1]
    paths, found = set(), {}
    for person in judged:
        paths |= {person.reference, *person.tests}
    paths = sorted(paths)
    bar = tqdm(paths, "real pictures", leave=False, disable=None)
    crops, several = {}, []
    for path in bar:
        image = photos.read_photo(path)
        crops[path] = judges.crop(image)
        if judges.count(image) > 1:
            several.append(str(path))
    if several:
        note(f"several faces in real pictures, of which the largest counts: {', '.join(several)}")
    complain([f"no face found in the real picture {path}: take it out of the folder"
              for path, crop in crops.items() if crop is None], "eval_rfacesim.py")
    embeddings = dict(zip(paths, judges.embed([*crops.values()])))
    for person in judged:
        files = person.reference, *person.tests
        own = torch.stack([embeddings[path] for path in files])
        key = " ".join(digest(path.read_bytes()) for path in files)
        found[person.name] = Real(own[0], own[1:], key)
    return found


def score(judges: Judges, real: Real | None, pictures: list[Picture],
          kept: Path) -> tuple[list[dict], list[str]]:
    """A dict for each picture of one person, and a line for each that cannot be read. They are kept in the
    folder `kept`, under what they depend on: the judges, the bytes of all pictures, the prompts.

    r_facesim: mean cosine with the test pictures; facesim: with the reference; both None where no face was
    found, absent where there is nothing to compare with. clip_t: cosine with the prompt.
    """
    images, problems = {}, []
    for picture in pictures:
        try:
            images[picture] = photos.read_photo(picture.path)
        except ValueError as error:
            problems.append(f"not scored: {error}")
    files = [(picture.text, digest(picture.path.read_bytes())) for picture in images]
    depends = [judges.names, real.key if real else "", files]
    path = kept / f"{digest(json.dumps(depends).encode())}.json"
    if not path.is_file():
        numbers = cosines(judges, real, images)
        kept.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"numbers": numbers}).encode())
    rows = []
    for picture, own in zip(images, JsonFile(path)["numbers"]):
        rows.append({"method": picture.label, "identity": picture.person, "prompt": picture.text,
                     "number": picture.prompt, "seed": picture.seed} | own)
    return rows, problems


def cosines(judges: Judges, real: Real | None, images: dict[Picture, Image.Image]) -> list[dict]:
    """As of `score`, of pictures that were read."""
    texts = [picture.text for picture in images]
    matches = judges.match([*images.values()], texts) if images else []
    numbers = [{"clip_t": round(float(value), 6)} for value in matches]
    if real is None:
        return numbers
    faces = []
    for own, image in zip(numbers, images.values()):
        own["facesim"] = None
        if len(real.tests):
            own["r_facesim"] = None
        crop = judges.crop(image)
        if crop is not None:
            faces.append((own, crop))
    embeddings = judges.embed([crop for _, crop in faces])
    for (own, _), embedding in zip(faces, embeddings):
        own["facesim"] = round((real.reference @ embedding).item(), 6)
        if len(real.tests):
            own["r_facesim"] = round((real.tests @ embedding).mean().item(), 6)
    return numbers


def score_all(judges: Judges, real: dict[str, Real], pictures: list[Picture],
              kept: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """Scores of all pictures, {method: [dict]}, and a line for each that cannot be read."""
    groups, rows, problems = {}, {}, []
    for picture in pictures:
        groups.setdefault((picture.label, picture.person), []).append(picture)
    for (label, person), some in tqdm(groups.items(), "scoring", unit="person", disable=None):
        own, unread = score(judges, real.get(person), some, kept)
        rows.setdefault(label, []).extend(own)
        problems += unread
    return rows, problems


def means(values: Iterable[tuple[object, float]]) -> dict[object, float]:
    """(key, value) pairs -> {key: mean of its values}."""
    groups = {}
    for key, value in values:
        groups.setdefault(key, []).append(value)
    return {key: sum(own) / len(own) for key, own in groups.items()}


def summarise(rows: list[dict], people: list[Person], metric: str,
              no_face_as_zero: bool = False) -> dict | None:
    """Mean of a metric over identities, its standard error, and the counts; None without any value.

    rows: of `score`, of one method. A person's score is the mean over prompts of the mean over seeds, an
    identity's the mean over its references. With every face found this is Algorithm 3's mean. A picture
    without a face counts as 0, or not at all: `pictures` of `of` then tells how many did.
    """
    values = [row for row in rows if metric in row]
    faces = [row for row in values if row[metric] is not None]
    counted = values if no_face_as_zero else faces
    if not counted:
        return None
    identity_of = {person.name: person.identity for person in people}
    prompts = means(((row["identity"], row["number"]), row[metric] or 0.0) for row in counted)
    persons = means((person, value) for (person, _), value in prompts.items())
    scores = means((identity_of[person], value) for person, value in persons.items()).values()
    n, middle, error = len(scores), sum(scores) / len(scores), None
    if n > 1:
        variance = sum((own - middle) ** 2 for own in scores) / (n - 1)
        error = round((variance / n) ** 0.5, 6)
    return {"mean": round(middle, 6), "error": error, "identities": n, "pictures": len(counted),
            "of": len(values), "found": round(len(faces) / len(values), 6)}


def summary_of(rows: list[dict], people: list[Person], no_face_as_zero: bool) -> dict:
    """All three metrics of one method; CLIP-T is of the one-picture people where there are any."""
    alone = {person.name for person in people if not person.tests}
    text_rows = [row for row in rows if row["identity"] in alone] or rows
    return {"r_facesim": summarise(rows, people, "r_facesim", no_face_as_zero),
            "facesim": summarise(rows, people, "facesim", no_face_as_zero),
            "clip_t": summarise(text_rows, people, "clip_t")}


def title_of(label: str) -> dict:
    return {"title": label}


def report(out: Path, people: list[Person], rows: dict[str, list[dict]], real: dict[str, Real],
           judges: Judges, problems: list[str], no_face_as_zero: bool = False, paper: bool = False,
           base: str = "–", settings: dict | None = None,
           describe: Callable[[str], dict] = title_of) -> tuple[list[dict], dict | None]:
    """scores.json and tables.md into `out` -> a summary of each method, and the numbers that are quoted."""
    methods, pictures, real_rows, shown = [], [], [], {}
    for label, own in rows.items():
        pictures += own
        if own:
            methods.append({"label": label, **describe(label)} | summary_of(own, people, no_face_as_zero))
    if not methods:
        raise ValueError("none of the pictures can be read")
    for name, own in real.items():
        if len(own.tests):
            value = (own.tests @ own.reference).mean().item()
            real_rows.append({"identity": name, "number": 0, "r_facesim": value})
    for person in people:
        shown[person.name] = {
            "identity": person.identity, "gender": person.gender, "reference": person.reference.name,
            "more": [path.name for path in person.more], "tests": [path.name for path in person.tests]}
    ceiling = summarise(real_rows, people, "r_facesim")
    quoted = JsonFile(META_PHD / "published.json") if paper else None
    versions = {name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "facenet-pytorch")}
    scores = {"settings": (settings or {}) | {"no_face_as_zero": no_face_as_zero},
              "judges": judges.names, "versions": versions, "methods": methods,
              "reference_photo": ceiling, "people": shown, "problems": problems, "pictures": pictures}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "scores.json", json.dumps(scores, indent=1).encode())
    write_whole(out / "tables.md", tables(methods, ceiling, base, quoted, no_face_as_zero).encode())
    return methods, quoted


# The command ------------------------------------------------------------------------------------------------


def add_options(add: Callable[..., object]) -> None:
    """What this command and paper/compare.py have in common, for the parser of a script."""
    add("--data", type=Path, nargs="+", required=True, metavar="DIR",
        help="real pictures: DIR/[man|woman/]<identity>/<pictures>, or DIR/[man|woman/]<pictures> of "
        "one person each, for CLIP-T alone; or photos of one person, who is called `person`")
    add("--out", type=Path, default=Path("report"), help="folder of all results (default: report)")
    add("--model", type=model_name, default="flux-dev",
        help="baby or a folder may have judges, prompts (default: flux-dev)")
    add("--prompts", type=Path, help="text file; [man/woman] by gender, `man: ...` for men only "
        "(default: prompts.txt in --images, else the model's, else paper/meta_phd/unsplash.txt, for "
        "one-picture people ffhq.txt)")
    add("--reference", choices=("first", "all"), default="first", help="the picture called reference.*, else "
        "the first by name; or each in turn")
    add("--gender", choices=("man", "woman"), help="of people whose folder and captions do not say")
    add("--no-face-as-zero", action="store_true", help="a picture without a face counts as 0, not as missing")
    add("--face-weights", type=Path, metavar="FILE", help="state dict of InceptionResnetV1 (default: "
        "facenet-pytorch's, from its cache or downloaded)")
    add("--clip", metavar="DIR", help=f"folder of a CLIP model (default: {CLIP} from the hub)")
    add("--paper", action="store_true", help="add the paper's published numbers, marked as quoted")
    add("--device", help="cuda, mps or cpu (default: the best there is)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="eval_rfacesim.py", allow_abbrev=False,
                    description="R-FaceSim, FaceSim, CLIP-T of finished pictures.")
    add = parser.add_argument
    add_options(add)
    add("--images", type=Path, required=True, metavar="DIR",
        help="pictures to score: DIR/<method>/<identity>/<number of the prompt, from 0>_<seed>.png")
    add("--seeds", type=positive, help="pictures of each prompt (default: all there are)")
    return parser.parse_args(argv)


def evaluate(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.images.is_dir():
        raise ValueError(f"no such folder: {args.images}")
    args.data = [Path(name) for name in expand(args.data)]
    check_apart(args.out, "--out", args.data)
    people = read_people(args.data, args.reference, args.gender)
    drawn = args.images / PROMPTS
    own_prompts = args.prompts or (drawn if drawn.is_file() else None)
    prompts = prompts_for(people, own_prompts, own_folder(args.model))
    pictures, problems = find_pictures(args.images, prompts)
    pictures, incomplete = check_complete(pictures, people, prompts, args.seeds)
    if not pictures:
        nobody = f"--images {args.images} holds no picture of anybody in --data"
        complain([*problems, *incomplete, nobody], "eval_rfacesim.py")
    judges = Judges(args.model, args.face_weights, args.clip, pick_device(args.device))
    real = embed_real(judges, people)
    rows, unread = score_all(judges, real, pictures, args.out / "parts")
    for problem in (problems := problems + incomplete + unread):
        note(" ".join(problem.split()))
    report(args.out, people, rows, real, judges, problems, args.no_face_as_zero, args.paper,
           settings={"reference": args.reference})
    print((args.out / "tables.md").read_text("utf-8"))
    print(f"{args.out}: scores.json, tables.md")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 130 Ctrl-C; the same command goes on."""
    return run_script("eval_rfacesim.py", evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
