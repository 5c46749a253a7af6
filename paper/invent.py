"""People that the base model invents: a folder for stage 1 without anybody's photographs.

    python -m paper.invent --out faces/ --people 50 --pictures 10
    python meta_train.py --data faces/ --resolution 512 --iters 1000 --warmup 0

A person is a description and a start noise; each picture has another setting. Half of a person's
pictures start from the person's own noise, half from free noise, so that poses differ. The baby's
captions know no looks, so there the noise alone makes the person. The caption beside a picture
names setting and clothes, never the looks: M and U are to learn those.

A face network is the filter. More is drawn than asked for. The pictures nearest to a person's mean
stay, and so do the people whose pictures agree best and who are like nobody else. Where two
pictures of one person are hardly more alike than pictures of two people, the command ends without a
folder: trained on such people, a LoMD was no better than a random one (docs/STAGE1.md).

All that is drawn lies in <out>-drawn/, with a contact sheet. Stopped, the command continues there,
and the folder is the same to the byte.
"""
import argparse
import math
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import support  # before torch: how its threads wait
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from baby import faces
from sample import decode_latent, sample_latents
from support.checkpoints import (add_speed_options, check_sampling_memory, encode_prompts, find_model,
                                 is_small, load_autoencoder, model_defaults, open_flux, pick_dtype,
                                 text_device)
from support.common import (Parser, check_out, count, free, note, pick_device, positive,
                            run_script, save_png, side, use_threads, whole, write_whole)
from support.finding import tokenizers_of
from support.judges import load_face_network
from support.memory import fit_sampling
from support.photos import read_photo
from support.sheets import sheet

MORE_PICTURES = 1.5         # drawn for each that is asked for; with many more, the gate tells less
MORE_PEOPLE = 1.5
GATE = 0.8                  # AUC below which the folder is refused
APART = 0.85                # AUC of any two people who stay
BATCH = 8                   # pictures at once, for small models; one keeps a large model busy
ROUND = 1000                # pictures whose texts are in memory at once: 4.2 MB each with FLUX.1
SHEET = 16                  # people on the contact sheet

# Words for FLUX.1. The unusual is as frequent as the usual: by itself it draws one kind of face.
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
    """A picture to be drawn."""
    person: str
    number: int
    prompt: str
    caption: str
    seed: int                                # of its start noise

    def file(self, folder: Path, suffix: str) -> Path:
        return folder / self.person / f"{self.number:02d}{suffix}"


def deal(words: str, number: int, rng: np.random.Generator) -> list[str]:
    """`number` of the words at random, each as often as any other."""
    values = " ".join(words.split()).split(", ")
    rounds = math.ceil(number / len(values))
    return np.concatenate([rng.permutation(values) for _ in range(rounds)])[:number].tolist()


def invent_people(people: int, pictures: int, seed: int, baby: bool) -> list[list[Shot]]:
    """The shots of each person, by the seed. baby: in its captions' words, which know no looks."""
    rng = np.random.default_rng(seed)
    genders = deal("woman, man", people, rng)
    looks = {name: deal(words, people, rng) for name, words in LOOKS.items()}
    everyone = []
    for i, gender in enumerate(genders):
        own = {name: values[i] for name, values in looks.items()}
        description = DESCRIPTION.format(gender=gender, mark=own[gender], **own)
        clothes, places = (deal(words, pictures, rng) for words in (CLOTHES, PLACES))
        noise = rng.integers(2 ** 62, size=pictures).tolist()
        shots = []
        for k in range(pictures):
            photo = rng.random() < 0.9
            style = deal(PHOTOS if photo else STYLES, 1, rng)[0]
            prompt = f"{style} of {description} {places[k]}, wearing {clothes[k]}"
            caption = prompt.replace(description, f"a {gender}")
            if baby:
                scene = faces.scene(rng, style="photo" if photo else None)
                prompt = caption = faces.caption({"gender": gender}, scene, rng)
            shots.append(Shot(f"{i:04d}", k, prompt, caption, noise[0 if baby or k % 2 else k]))
        everyone.append(shots)
    return everyone


