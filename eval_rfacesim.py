"""R-FaceSim: does it look like the person, or only like the photo? Scores pictures, or runs the paper's whole comparison.

    python eval_rfacesim.py --data people/ --images results/                   # finished pictures of any method
    python eval_rfacesim.py --data people/ --methods lora lora-crops meta-lora # personalise, sample, score

    people/[man|woman/]<identity>/<pictures>                real pictures; with one picture a person, and no folders for
                                                            them, only CLIP-T is taken (the FFHQ part of Meta-PHD)
    results/<method>/<identity>/<prompt>_<seed>.png         <prompt>: its number in --prompts, from 0, or its first words
                                                            as sample.py writes them

One picture of an identity is the reference: what the person's LoRA is made of. R-FaceSim compares what is generated with
the *other* real pictures, FaceSim with the reference, CLIP-T with the prompt; all are cosines. To --out go scores.json
(every number of every picture), tables.md, figures, contact sheets, and on the second way LoRAs and pictures, so that the
same command goes on where it was stopped and adds what is new.

Sources: "Meta-LoRA" (Topal et al. 2025), Algorithm 3, appendix F, Tables 4 and 5, Figures 3, 4, 6 to 8; facenet-pytorch for
MTCNN's face crop (160 pixels, no margin) and InceptionResnetV1 (VGGFace2); CLIP ViT-B/32.
Deviation: Algorithm 3 does not say what happens to a picture without a face. Here it is left out of both face scores and
the share of faces found stands beside them, or it counts as 0 (--no-face-as-zero).
"""
import collections
import hashlib
import importlib.metadata
import json
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import support  # before torch: how its threads wait
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import flux_model
from support import common
from support import checkpoints
import personalize
from support import photos
from support.lora_files import load_lora, read_lomd, save_lora
from support.common import Interruption, save_figure, write_whole
from metalora import IdentityBank, MetaLoRA, apply_loras, random_lomd
from support.speed import blocks_of, recompute_blocks
from support.checkpoints import find_targets
from sample import decode_latent, encode_prompts, sample_latents
from support.common import note, read_prompts, save_png

HERE = Path(__file__).resolve().parent
METHODS = {"meta-lora": "Meta-LoRA", "lora": "LoRA", "lora-crops": "LoRA + augmented inputs",
           "random-lomd": "Meta-LoRA, random LoMD", "none": "no LoRA"}
GENDERS = {"man": "man", "men": "man", "male": "man", "woman": "woman", "women": "woman", "female": "woman"}
INCEPTION = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt"
CLIP = "openai/clip-vit-base-patch32"


# ---------------------------------------------------------------------------------------------------------------------
# What judges


class FaceEmbedder(nn.Module):
    """The baby's face embedder, a small residual network used like InceptionResnetV1.

    Crops (B, 3, 64, 64), about [-1, 1] -> (B, 128), of length 1. Trained by baby/metrics.py.
    """
    SIDE, DIM, WIDTHS = 64, 128, (24, 48, 96, 160)

    def __init__(self):
        super().__init__()
        self.blocks, before = nn.ModuleList(), 3
        for width in self.WIDTHS:                                  # each halves the sides: 32, 16, 8, 4
            self.blocks.append(nn.ModuleDict({
                "skip": nn.Conv2d(before, width, 1, stride=2), "down": nn.Conv2d(before, width, 3, stride=2, padding=1),
                "norm1": nn.BatchNorm2d(width), "conv1": nn.Conv2d(width, width, 3, padding=1, bias=False),
                "norm2": nn.BatchNorm2d(width), "conv2": nn.Conv2d(width, width, 3, padding=1, bias=False),
                "norm3": nn.BatchNorm2d(width), "conv3": nn.Conv2d(width, width, 3, padding=1, bias=False)}))
            before = width
        self.norm = nn.BatchNorm2d(before)
        self.last = nn.Linear(before * 16, self.DIM)
        self.last_norm = nn.BatchNorm1d(self.DIM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            h = block["conv1"](F.relu(block["norm1"](block["down"](x))))
            x = block["skip"](x) + h
            x = x + block["conv3"](F.relu(block["norm3"](block["conv2"](F.relu(block["norm2"](x))))))
        return F.normalize(self.last_norm(self.last(F.relu(self.norm(x)).flatten(1))), dim=1)


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a .pt of tensors only: a pickle of anything else is refused, not run."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                    # on files that are none, the readers raise whatever they stumble on
        raise ValueError(f"{path} is no file of weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict: it must map names to tensors")
    return state


def find_inception() -> Path:
    """facenet-pytorch's VGGFace2 weights, where it keeps them itself; downloaded if need be."""
    from facenet_pytorch.models.inception_resnet_v1 import get_torch_home
    path = Path(get_torch_home()) / "checkpoints" / INCEPTION.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"the weights of InceptionResnetV1 are not at {path} and could not be downloaded ({error}): fetch "
                             f"{INCEPTION} (107 MB), or name a state dict with --face-weights; --model baby needs neither") from None
    return path


