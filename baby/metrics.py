"""Trains the baby's judges: a face embedder and a text-image scorer.

    python baby/metrics.py --run baby/run/metrics --out baby/checkpoint

They stand in for InceptionResnetV1 and CLIP ViT-B/32. Stages, each skipped where its result exists:
  pictures   20 of each of 1,500 METRIC identities, captions, faces cut out by MTCNN  -> run
  embedder   support.judges.FaceEmbedder, trained to tell these people apart (CosFace)
  scorer     transformers' CLIPModel, small, trained to match pictures and captions   -> out/scorer
Neither the baby nor a LoMD was trained on METRIC people, and none of them is a test person. Both
networks see what the baby's own pictures suffer from (blur, noise, shifted colours), so that they
judge the face and not the rendering.

Sources: "CosFace: Large Margin Cosine Loss for Deep Face Recognition" (Wang et al. 2018), "Learning
Transferable Visual Models From Natural Language Supervision" (Radford et al. 2021); equal captions
in a batch count as matches here.
"""
import argparse
import math
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support  # noqa: E402, F401  before torch: how its threads wait
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import faces  # noqa: E402
from support.judges import FaceEmbedder  # noqa: E402
from pretrain import CPU, bf16, cosine, is_photo, save_whole, workers  # noqa: E402

# HELD_OUT: METRIC people that only measure
SEED = 0
PEOPLE = 1_500
PICTURES = 20
HELD_OUT = 100
EMBEDDER_STEPS = 4_000
EMBEDDER_BATCH = 128
EMBEDDER_LR = 2e-3
SCALE = 24.0
MARGIN = 0.3
SCORER_STEPS = 2_000
SCORER_BATCH = 128
SCORER_LR = 1e-3


# --------------------------------------------------------------------------------------------------
# Pictures


def draw(person: int) -> tuple[np.ndarray, np.ndarray, list, list]:
    """A METRIC person: pictures (n, 128, 128, 3), crops (n, 64, 64, 3), whether a face was found,
    captions."""
    torch.set_num_threads(1)
    from facenet_pytorch.models.utils.detect_face import crop_resize

    images = []
    crops = []
    found = []
    texts = []
    for index in range(PICTURES):
        size = 128 if index % 2 else 256
        who = faces.identity(faces.METRIC.start + person)
        rng = np.random.default_rng([faces.METRIC.start + person, index, 1])
        scene = faces.scene(rng)
        image = Image.fromarray(faces.render(who, scene, size, size))
        boxes, _ = detector().detect(image)
        box = (0, 0, 0, 0) if boxes is None else boxes[0].clip(0, size).astype(int).tolist()
        ok = box[2] - box[0] >= 8 and box[3] - box[1] >= 8
        if ok:
            crop = crop_resize(image, box, FaceEmbedder.SIDE)
        else:
            crop = Image.new("RGB", (FaceEmbedder.SIDE, FaceEmbedder.SIDE))
        images.append(np.asarray(image.resize((128, 128), Image.BOX)))
        crops.append(np.asarray(crop))
        found.append(bool(ok))
        texts.append(describe(who, scene, rng))
    return np.stack(images), np.stack(crops), found, texts


def detector():
    if not hasattr(detector, "mtcnn"):
        from facenet_pytorch import MTCNN

        detector.mtcnn = MTCNN()
    return detector.mtcnn


def describe(who: dict, scene: dict, rng: np.random.Generator) -> str:
    """The caption, or now and then only a part of it: a scorer must also know what short prompts
    mean."""
    text = faces.caption(who, scene, rng)
    chance = rng.random()
    style = faces.STYLES[scene["style"]]
    place = faces.BACKGROUNDS[scene["background"]]
    if chance < 0.15:
        text = f"{style} of a {who['gender']} {place}"
    elif chance < 0.25:
        text = f"{style} of a {who['gender']} in a {scene['colour']} {scene['clothes']}"
    elif chance < 0.3:
        text = f"{style} of a {who['gender']}"
    return text.replace(who["gender"], "person") if rng.random() < 0.2 else text


