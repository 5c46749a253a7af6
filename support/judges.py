"""The networks that judge generated pictures, and which pictures and prompts belong together.

InceptionResnetV1 of facenet-pytorch (VGGFace2) tells faces apart, or the baby's own network.
"""
import itertools
import re
import textwrap
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from support.checkpoints import load_transformers_model, quiet_transformers
from support.common import check_file, digest, not_content, read_prompts
from support.finding import HUB, find_model, model_name
from support.people import Person, fill
from support.photos import SUFFIXES, visible
from support.sheets import PROMPTS, SHEET

INCEPTION = ("https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
             "20180402-114759-vggface2.pt")
CLIP = "openai/clip-vit-base-patch32"
META_PHD = Path(__file__).resolve().parents[1] / "paper" / "meta_phd"
Prompts = dict[str, dict[int, str]]              # {person: {number: prompt}}


class FaceEmbedder(nn.Module):
    """The baby's InceptionResnetV1: crops (B, 3, 64, 64), about [-1, 1] -> (B, 128), norm 1."""
    SIDE = 64
    DIM = 128
    WIDTHS = 24, 48, 96, 160

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()
        # each block halves the sides: 32, 16, 8, 4
        for before, width in itertools.pairwise((3, *self.WIDTHS)):
            block = nn.ModuleDict()
            block["skip"] = nn.Conv2d(before, width, 1, stride=2)
            block["down"] = nn.Conv2d(before, width, 3, stride=2, padding=1)
            for i in (1, 2, 3):
                block[f"norm{i}"] = nn.BatchNorm2d(width)
                block[f"conv{i}"] = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.blocks.append(block)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Linear(width * 16, self.DIM)
        self.last_norm = nn.BatchNorm1d(self.DIM)

    @staticmethod
    def layer(block: nn.ModuleDict, i: int, x: Tensor) -> Tensor:
        return block[f"conv{i}"](F.relu(block[f"norm{i}"](x)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["skip"](x) + self.layer(block, 1, block["down"](x))
            x = x + self.layer(block, 3, self.layer(block, 2, x))
        x = F.relu(self.norm(x)).flatten(1)
        x = self.last_norm(self.last(x))
        return F.normalize(x, dim=1)


def find_inception() -> Path:
    """facenet-pytorch's VGGFace2 weights in its own cache; downloaded if they are not there."""
    from facenet_pytorch.models.inception_resnet_v1 import get_torch_home
    path = Path(get_torch_home()) / "checkpoints" / INCEPTION.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"InceptionResnetV1 is not at {path} and cannot be downloaded ({error}): fetch "
                f"{INCEPTION} (107 MB), or name a state dict with --face-weights; "
                "--model baby needs neither") from None
    return path


def fill_embedder(model: nn.Module, path: Path):
    """Weights from a .safetensors file, or a .pt of tensors only. ValueError for any other pickle,
    which is never run, and for the weights of another network."""
    check_file(path, "file of weights")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                   # on files of another kind, readers raise anything
        reason = not_content(path) or textwrap.shorten(f"{error!r}", 200)
        raise ValueError(f"{path} is not a file of weights: {reason}") from None
    try:
        # facenet-pytorch's own file has a classifier too
        state = {name: value for name, value in state.items() if not name.startswith("logits.")}
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(
            f"{path} is not a state dict of {type(model).__name__}: {reason}") from None


class FaceNetwork:
    """MTCNN with an embedder of the largest face that it finds: frozen, fp32, on `device`.

    folder: of a model that may have its own embedder. weights: a state dict of InceptionResnetV1
    instead. Without either, facenet-pytorch's. ValueError if weights are missing or of another
    network."""
    def __init__(self, folder: Path | None, weights: Path | None, device: torch.device):
        from facenet_pytorch import MTCNN, InceptionResnetV1
        path = own_file(folder, "face_embedder.safetensors")
        if path and not weights:
            side = FaceEmbedder.SIDE
            embedder = FaceEmbedder()
        else:
            path = weights or find_inception()
            side = 160
            embedder = InceptionResnetV1()
        fill_embedder(embedder, path)
        self.device = device
        self.embedder = embedder.eval().to(device)
        self.face_name = f"{type(embedder).__name__} {digest(path.read_bytes())}"
        # MTCNN pools to arbitrary sizes, which mps cannot
        self.detector = MTCNN(side, margin=0, device="cpu" if device.type == "mps" else device)

    @torch.no_grad()
    def embed(self, image: Image.Image) -> Tensor | None:
        """The largest face (E,), of norm 1, on the CPU; None without one."""
        if min(image.size) < self.detector.min_face_size:
            return None                                      # MTCNN fails on these
        face = self.detector(image)                          # (3, side, side), about [-1, 1]
        return None if face is None else self.embedder(face[None].to(self.device))[0].cpu()

    def count(self, image: Image.Image) -> int:
        """How many faces MTCNN is sure of, in a picture in which `embed` finds one."""
        _, probabilities = self.detector.detect(image)
        return sum(value > 0.9 for value in probabilities)


class Judges(FaceNetwork):
    """FaceNetwork, and CLIP, frozen and fp32 too. ValueError if weights are missing.

    model: one with its own judges (baby); any other gets InceptionResnetV1 and CLIP ViT-B/32."""
    def __init__(
        self,
        model: str = "flux-dev",
        face_weights: Path | None = None,
        clip: str | None = None,
        device: str | torch.device = "cpu",
    ):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        folder = own_folder(model)
        super().__init__(folder, face_weights, torch.device(device))
        name = clip or own_file(folder, "scorer") or CLIP
        try:
            with quiet_transformers():
                self.tokenizer = CLIPTokenizer.from_pretrained(name)
                self.processor = CLIPImageProcessor.from_pretrained(name)
                self.clip = load_transformers_model(CLIPModel, name, torch.float32)
                self.clip.to(self.device)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"CLIP cannot be loaded from {name} ({str(error).splitlines()[0]}): download "
                f"{CLIP}, or name a folder with --clip; --model baby needs neither") from None
        weights = torch.cat([each.flatten() for each in self.clip.state_dict().values()])
        kind = digest(weights.cpu().numpy().tobytes()) + self.processor.to_json_string()
        clip_name = f"{Path(name).name} {digest(kind.encode())}"
        self.names = {"face": self.face_name, "text": clip_name}

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """CLIP's image embeddings (n, E), on the CPU."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        pooled = self.clip.vision_model(pixels.to(self.device)).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """CLIP's text embeddings (n, E)."""
        length = self.clip.config.text_config.max_position_embeddings    # 77 tokens; cut off after
        batch = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        pooled = self.clip.text_model(batch.input_ids.to(self.device)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=1).cpu()

    def match(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        """CLIP-T: cosine of each image with its own text (n,)."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(dim=1)


# --------------------------------------------------------------------------------------------------
# The pictures to judge


def add_options(add: Callable[..., object]):
    """Options of eval_rfacesim.py that paper/compare.py has too; add: a parser's add_argument."""
    add("--data", type=Path, nargs="+", action="extend", required=True, metavar="DIR",
        help="real pictures: DIR/[man|woman/]<identity>/<pictures>; or DIR/[man|woman/]<pictures>, "
        "one per person, for CLIP-T only; or photo files of one person, who is called `person`")
    add("--out", type=Path, default="report", help="folder of all results (default: report)")
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


class Picture(NamedTuple):
    method: str                      # a row of the tables
    identity: str                    # name of a Person
    number: int                      # of the prompt, among the person's prompts
    seed: int
    prompt: str
    path: Path


def own_folder(model: str) -> Path | None:
    """The folder of a model that may hold its own judges and prompts."""
    if model in HUB:
        return None
    if Path(model).is_file():
        return Path(model).parent
    return Path(find_model(model))


def own_file(folder: Path | None, name: str) -> Path | None:
    """A file of a folder, which may lack it."""
    path = folder and folder / name
    return path if path and path.exists() else None


def prompts_for(
    people: list[Person],
    prompt_file: Path | None,
    model: str,
) -> Prompts:
    """Everybody's prompts, without those that are for the other gender.

    They come from `prompt_file`, or else from the model's prompts.txt, or else from Meta-PHD."""
    prompt_file = prompt_file or own_file(own_folder(model), PROMPTS)
    prompts = {}
    for person in people:
        path = prompt_file or META_PHD / ("unsplash.txt" if person.tests else "ffhq.txt")
        texts = [fill(prompt, person.gender) for prompt in read_prompts([], path)]
        prompts[person.name] = {i: text for i, text in enumerate(texts) if text}
    if not any(prompts.values()):
        raise ValueError(f"{path} has no prompt for any of these people")
    return prompts


def find_pictures(root: Path, prompts: Prompts) -> tuple[list[Picture], list[str]]:
    """Pictures root/<method>/<identity>/<prompt>_<seed>.png, each prompt and seed once, and a line
    for each file that is not scored."""
    found, skipped = {}, {}          # {(method, identity, number, seed): Picture}, {path: why}
    folders = []
    for path in visible(root):
        if path.is_dir():
            folders += visible(path)
        elif path.name not in (PROMPTS, SHEET):
            skipped[path] = "it is not in a method's folder"

    for folder in folders:
        person = unicodedata.normalize("NFC", folder.name)
        if not folder.is_dir():
            skipped[folder] = "it is not in an identity's folder"
            continue
        if person not in prompts:
            skipped[folder] = "no identity of that name in --data"
            continue
        for path in visible(folder):
            match = re.fullmatch(r"([0-9]+)_([0-9]+)", path.stem)
            if not match or path.suffix.lower() not in SUFFIXES:
                skipped[path] = "its name is not <prompt>_<seed>.png"
                continue
            number, seed = map(int, match.groups())
            text = prompts[person].get(number)
            if text is None:
                skipped[path] = f"{number} is not a prompt of {person}"
                continue
            picture = Picture(folder.parent.name, person, number, seed, text, path)
            first = found.setdefault(picture[:4], picture)
            if first is not picture:
                skipped[path] = f"{first.path.name} is the same prompt and seed"
    problems = [f"{path} is not scored: {why}" for path, why in skipped.items()]
    return [*found.values()], problems


def find_missing(pictures: list[Picture], prompts: Prompts) -> list[str]:
    """A line for each person's missing pictures.

    Expected is every seed that anybody has from any method."""
    there = {picture[:4] for picture in pictures}
    methods = dict.fromkeys(picture.method for picture in pictures)
    seeds = sorted({picture.seed for picture in pictures})
    problems = []
    for method, person in itertools.product(methods, prompts):
        cells = [*itertools.product([method], [person], prompts[person], seeds)]
        missing = [cell for cell in cells if cell not in there]
        if missing:
            _, _, number, seed = missing[0]
            problems.append(
                f"{method}: {len(missing)} of {len(cells)} pictures of {person} are missing, "
                f"the first is prompt {number}, seed {seed}")
    return problems
