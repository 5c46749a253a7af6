"""Judges of generated pictures, which of these there are, and what they were to show.

Faces are told apart by InceptionResnetV1 of facenet-pytorch (VGGFace2), or by the baby's own network.
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
    """The baby's InceptionResnetV1: crops (B, 3, 64, 64), about [-1, 1] -> (B, 128), of norm 1."""
    SIDE, DIM, WIDTHS = 64, 128, (24, 48, 96, 160)

    def __init__(self) -> None:
        super().__init__()
        self.blocks, before = nn.ModuleList(), 3
        for width in self.WIDTHS:                # each halves the sides: 32, 16, 8, 4
            conv = lambda: nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.blocks.append(nn.ModuleDict({
                "skip": nn.Conv2d(before, width, 1, stride=2),
                "down": nn.Conv2d(before, width, 3, stride=2, padding=1), "norm1": nn.BatchNorm2d(width),
                "conv1": conv(), "norm2": nn.BatchNorm2d(width), "conv2": conv(),
                "norm3": nn.BatchNorm2d(width), "conv3": conv()}))
            before = width
        self.norm = nn.BatchNorm2d(before)
        self.last = nn.Linear(before * 16, self.DIM)
        self.last_norm = nn.BatchNorm1d(self.DIM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["skip"](x) + block["conv1"](F.relu(block["norm1"](block["down"](x))))
            x = x + block["conv3"](F.relu(block["norm3"](block["conv2"](F.relu(block["norm2"](x))))))
        return F.normalize(self.last_norm(self.last(F.relu(self.norm(x)).flatten(1))), dim=1)


def find_inception() -> Path:
    """facenet-pytorch's VGGFace2 weights, in its own cache; downloaded if need be."""
    from facenet_pytorch.models.inception_resnet_v1 import get_torch_home
    path = Path(get_torch_home()) / "checkpoints" / INCEPTION.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"InceptionResnetV1 is not at {path} and cannot be downloaded ({error}): fetch "
                             f"{INCEPTION} (107 MB), or name a state dict with --face-weights; "
                             "--model baby needs neither") from None
    return path


def load_face_embedder(baby: Path | None, weights: Path | None = None) -> tuple[nn.Module, int, str]:
    """The network, the side of its crops in pixels, its name with a hash. baby: a model with its own judges.

    weights: a state dict, .safetensors or .pt; a pickle of more than tensors is refused, not run. ValueError.
    """
    path = weights or (baby / "face_embedder.safetensors" if baby else find_inception())
    check_file(path, "file of weights")
    try:
        own = path.suffix == ".safetensors"
        state = load_file(path) if own else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                   # of files that are none, readers raise anything
        reason = not_content(path) or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no file of weights: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict: it must map names to tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from facenet_pytorch import InceptionResnetV1
    model = FaceEmbedder() if baby else InceptionResnetV1(pretrained=None)
    shapes = lambda tensors: {(name, value.shape) for name, value in tensors.items()
                              if not name.startswith("logits.") and "num_batches_tracked" not in name}
    if odd := sorted(name for name, _ in shapes(state) ^ shapes(model.state_dict())):
        raise ValueError(f"{path} does not fit {type(model).__name__}: the first difference is in {odd[0]}")
    # all else was compared just now: only BatchNorm's counts of batches are absent
    model.load_state_dict({name: state[name] for name, _ in shapes(state)}, strict=False)
    return model.eval(), 64 if baby else 160, f"{type(model).__name__} {digest(path.read_bytes())}"


