"""R-FaceSim: does a picture look like the person, or only like the photo?

    python eval_rfacesim.py --data people/ --images results/
    python eval_rfacesim.py --data face.jpg --images compare/    # output of sample.py --compare

    people/[man|woman/]<identity>/<pictures>         real pictures
    people/[man|woman/]<pictures>                    one picture per person: CLIP-T only
    results/<method>/<identity>/<prompt>_<seed>.png  <prompt>: its number in --prompts, from 0

One picture of each identity is the reference, the one that the method was given. R-FaceSim compares
generated pictures with the *other* real pictures, FaceSim with the reference, CLIP-T with the
prompt. All three are cosines. --data also takes photo files, the reference first: they belong to
one identity called `person`. A single photo has no R-FaceSim.

Sources: "Meta-LoRA" (Topal et al. 2025), Algorithm 3, appendix F, Tables 4 and 5; facenet-pytorch
for MTCNN's crop (160 pixels, no margin) and InceptionResnetV1 (VGGFace2); CLIP ViT-B/32.
Deviation: Algorithm 3 does not say how to score a picture without a face. Here both face scores
leave it out and the share of faces found is reported, or it counts as 0 (--no-face-as-zero).
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
from support.common import (JsonFile, Parser, check_writable, digest, expand, note, pick_device,
                            positive, run_script, write_whole)
from support.finding import model_name
from support.judges import (CLIP, META_PHD, Judges, Picture, check_complete, find_pictures,
                            own_folder, prompts_for)
from support.people import Person, complain, read_people, tell
from support.sheets import PROMPTS, tables


# --------------------------------------------------------------------------------------------------
# Algorithm 3


def face_scores(
    generated: Tensor,
    reference: Tensor,
    tests: Tensor,
) -> tuple[float, float | None]:
    """FaceSim and R-FaceSim of one generated face; embeddings of norm 1.

    generated, reference (E,); tests (n, E). R-FaceSim is None without test pictures."""
    facesim = (reference @ generated).item()
    if len(tests) == 0:
        return facesim, None
    return facesim, (tests @ generated).mean().item()


def mean_by_key(keys: Iterable, values: Iterable[float]) -> dict:
    """{key: mean of its values}, for keys and values in parallel."""
    groups = {}
    for key, value in zip(keys, values):
        groups.setdefault(key, []).append(value)
    return {key: sum(group) / len(group) for key, group in groups.items()}


def summarise(
    rows: list[dict],
    people: list[Person],
    metric: str,
    no_face_as_zero: bool = False,
) -> dict | None:
    """Mean of a metric over identities, its standard error, and counts; None without any value.

    rows: from `score`, of one method. A picture without a face is left out, or counts as 0. With a
    face in every picture, the mean is Algorithm 3's."""
    scored = [row for row in rows if metric in row]
    with_face = [row for row in scored if row[metric] is not None]
    counted = scored if no_face_as_zero else with_face
    if not counted:
        return None

    # 1. over the seeds of a prompt
    keys = [(row["identity"], row["number"]) for row in counted]
    values = [row[metric] or 0.0 for row in counted]
    by_prompt = mean_by_key(keys, values)
    # 2. over the prompts of a reference; with --reference all, each reference is a Person
    keys = [person for person, _ in by_prompt]
    by_reference = mean_by_key(keys, by_prompt.values())
    # 3. over the references of an identity
    identities = {person.name: person.identity for person in people}
    keys = [identities[person] for person in by_reference]
    by_identity = mean_by_key(keys, by_reference.values())

    n = len(by_identity)
    mean = sum(by_identity.values()) / n
    error = None
    if n > 1:
        variance = sum((value - mean) ** 2 for value in by_identity.values()) / (n - 1)
        error = round((variance / n) ** 0.5, 6)
    return {
        "mean": round(mean, 6),
        "error": error,
        "identities": n,
        "pictures": len(counted),
        "of": len(scored),
        "found": round(len(with_face) / len(scored), 6),
    }


def summarise_method(rows: list[dict], people: list[Person], no_face_as_zero: bool) -> dict:
    """All three metrics of one method."""
    # as in the paper, CLIP-T comes from the people with a single picture if there are any
    single = {person.name for person in people if not person.tests}
    text_rows = [row for row in rows if row["identity"] in single] or rows
    return {
        "r_facesim": summarise(rows, people, "r_facesim", no_face_as_zero),
        "facesim": summarise(rows, people, "facesim", no_face_as_zero),
        "clip_t": summarise(text_rows, people, "clip_t"),
    }


# --------------------------------------------------------------------------------------------------
# From pictures to scores


class Real(NamedTuple):
    """The real pictures of a person."""
    reference: Tensor                # (E,)
    tests: Tensor                    # (n, E); n is 0 for a single photo
    key: str                         # digests of the files