def load_face_embedder(baby: Path | None, weights: Path | None = None) -> tuple[nn.Module, int, str]:
    """The network, the side of its crops in pixels, and its name with a hash. `baby`: folder of a model with its own."""
    path = weights or (baby / "face_embedder.safetensors" if baby else find_inception())
    if not path.is_file():
        raise ValueError(f"no such file of weights: {path}")
    state = {name: value for name, value in read_state(path).items() if not name.startswith("logits.")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from facenet_pytorch import InceptionResnetV1
    model = FaceEmbedder() if baby else InceptionResnetV1(pretrained=None)
    own = model.state_dict()
    odd = sorted(name for name in own.keys() | state.keys() if not name.endswith("num_batches_tracked")
                 and (name not in state or name not in own or state[name].shape != own[name].shape))
    if odd:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {len(odd)} differences, the first in {odd[0]}")
    model.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in state.items()},
                          strict=False)                           # odd is empty: only num_batches_tracked may be absent
    return model.eval(), FaceEmbedder.SIDE if baby else 160, f"{type(model).__name__} {digest(path.read_bytes())}"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class Judges:
    """MTCNN and a face embedder; CLIP. Everything that turns pictures into numbers, frozen, in fp32.

    model: `baby` or another with judges of its own; else InceptionResnetV1 and CLIP ViT-B/32. ValueError, one line, where
    weights are missing.
    """
    def __init__(self, model: str = "flux-dev", face_weights: Path | None = None, clip: str | None = None, device="cpu"):
        from facenet_pytorch import MTCNN
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        folder = checkpoints.find_model(model) if model not in checkpoints.HUB else None
        baby = folder if folder and (folder / "face_embedder.safetensors").is_file() else None
        self.device = torch.device(device)
        self.embedder, side, face_name = load_face_embedder(None if face_weights else baby, face_weights)
        self.embedder.to(self.device)
        # pooling to arbitrary sizes does not exist on mps
        self.detector = MTCNN(image_size=side, margin=0, device=torch.device("cpu" if self.device.type == "mps" else device))
        name = clip or (folder / "scorer" if baby else CLIP)
        try:
            with checkpoints.quiet_transformers():
                self.tokenizer = CLIPTokenizer.from_pretrained(name)
                self.processor = CLIPImageProcessor.from_pretrained(name)
                self.clip = checkpoints.load_transformers_model(CLIPModel, name, torch.float32, None).to(self.device)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"CLIP cannot be loaded from {name} ({str(error).splitlines()[0]}): download {CLIP} from the hub, "
                             "or name a folder with --clip; --model baby needs neither") from None
        weights = self.clip.text_projection.weight.detach().cpu().numpy().tobytes()
        self.names = {"face": face_name, "text": f"{Path(name).name} {digest(weights)}"}

    @torch.no_grad()
    def crop(self, image: Image.Image) -> Tensor | None:
        """The largest face that MTCNN finds, (3, side, side) in about [-1, 1] on the CPU; None without one."""
        face = self.detector(image)
        return None if face is None else face.cpu()

    @torch.no_grad()
    def embed(self, crops: list[Tensor]) -> Tensor:
        """Crops -> embeddings (n, E) of length 1, on the CPU."""
        parts = [self.embedder(torch.stack(crops[i:i + 32]).to(self.device)).cpu() for i in range(0, len(crops), 32)]
        return torch.cat(parts) if parts else torch.zeros(0, 1)

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """CLIP's embeddings (n, E) of length 1, on the CPU."""
        parts = [self.processor(images=images[i:i + 32], return_tensors="pt")["pixel_values"].to(self.device)
                 for i in range(0, len(images), 32)]
        parts = [self.clip.visual_projection(self.clip.vision_model(pixel_values=part).pooler_output) for part in parts]
        return F.normalize(torch.cat(parts), dim=1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """The same of texts; longer ones are cut at CLIP's 77 tokens."""
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        return F.normalize(self.clip.text_projection(self.clip.text_model(input_ids=ids.to(self.device)).pooler_output), dim=1).cpu()

    def match(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        """CLIP-T: cosine of each image with its own text (n,)."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# People and prompts


class Person(NamedTuple):
    name: str                  # the identity's; with --reference all the picture's too: anna@02
    identity: str
    gender: str | None
    reference: Path
    tests: tuple[Path, ...]    # the other pictures; never the reference. Empty: one picture a person, CLIP-T only
    more: tuple[Path, ...] = ()                       # with --photos further references: seen by the method, never a test


def complain(problems: list[str]):
    """All problems on stderr, the last as ValueError."""
    for problem in problems[:-1]:
        print(f"eval_rfacesim.py: {' '.join(problem.split())}", file=sys.stderr)
    if problems:
        raise ValueError(problems[-1])


def read_people(folders: list[Path], reference: str = "first", gender: str | None = None, count: int = 1) -> list[Person]:
    """Identities of the folders, in order. `reference`: "first" by name (or the one called reference.*), or "all": each in
    turn; the `count` - 1 after it by name are shown to the method too. Gender: of the folder above, else as a caption (.txt)
    beside a picture says, else `gender`.

    ValueError, after a line for each problem: pictures that cannot be read, a reference that is also among the test
    pictures, an identity of one picture among others with several, two identities of one name.
    """
    found, problems = {}, []
    for folder in folders:
        inside = subfolders(folder)
        sexes = [f for f in inside if f.name.lower() in GENDERS]
        if sexes and (len(sexes) < len(inside) or photos.image_files(folder)):
            raise ValueError(f"{folder} holds {sexes[0].name}/ and others beside it: sort all people by gender, or none")
        for place in sexes or [folder]:
            people, loose = subfolders(place), photos.image_files(place)
            if bool(people) == bool(loose):
                raise ValueError(f"{place} must hold a folder for each person, or one picture for each: it holds "
                                 + ("both" if people else "neither"))
            for name, paths in [(f.name, photos.image_files(f)) for f in people] + [(p.stem, [p]) for p in loose]:
                if name in found:
                    problems.append(f"{place / name}: another identity has this name already")
                if people and len(paths) <= count:
                    problems.append(f"{place / name} has {len(paths)} pictures: R-FaceSim needs {count} as reference and at least one other")
                found[name] = GENDERS.get(place.name.lower()) if sexes else None, paths
    persons = []
    for name, (sex, paths) in found.items():
        pixels = {}
        for path in paths:
            try:
                image = photos.read_photo(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            same = pixels.setdefault((image.size, digest(image.tobytes())), path)
            if same != path:                          # a copy of the reference among the tests would be a perfect score
                problems.append(f"{path} is the same picture as {same.name}")
        sex = sex or gender_in_captions(paths) or gender
        named = [path for path in paths if path.stem == "reference"]
        for i in range(len(paths)) if reference == "all" else [paths.index(named[0]) if named else 0][:len(paths)]:
            label = f"{name}@{paths[i].stem}" if reference == "all" and len(paths) > 1 else name
            turned = paths[i:] + paths[:i]
            persons.append(Person(label, name, sex, paths[i], tuple(sorted(turned[count:])), tuple(turned[1:count])))
    complain(problems)
    return persons


def subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def gender_in_captions(paths: list[Path]) -> str | None:
    for path in paths:
        caption = path.with_suffix(".txt")
        words = set(re.findall(r"[a-z]+", caption.read_text("utf-8").lower())) & set(GENDERS) if caption.is_file() else set()
        if len(words) == 1:
            return GENDERS[words.pop()]
    return None


def fill(prompt: str, gender: str | None) -> str | None:
    """A prompt for somebody: [man/woman] takes the side of the gender, and `man: ...` is for men only (None for others)."""
    only, _, rest = prompt.partition(":")
    slots = r"\[([^][/]*)/([^][/]*)\]"
    if gender is None and (only in ("man", "woman") or re.search(slots, prompt)):
        raise ValueError(f"the prompt {prompt!r} depends on the gender: sort the people into man/ and woman/, or give --gender")
    if only in ("man", "woman"):
        return fill(rest.strip(), gender) if only == gender else None
    return re.sub(slots, lambda match: match[1 if gender == "man" else 2], prompt)


def prompts_for(people: list[Person], own: Path | None, model_folder: Path | None) -> dict[str, list[str | None]]:
    """{person: its prompts}; None where a prompt is not for it. Of one file, else the model's, else Meta-PHD's."""
    theirs = model_folder / "prompts.txt" if model_folder and (model_folder / "prompts.txt").is_file() else None
    files = {bool(p.tests): own or theirs or HERE / "meta_phd" / ("unsplash.txt" if p.tests else "ffhq.txt") for p in people}
    lists = {kind: read_prompts([], path) for kind, path in files.items()}
    return {p.name: [fill(prompt, p.gender) for prompt in lists[bool(p.tests)]] for p in people}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


class Picture(NamedTuple):
    label: str                 # of its method: a row of the tables
    person: str
    prompt: int                # its number among the person's prompts
    seed: int
    path: Path
    text: str                  # the prompt


def find_pictures(root: Path, prompts: dict) -> tuple[list[Picture], list[str]]:
    """Pictures of <root>/<method>/<identity>/<prompt>_<seed>.<suffix>, and a line for each thing that is none."""
    inside = lambda folder: sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures, problems = [], [f"{path} is not scored: it is not in a method's folder" for path in inside(root) if path.is_file()]
    for folder in [path for method in subfolders(root) for path in inside(method)]:
        if folder.name not in prompts or not folder.is_dir():
            problems.append(f"{folder} is not scored: no identity of that name in --data")
            continue
        texts = prompts[folder.name]
        numbers = {str(i): i for i in range(len(texts))}
        for path in inside(folder):
            match = re.fullmatch(r"(.+)_(\d+)", path.stem)
            number = match and numbers.get(match[1], numbers.get(match[1].lstrip("0") or "0"))
            if path.suffix.lower() not in photos.SUFFIXES or not match:
                problems.append(f"{path} is not scored: its name is not <prompt>_<seed>.png")
            elif number is None or texts[number] is None:
                problems.append(f"{path} is not scored: {match[1]} is no prompt of {folder.name}")
            else:
                pictures.append(Picture(folder.parent.name, folder.name, number, int(match[2]), path, texts[number]))
    return pictures, problems


def read_picture_list(path: Path, people: list[Person]) -> tuple[list[Picture], list[str], dict]:
    """The same, and everybody's prompts, from a JSON list of {"method", "identity", "prompt" (its words), "seed", "path"
    (relative to the list)}."""
    try:
        pictures, problems, prompts = [], [], {p.name: [] for p in people}
        for entry in json.loads(path.read_text("utf-8")):
            person, text, file = str(entry["identity"]), str(entry["prompt"]), path.parent / entry["path"]
            if person in prompts:
                prompts[person] += [text] if text not in prompts[person] else []
                pictures.append(Picture(str(entry["method"]), person, prompts[person].index(text), int(entry["seed"]), file, text))
            else:
                problems.append(f"{file} is not scored: no identity {person} in --data")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--images {path} is no list of pictures, {{method, identity, prompt, seed, path}} each: "
                         f"{type(error).__name__} {error}") from None
    return pictures, problems, prompts


def check_complete(pictures: list[Picture], people: list[Person], prompts: dict, seeds: int | None) -> tuple[list, list[str]]:
    """The pictures to score, each prompt and seed once, and a line for everybody's missing ones and what is too much. Wanted
    are seeds 0 to `seeds` - 1, else all that there are of anybody by any method."""
    wanted = range(seeds) if seeds is not None else sorted({p.seed for p in pictures})
    kept, problems = {}, []
    for picture in pictures:
        if picture.seed not in wanted:
            problems.append(f"{picture.path} is not scored: its seed is beyond --seeds {seeds}")
        elif (first := kept.setdefault(picture[:4], picture)) is not picture:
            problems.append(f"{picture.path} is not scored: {first.path.name} is the same prompt and seed")
    for label in dict.fromkeys(p.label for p in pictures):
        for person in people:
            cells = [(i, seed) for i, text in enumerate(prompts[person.name]) if text is not None for seed in wanted]
            gone = [cell for cell in cells if (label, person.name, *cell) not in kept]
            if gone:
                problems.append(f"{label}: {len(gone)} of {len(cells)} pictures of {person.name} are missing, the first is "
                                f"prompt {gone[0][0]}, seed {gone[0][1]}")
    return list(kept.values()), problems


# ---------------------------------------------------------------------------------------------------------------------
# Scores


class Real(NamedTuple):
    """What is known of a person's real pictures."""
    reference: Tensor          # (E,)
    tests: Tensor              # (n, E)
    key: str                   # of these files


def embed_real(judges: Judges, people: list[Person]) -> dict[str, Real]:
    """Embeddings of real pictures, of everybody with test pictures. ValueError names each one without a face."""
    crops, keys, problems = {}, {}, []
    paths = sorted({path for p in people if p.tests for path in (p.reference, *p.tests)})
    for path in tqdm(paths, "real pictures", disable=None, leave=False):
        crops[path], keys[path] = judges.crop(photos.read_photo(path)), digest(path.read_bytes())
        if crops[path] is None:
            problems.append(f"no face found in the real picture {path}: take it out of the folder")
    complain(problems)
    embeddings = dict(zip(paths, judges.embed([crops[path] for path in paths])))
    return {p.name: Real(embeddings[p.reference], torch.stack([embeddings[path] for path in p.tests]),
                         " ".join(keys[path] for path in (p.reference, *p.tests))) for p in people if p.tests}


def score(judges: Judges, real: Real | None, pictures: list[Picture], kept: Path) -> tuple[list[dict], list[str]]:
    """A dict for each picture of one person, and a line for each that cannot be read. Kept in the folder `kept` under what
    it depends on: the judges, the bytes of all pictures, the prompts.

    r_facesim: mean cosine with the person's test pictures; facesim: cosine with the reference; both None where no face was
    found, and absent for people without test pictures. clip_t: cosine with the prompt.
    """
    images, problems, sound = [], [], []
    for picture in pictures:
        try:
            images.append(photos.read_photo(picture.path))
            sound.append(picture)
        except ValueError as error:
            problems.append(f"not scored: {error}")
    depends = [judges.names, real.key if real else "", [(p.text, digest(p.path.read_bytes())) for p in sound]]
    path = kept / f"{digest(json.dumps(depends).encode())}.json"
    if path.is_file():
        numbers = common.JsonFile(path)["numbers"]
    else:
        clip = judges.match(images, [p.text for p in sound]) if sound else []
        numbers = [{"clip_t": float(value)} for value in clip]
        if real:
            crops = [judges.crop(image) for image in images]
            faces = [i for i, crop in enumerate(crops) if crop is not None]
            for own in numbers:
                own.update(r_facesim=None, facesim=None)
            for i, embedding in zip(faces, judges.embed([crops[i] for i in faces])):
                numbers[i].update(r_facesim=(real.tests @ embedding).mean().item(), facesim=(real.reference @ embedding).item())
        numbers = [{name: value if value is None else round(value, 6) for name, value in own.items()} for own in numbers]
        kept.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"numbers": numbers}).encode())
    return [{"method": p.label, "identity": p.person, "prompt": p.text, "number": p.prompt, "seed": p.seed} | own
            for p, own in zip(sound, numbers)], problems