class Judges:
    """MTCNN with a face embedder, and CLIP: all that turns pictures into numbers, frozen, fp32, on device.

    model: one with judges of its own (baby), else InceptionResnetV1 and CLIP ViT-B/32. ValueError, one line,
    where weights are missing. Embeddings are (n, E), of norm 1, on the CPU.
    """
    def __init__(self, model: str = "flux-dev", face_weights: Path | None = None, clip: str | None = None,
                 device: str | torch.device = "cpu") -> None:
        from facenet_pytorch import MTCNN
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        folder, self.device = own_folder(model), torch.device(device)
        baby = folder if folder and (folder / "face_embedder.safetensors").is_file() else None
        self.embedder, side, face = load_face_embedder(None if face_weights else baby, face_weights)
        self.embedder.to(self.device)
        # pooling to arbitrary sizes does not exist on mps
        self.detector = MTCNN(side, margin=0, device="cpu" if self.device.type == "mps" else self.device)
        name = clip or (folder / "scorer" if baby else CLIP)
        try:
            with quiet_transformers():
                self.tokenizer = CLIPTokenizer.from_pretrained(name)
                self.processor = CLIPImageProcessor.from_pretrained(name)
                self.clip = load_transformers_model(CLIPModel, name, torch.float32, None).to(self.device)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"CLIP cannot be loaded from {name} ({str(error).splitlines()[0]}): download "
                             f"{CLIP}, or name a folder with --clip; --model baby needs neither") from None
        weights = self.clip.text_projection.weight.detach().cpu().numpy().tobytes()
        self.names = {"face": face, "text": f"{Path(name).name} {digest(weights)}"}

    @torch.no_grad()
    def crop(self, image: Image.Image) -> Tensor | None:
        """The largest face that MTCNN finds, (3, side, side) in about [-1, 1]; None without one."""
        face = self.detector(image)
        return None if face is None else face.cpu()

    def count(self, image: Image.Image) -> int:
        """How many faces there are of which MTCNN is sure."""
        _, probabilities = self.detector.detect(image)
        return sum(probability is not None and probability > 0.9 for probability in probabilities)

    @torch.no_grad()
    def embed(self, crops: list[Tensor]) -> Tensor:
        parts = [self.embedder(torch.stack(crops[i:i + 32]).to(self.device)).cpu()
                 for i in range(0, len(crops), 32)]
        return torch.cat(parts) if parts else torch.zeros(0, 1)

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        parts = []
        for i in range(0, len(images), 32):
            pixels = self.processor(images=images[i:i + 32], return_tensors="pt")["pixel_values"]
            seen = self.clip.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            parts.append(self.clip.visual_projection(seen))
        return F.normalize(torch.cat(parts), dim=1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        length = self.clip.config.text_config.max_position_embeddings        # 77 tokens; the rest is cut off
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length,
                             return_tensors="pt").input_ids.to(self.device)
        return F.normalize(self.clip.text_projection(self.clip.text_model(ids).pooler_output), dim=1).cpu()

    def match(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        """CLIP-T: cosine of each image with its own text (n,)."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(dim=1)


# The pictures to judge ------------------------------------------------------------------------------------


class Picture(NamedTuple):
    label: str                       # of its method: a row of the tables
    person: str
    prompt: int                      # its number among the person's prompts
    seed: int
    path: Path
    text: str                        # the prompt


def own_folder(model: str) -> Path | None:
    """The folder of a model that may bring judges and prompts of its own."""
    if model in HUB or Path(model).is_file():
        return None if model in HUB else Path(model).parent
    return Path(find_model(model))


def prompts_for(people: list[Person], own: Path | None,
                model_folder: Path | None) -> dict[str, list[str | None]]:
    """{person: its prompts, None where one is not for it}: of the file, else the model's or Meta-PHD's."""
    if own is None and model_folder and (model_folder / "prompts.txt").is_file():
        own = model_folder / "prompts.txt"
    lists, found = {}, {}
    for person in people:
        path = own or META_PHD / ("unsplash.txt" if person.tests else "ffhq.txt")
        if path not in lists:
            lists[path] = read_prompts([], path)
        found[person.name] = [fill(prompt, person.gender) for prompt in lists[path]]
    return found


def find_pictures(root: Path, prompts: dict[str, list[str | None]]) -> tuple[list[Picture], list[str]]:
    """Pictures of <root>/<method>/<identity>/<prompt>_<seed>.<suffix>; a line for each thing that is none."""
    pictures, odd, folders = [], {}, []
    for path in visible(root):
        if path.is_dir():
            folders += visible(path)
        elif path.name not in (PROMPTS, SHEET):
            odd[path] = "it is not in a method's folder"
    for folder in folders:
        if folder.name not in prompts or not folder.is_dir():
            odd[folder] = "no identity of that name in --data"
            continue
        texts = dict(enumerate(prompts[folder.name]))
        for path in visible(folder):
            match = re.fullmatch(r"(.+)_([0-9]+)", path.stem)
            if path.suffix.lower() not in SUFFIXES or not match:
                odd[path] = "its name is not <prompt>_<seed>.png"
            elif not match[1].isdecimal() or texts.get(int(match[1])) is None:
                odd[path] = f"{match[1]} is no prompt of {folder.name}"
            else:
                number = int(match[1])
                pictures.append(Picture(folder.parent.name, folder.name, number, int(match[2]), path,
                                        texts[number]))
    return pictures, [f"{path} is not scored: {why}" for path, why in odd.items()]


def check_complete(pictures: list[Picture], people: list[Person], prompts: dict[str, list[str | None]],
                   seeds: int | None) -> tuple[list[Picture], list[str]]:
    """Each prompt and seed once, and a line for what is too much and for everybody's missing ones. Wanted are
    seeds 0 to seeds - 1, else all that there are of anybody by any method."""
    wanted = range(seeds) if seeds is not None else sorted({p.seed for p in pictures})
    kept, problems = {}, []
    for picture in pictures:
        if picture.seed not in wanted:
            problems.append(f"{picture.path} is not scored: its seed is beyond --seeds {seeds}")
        elif (first := kept.setdefault(picture[:4], picture)) is not picture:
            problems.append(f"{picture.path} is not scored: {first.path.name} is the same prompt and seed")
    labels = dict.fromkeys(picture.label for picture in pictures)
    for label, person in itertools.product(labels, people):
        numbers = [i for i, text in enumerate(prompts[person.name]) if text is not None]
        cells = [*itertools.product(numbers, wanted)]
        gone = [cell for cell in cells if (label, person.name, *cell) not in kept]
        if gone:
            problems.append(f"{label}: {len(gone)} of {len(cells)} pictures of {person.name} are missing, "
                            f"the first is prompt {gone[0][0]}, seed {gone[0][1]}")
    return list(kept.values()), problems