def embed_real(judges: Judges, people: list[Person]) -> dict[str, Real]:
    """{person: Real} of all with test pictures, or of the only person. ValueError: no face."""
    judged = [person for person in people if person.tests or len(people) == 1]
    paths = set()
    for person in judged:
        paths.update([person.reference, *person.tests])

    crops = {}
    several, problems = [], []
    for path in tqdm(sorted(paths), "real pictures", leave=False, disable=None):
        image = photos.read_photo(path)
        crops[path] = judges.crop(image)
        if crops[path] is None:
            problems.append(f"no face found in the real picture {path}: take it out of the folder")
        if judges.count(image) > 1:
            several.append(str(path))
    if several:
        note(f"several faces in real pictures, of which the largest counts: {', '.join(several)}")
    complain(problems, "eval_rfacesim.py")

    embeddings = dict(zip(crops, judges.embed(list(crops.values()))))
    real = {}
    for person in judged:
        files = [person.reference, *person.tests]
        embedded = torch.stack([embeddings[path] for path in files])
        key = " ".join(digest(path.read_bytes()) for path in files)
        real[person.name] = Real(embedded[0], embedded[1:], key)
    return real


def judge(judges: Judges, real: Real | None, images: dict[Picture, Image.Image]) -> list[dict]:
    """The scores of one person's pictures, as `score` describes them."""
    if not images:
        return []
    texts = [picture.text for picture in images]
    matches = judges.match(list(images.values()), texts)
    scores = [{"clip_t": round(float(value), 6)} for value in matches]
    if real is None:
        return scores

    crops, with_face = [], []
    for row, image in zip(scores, images.values()):
        row["facesim"] = None
        if len(real.tests):
            row["r_facesim"] = None
        crop = judges.crop(image)
        if crop is not None:
            crops.append(crop)
            with_face.append(row)
    for row, generated in zip(with_face, judges.embed(crops)):
        facesim, r_facesim = face_scores(generated, real.reference, real.tests)
        row["facesim"] = round(facesim, 6)
        if r_facesim is not None:
            row["r_facesim"] = round(r_facesim, 6)
    return scores


def score(
    judges: Judges,
    real: Real | None,
    pictures: list[Picture],
    kept: Path,
) -> tuple[list[dict], list[str]]:
    """A dict for each picture of one person, and a line for each that cannot be read.

    clip_t: cosine with the prompt. facesim: with the reference. r_facesim: mean over the test
    pictures. The face scores are None where no face was found, and absent without real pictures
    to compare with. Scores are cached in the folder `kept`, by everything they depend on: the
    judges, the bytes of all pictures, and the prompts."""
    images, problems = {}, []
    for picture in pictures:
        try:
            images[picture] = photos.read_photo(picture.path)
        except ValueError as error:
            problems.append(f"not scored: {error}")

    files = [(picture.text, digest(picture.path.read_bytes())) for picture in images]
    key = json.dumps([judges.names, real.key if real else "", files])
    path = kept / f"{digest(key.encode())}.json"
    if not path.is_file():
        numbers = judge(judges, real, images)
        kept.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"numbers": numbers}))

    rows = []
    for picture, numbers in zip(images, JsonFile(path)["numbers"]):
        row = {
            "method": picture.label,
            "identity": picture.person,
            "prompt": picture.text,
            "number": picture.prompt,
            "seed": picture.seed,
        }
        rows.append(row | numbers)
    return rows, problems


def score_all(
    judges: Judges,
    real: dict[str, Real],
    pictures: list[Picture],
    kept: Path,
) -> tuple[dict[str, list[dict]], list[str]]:
    """Scores of all pictures, {method: [dict]}, and a line for each that cannot be read."""
    groups = {}
    for picture in pictures:
        groups.setdefault((picture.label, picture.person), []).append(picture)

    rows, problems = {}, []
    for (label, person), group in tqdm(groups.items(), "scoring", unit="person", disable=None):
        scored, unread = score(judges, real.get(person), group, kept)
        rows.setdefault(label, []).extend(scored)
        problems += unread
    return rows, problems


# --------------------------------------------------------------------------------------------------
# The report


def title_of(label: str) -> dict:
    return {"title": label}


def score_references(real: dict[str, Real], people: list[Person]) -> dict | None:
    """R-FaceSim of the reference photos themselves."""
    rows = []
    for name, person in real.items():
        if len(person.tests):
            value = (person.tests @ person.reference).mean().item()
            rows.append({"identity": name, "number": 0, "r_facesim": value})
    return summarise(rows, people, "r_facesim")