def summarise(rows: list[dict], people: list[Person], metric: str, no_face_as_zero: bool = False) -> dict | None:
    """Mean of a metric over identities, with standard error and the counts behind it; None without any value.

    rows: of `score`, of one method. A person's score is the mean over prompts of the mean over seeds, an identity's the mean
    over its references. With every face found, the mean over identities is Algorithm 3's mean over identities and prompts.
    A picture without a face counts as 0, or not at all: `pictures` of `of` then tells how many did.
    """
    identity_of, cells, of = {p.name: p.identity for p in people}, {}, 0
    for row in rows:
        if metric in row:
            of += 1
            value = 0.0 if row[metric] is None and no_face_as_zero else row[metric]
            if value is not None:
                cells.setdefault(identity_of[row["identity"]], {}).setdefault(row["identity"], {}).setdefault(
                    row["number"], []).append(value)
    if not cells:
        return None
    mean = lambda values: sum(values) / len(values)
    scores = [mean([mean([mean(seeds) for seeds in prompts.values()]) for prompts in persons.values()])
              for persons in cells.values()]
    error = (sum((s - mean(scores)) ** 2 for s in scores) / (len(scores) - 1) / len(scores)) ** 0.5 if len(scores) > 1 else None
    counted = sum(len(seeds) for persons in cells.values() for prompts in persons.values() for seeds in prompts.values())
    found = sum(row[metric] is not None for row in rows if metric in row)
    return {"mean": round(mean(scores), 6), "error": None if error is None else round(error, 6), "identities": len(scores),
            "pictures": counted, "of": of, "found": round(found / of, 6)}