def make_pictures(run: Path) -> dict:
    path = run / "pictures.npz"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        with workers() as pool:
            parts = list(tqdm(pool.imap(draw, range(PEOPLE), 4), total=PEOPLE, desc="people"))
        images, crops, found, texts = map(np.concatenate, zip(*parts))
        np.savez(f"{path}.part.npz", images=images, crops=crops, found=found, texts=texts)
        os.replace(f"{path}.part.npz", path)
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def worsen(x: torch.Tensor, generator: torch.Generator, shift: float) -> torch.Tensor:
    """(B, 3, H, W) in about [-1, 1]: shifted and scaled by up to `shift`, some blurred, with
    another contrast, and with noise."""
    n = len(x)
    side = x.shape[-1]
    u = lambda *shape: 2 * torch.rand(shape, generator=generator) - 1
    zoom = 1 + shift * u(n)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = zoom
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = shift * u(n, 2)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    small = side // 2 + int(torch.randint(side // 2, (), generator=generator))
    blurred = F.interpolate(x, size=small, mode="area")
    blurred = F.interpolate(blurred, size=side, mode="bilinear", align_corners=False)
    x = torch.where(u(n, 1, 1, 1) > 0, blurred, x)
    contrast = 1 + 0.15 * u(n, 1, 1, 1)
    tint = 0.1 * u(n, 3, 1, 1)
    x = x * contrast + tint
    strength = 0.04 * torch.rand((n, 1, 1, 1), generator=generator)
    return x + strength * torch.randn(x.shape, generator=generator)


# --------------------------------------------------------------------------------------------------
# Face embedder


