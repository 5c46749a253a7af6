"""People that the base model invents: a folder for stage 1 without anybody's photographs.

    python -m paper.invent --out faces/ --people 50 --pictures 10
    python meta_train.py --data faces/ --resolution 512 --iters 1000 --warmup 0

A person is a description and a start noise, and each picture has a different setting. Every other
picture of a person starts from the person's own noise, the rest from fresh noise, so that poses
differ. The baby's captions do not describe looks, so there the noise alone makes the person. The
caption beside a picture names the setting and the clothes, never the looks: M and U are to learn
those.

A face network filters the pictures. More are drawn than asked for; the pictures nearest to a
person's mean are kept, and so are the people whose pictures agree best and who are like nobody else.
If two pictures of one person are hardly more alike than pictures of two people, the command stops
without writing a folder: a LoMD trained on such people was no better than a random one
(docs/STAGE1.md).

Everything that is drawn is in <out>-drawn/, with a contact sheet. Rerun the command to resume; the
resulting folder is identical to the byte.
"""
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import support  # before torch: sets how its threads wait
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from baby import faces
from sample import draw_all
from support.checkpoints import (add_speed_options, check_sampling_memory, choose_model,
                                 compiling_pays, encode_prompts, is_small, model_defaults)
from support.common import (Parser, batched, check_out, check_settings, count, note, pick_device,
                            positive, run_script, save_png, save_settings, side, use_threads,
                            whole_number, write_whole)
from support.finding import tokenizers_of
from support.judges import FaceNetwork
from support.photos import read_photo
from support.sheets import sheet

MORE = 1.5                  # drawn for each one asked for; with many more, the AUC tells less
GATE = 0.8                  # AUC below which the folder is refused
APART = 0.85                # AUC of any two people who are kept
BATCH = 8                   # pictures at once, for small models; one keeps a large model busy
ROUND = 1000                # pictures whose texts are in memory at once: 4.2 MB each with FLUX.1
SHEET = 16                  # people on the contact sheet

# Words for FLUX.1. Unusual looks are as frequent as usual ones: left alone, it draws one kind of face.
PHOTOS = "a portrait photo, a candid photo, a close-up photo, a half-length photo, a snapshot"
STYLES = "an oil painting, a watercolor, a pencil drawing, a black and white film photo"
CLOTHES = """a red T-shirt, a navy suit, a khaki raincoat, a white shirt, a black hoodie,
dungarees, a mustard wool sweater, a denim jacket, an orange parka, a lilac dressing gown,
a gray turtleneck, a chef's jacket, a leather jacket, a green cardigan, a striped jersey,
a football shirt"""
PLACES = """on a beach at noon, in a library with soft window light, in a kitchen in the morning,
in a forest in fog, on a city street lit by neon signs, in the snow at dusk, on a train,
in a workshop under fluorescent light, on a mountain in harsh sunlight, in a greenhouse,
in front of a gray wall, in a cafe by candlelight, in a parking garage, in a garden at sunset,
on a boat in overcast weather, in front of a brick wall, at a market, in an office"""
DESCRIPTION = "a {age}-year-old {gender} with {skin} skin, {hair}, {face}, {nose} and {mark}"
LOOKS = {
    "gender": "woman, man",
    "age": "20, 26, 33, 41, 50, 60, 74",
    "skin": "very pale, fair, tanned, olive, light brown, dark brown",
    "hair": """short red hair, long straight black hair, curly blond hair, a shaved head,
a gray braid, tightly coiled black hair, shoulder-length brown hair, a white crew cut,
wavy auburn hair, thinning dark hair, a bleached quiff""",
    "face": """a round face, a long narrow face, a square jaw, high cheekbones, full cheeks,
a small chin, a heart-shaped face, deep-set eyes, hooded eyes""",
    "nose": """a broad nose, a hooked nose, a snub nose, a long straight nose, a crooked nose,
a narrow nose""",
    "woman": """freckles, round glasses, bushy eyebrows, a scar on one cheek, thin lips, full lips,
thick-rimmed glasses, a mole on the chin, protruding ears""",
    "man": """freckles, round glasses, a full beard, stubble, a moustache, a goatee, bushy eyebrows,
a scar on one cheek, protruding ears"""}


class Shot(NamedTuple):
    """A picture to draw."""
    path: Path                               # <person>/<number>.png
    prompt: str
    caption: str
    seed: int                                # of its start noise


def deal(words: str, number: int, rng: np.random.Generator) -> list[str]:
    """`number` of the words at random, each as often as any other."""
    values = words.replace("\n", " ").split(", ")
    dealt = []
    while len(dealt) < number:
        dealt += rng.permutation(values).tolist()
    return dealt[:number]