def summary_of(rows: list[dict], people: list[Person], no_face_as_zero: bool) -> dict:
    """All three metrics of one method. CLIP-T is of the one-picture people where there are any (Meta-PHD's FFHQ part)."""
    alone = {p.name for p in people if not p.tests}
    text_rows = [row for row in rows if row["identity"] in alone] or rows
    return {"r_facesim": summarise(rows, people, "r_facesim", no_face_as_zero),
            "facesim": summarise(rows, people, "facesim", no_face_as_zero), "clip_t": summarise(text_rows, people, "clip_t")}


# ---------------------------------------------------------------------------------------------------------------------
# Run it all


class Setting(NamedTuple):
    """A row of the tables: who was trained how, for how long. rank and iterations 0: nothing was."""
    method: str
    rank: int = 0
    iterations: int = 0

    @property
    def label(self) -> str:
        return f"{self.method}_r{self.rank}_i{self.iterations}" if self.rank else self.method

    @classmethod
    def read(cls, label: str):
        match = re.fullmatch(r"(.+)_r(\d+)_i(\d+)", label)
        return cls(match[1], int(match[2]), int(match[3])) if match else cls(label)

    @property
    def title(self) -> str:
        name = METHODS.get(self.method, self.method)
        return f"Rank-{self.rank} {name}, {self.iterations} iterations" if self.rank else name


def kind_of(method: str) -> str:
    """What metalora.py calls a method: "lora" or "meta-lora"."""
    return "lora" if method.startswith("lora") else "meta-lora"


def iterations_of(method: str, given: list[int] | None) -> list[int]:
    return sorted(given or [personalize.ITERATIONS[kind_of(method)]])


def settings_of(args) -> list[Setting]:
    return [setting for method in args.methods for setting in ([Setting(method)] if method == "none" else [
        Setting(method, rank, i) for rank in args.ranks for i in iterations_of(method, args.iters)])]


def people_at_once(flux, rank):
    """How many people together make the most of a step: each widens every layer by its rank.

    Measured on the baby at ranks 1 to 16 (`bench.py --people 16`). A large model fills the machine with one.
    """
    small = sum(parameter.numel() for parameter in flux.parameters()) < 1e9
    return max(1, round(16 / rank ** 0.5)) if small else 1


def train_together(flux, adapter, people, txt, y, iters, lr, seed=0, on_step=None, weights=None):
    """`iters` steps of flow matching for each row of the adapter; the base stays as it is.

    flux with `adapter` in it; people: for each row what `encode` gave; weights: beside it of `head_weights`, None to count
    all places alike; txt (N, T, _) and y (N, _): one caption for each. Every random number of a person comes from
    one CPU generator, and lr is constant, so a longer run begins as a shorter one, and rows that have steps behind
    them go on where they were.
    A person trains as if alone. But whose next batches have the same shape go through the network together, up
    to `adapter.slots` people: nobody waits for anybody, so the most frequent shape goes first.
    on_step(iteration, loss, person) is called after each step, counted from 1. Raises NotFinite.
    """
    weights = weights or [[torch.ones(len(latent), 1, 1, 1) for latent in latents] for latents in people]
    streams = [personalize.batches(latents, own, seed) for latents, own in zip(people, weights)]
    done, waiting = adapter.bank.steps.tolist(), {}
    for person, stream in enumerate(streams):
        for _ in range(done[person]):
            next(stream)
        if done[person] < iters:
            waiting[person] = next(stream)
    while waiting:
        alike = collections.defaultdict(list)
        for person in sorted(waiting, key=done.__getitem__):                          # who is behind goes first
            alike[waiting[person][1].shape].append(person)
        group = max(alike.values(), key=len)[:adapter.slots]
        images, *tensors = zip(*(waiting[person] for person in group))
        latent, noise, weight, t = (torch.cat(parts).to(txt.device) for parts in tensors)          # (B, 16, h, w), .., (B,)
        rows = torch.tensor(group)

        adapter.assign(rows)
        losses = flux_model.flow_matching_loss(flux, latent, noise, t, txt[rows], y[rows], 1.0, weight)        # (B,)
        losses.sum().backward()
        of_person = losses.detach().view(len(group), -1).cpu()
        try:
            adapter.step(lr)
        except FloatingPointError:
            at = next((i for i, own in enumerate(of_person) if not own.isfinite().all()), 0)
            error = personalize.NotFinite(done[group[at]] + 1, images[at])
            error.person = group[at]
            raise error from None
        for person in group:
            done[person] += 1
            if done[person] < iters:
                waiting[person] = next(streams[person])
            else:
                del waiting[person]
        if on_step:
            for person, loss in zip(group, of_person.mean(dim=1).tolist()):
                on_step(done[person], loss, person)


