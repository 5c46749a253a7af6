"""The networks that judge generated pictures, and which pictures and prompts belong together.

InceptionResnetV1 of facenet-pytorch (VGGFace2) tells faces apart, or the baby's own network.
"""
import itertools
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from support.checkpoints import load_transformers_model, quiet_transformers
from support.common import check_file, digest, not_content, read_prompts
from support.finding import HUB, find_model
from support.people import Person, fill
from support.photos import SUFFIXES, visible
from support.sheets import PROMPTS, SHEET

INCEPTION = ("https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
             "20180402-114759-vggface2.pt")
CLIP = "openai/clip-vit-base-patch32"
META_PHD = Path(__file__).resolve().parents[1] / "paper" / "meta_phd"


class FaceEmbedder(nn.Module):
    """The baby's InceptionResnetV1: crops (B, 3, 64, 64), about [-1, 1] -> (B, 128), norm 1."""
    SIDE = 64
    DIM = 128
    WIDTHS = 24, 48, 96, 160

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        before = 3
        for width in self.WIDTHS:                # each block halves the sides: 32, 16, 8, 4
            block = nn.ModuleDict()
            block["skip"] = nn.Conv2d(before, width, 1, stride=2)
            block["down"] = nn.Conv2d(before, width, 3, stride=2, padding=1)
            for i in (1, 2, 3):
                block[f"norm{i}"] = nn.BatchNorm2d(width)
                block[f"conv{i}"] = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.blocks.append(block)
            before = width
        self.norm = nn.BatchNorm2d(before)
        self.last = nn.Linear(before * 16, self.DIM)
        self.last_norm = nn.BatchNorm1d(self.DIM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            h = block["down"](x)
            h = block["conv1"](F.relu(block["norm1"](h)))
            x = block["skip"](x) + h
            h = block["conv2"](F.relu(block["norm2"](x)))
            h = block["conv3"](F.relu(block["norm3"](h)))
            x = x + h
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


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A .safetensors file, or a .pt of tensors only: ValueError for any other pickle, never run."""
    check_file(path, "file of weights")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                   # on files of another kind, readers raise anything
        message = str(error) or type(error).__name__
        reason = not_content(path) or message.splitlines()[0]
        raise ValueError(f"{path} is not a file of weights: {reason}") from None
    values = state.values() if isinstance(state, dict) else [None]
    if not all(isinstance(value, Tensor) for value in values):
        raise ValueError(f"{path} is not a state dict: it must map names to tensors")
    return state


def find_shapes(state: dict[str, Tensor]) -> set[tuple[str, torch.Size]]:
    """(name, shape) of what an embedder needs: no classifier, none of BatchNorm's counts."""
    shapes = set()
    for name, value in state.items():
        if not name.startswith("logits.") and "num_batches_tracked" not in name:
            shapes.add((name, value.shape))
    return shapes


def load_face_embedder(
    baby: Path | None,
    weights: Path | None = None,
) -> tuple[nn.Module, int, str]:
    """The network, the side of its crops in pixels, and its name with a hash.

    baby: folder of a model with its own face network. weights: file of a state dict. ValueError."""
    path = weights
    if path is None:
        path = baby / "face_embedder.safetensors" if baby else find_inception()
    state = read_state_dict(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from facenet_pytorch import InceptionResnetV1
    model = FaceEmbedder() if baby else InceptionResnetV1(pretrained=None)

    kind = type(model).__name__
    shapes = find_shapes(state)
    different = sorted(name for name, _ in shapes ^ find_shapes(model.state_dict()))
    if different:
        raise ValueError(f"{path} does not fit {kind}: the first difference is in {different[0]}")
    # strict=False: only BatchNorm's counts are missing, all else was just compared
    model.load_state_dict({name: state[name] for name, _ in shapes}, strict=False)
    side = FaceEmbedder.SIDE if baby else 160
    return model.eval(), side, f"{kind} {digest(path.read_bytes())}"


def load_face_network(
    baby: Path | None,
    weights: Path | None,
    device: torch.device,
) -> tuple[nn.Module, nn.Module, str]:
    """MTCNN, which finds and crops the largest face; the embedder of its crops; its name.

    baby: folder of a model with its own embedder; weights of a state dict are InceptionResnetV1's."""
    from facenet_pytorch import MTCNN
    embedder, side, name = load_face_embedder(None if weights else baby, weights)
    # MTCNN pools to arbitrary sizes, which mps cannot
    detector = MTCNN(side, margin=0, device="cpu" if device.type == "mps" else device)
    return detector, embedder.to(device), name


class Judges:
    """MTCNN with a face embedder, and CLIP: frozen, fp32, on `device`.

    model: one with its own judges (baby); any other gets InceptionResnetV1 and CLIP ViT-B/32.
    Embeddings are (n, E), of norm 1, on the CPU. ValueError if weights are missing."""
    BATCH = 32

    def __init__(
        self,
        model: str = "flux-dev",
        face_weights: Path | None = None,
        clip: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        self.device = torch.device(device)
        folder = own_folder(model)
        baby = None
        if folder and (folder / "face_embedder.safetensors").is_file():
            baby = folder

        faces = load_face_network(baby, face_weights, self.device)
        self.detector, self.embedder, face_name = faces

        name = clip or (folder / "scorer" if baby else CLIP)
        try:
            with quiet_transformers():
                self.tokenizer = CLIPTokenizer.from_pretrained(name)
                self.processor = CLIPImageProcessor.from_pretrained(name)
                self.clip = load_transformers_model(CLIPModel, name, torch.float32, None)
                self.clip.to(self.device)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"CLIP cannot be loaded from {name} ({str(error).splitlines()[0]}): download "
                f"{CLIP}, or name a folder with --clip; --model baby needs neither") from None
        weights = self.clip.text_projection.weight.detach().cpu().numpy()
        clip_name = f"{Path(name).name} {digest(weights.tobytes())}"
        self.names = {"face": face_name, "text": clip_name}

    @torch.no_grad()
    def crop(self, image: Image.Image) -> Tensor | None:
        """The largest face that MTCNN finds, (3, side, side) in about [-1, 1]; None without one."""
        face = self.detector(image)
        return None if face is None else face.cpu()

    def count(self, image: Image.Image) -> int:
        """How many faces MTCNN is sure of."""
        _, probabilities = self.detector.detect(image)             # [None] without a face
        return sum(value is not None and value > 0.9 for value in probabilities)

    @torch.no_grad()
    def embed(self, crops: list[Tensor]) -> Tensor:
        """Crops of `crop` -> (n, E)."""
        if not crops:
            return torch.zeros(0, 1)
        parts = []
        for i in range(0, len(crops), self.BATCH):
            batch = torch.stack(crops[i:i + self.BATCH])
            parts.append(self.embedder(batch.to(self.device)).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """CLIP's image embeddings (n, E)."""
        parts = []
        for i in range(0, len(images), self.BATCH):
            batch = self.processor(images=images[i:i + self.BATCH], return_tensors="pt")
            pixels = batch["pixel_values"].to(self.device)
            pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
            parts.append(self.clip.visual_projection(pooled))
        return F.normalize(torch.cat(parts), dim=1).cpu()

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


class Picture(NamedTuple):
    label: str                       # its method: a row of the tables
    person: str
    prompt: int                      # number among the person's prompts
    seed: int
    path: Path
    text: str                        # the prompt


def own_folder(model: str) -> Path | None:
    """The folder of a model that may hold its own judges and prompts."""
    if model in HUB:
        return None
    if Path(model).is_file():
        return Path(model).parent
    return Path(find_model(model))


def prompts_for(
    people: list[Person],
    prompt_file: Path | None,
    model_folder: Path | None,
) -> dict[str, list[str | None]]:
    """{person: prompts, None for one that is for the other gender}.

    They come from `prompt_file`, or else from the model's prompts.txt, or else from Meta-PHD."""
    if prompt_file is None and model_folder and (model_folder / "prompts.txt").is_file():
        prompt_file = model_folder / "prompts.txt"
    lists = {}                                   # {file: its lines}
    prompts = {}
    for person in people:
        path = prompt_file or META_PHD / ("unsplash.txt" if person.tests else "ffhq.txt")
        if path not in lists:
            lists[path] = read_prompts([], path)
        prompts[person.name] = [fill(prompt, person.gender) for prompt in lists[path]]
    return prompts


def find_pictures(
    root: Path,
    prompts: dict[str, list[str | None]],
) -> tuple[list[Picture], list[str]]:
    """Pictures root/<method>/<identity>/<prompt>_<seed>.png, and a line for each other thing."""
    pictures, folders = [], []
    skipped = {}                                 # {path: why}
    for path in visible(root):
        if path.is_dir():
            folders += visible(path)
        elif path.name not in (PROMPTS, SHEET):
            skipped[path] = "it is not in a method's folder"

    for folder in folders:
        if folder.name not in prompts or not folder.is_dir():
            skipped[folder] = "no identity of that name in --data"
            continue
        texts = prompts[folder.name]
        for path in visible(folder):
            match = re.fullmatch(r"(.+)_([0-9]+)", path.stem)
            if path.suffix.lower() not in SUFFIXES or not match:
                skipped[path] = "its name is not <prompt>_<seed>.png"
                continue
            number = int(match[1]) if match[1].isdecimal() else len(texts)
            if number >= len(texts) or texts[number] is None:
                skipped[path] = f"{match[1]} is not a prompt of {folder.name}"
                continue
            pictures.append(Picture(
                label=folder.parent.name,
                person=folder.name,
                prompt=number,
                seed=int(match[2]),
                path=path,
                text=texts[number],
            ))
    return pictures, [f"{path} is not scored: {why}" for path, why in skipped.items()]


def check_complete(
    pictures: list[Picture],
    people: list[Person],
    prompts: dict[str, list[str | None]],
    seeds: int | None,
) -> tuple[list[Picture], list[str]]:
    """Each prompt and seed once, and a line for each extra picture and each person's missing ones.

    Expected are the seeds 0 to seeds - 1, or else every seed that anybody has from any method."""
    if seeds is None:
        expected = sorted({picture.seed for picture in pictures})
    else:
        expected = range(seeds)
    kept, problems = {}, []                      # kept: {(label, person, prompt, seed): Picture}
    for picture in pictures:
        if picture.seed not in expected:
            problems.append(f"{picture.path} is not scored: its seed is beyond --seeds {seeds}")
            continue
        first = kept.setdefault(picture[:4], picture)
        if first is not picture:
            same = f"{first.path.name} is the same prompt and seed"
            problems.append(f"{picture.path} is not scored: {same}")

    labels = dict.fromkeys(picture.label for picture in pictures)
    for label, person in itertools.product(labels, people):
        numbers = [i for i, text in enumerate(prompts[person.name]) if text is not None]
        cells = list(itertools.product(numbers, expected))
        missing = [cell for cell in cells if (label, person.name, *cell) not in kept]
        if missing:
            number, seed = missing[0]
            problems.append(
                f"{label}: {len(missing)} of {len(cells)} pictures of {person.name} are missing, "
                f"the first is prompt {number}, seed {seed}")
    return list(kept.values()), problems