def invent_people(people: int, pictures: int, seed: int, baby: bool) -> list[list[Shot]]:
    """The shots of each person. baby: in the words of its captions, which do not describe looks."""
    rng = np.random.default_rng(seed)
    looks = [deal(words, people, rng) for words in LOOKS.values()]
    everyone = []
    for i, words in enumerate(zip(*looks)):
        own = dict(zip(LOOKS, words))
        description = DESCRIPTION.format(mark=own[own["gender"]], **own)
        clothes = deal(CLOTHES, pictures, rng)
        places = deal(PLACES, pictures, rng)
        noise = rng.integers(2 ** 62, size=pictures).tolist()
        shots = []
        for k in range(pictures):
            photo = rng.random() < 0.9
            style = deal(PHOTOS if photo else STYLES, 1, rng)[0]
            prompt = f"{style} of {description} {places[k]}, wearing {clothes[k]}"
            caption = prompt.replace(description, f"a {own['gender']}")
            if baby:
                scene = faces.scene(rng, style="photo" if photo else None)
                prompt = caption = faces.caption(own, scene, rng)
            shots.append(Shot(Path(f"{i:04d}/{k:02d}.png"), prompt, caption,
                              seed=noise[0 if baby or k % 2 else k]))
        everyone.append(shots)
    return everyone


def draw_pictures(args: Namespace, shots: list[Shot], folder: Path):
    """Draws the batches of which a picture is not there yet: rounding depends on the batch."""
    if args.compile is None:                 # however many are left, so that the bytes stay the same
        args.compile = compiling_pays(args, len(shots) * args.steps)
    batch_size = BATCH if is_small(args.folder) else 1
    left = []
    for batch in batched(shots, batch_size):
        if not all((folder / shot.path).is_file() for shot in batch):
            left += batch
    for batch in batched(left, ROUND):

        def save(number: int, picture: Image.Image):
            shot = batch[number]
            save_png(picture, folder / shot.path, {"prompt_text": shot.prompt, "seed": shot.seed})

        jobs = [(shot.prompt, shot.seed) for shot in batch]
        embeddings = encode_prompts(args.folder, [prompt for prompt, _ in jobs], args.text_device,
                                    args.dtype)
        draw_all(args, [[]], embeddings, jobs, save, width=args.size, height=args.size,
                 steps=args.steps, guidance=args.guidance, batch_size=batch_size)


# The filter ---------------------------------------------------------------------------------------


def face_network(args: Namespace) -> Callable | None:
    """A picture's path -> embedding (E,), norm 1, of its largest face; None without a face. The
    network is the model's own, or else facenet-pytorch's. No network, after a note, without its
    weights."""
    if args.no_filter:
        return None
    try:
        network = FaceNetwork(tokenizers_of(args.folder), args.face_weights, args.device)
    except ValueError as error:
        if args.face_weights:
            raise
        note(f"no filter, so pictures that show somebody else stay, and no AUC: {error}")
        return None
    return lambda path: network.embed(read_photo(path))


def nearest(embeddings: Tensor, number: int) -> list[int]:
    """Indices of the `number` embeddings (n, E) that are nearest to their own mean."""
    mean = embeddings.mean(0)
    for _ in range(5):
        chosen = (embeddings @ mean).topk(number).indices
        mean = embeddings[chosen].mean(0)
    return sorted(chosen.tolist())


def separation(people: Tensor) -> float:
    """(P people, K pictures, E) -> AUC: how often two pictures of one person have a larger cosine
    than two pictures of different people. 0.5 is chance."""
    pictures = people.flatten(0, 1)
    owner = torch.arange(len(pictures)) // people.shape[1]
    own = owner[:, None] == owner
    cosines = pictures @ pictures.T
    same, other = cosines[own.triu(1)], cosines[~own]
    below = torch.searchsorted(other.sort().values, same)
    return (below / len(other)).mean().item()


def choose_people(people: Tensor, number: int) -> list[int]:
    """Indices of at most `number` people: their pictures agree best, and no two are alike."""
    chosen = []
    agreement = people.mean(dim=1).norm(dim=1)
    for i in agreement.argsort(descending=True).tolist():
        if all(separation(people[[i, j]]) >= APART for j in chosen):
            chosen.append(i)
    return sorted(chosen[:number])