class Run:
    """Personalises everybody by every method, and draws every prompt at every seed; what is there already stays.

    Results do not depend on interruptions: people train alone though together, and a batch of pictures is drawn whole.
    """
    def __init__(self, args, people: list[Person], prompts: dict, interruption: Interruption):
        self.args, self.people, self.prompts, self.interruption = args, people, prompts, interruption
        self.device, self.out = args.device, args.out
        self.small = checkpoints.is_small(args.folder)
        self.flux = self.texts = self.autoencoder = None
        self.encoded = {}

    def lora_path(self, setting: Setting, person: Person) -> Path:
        return self.out / "loras" / setting.label / f"{person.name}.safetensors"

    def pictures(self, setting: Setting, person: Person) -> list[Picture]:
        """What is to be there in the end: seed after seed, so that more seeds come after what is there."""
        folder = self.out / "images" / setting.label / person.name
        return [Picture(setting.label, person.name, i, seed, folder / f"{i}_{seed}.png", text)
                for seed in range(self.args.seeds) for i, text in enumerate(self.prompts[person.name]) if text is not None]

    def batches(self, setting: Setting, person: Person) -> list[list[Picture]]:
        """Batches of which a picture is missing. They are the same whatever is there, and so are their pictures' bits."""
        size, batches, pictures = 16 if self.small else 1, [], self.pictures(setting, person)
        for seed in range(self.args.seeds):
            own = [p for p in pictures if p.seed == seed]
            batches += [own[i:i + size] for i in range(0, len(own), size)]
        return [batch for batch in batches if not all(p.path.is_file() for p in batch)]

    def load(self):
        """Texts, encoded; then the transformer and the autoencoder, which stay."""
        if self.flux is None:
            captions = [fill(self.args.prompt, p.gender) for p in self.people]
            words = dict.fromkeys(captions + [text for texts in self.prompts.values() for text in texts if text])
            self.texts = encode_prompts(self.args.folder, list(words), self.device, self.args.dtype)
            self.captions = [torch.cat(parts) for parts in zip(*(self.texts[caption] for caption in captions))]
            self.autoencoder = checkpoints.load_autoencoder(self.args.folder, self.device, self.args.dtype)
            tokens = max(self.args.size, *self.args.resolution) ** 2 // 256 + self.captions[0].shape[1]
            self.flux = checkpoints.open_flux(self.args, self.device, max(self.args.iters or [0]) + self.args.steps, tokens, training=True)
            every = 0 if self.small else len(blocks_of(self.flux))
            recompute_blocks(self.flux, every if self.args.recompute is None else self.args.recompute)

    def latents(self, augment: bool) -> tuple[tuple[list[Tensor], ...], tuple[list[Tensor], ...]]:
        """Of everybody's reference: what personalize.py trains on, kept on the CPU, and the weights of the loss beside it."""
        if augment not in self.encoded:
            everybody = []
            for person in tqdm(self.people, "crops" if augment else "photos", disable=None, leave=False):
                crops = photos.load_crops([person.reference, *person.more], self.args.resolution, augment,
                                               self.args.aspects, self.args.scales)
                latents, weights = personalize.encode_crops(self.autoencoder, crops, self.args.background, self.args.mirror)
                everybody.append(([latent.cpu() for latent in latents], weights))
                self.interruption.raise_if_asked()
            self.encoded[augment] = tuple(zip(*everybody))
        return self.encoded[augment]

    def personalise(self, method: str, rank: int):
        """All LoRAs of a method and rank, of one training run: everybody is a row of one identity bank."""
        args, settings = self.args, [Setting(method, rank, i) for i in iterations_of(method, self.args.iters)]
        if all(self.lora_path(s, person).is_file() for s in settings for person in self.people):
            return
        self.load()
        augment, kind, lomd = method != "lora", kind_of(method), None
        if kind == "meta-lora":
            lomd = args.learned_lomd
            if method == "random-lomd":
                lomd = random_lomd(find_targets(self.flux), len(next(iter(lomd.values()))), args.seed)
        people, weights = self.latents(augment)
        slots = min(len(people), people_at_once(self.flux, rank))
        adapter = MetaLoRA(self.flux, rank, lomd, num_identities=0, slots=slots)
        row = adapter.new_row(torch.Generator().manual_seed(args.seed))         # as everybody starts in a run of their own
        adapter.bank = IdentityBank(row.repeat(len(people), 1).to(self.device))
        state, by_iterations = self.out / "state" / f"{method}_r{rank}.safetensors", {s.iterations: s for s in settings}

        def save_lora_of(person: int, iterations: int):
            path = self.lora_path(by_iterations[iterations], self.people[person])
            path.parent.mkdir(parents=True, exist_ok=True)
            save_lora(path, adapter.collapse(person), metadata={
                "method": method, "rank": str(rank), "iterations": str(iterations), "seed": str(args.seed),
                "learning_rate": f"{args.rates[method]:g}", "prompt": fill(args.prompt, self.people[person].gender),
                "model": Path(args.model).name, "made_by": "eval_rfacesim.py"})

        def save_state():
            state.parent.mkdir(parents=True, exist_ok=True)
            save_file({part: getattr(adapter.bank, part).cpu() for part in IdentityBank.PARTS}, f"{state}.part")
            os.replace(f"{state}.part", state)

        if state.is_file():
            parts = {name: value.clone().to(self.device) for name, value in load_file(state).items()}
            lost = [i for i, steps in enumerate(parts["steps"].tolist()) for s in settings
                    if s.iterations < steps and not self.lora_path(s, self.people[i]).is_file()]
            if parts["weight"].shape == adapter.bank.weight.shape and not lost:
                adapter.bank = IdentityBank(*(parts[part] for part in IdentityBank.PARTS))       # else: an earlier iteration is asked for now; from the start
        for person, steps in enumerate(adapter.bank.steps.tolist()):
            if steps in by_iterations:                     # a kill may come after the state and before the LoRA
                save_lora_of(person, steps)
        last = max(by_iterations)
        saved, left = time.monotonic(), sum(max(0, last - steps) for steps in adapter.bank.steps.tolist())

        def on_step(iteration, loss, person):
            nonlocal saved
            bar.update()
            if iteration in by_iterations:
                save_lora_of(person, iteration)
            if time.monotonic() - saved > 30 or self.interruption.asked:
                save_state()
                saved = time.monotonic()
            self.interruption.raise_if_asked()

        txt, y = (part.to(self.device) for part in self.captions)
        with tqdm(total=left, desc=f"training {method}, rank {rank}, {len(people)} people", disable=None) as bar:
            try:
                train_together(self.flux, adapter, people, txt, y, last, args.rates[method], seed=args.seed, on_step=on_step,
                                  weights=weights)
            except personalize.NotFinite as error:
                raise FloatingPointError(f"{method}, rank {rank}, {self.people[error.person].name}: {error}; a smaller --lr "
                                         f"{method}={args.rates[method]:g} may help") from None
        save_state()
        apply_loras(self.flux, [])

    def draw(self, setting: Setting, person: Person, bar):
        batches = self.batches(setting, person)
        if not batches:
            return
        self.load()
        apply_loras(self.flux, [])
        if setting.rank:
            apply_loras(self.flux, [(load_lora(self.lora_path(setting, person), self.flux.config), 1.0)])
        for batch in batches:
            jobs = [(p.text, p.seed) for p in batch]
            latents = sample_latents(self.flux, self.texts, jobs, self.args.size, self.args.size, self.args.steps,
                                     self.args.guidance, batch_size=len(jobs), on_step=self.interruption.raise_if_asked)
            for picture, latent in zip(batch, list(latents)):
                save_png(decode_latent(self.autoencoder, latent), picture.path, {
                    "prompt": picture.text, "seed": picture.seed, "identity": person.name, "method": setting.title})
                bar.update()

    def everything(self) -> list[Picture]:
        settings, pictures = settings_of(self.args), []
        for method, rank in dict.fromkeys((s.method, s.rank) for s in settings if s.rank):
            self.personalise(method, rank)
        todo = sum(len(batch) for s in settings for p in self.people for batch in self.batches(s, p))
        with tqdm(total=todo, desc="drawing", unit="picture", disable=None) as bar:
            for setting in settings:
                for person in self.people:
                    self.draw(setting, person, bar)
                    pictures += self.pictures(setting, person)
        self.flux = self.autoencoder = None
        common.free(self.device)
        return pictures


