"""R-FaceSim: does it look like the person, or only like the photo?

    python eval_rfacesim.py --data people/ --images results/

    people/[man|woman/]<identity>/<pictures>                real pictures; with one picture a person, and no folders for
                                                            them, only CLIP-T is taken (the FFHQ part of Meta-PHD)
    results/<method>/<identity>/<prompt>_<seed>.png         of any method; <prompt>: its number in --prompts, from 0

One picture of an identity is the reference: what the method was shown. R-FaceSim compares what is generated with the
*other* real pictures, FaceSim with the reference, CLIP-T with the prompt; all are cosines. To --out go scores.json (every
number of every picture) and tables.md. The paper's whole comparison, training and drawing included: paper/compare.py.

Sources: "Meta-LoRA" (Topal et al. 2025), Algorithm 3, appendix F, Tables 4 and 5; facenet-pytorch for MTCNN's face crop
(160 pixels, no margin) and InceptionResnetV1 (VGGFace2); CLIP ViT-B/32.
Deviation: Algorithm 3 does not say what happens to a picture without a face. Here it is left out of both face scores and
the share of faces found stands beside them, or it counts as 0 (--no-face-as-zero).
"""
import argparse
import hashlib
import importlib.metadata
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import support  # before torch: how its threads wait
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from support import photos
from support.checkpoints import HUB, find_model, load_transformers_model, quiet_transformers
from support.common import (JsonFile, Parser, check_writable, note, pick_device, positive, read_prompts, run_script,
                            write_whole)

META_PHD = Path(__file__).resolve().parent / "paper" / "meta_phd"
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
        folder = find_model(model) if model not in HUB else None
        baby = folder if folder and (folder / "face_embedder.safetensors").is_file() else None
        self.device = torch.device(device)
        self.embedder, side, face_name = load_face_embedder(None if face_weights else baby, face_weights)
        self.embedder.to(self.device)
        # pooling to arbitrary sizes does not exist on mps
        self.detector = MTCNN(image_size=side, margin=0, device=torch.device("cpu" if self.device.type == "mps" else device))
        name = clip or (folder / "scorer" if baby else CLIP)
        try:
            with quiet_transformers():
                self.tokenizer = CLIPTokenizer.from_pretrained(name)
                self.processor = CLIPImageProcessor.from_pretrained(name)
                self.clip = load_transformers_model(CLIPModel, name, torch.float32, None).to(self.device)
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
    files = {bool(p.tests): own or theirs or META_PHD / ("unsplash.txt" if p.tests else "ffhq.txt") for p in people}
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
        numbers = JsonFile(path)["numbers"]
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


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="eval_rfacesim.py", allow_abbrev=False, description="R-FaceSim, FaceSim and CLIP-T of pictures.")
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="DIR", help="real pictures: "
        "DIR/[man|woman/]<identity>/<pictures>, or DIR/[man|woman/]<pictures> of one person each for CLIP-T alone; "
        "several folders are taken together")
    add("--images", type=Path, required=True, metavar="DIR", help="pictures to score: "
        "DIR/<method>/<identity>/<number of the prompt, from 0>_<seed>.png")
    add("--out", type=Path, default=Path("report"), help="folder of scores.json and tables.md (default: report)")
    add("--model", default="flux-dev", help="baby, or a folder, with judges and prompts of its own (default: flux-dev)")
    add("--seeds", type=positive, help="pictures of each prompt (default: all that there are)")
    add("--prompts", type=Path, help="text file; [man/woman] by gender, `man: ...` for men only (default: the model's "
        "own, else paper/meta_phd/unsplash.txt, for one-picture people paper/meta_phd/ffhq.txt)")
    add("--reference", choices=("first", "all"), default="first", help="which picture of an identity is the reference: "
        "the one called reference.*, else the first by name; or each in turn")
    add("--gender", choices=("man", "woman"), help="of people whose folder and captions do not say")
    add_judges(add)
    return parser.parse_args(argv)


