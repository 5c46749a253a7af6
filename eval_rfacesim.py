"""R-FaceSim: does a picture look like the person, or only like the photo?

    python eval_rfacesim.py --data people/ --images results/
    python eval_rfacesim.py --data face.jpg --images compare/    # output of sample.py --compare

    people/[man|woman/]<identity>/<pictures>         real pictures
    people/[man|woman/]<pictures>                    one picture per person: CLIP-T only
    results/<method>/<identity>/<prompt>_<seed>.png  <prompt>: its number in --prompts, from 0;
                                                     --reference all: <identity>@<its file's stem>

One picture of each identity is the reference, the one that the method was given. R-FaceSim compares
generated pictures with the *other* real pictures, FaceSim with the reference, CLIP-T with the
prompt. All three are cosines. --data also takes photo files, the reference first: they belong to
one identity called `person`. A single photo has no R-FaceSim.

Sources: "Meta-LoRA" (Topal et al. 2025), Algorithm 3, appendix F, Tables 4 and 5; facenet-pytorch
for MTCNN's crop (160 pixels, no margin) and InceptionResnetV1 (VGGFace2); CLIP ViT-B/32.
Deviation: Algorithm 3 does not say how to score a picture without a face. Here both face scores
leave it out and the share of faces found is reported, or it counts as 0 (--no-face-as-zero).
"""
import importlib.metadata
import json
import statistics
import sys
from argparse import Namespace
from contextlib import suppress
from functools import partial
from pathlib import Path

import support  # before torch: how its threads wait
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from support import photos
from support.common import (JsonFile, Parser, check_writable, digest, expand, note, pick_device,
                            progress, run_script, write_whole)
from support.judges import (META_PHD, Judges, Picture, add_options, find_missing, find_pictures,
                            own_file, prompts_for)
from support.people import Person, complain, read_people, tell
from support.sheets import PROMPTS, write_report


# --------------------------------------------------------------------------------------------------
# Algorithm 3


def face_scores(generated: Tensor, reference: Tensor, tests: Tensor) -> dict[str, float]:
    """FaceSim and R-FaceSim of one generated face; embeddings of norm 1.

    generated, reference (E,); tests (n, E). Without test pictures there is no R-FaceSim."""
    scores = {"facesim": (reference @ generated).item()}
    if len(tests):
        scores["r_facesim"] = (tests @ generated).mean().item()
    return scores


def mean_over_last(values: dict[tuple, float]) -> dict[tuple, float]:
    """{(a, .., y, z): value} -> {(a, .., y): the mean over all z}."""
    groups = {}
    for key, value in values.items():
        groups.setdefault(key[:-1], []).append(value)
    return {key: statistics.fmean(group) for key, group in groups.items()}


def summarise(
    rows: list[dict],
    people: list[Person],
    metric: str,
    no_face_as_zero: bool = False,
) -> dict | None:
    """Mean of a metric over identities, its standard error, and counts; None without any value.

    rows: from `score_all`, of one method. A picture without a face is left out, or counts as 0.
    With a face in every picture, and the same prompts and seeds for all, the mean is Algorithm
    3's."""
    scored = [row for row in rows if metric in row]
    with_face = [row for row in scored if row[metric] is not None]
    counted = scored if no_face_as_zero else with_face
    if not counted:
        return None

    identities = {person.name: person.identity for person in people}
    values = {}
    for row in counted:
        key = identities[row["identity"]], row["identity"], row["number"], row["seed"]
        values[key] = row[metric] or 0.0
    by_prompt = mean_over_last(values)           # 1. over the seeds of a prompt
    # 2. over the prompts of a reference; with --reference all, each reference is a Person
    by_reference = mean_over_last(by_prompt)
    by_identity = mean_over_last(by_reference)   # 3. over the references of an identity
    means = [*by_identity.values()]
    n = len(means)
    return {
        "mean": statistics.fmean(means),
        "error": statistics.stdev(means) / n ** 0.5 if n > 1 else None,
        "identities": n,
        "pictures": len(counted),
        "of": len(scored),
        "found": len(with_face) / len(scored),
    }


def summarise_methods(
    rows: list[dict],
    people: list[Person],
    no_face_as_zero: bool,
) -> list[dict]:
    """All three metrics of each method."""
    # as in the paper, CLIP-T comes from the people with a single picture if there are any
    single = {person.name for person in people if not person.tests}
    methods = []
    for label in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == label]
        text_rows = [row for row in own if row["identity"] in single] or own
        methods.append({
            "label": label,
            "title": label,
            "r_facesim": summarise(own, people, "r_facesim", no_face_as_zero),
            "facesim": summarise(own, people, "facesim", no_face_as_zero),
            "clip_t": summarise(text_rows, people, "clip_t"),
        })
    return methods


# --------------------------------------------------------------------------------------------------
# From pictures to scores


def embed_real(judges: Judges, people: list[Person]) -> dict[str, Tensor]:
    """{person: embeddings (1 + n, E)}: the reference, then the n test pictures. People without test
    pictures are left out, unless there is only one. ValueError: no face."""
    judged = [person for person in people if person.tests or len(people) == 1]
    faces = {}
    for person in judged:
        faces |= dict.fromkeys([person.reference, *person.tests])

    several, problems = [], []
    for path in progress(faces, "real pictures"):
        image = photos.read_photo(path)
        with suppress(ValueError):               # no face: said below
            image, _ = photos.find_anywhere(image, path)     # turned as personalize.py turns it
        faces[path] = judges.embed(image)
        if faces[path] is None:
            problems.append(f"no face found in the real picture {path}: leave it out")
        elif judges.count(image) > 1:
            several.append(str(path))
    if several:
        note(f"several faces in real pictures, of which the largest counts: {', '.join(several)}")
    complain(problems)

    real = {}
    for person in judged:
        real[person.name] = torch.stack([faces[path] for path in (person.reference, *person.tests)])
    return real