def choose(embed: Callable, everyone: list[list[Shot]], folder: Path,
           args: Namespace) -> list[list[Shot]]:
    """The people and pictures that are kept. ValueError if the people cannot be told apart."""
    chosen, embeddings = [], []
    for shots in tqdm(everyone, "looking at faces", disable=None):
        found = {}
        for shot in shots:
            face = embed(folder / shot.path)
            if face is not None:
                found[shot] = face
        if len(found) >= args.pictures:
            own = torch.stack([*found.values()])
            indices = nearest(own, args.pictures)
            chosen.append([[*found][i] for i in indices])
            embeddings.append(own[indices])
    if len(chosen) < 2:
        raise ValueError(f"too few of the pictures in {folder} show a face")

    people = torch.stack(embeddings)
    auc = separation(people)
    print(f"people with enough faces: {len(people)}, AUC {auc:.3f}")
    if auc < GATE:
        raise ValueError(f"an AUC below {GATE} means that the pictures show nobody in particular; a "
                         f"LoMD trained on such pictures was no better than a random one, so "
                         f"{args.out} is not written")
    kept = choose_people(people, args.people)
    if len(kept) < 2:
        raise ValueError("no two of the people can be told apart: try more --people")
    print(f"people kept: {len(kept)} of the {args.people} asked for, "
          f"AUC {separation(people[kept]):.3f}")
    return [chosen[i] for i in kept]


# The command --------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> Namespace:
    """The command line, and what the model decides. ValueError if it does not fit into memory."""
    parser = Parser(prog="paper.invent", description="People that the base model invents, a folder "
                    "for stage 1: <out>/<person>/<pictures, captions>.")
    add = parser.add_argument
    add("--out", type=Path, default="faces", help="folder for the people (default: faces/)")
    add("--people", type=whole_number(2), default=50, help="how many (default: 50)")
    add("--pictures", type=whole_number(2), default=10, help="of each person (default: 10)")
    add("--size", type=side, help="pixels on a side (default: 512; baby: 128)")
    add("--steps", type=positive, default=20, help="Euler steps (default: 20)")
    add("--seed", type=count, default=0, help="another seed gives other people (default: 0)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--no-filter", action="store_true", help="draw only as many as asked for, and keep all")
    either("--face-weights", type=Path, metavar="FILE", help="state dict of InceptionResnetV1 "
           "(default: facenet-pytorch's, downloaded; the baby has its own)")
    add_speed_options(add, training=False)
    args = parser.parse_args(argv)
    check_out(args.out)

    args.device = pick_device(args.device)
    choose_model(args)
    use_threads(args.dtype)
    args.baby = (tokenizers_of(args.folder) / "face_embedder.safetensors").is_file()
    defaults = model_defaults(args.folder)
    args.size = args.size or min(512, defaults["resolution"])
    args.guidance = defaults["guidance"]
    check_sampling_memory(args, (args.size // 8, args.size // 8), [[]])
    return args


def invent(argv: list[str] | None):
    """From the command line to the folder: cheap checks first, then one model after the other."""
    args = parse(argv)
    embed = face_network(args)
    more = MORE if embed else 1
    people = math.ceil(more * args.people)
    pictures = math.ceil(more * args.pictures)
    deciding = "people", "pictures", "size", "steps", "seed", "model"
    settings = {name: getattr(args, name) for name in deciding}
    settings["filter"] = str(args.face_weights or "on") if embed else "off"

    folder = Path(f"{args.out}-drawn")
    kept = folder / "settings.json"
    check_settings(kept, settings)
    if not kept.is_file() and any(args.out.glob("*")):
        raise ValueError(f"--out {args.out} is not empty, and {kept}, which would say how it was "
                         "made, is missing")
    save_settings(kept, settings)
    for parent in (folder, args.out):        # left by a process that was killed
        for part in parent.rglob("*.part"):
            part.unlink(missing_ok=True)

    print(f"{people} people, {pictures} pictures of each, on {args.device}")
    everyone = invent_people(people, pictures, args.seed, args.baby)
    draw_pictures(args, sum(everyone, []), folder)
    if embed:
        everyone = choose(embed, everyone, folder, args)

    rows = []
    for shots in everyone:
        rows.append((shots[0].path.parent.name, [folder / shot.path for shot in shots]))
        for shot in shots:
            picture = args.out / shot.path
            write_whole(picture.with_suffix(".txt"), shot.caption)
            write_whole(picture, (folder / shot.path).read_bytes())
    sheet(folder / "sheet.png", [""] * args.pictures, rows[:SHEET])
    print(f"saved {args.out}: look at {folder / 'sheet.png'} before stage 1, then delete {folder}")


# Exit code: 0 done, 1 failed while computing, 2 bad input or people that cannot be told apart,
# 130 Ctrl-C; one line on stderr for each.
main = partial(run_script, "paper.invent", invent)

if __name__ == "__main__":
    sys.exit(main())