def draw_latents(args: argparse.Namespace, batches: list[list[Shot]], folder: Path,
                 steps: int) -> None:
    """A file of latents for each batch, (B, 16, h, w). steps: of a run that was not interrupted, so
    that it compiles as often."""
    prompts = [shot.prompt for shot in chain.from_iterable(batches)]
    embeddings = encode_prompts(args.folder, prompts, text_device(args, args.device), args.dtype)
    flux = open_flux(args, args.device, steps)
    text_tokens = embeddings[prompts[0]][0].shape[1]
    fit_sampling(flux, (args.size // 8, args.size // 8), text_tokens, args.batch)
    with tqdm(total=len(batches) * args.steps, desc="drawing", unit="step", disable=None) as bar:
        for batch in batches:
            jobs = [(shot.prompt, shot.seed) for shot in batch]
            latents = torch.cat([*sample_latents(
                flux, embeddings, jobs, width=args.size, height=args.size, steps=args.steps,
                guidance=args.guidance, on_step=bar.update, batch_size=len(jobs))])
            path = batch[0].file(folder, ".safetensors")
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as part:
                save_file({"latents": latents.cpu()}, part)


def draw_pictures(args: argparse.Namespace, batches: list[list[Shot]], folder: Path) -> None:
    """Draws what is not there yet, with one model after the other in memory."""
    left = [batch for batch in batches if not batch[0].file(folder, ".safetensors").is_file()]
    if left:
        draw_latents(args, left, folder, len(batches) * args.steps)
        free(args.device)
    left = [batch for batch in batches if not batch[-1].file(folder, ".png").is_file()]
    if left:
        autoencoder = load_autoencoder(args.folder, args.device, args.dtype)
    for batch in tqdm(left, "decoding", disable=None):
        latents = load_file(batch[0].file(folder, ".safetensors"))["latents"]
        for shot, latent in zip(batch, latents):
            picture = decode_latent(autoencoder, latent[None])
            fields = {"prompt_text": shot.prompt, "seed": shot.seed}
            save_png(picture, shot.file(folder, ".png"), fields)


# The filter ---------------------------------------------------------------------------------------


def face_network(args: argparse.Namespace) -> Callable[[Path], Tensor | None] | None:
    """Picture -> embedding (E,), of norm 1, of its largest face, None without one. The network is
    the model's own, else facenet-pytorch's. None with --no-filter or, after a note, without
    weights."""
    if args.no_filter:
        return None
    try:
        detector, embedder, _ = load_face_network(args.baby, args.face_weights, args.device)
    except ValueError as error:
        if args.face_weights:
            raise
        note(f"no filter, so pictures that show somebody else stay, and no AUC: {error}")
        return None

    @torch.no_grad()
    def embed(path: Path) -> Tensor | None:
        face = detector(read_photo(path))
        return None if face is None else embedder(face[None].to(args.device))[0].cpu()
    return embed


def nearest(embeddings: Tensor, number: int) -> list[int]:
    """Places of the `number` embeddings (n, E) that are nearest to the mean of those chosen."""
    mean = embeddings.mean(dim=0)
    for _ in range(5):
        chosen = (embeddings @ mean).topk(number).indices
        mean = embeddings[chosen].mean(dim=0)
    return sorted(chosen.tolist())


def separation(people: Tensor) -> float:
    """(P people, K pictures, E) -> AUC: how often a pair of one person's pictures has a larger
    cosine than a pair of two people's. 0.5 is chance."""
    pictures = people.flatten(0, 1)
    owner = torch.arange(len(pictures)) // people.shape[1]
    own = owner[:, None] == owner
    cosines = pictures @ pictures.T
    same, other = cosines[own.triu(1)], cosines[~own]
    below = torch.searchsorted(other.sort().values, same)
    return (below / len(other)).mean().item()


def choose_people(people: Tensor, number: int) -> list[int]:
    """Places of at most `number` people: their pictures agree best, and no two are alike."""
    chosen = []
    agreement = people.mean(dim=1).norm(dim=1)
    for i in agreement.argsort(descending=True).tolist():
        if all(separation(people[[i, j]]) >= APART for j in chosen):
            chosen.append(i)
    return sorted(chosen[:number])


def choose(embed: Callable, everyone: list[list[Shot]], folder: Path,
           args: argparse.Namespace) -> list[list[Shot]]:
    """The people and pictures that stay. ValueError where the people cannot be told apart."""
    chosen, embeddings = [], []
    for shots in tqdm(everyone, "looking at faces", disable=None):
        found = {shot: embed(shot.file(folder, ".png")) for shot in shots}
        seen = [shot for shot in shots if found[shot] is not None]
        if len(seen) >= args.pictures:
            own = torch.stack([found[shot] for shot in seen])
            places = nearest(own, args.pictures)
            chosen.append([seen[i] for i in places])
            embeddings.append(own[places])
    if len(chosen) < 2:
        raise ValueError(f"too few of the pictures in {folder} show a face")

    people = torch.stack(embeddings)
    alike = separation(people)
    print(f"people with enough faces: {len(people)}; same against other, AUC {alike:.3f}")
    if alike < GATE:
        raise ValueError(f"an AUC below {GATE} means that nobody in particular is shown, and a "
                         f"LoMD of such pictures was no better than a random one: {args.out} is not "
                         "written")
    staying = choose_people(people, args.people)
    print(f"people who stay: {len(staying)}, AUC {separation(people[staying]):.3f}")
    if len(staying) < args.people:
        note(f"{args.people} were asked for: the others drift, or are too like somebody else")
    return [chosen[i] for i in staying]


# The command --------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="paper.invent", allow_abbrev=False, description="People that the base "
                    "model invents, a folder for stage 1: <out>/<person>/<pictures, captions>.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("faces"), help="folder for the people (default: faces/)")
    add("--people", type=positive, default=50, help="how many (default: 50)")
    add("--pictures", type=positive, default=10, help="of each (default: 10)")
    add("--size", type=side, help="pixels of a side (default: 512; the baby's is 128)")
    add("--steps", type=positive, default=20, help="Euler steps (default: 20)")
    add("--seed", type=count, default=0, help="of the people; others are other people (default: 0)")
    add("--no-filter", action="store_true", help="draw no more than asked for, keep it all")
    add("--face-weights", type=Path, metavar="FILE", help="state dict of InceptionResnetV1 "
        "(default: facenet-pytorch's, downloaded; the baby has its own)")
    add("--model", default="flux-dev",
        help="flux-dev (default), flux-schnell, baby, a folder or a file")
    add_speed_options(add, training=False)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    if min(args.people, args.pictures) < 2:
        raise ValueError("--people and --pictures are 2 or more")
    if args.no_filter and args.face_weights:
        raise ValueError("--face-weights is for the filter, which --no-filter turns off")
    check_out(args.out)
    return args


def take_model(args: argparse.Namespace) -> None:
    """Fills in what the model decides, and checks that it fits."""
    args.device = pick_device(args.device)
    args.folder = find_model(args.model, args)
    args.dtype = pick_dtype(args.device, args.folder)
    small = is_small(args.folder)
    use_threads(args.device.type == "cpu" and small)
    defaults = model_defaults(args.folder)
    own = tokenizers_of(args.folder)
    args.baby = own if (own / "face_embedder.safetensors").is_file() else None
    args.size = args.size or min(512, defaults["resolution"])
    args.guidance = defaults["guidance"]
    args.batch = BATCH if small else 1
    check_sampling_memory(args, args.device, (args.size // 8, args.size // 8), [[]], args.batch)


def prepare(out: Path, folder: Path, settings: str) -> None:
    """The folder of what is drawn: new, or of the same settings. ValueError at others."""
    kept = folder / "settings.txt"
    if kept.is_file():
        if kept.read_text("utf-8") != settings:
            raise ValueError(f"{folder} has {kept.read_text('utf-8')}, not {settings}: delete it "
                             f"and {out}, or choose another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty, and not of this command")
    folder.mkdir(exist_ok=True)
    write_whole(kept, settings.encode())
    # of a process that was killed
    for part in chain(folder.rglob("*.part"), out.rglob("*.part")):
        part.unlink()


def invent(argv: list[str] | None = None) -> None:
    """From the command line to the folder: cheap checks first, then one model after the other."""
    args = parse(argv)
    take_model(args)
    embed = face_network(args)
    people, pictures = args.people, args.pictures
    if embed:
        people = math.ceil(people * MORE_PEOPLE)
        pictures = math.ceil(pictures * MORE_PICTURES)
    folder = args.out.with_name(f"{args.out.name}-drawn")
    settings = f"{people} people, {pictures} pictures, {args.size} pixels, {args.steps} steps"
    settings += f", seed {args.seed}, model {args.model}"
    prepare(args.out, folder, settings)

    print(f"{settings}, on {args.device}")
    everyone = invent_people(people, pictures, args.seed, baby=args.baby is not None)
    batches = []
    for shots in everyone:
        batches += [shots[start:start + args.batch] for start in range(0, pictures, args.batch)]
    for start in range(0, len(batches), ROUND):
        draw_pictures(args, batches[start:start + ROUND], folder)
    if embed:
        everyone = choose(embed, everyone, folder, args)

    rows = []
    for shots in everyone:
        rows.append((shots[0].person, [shot.file(folder, ".png") for shot in shots]))
        for shot in shots:
            shot.file(args.out, "").parent.mkdir(parents=True, exist_ok=True)
            write_whole(shot.file(args.out, ".txt"), shot.caption.encode())
            write_whole(shot.file(args.out, ".png"), shot.file(folder, ".png").read_bytes())
    sheet(folder / "sheet.png", [""] * args.pictures, rows[:SHEET])
    print(f"saved {args.out}: look at {folder / 'sheet.png'} before stage 1, then delete {folder}")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, or people that cannot be told
    apart, 130 Ctrl-C; one line on stderr for each."""
    return run_script("paper.invent", invent, argv)


if __name__ == "__main__":
    sys.exit(main())