def report(
    out: Path,
    people: list[Person],
    rows: dict[str, list[dict]],
    real: dict[str, Real],
    judges: Judges,
    problems: list[str],
    no_face_as_zero: bool = False,
    paper: bool = False,
    base: str = "–",
    settings: dict | None = None,
    describe: Callable[[str], dict] = title_of,
) -> list[dict]:
    """Writes scores.json and tables.md -> a summary of each method."""
    methods, pictures = [], []
    for label, method_rows in rows.items():
        pictures += method_rows
        if method_rows:
            summary = summarise_method(method_rows, people, no_face_as_zero)
            methods.append({"label": label} | describe(label) | summary)
    if not methods:
        raise ValueError("none of the pictures can be read")

    files = {}
    for person in people:
        files[person.name] = {
            "identity": person.identity,
            "gender": person.gender,
            "reference": person.reference.name,
            "more": [path.name for path in person.more],
            "tests": [path.name for path in person.tests],
        }
    packages = "torch", "transformers", "facenet-pytorch"
    reference_photo = score_references(real, people)
    scores = {
        "settings": (settings or {}) | {"no_face_as_zero": no_face_as_zero},
        "judges": judges.names,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "methods": methods,
        "reference_photo": reference_photo,
        "people": files,
        "problems": problems,
        "pictures": pictures,
    }
    published = JsonFile(META_PHD / "published.json") if paper else None
    text = tables(methods, reference_photo, base, published, no_face_as_zero)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "scores.json", json.dumps(scores, indent=1))
    write_whole(out / "tables.md", text)
    return methods


# --------------------------------------------------------------------------------------------------
# The command


def add_options(add: Callable[..., object]) -> None:
    """The options that this command and paper/compare.py share; add: a parser's add_argument."""
    add("--data", type=Path, nargs="+", required=True, metavar="DIR",
        help="real pictures: DIR/[man|woman/]<identity>/<pictures>; or DIR/[man|woman/]<pictures>, "
        "one per person, for CLIP-T only; or photo files of one person, who is called `person`")
    add("--out", type=Path, default=Path("report"), help="folder of all results (default: report)")
    add("--model", type=model_name, default="flux-dev",
        help="baby, or a folder that may hold its own judges and prompts (default: flux-dev)")
    add("--prompts", type=Path,
        help="text file; [man/woman] is filled in by gender, `man: ...` is for men only (default: "
        "prompts.txt in --images, else the model's, else paper/meta_phd/unsplash.txt, or ffhq.txt "
        "for people with a single picture)")
    add("--reference", choices=("first", "all"), default="first",
        help="first: the picture named reference.*, or else the first by name; all: each picture "
        "in turn (default: first)")
    add("--gender", choices=("man", "woman"),
        help="gender of people whose folder and captions do not say (default: unknown)")
    add("--no-face-as-zero", action="store_true",
        help="count a picture without a face as 0 (default: leave it out)")
    add("--face-weights", type=Path, metavar="FILE",
        help="state dict of InceptionResnetV1 (default: the model's own face network, else "
        "facenet-pytorch's, from its cache or downloaded)")
    add("--clip", metavar="DIR",
        help=f"folder of a CLIP model (default: the model's own, else {CLIP} from the hub)")
    add("--paper", action="store_true",
        help="add the paper's published numbers, marked as quoted (default: leave them out)")
    add("--device", help="cuda, mps, or cpu (default: the best available)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="eval_rfacesim.py",
        allow_abbrev=False,
        description="Scores generated pictures: R-FaceSim, FaceSim, and CLIP-T.",
    )
    add = parser.add_argument
    add_options(add)
    add("--images", type=Path, required=True, metavar="DIR",
        help="pictures to score: DIR/<method>/<identity>/<number of the prompt, from 0>_<seed>.png")
    add("--seeds", type=positive, help="pictures per prompt (default: all that are there)")
    return parser.parse_args(argv)


def evaluate(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.images.is_dir():
        raise ValueError(f"no such folder: {args.images}")
    args.data = [Path(name) for name in expand(args.data)]
    check_writable(args.out, "--out", args.data)

    # what there is to score, before any network is loaded
    people = read_people(args.data, args.reference, args.gender)
    prompt_file = args.prompts
    beside_images = args.images / PROMPTS
    if prompt_file is None and beside_images.is_file():
        prompt_file = beside_images
    prompts = prompts_for(people, prompt_file, own_folder(args.model))
    pictures, unknown = find_pictures(args.images, prompts)
    pictures, incomplete = check_complete(pictures, people, prompts, args.seeds)
    if not pictures:
        nobody = f"--images {args.images} holds no picture of anybody in --data"
        complain([*unknown, *incomplete, nobody], "eval_rfacesim.py")

    judges = Judges(args.model, args.face_weights, args.clip, pick_device(args.device))
    real = embed_real(judges, people)
    rows, unread = score_all(judges, real, pictures, args.out / "parts")
    problems = unknown + incomplete + unread
    tell(problems)

    report(
        args.out,
        people,
        rows,
        real,
        judges,
        problems,
        no_face_as_zero=args.no_face_as_zero,
        paper=args.paper,
        settings={"reference": args.reference},
    )
    print((args.out / "tables.md").read_text("utf-8"))
    print(f"{args.out}: scores.json, tables.md")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 130 Ctrl-C; rerun the command to resume."""
    return run_script("eval_rfacesim.py", evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