# ---------------------------------------------------------------------------------------------------------------------
# Report


def percent(summary: dict | None) -> str:
    if summary is None:
        return "–"
    spread = "" if summary["error"] is None else f" ({100 * summary['error']:.2f})"
    return f"{100 * summary['mean']:.2f}{spread}"


def count(summary: dict | None) -> str:
    return "–" if summary is None else f"{summary['identities']}, {summary['pictures']} of {summary['of']}"


def tables(methods: list[dict], real: dict | None, base: str, quoted: dict | None, no_face_as_zero: bool) -> str:
    """Markdown in the form of the paper's Tables 4 and 5."""
    policy = "a picture without a face counts as 0" if no_face_as_zero else "pictures without a face are left out"
    lines = [f"In percent; in brackets the standard error over identities. Face scores: {policy}.", "",
             "| Model | Base model | FaceSim ↑ | R-FaceSim ↑ | Relative difference | Faces found | Identities, pictures |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for method in methods:
        face, robust = method["facesim"], method["r_facesim"]
        change = f"{100 * (robust['mean'] / face['mean'] - 1):+.1f}%" if face and face["mean"] > 0 else "–"
        found = f"{robust['found']:.1%}" if robust else "–"
        lines.append(f"| {method['title']} | {base} | {percent(face)} | {percent(robust)} | {change} | {found} | {count(robust)} |")
    if real:
        lines.append(f"| the reference photo itself | – | 100.00 | {percent(real)} | – | 100.0% | {count(real)} |")
    for row in quoted["table 4"] if quoted else []:
        lines.append(f"| *{row['method']}, quoted* | *{row['base']}* | *{row['facesim']:.2f}* | *{row['r_facesim']:.2f}* "
                     f"| *{row['difference']:+.1f}%* | | |")
    lines += ["", "| Model | Base model | CLIP-T ↑ | R-FaceSim ↑ | Identities, pictures of CLIP-T; of R-FaceSim |", "| --- | --- | --- | --- | --- |"]
    for method in methods:
        text, robust = method["clip_t"], method["r_facesim"]
        lines.append(f"| {method['title']} | {base} | {percent(text)} | {percent(robust)} | {count(text)}; {count(robust)} |")
    for row in quoted["table 5"] if quoted else []:
        lines.append(f"| *{row['method']}, quoted* | *{row['base']}* | *{row['clip_t']:.2f}* | *{row['r_facesim']:.2f}* | |")
    if quoted:
        lines += ["", f"Quoted: {quoted['source']}. Other people, prompts and judges than here, unless these are Meta-PHD's."]
    return "\n".join(lines) + "\n"


def grouped(methods: list[dict]) -> dict[str, list[dict]]:
    """{method: its ranks and iterations} of those that have both scores."""
    by_method = {}
    for method in methods:
        if method["r_facesim"] and method["clip_t"]:
            by_method.setdefault(method["method"], []).append(method)
    return by_method


def line_of(axes, points: list[dict], metric: str, **style):
    points = sorted(points, key=lambda p: p["iterations"])
    errors = [100 * (p[metric]["error"] or 0) for p in points]
    axes.errorbar([p["iterations"] for p in points], [100 * p[metric]["mean"] for p in points], errors, marker="o",
                  markersize=4, capsize=3, **style)


def figures(methods: list[dict], quoted: dict | None, out: Path):
    """scores.png: R-FaceSim against CLIP-T with quadratic fits, and both against iterations at the lowest rank (Figure 3);
    ranks.png: both against iterations, a column for each rank (Figure 6)."""
    from matplotlib.figure import Figure
    by_method, names = grouped(methods), {"r_facesim": "R-FaceSim (%)", "clip_t": "CLIP-T (%)"}
    if not by_method:
        return
    colours = {method: f"C{i % 10}" for i, method in enumerate(by_method)}
    figure = Figure(figsize=(12, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    plane, upper = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    panels = {"r_facesim": upper, "clip_t": figure.add_subplot(grid[1, 1], sharex=upper)}
    for method, points in by_method.items():
        x, y = (np.array([100 * p[metric]["mean"] for p in points]) for metric in ("clip_t", "r_facesim"))
        label, trained = METHODS.get(method, method), points[0]["rank"] > 0
        plane.scatter(x, y, s=[20 + 6 * p["rank"] for p in points], marker="o" if trained else "*", color=colours[method],
                      label=label, alpha=0.8)
        if len(set(x.tolist())) > 3:
            at = np.linspace(x.min(), x.max(), 50)
            plane.plot(at, np.poly1d(np.polyfit(x - x.mean(), y, 2))(at - x.mean()), color=colours[method], linewidth=1)
        for metric, axes in panels.items():
            if trained:
                lowest = min(p["rank"] for p in points)
                line_of(axes, [p for p in points if p["rank"] == lowest], metric, color=colours[method])
            else:
                axes.axhline(100 * points[0][metric]["mean"], color=colours[method], linestyle="--")
    for i, row in enumerate(quoted["table 5"] if quoted else []):
        plane.scatter(row["clip_t"], row["r_facesim"], marker=f"${i + 1}$", color="grey",
                      label=f"quoted: {row['method']}, {row['base']}")
    plane.set(xlabel=names["clip_t"], ylabel=names["r_facesim"], title="each rank (size of the dot) and number of iterations")
    for metric, axes in panels.items():
        axes.set(ylabel=names[metric], xlabel="iterations" if metric == "clip_t" else "")
    upper.set(title="the lowest rank")
    figure.legend(*plane.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, out / "scores.png")
    ranks = sorted({p["rank"] for points in by_method.values() for p in points if p["rank"]})
    if not ranks:
        return
    figure = Figure(figsize=(3.5 * len(ranks) + 1, 5), layout="constrained")
    axes = figure.subplots(2, len(ranks), sharex=True, sharey="row", squeeze=False)
    for column, rank in enumerate(ranks):
        for row, metric in enumerate(names):
            for method, points in by_method.items():
                if some := [p for p in points if p["rank"] == rank]:
                    line_of(axes[row, column], some, metric, color=colours[method], label=METHODS.get(method, method))
        axes[0, column].set(title=f"rank {rank}")
        axes[1, column].set(xlabel="iterations")
    for row, metric in enumerate(names):
        axes[row, 0].set(ylabel=names[metric])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, out / "ranks.png")


def sheet(path: Path, columns: list[tuple[str, Path | None]], rows: list[tuple[str, list[Path | None]]], side: int = 144):
    """A contact sheet: over each column its prompt and the input, before each row the method's name."""
    font, left, head = ImageFont.load_default(12), 130, 84
    given = any(photo for _, photo in columns)
    lines = ([("input", [photo for _, photo in columns])] if given else []) + rows
    picture = Image.new("RGB", (left + side * len(columns), head + side * len(lines)), "white")
    draw = ImageDraw.Draw(picture)

    def write(text, x, y, width, height):
        text, line = " ".join(text.split()), ""
        for word in [*text.split(), None]:
            if word is None or draw.textlength(f"{line} {word}", font) > width - 8:
                draw.text((x + 4, y + 2), line, "black", font)
                y, height, line = y + 14, height - 14, ""
                if height < 14:
                    break
            line = f"{line} {word}".strip()
    for i, (text, _) in enumerate(columns):
        write(text, left + side * i, 0, side, head)
    for j, (name, paths) in enumerate(lines):
        write(name, 0, head + side * j, left, side)
        for i, file in enumerate(paths):
            try:
                photo = file and photos.read_photo(file)
            except ValueError:
                photo = None
            if photo:
                picture.paste(ImageOps.pad(photo, (side, side), color="white"), (left + side * i, head + side * j))
    save_png(picture, path, {})


def sheets(pictures: list[Picture], people: list[Person], out: Path):
    """For each gender people and prompts across, methods down (Figures 4, 7 and 8); one person's seeds (Figure 4, right)."""
    settings = {p.label: Setting.read(p.label) for p in pictures}
    chosen = {}                                     # of each method the lowest rank, and the iterations nearest the paper's
    for label, setting in settings.items():
        wish = iterations_of(setting.method, None)[0]
        better = (setting.rank, abs(setting.iterations - wish))
        if setting.method not in chosen or better < chosen[setting.method][0]:
            chosen[setting.method] = better, label
    labels = [label for _, label in chosen.values()]
    at = {(p.label, p.person, p.prompt, p.seed): p for p in pictures}
    for gender in dict.fromkeys(p.gender for p in people):
        own = [p for p in people if p.gender == gender and any(q.person == p.name for q in pictures)]
        columns = []
        for i in range(8 if own else 0):
            person = own[i % len(own)]
            there = sorted({(q.seed, q.prompt, q.text) for q in pictures if q.person == person.name})
            first = [cell for cell in there if cell[0] == there[0][0]]
            cell = first[(i if len(own) < len(first) else i // len(own) + i) % len(first)]
            if (person, cell) not in columns:
                columns.append((person, cell))
        if columns:
            sheet(out / f"sheet_{gender or 'people'}.png", [(text, person.reference) for person, (_, _, text) in columns],
                  [(settings[label].title, [getattr(at.get((label, person.name, prompt, seed)), "path", None)
                                            for person, (seed, prompt, _) in columns]) for label in labels])
    person = next(p for p in people if any(q.person == p.name for q in pictures))
    prompt, text = min((q.prompt, q.text) for q in pictures if q.person == person.name)
    seeds = sorted({q.seed for q in pictures if (q.person, q.prompt) == (person.name, prompt)})[:6]
    sheet(out / "sheet_seeds.png", [(f"seed {seed}: {text}", person.reference) for seed in seeds],
          [(settings[label].title, [getattr(at.get((label, person.name, prompt, seed)), "path", None) for seed in seeds])
           for label in labels])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = common.Parser(prog="eval_rfacesim.py", allow_abbrev=False,
                               description="R-FaceSim, FaceSim and CLIP-T of pictures, or of a whole comparison.")
    add, positive = parser.add_argument, common.positive
    add("--data", type=Path, nargs="+", required=True, metavar="DIR", help="real pictures: DIR/[man|woman/]<identity>/<pictures>, "
        "or DIR/[man|woman/]<pictures> of one person each for CLIP-T alone; several folders are taken together")
    add("--images", type=Path, metavar="DIR|JSON", help="score finished pictures, DIR/<method>/<identity>/<prompt>_<seed>.png, or "
        "a JSON list; without it people are personalised and drawn here")
    add("--out", type=Path, default=Path("report"), help="folder of all results; the same command goes on (default: report)")
    add("--model", default="flux-dev", help="flux-dev (default), flux-schnell, baby, or a folder; baby also judges by itself")
    add("--methods", nargs="+", choices=tuple(METHODS), default=["meta-lora", "lora-crops", "lora"],
        help="what to compare (default: meta-lora lora-crops lora); random-lomd is a control, none the floor")
    add("--ranks", type=positive, nargs="+", default=[1], metavar="R", help="ranks of the LoRAs (default: 1)")
    add("--iters", type=positive, nargs="+", metavar="N", help="iterations, of one run each (default: 375, LoRA 625)")
    add("--seeds", type=positive, help="pictures of each prompt (default: 5; with --images all that there are)")
    add("--prompts", type=Path, help="text file; [man/woman] by gender, `man: ...` for men only (default: the model's own, "
        "else meta_phd/unsplash.txt, for one-picture people meta_phd/ffhq.txt)")
    add("--reference", choices=("first", "all"), default="first", help="which picture of an identity is the reference: the one "
        "called reference.*, else the first by name; or each in turn")
    add("--photos", type=positive, default=1, metavar="N", help="how many pictures of a person the methods see: the reference and "
        "those after it (default: 1)")
    add("--gender", choices=("man", "woman"), help="of people whose folder and captions do not say")
    add("--lr", nargs="+", default=[], metavar="[METHOD=]LR", help="learning rates (default: the model's)")
    add("--lomd", type=Path, help="weights of stage 1 (default: lomd.safetensors of the model's folder, else here)")
    add("--prompt", help="what the crops are called in training; may have [man/woman] (default: the model's)")
    add("--resolution", type=positive, nargs="+", metavar="PIXELS", help="of the crops (default: the model's)")
    add("--size", type=positive, help="side of the pictures (default: the model's; FLUX.1's is 1024)")
    add("--steps", type=positive, default=30, help="Euler steps (default: 30)")
    add("--guidance", type=float, help="guidance input (default: the model's; FLUX.1's is 3.5)")
    add("--seed", type=int, default=0, help="of the training (default: 0)")
    add("--no-face-as-zero", action="store_true", help="a picture without a face counts as 0, not as missing")
    add("--face-weights", type=Path, metavar="FILE", help="state dict of InceptionResnetV1, .pt or .safetensors (default: "
        "facenet-pytorch's, from its cache or downloaded)")
    add("--clip", metavar="DIR", help=f"folder of a CLIP model (default: {CLIP} from the hub)")
    add("--paper", action="store_true", help="put the paper's published numbers beside, marked as quoted")
    checkpoints.add_speed_options(add, training=True)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    return parser.parse_args(argv)


def check(args):
    """ValueError for what can be refused before anything large is read; fills in the defaults."""
    parent = next(p for p in (args.out, *args.out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {args.out}: {parent} is no folder that can be written to")
    if args.images and not args.images.exists():
        raise ValueError(f"no such folder or list: {args.images}")
    for folder in args.data:
        if args.out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {args.out} lies within --data {folder}; name a folder outside of it")
    args.methods, args.ranks = list(dict.fromkeys(args.methods)), sorted(set(args.ranks))
    args.iters = args.iters and sorted(set(args.iters))
    args.device = common.pick_device(args.device)
    if args.images:
        return
    args.rates, args.seeds = {}, args.seeds or 5
    for word in args.lr:
        method, _, rate = word.rpartition("=")
        if method and method not in METHODS:
            raise ValueError(f"--lr {word}: no method {method!r}; there are {', '.join(METHODS)}")
        try:
            args.rates[method] = float(rate)
        except ValueError:
            raise ValueError(f"--lr {word}: {rate!r} is no number") from None
    for args.lr in [*args.rates.values(), None]:
        common.check_training(args)
    if args.size and args.size % 16:
        raise ValueError(f"--size takes multiples of 16, not {args.size}")


def take_model(args):
    """Finds the model (may download) and its LoMD, and what decides about results into args.settings."""
    general = args.rates.pop("", None)
    checkpoints.take_model(args, args.device, "lora")
    args.rates = {m: args.rates.get(m) or general or checkpoints.learning_rate(args.folder, kind_of(m))
                  for m in METHODS if m != "none"}
    args.size = args.size or checkpoints.model_defaults(args.folder)["resolution"]
    args.learned_lomd, lomd = None, "none"
    if {"meta-lora", "random-lomd"} & set(args.methods):
        args.learned_lomd, lomd, untrained = read_lomd(args.folder, args.lomd)
        if untrained and "meta-lora" in args.methods:
            note("this LoMD is random and was never trained")
    args.settings = {"model": checkpoints.flux_fingerprint(args.folder), "autoencoder": checkpoints.autoencoder_fingerprint(args.folder),
                     "lomd": lomd, "learning rates": args.rates, "seed": args.seed, "caption": args.prompt,
                     "resolution": args.resolution, "size": args.size, "steps": args.steps,
                     "guidance": args.guidance, "dtype": str(args.dtype) + " fp8" * args.fp8,
                     **{name: getattr(args, name) for name in ("aspects", "scales", "background", "mirror")},
                     "order of a row's numbers": "by width"}


def check_settings(args, people: list[Person], prompts: dict):
    """What --out was made with: written by the first command; ValueError for one that differs. --methods, --ranks, --iters and
    --seeds may change: what they name is added."""
    now = json.loads(json.dumps(args.settings | {
        "people and their references": [" ".join([p.name, *(digest(path.read_bytes()) for path in (p.reference, *p.more))]) for p in people],
        "prompts": prompts}))
    path = args.out / "settings.json"
    if path.exists():
        before = common.JsonFile(path)
        if now["lomd"] == "none" or before["lomd"] == "none":             # methods without one came first, or come now
            now["lomd"] = before["lomd"] = max(now["lomd"], before["lomd"])
        for name, value in now.items():
            was = before.get(name, "not written down")
            if was != value:
                detail = f": it was {was} and is {value}" if len(f"{was}{value}") < 200 else ""
                raise ValueError(f"--out {args.out} was made with another setting of {name}{detail}; name a new folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(now, indent=1).encode())


def evaluate(argv=None, quiet: bool = False):
    """The command. `quiet`: scores.json and tables.md alone, for a script that goes on with them."""
    args = parse(argv)
    start, problems = time.perf_counter(), []
    check(args)
    people = read_people(args.data, args.reference, args.gender, args.photos)
    if args.images and args.images.is_file():
        pictures, problems, prompts = read_picture_list(args.images, people)
    else:
        prompts = prompts_for(people, args.prompts, None if args.model in checkpoints.HUB else checkpoints.find_model(args.model))
        pictures, problems = find_pictures(args.images, prompts) if args.images else ([], [])
    if args.images:
        pictures, incomplete = check_complete(pictures, people, prompts, args.seeds)
        problems += incomplete
        if not pictures:
            complain(problems + [f"--images {args.images} holds no picture of anybody in --data"])
    judges = Judges(args.model, args.face_weights, args.clip, args.device)
    real = embed_real(judges, people)
    if not args.images:
        take_model(args)
        check_settings(args, people, prompts)
        with Interruption() as interruption:
            pictures = Run(args, people, prompts, interruption).everything()
    groups = {}
    for picture in pictures:
        groups.setdefault(picture.label, {}).setdefault(picture.person, []).append(picture)
    rows = {label: [] for label in groups}
    drawn = time.perf_counter()
    with tqdm(total=len(pictures), desc="scoring", unit="picture", disable=None) as bar:
        for label, by_person in groups.items():
            for person, some in by_person.items():
                own, unread = score(judges, real.get(person), some, args.out / "parts")
                rows[label] += own
                problems += unread
                bar.update(len(some))
    for problem in problems:
        note(" ".join(problem.split()))
    report(args, people, pictures, rows, real, judges, problems, people, quiet)
    if not quiet:
        print(f"seconds: {drawn - start:.0f} until all pictures were there, {time.perf_counter() - drawn:.0f} to score and report")


def report(args, people, pictures, rows, real, judges, problems, shown, quiet=False):
    """scores.json and tables.md into args.out; unless `quiet` also figures and sheets (of the people `shown`), tables on stdout."""
    args.out.mkdir(parents=True, exist_ok=True)
    methods = []
    for label, own in rows.items():
        if own:
            setting = Setting.read(label)
            methods.append({"label": label, "title": setting.title, **setting._asdict()}
                           | summary_of(own, people, args.no_face_as_zero))
    if not methods:
        raise ValueError("none of the pictures can be read")
    real_rows = [{"identity": name, "number": 0, "seed": 0, "r_facesim": (own.tests @ own.reference).mean().item()}
                 for name, own in real.items()]
    ceiling = summarise(real_rows, people, "r_facesim")
    quoted = common.JsonFile(HERE / "meta_phd" / "published.json") if args.paper else None
    text = tables(methods, ceiling, "–" if args.images else Path(args.model).name, quoted, args.no_face_as_zero)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "facenet-pytorch")}
    scores = {"settings": getattr(args, "settings", {}) | {"reference": args.reference, "no_face_as_zero": args.no_face_as_zero},
              "judges": judges.names, "versions": versions, "methods": methods, "reference_photo": ceiling,
              "people": {p.name: {"identity": p.identity, "gender": p.gender, "reference": p.reference.name,
                                  "more": [path.name for path in p.more], "tests": [path.name for path in p.tests]} for p in people},
              "problems": problems, "pictures": [row for own in rows.values() for row in own]}
    write_whole(args.out / "scores.json", json.dumps(scores, indent=1).encode())
    write_whole(args.out / "tables.md", text.encode())
    if quiet:
        return
    figures(methods, quoted, args.out)
    sheets(pictures, shown, args.out)
    print(text)
    print(f"{args.out}: scores.json, tables.md, {', '.join(sorted(p.name for p in args.out.glob('*.png')))}")


def main(argv=None):
    """Exit code: 0 done, 1 training diverged or memory ran out, 2 bad input, 130 Ctrl-C; the same command goes on."""
    return common.run_script("eval_rfacesim.py", evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