def judge(judges: Judges, real: Tensor | None, images: dict[Picture, Image.Image]) -> list[dict]:
    """The scores of one person's pictures.

    clip_t: cosine with the prompt. facesim: with the reference. r_facesim: mean over the test
    pictures. The face scores are None where no face was found, and absent without real pictures
    to compare with."""
    prompts = [picture.prompt for picture in images]
    matches = judges.match([*images.values()], prompts)
    scores = [{"clip_t": value} for value in matches.tolist()]
    if real is None:
        return scores
    reference, tests = real[0], real[1:]
    nothing = dict.fromkeys(face_scores(reference, reference, tests))          # None for each score
    for row, image in zip(scores, images.values()):
        face = judges.embed(image)
        row |= nothing if face is None else face_scores(face, reference, tests)
    return scores


def score(
    judges: Judges,
    real: Tensor | None,
    images: dict[Picture, Image.Image],
    kept: Path,
) -> list[dict]:
    """`judge`, cached in the folder `kept` by everything that the scores depend on: the judges, the
    real faces, the bytes of all pictures, and the prompts."""
    faces = "" if real is None else digest(real.numpy().tobytes())
    files = [(picture.prompt, digest(picture.path.read_bytes())) for picture in images]
    key = json.dumps([judges.names, faces, files])
    path = kept / f"{digest(key.encode())}.json"
    if not path.is_file():
        numbers = judge(judges, real, images)
        write_whole(path, json.dumps({"numbers": numbers}))
    return JsonFile(path)["numbers"]


def score_all(
    judges: Judges,
    real: dict[str, Tensor],
    pictures: list[Picture],
    kept: Path,
) -> tuple[list[dict], list[str]]:
    """A dict for each picture, with its scores, and a line for each that cannot be read."""
    groups = {}
    for picture in pictures:
        groups.setdefault(picture[:2], []).append(picture)
    rows, problems = [], []
    for (_, person), group in tqdm(groups.items(), "scoring", unit="person", disable=None):
        images = {}
        for picture in group:
            try:
                images[picture] = photos.read_photo(picture.path)
            except ValueError as error:
                problems.append(f"not scored: {error}")
        if not images:
            continue
        for picture, numbers in zip(images, score(judges, real.get(person), images, kept)):
            row = picture._asdict() | numbers
            del row["path"]
            rows.append(row)
    return rows, problems


# --------------------------------------------------------------------------------------------------
# The report


def collect(
    args: Namespace,
    judges: Judges,
    people: list[Person],
    real: dict[str, Tensor],
    pictures: list[Picture],
    problems: list[str],
) -> dict:
    """Scores the pictures -> what scores.json holds. problems: those of --images."""
    rows, unread = score_all(judges, real, pictures, args.out / "parts")
    problems = problems + unread
    tell(problems)
    if not rows:
        raise ValueError("none of the pictures can be read")
    photos_as_rows = []
    for person, faces in real.items():
        numbers = face_scores(faces[0], faces[0], faces[1:])
        photos_as_rows.append({"identity": person, "number": 0, "seed": 0} | numbers)
    packages = "torch", "transformers", "facenet-pytorch"
    return {
        "settings": {"reference": args.reference, "no_face_as_zero": args.no_face_as_zero},
        "judges": judges.names,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "methods": summarise_methods(rows, people, args.no_face_as_zero),
        # what a picture scores that only copies the reference
        "reference": summarise(photos_as_rows, people, "r_facesim"),
        "quoted": JsonFile(META_PHD / "published.json") if args.paper else None,
        "people": {person.name: person._asdict() for person in people},
        "problems": problems,
        "pictures": rows,
    }


# --------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(
        prog="eval_rfacesim.py",
        description="Scores generated pictures: R-FaceSim, FaceSim, and CLIP-T.",
    )
    add = parser.add_argument
    add_options(add)
    add("--images", type=Path, required=True, metavar="DIR",
        help="pictures to score: DIR/<method>/<identity>/<number of the prompt, from 0>_<seed>.png")
    return parser.parse_args(argv)


def evaluate(argv: list[str] | None):
    args = parse(argv)
    args.data = [Path(name) for name in expand(args.data)]
    check_writable(args.out, "--out", args.data)

    # what there is to score, before any network is loaded
    photos.visible(args.images)                  # ValueError: no such folder
    people = read_people(args.data, args.reference, args.gender)
    prompt_file = args.prompts or own_file(args.images, PROMPTS)
    prompts = prompts_for(people, prompt_file, args.model)
    pictures, problems = find_pictures(args.images, prompts)
    problems += find_missing(pictures, prompts)
    if not pictures:
        problems.append(f"--images {args.images} holds no picture of anybody in --data")
        complain(problems)

    judges = Judges(args.model, args.face_weights, args.clip, pick_device(args.device))
    real = embed_real(judges, people)
    scores = collect(args, judges, people, real, pictures, problems)
    print(write_report(args.out, scores))
    print(f"{args.out}: scores.json, tables.md")


# Exit code: 0 done, 1 out of memory, 2 bad input, 130, 143 or 129 by a signal; rerun to resume.
main = partial(run_script, "eval_rfacesim.py", evaluate)

if __name__ == "__main__":
    sys.exit(main())