def add_judges(add) -> None:
    """How pictures are judged, for the parser of a script."""
    add("--no-face-as-zero", action="store_true", help="a picture without a face counts as 0, not as missing")
    add("--face-weights", type=Path, metavar="FILE", help="state dict of InceptionResnetV1, .pt or .safetensors "
        "(default: facenet-pytorch's, from its cache or downloaded)")
    add("--clip", metavar="DIR", help=f"folder of a CLIP model (default: {CLIP} from the hub)")
    add("--paper", action="store_true", help="put the paper's published numbers beside, marked as quoted")
    add("--device", help="cuda, mps or cpu (default: the best there is)")


def check_out(out: Path, data: list[Path]) -> None:
    """ValueError unless results can be written, and not among the people."""
    check_writable(out, "--out")
    for folder in data:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {out} lies within --data {folder}; name a folder outside of it")


def own_folder(model: str) -> Path | None:
    """The folder of a model that may bring judges and prompts of its own."""
    return None if model in HUB else find_model(model)


def score_all(judges: Judges, real: dict[str, Real], pictures: list[Picture],
              kept: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """Scores of all pictures, {method: [dict]}, and a line for each that cannot be read."""
    groups, rows, problems = {}, {}, []
    for picture in pictures:
        groups.setdefault((picture.label, picture.person), []).append(picture)
    with tqdm(total=len(pictures), desc="scoring", unit="picture", disable=None) as bar:
        for (label, person), some in groups.items():
            own, unread = score(judges, real.get(person), some, kept)
            rows.setdefault(label, []).extend(own)
            problems += unread
            bar.update(len(some))
    return rows, problems


def report(out: Path, people: list[Person], rows: dict[str, list[dict]], real: dict[str, Real], judges: Judges,
           problems: list[str], no_face_as_zero: bool = False, paper: bool = False, base: str = "–",
           settings: dict | None = None,
           describe: Callable[[str], dict] = lambda label: {"title": label}) -> tuple[list[dict], dict | None]:
    """scores.json and tables.md into `out` -> a summary of each method, and the numbers that are quoted beside."""
    out.mkdir(parents=True, exist_ok=True)
    methods = [{"label": label, **describe(label)} | summary_of(own, people, no_face_as_zero) for label, own in rows.items() if own]
    if not methods:
        raise ValueError("none of the pictures can be read")
    real_rows = [{"identity": name, "number": 0, "seed": 0, "r_facesim": (own.tests @ own.reference).mean().item()}
                 for name, own in real.items()]
    ceiling = summarise(real_rows, people, "r_facesim")
    quoted = JsonFile(META_PHD / "published.json") if paper else None
    text = tables(methods, ceiling, base, quoted, no_face_as_zero)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "facenet-pytorch")}
    scores = {"settings": (settings or {}) | {"no_face_as_zero": no_face_as_zero},
              "judges": judges.names, "versions": versions, "methods": methods, "reference_photo": ceiling,
              "people": {p.name: {"identity": p.identity, "gender": p.gender, "reference": p.reference.name,
                                  "more": [path.name for path in p.more], "tests": [path.name for path in p.tests]} for p in people},
              "problems": problems, "pictures": [row for own in rows.values() for row in own]}
    write_whole(out / "scores.json", json.dumps(scores, indent=1).encode())
    write_whole(out / "tables.md", text.encode())
    return methods, quoted


def evaluate(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.images.is_dir():
        raise ValueError(f"no such folder: {args.images}")
    check_out(args.out, args.data)
    people = read_people(args.data, args.reference, args.gender)
    prompts = prompts_for(people, args.prompts, own_folder(args.model))
    pictures, problems = find_pictures(args.images, prompts)
    pictures, incomplete = check_complete(pictures, people, prompts, args.seeds)
    problems += incomplete
    if not pictures:
        complain(problems + [f"--images {args.images} holds no picture of anybody in --data"])
    judges = Judges(args.model, args.face_weights, args.clip, pick_device(args.device))
    real = embed_real(judges, people)
    rows, unread = score_all(judges, real, pictures, args.out / "parts")
    for problem in (problems := problems + unread):
        note(" ".join(problem.split()))
    report(args.out, people, rows, real, judges, problems, args.no_face_as_zero, args.paper,
           settings={"reference": args.reference})
    print((args.out / "tables.md").read_text())
    print(f"{args.out}: scores.json, tables.md")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 130 Ctrl-C; the same command goes on."""
    return run_script("eval_rfacesim.py", evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