def train_embedder(run: Path, out: Path, data: dict, device=CPU):
    people = np.repeat(np.arange(PEOPLE), PICTURES)
    train = np.flatnonzero(data["found"] & (people < PEOPLE - HELD_OUT))
    torch.manual_seed(SEED)
    model = FaceEmbedder().to(device)
    classes = nn.Parameter((torch.randn(PEOPLE - HELD_OUT, FaceEmbedder.DIM) * 0.05).to(device))
    optimizer = torch.optim.AdamW([*model.parameters(), classes], lr=EMBEDDER_LR, weight_decay=0.05)
    bar = tqdm(range(EMBEDDER_STEPS), desc="embedder", mininterval=5)
    shown = 0.0
    for step in bar:
        rng = np.random.default_rng([SEED, step, 5])
        generator = torch.Generator().manual_seed(step)
        index = rng.choice(train, EMBEDDER_BATCH, replace=False)
        x = (torch.from_numpy(data["crops"][index]).permute(0, 3, 1, 2).float() - 127.5) / 128
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = worsen(torch.where(mirrored, x.flip(-1), x), generator, 0.08)
        with torch.autocast(device.type, torch.bfloat16):
            embedding = model(x.to(device))
        cosines = embedding.float() @ F.normalize(classes, dim=1).T
        label = torch.from_numpy(people[index]).to(device)
        # the full margin at once keeps a new network from starting
        margin = MARGIN * min(1.0, step / 1000)
        logits = SCALE * (cosines - margin * F.one_hot(label, len(classes)))
        loss = F.cross_entropy(logits, label)
        optimizer.param_groups[0]["lr"] = EMBEDDER_LR * cosine(step, EMBEDDER_STEPS, 100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        shown = loss.item() if not step else 0.98 * shown + 0.02 * loss.item()
        if step % 500 == 499:
            bar.write(f"step {step + 1}, loss {shown:.3f}, {verification(model, data)}")
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            weights[name] = tensor.half()
    save_whole(weights, out / "face_embedder.safetensors", {"made_by": "baby/metrics.py"})


@torch.no_grad()
def verification(model: nn.Module, data: dict) -> str:
    """Same person or not, by the cosine of two pictures: AUC over all pairs of the held-out people.
    """
    rows = slice((PEOPLE - HELD_OUT) * PICTURES, None)
    people = np.repeat(np.arange(HELD_OUT), PICTURES)
    texts = data["texts"][rows]
    device = next(model.parameters()).device
    photo = np.array([is_photo(text) for text in texts])
    model.eval()
    x = (torch.from_numpy(data["crops"][rows]).permute(0, 3, 1, 2).float() - 127.5) / 128
    embeddings = torch.cat([model(part.to(device)).cpu() for part in x.split(256)]).numpy()
    model.train()
    found = data["found"][rows]
    words = []
    for name, chosen in (("photo", found & photo), ("all styles", found)):
        same, different = pairs(embeddings[chosen], people[chosen])
        means = f"same {same.mean():.2f}, different {different.mean():.2f}"
        words.append(f"{name}: AUC {auc(same, different):.4f}, {means}")
    return "; ".join(words)


def pairs(embeddings: np.ndarray, people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all pairs of embeddings (n, E): those of one person, those of two."""
    upper = np.triu_indices(len(people), 1)
    cosines = (embeddings @ embeddings.T)[upper]
    same = (people[:, None] == people)[upper]
    return cosines[same], cosines[~same]


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive is above a negative (Mann-Whitney)."""
    negative = np.sort(negative)
    ranks = np.searchsorted(negative, positive, "left")
    ranks = ranks + np.searchsorted(negative, positive, "right")
    return float(ranks.mean() / 2 / len(negative))


# --------------------------------------------------------------------------------------------------
# Scorer


def scorer_config(words: int, length: int, start: int, end: int):
    """A CLIP model of under a million parameters, for `words` tokens, of which two are start
    and end."""
    from transformers import CLIPConfig

    text = dict(
        vocab_size=words,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    vision = dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=128,
        patch_size=16,
    )
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)


def scorer_parts(out: Path) -> tuple:
    """Saves the tokenizer and the image processor -> the tokenizer and an untrained model."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = out / "scorer"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(out / "tokenizer" / name, folder / name)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 128},
        crop_size={"height": 128, "width": 128},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    config = scorer_config(
        len(tokenizer),
        tokenizer.model_max_length,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    torch.manual_seed(SEED)
    return tokenizer, CLIPModel(config)


def train_scorer(out: Path, data: dict, device=CPU):
    tokenizer, model = scorer_parts(out)
    model.to(device)
    tokens = tokenizer(
        data["texts"].tolist(),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
    )
    ids = torch.tensor(tokens.input_ids)
    longest = int((ids != tokenizer.eos_token_id).sum(1).max())
    ids = ids[:, : longest + 1]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=SCORER_LR, betas=(0.9, 0.98), weight_decay=0.05
    )
    train = (PEOPLE - HELD_OUT) * PICTURES
    bar = tqdm(range(SCORER_STEPS), desc="scorer", mininterval=5)
    shown = 0.0
    for step in bar:
        rng = np.random.default_rng([SEED, step, 6])
        generator = torch.Generator().manual_seed(step)
        index = rng.choice(train, SCORER_BATCH, replace=False)
        x = torch.from_numpy(data["images"][index]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with bf16(device):
            x = worsen(x, generator, 0.04).to(device)
            result = model(input_ids=ids[index].to(device), pixel_values=x)
        logits = result.logits_per_image.float()
        texts = data["texts"][index]
        match = torch.from_numpy(texts[:, None] == texts).float().to(device)
        match = match / match.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2
        optimizer.param_groups[0]["lr"] = SCORER_LR * cosine(step, SCORER_STEPS, 100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP does
        shown = loss.item() if not step else 0.98 * shown + 0.02 * loss.item()
        if step % 250 == 249:
            scale = f"{model.logit_scale.exp().item():.0f}"
            bar.set_postfix(loss=f"{shown:.3f}", scale=scale, refresh=False)
    model.half().save_pretrained(out / "scorer")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--run", type=Path, default=Path("baby/run/metrics"), help="pictures (2 GB)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("baby/checkpoint"), help="the baby's folder"
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = make_pictures(args.run)
    if not (args.out / "face_embedder.safetensors").exists():
        train_embedder(args.run, args.out, data, device)
    if not (args.out / "scorer" / "model.safetensors").exists():
        train_scorer(args.out, data, device)
    if not (args.out / "prompts.txt").exists():  # what to ask of this world
        shipped = Path(__file__).resolve().parent / "checkpoint"
        shutil.copyfile(shipped / "prompts.txt", args.out / "prompts.txt")


if __name__ == "__main__":
    main()
