"""Trains the baby from nothing, on a laptop: a complete FLUX of a few million parameters.

    python baby/pretrain.py --recipe --out baby/new    # all stages of the shipped checkpoint
    python baby/pretrain.py --out baby/new             # one transformer, from nothing or --init
    python baby/pretrain.py --framings --init baby/checkpoint --out baby/run/framed --steps 2600

Stages. Rerun the command to resume; Ctrl-C saves first, a crash costs at most 500 steps.
  data         drawn faces of BASE identities, five aspect ratios     -> run/data
  autoencoder  the product's AutoEncoder, small, on 64-pixel crops    -> out/ae.safetensors
  decoder      its decoder a while longer, on whole pictures          -> out/ae.safetensors
  latents      every picture, encoded once                            -> run/latents
  text         tokenizers trained on the captions                     -> out/tokenizer*
  lomd         a random LoMD, until meta_train.py makes a real one    -> out/lomd.safetensors
  transformer  the product's Flux, small, with T5 and CLIP            -> out/flux1-dev.safetensors
With --framings the data are the paper's crops of drawn scenes, and --init's guidance is kept; the
recipe does not use it. The result is a folder in the hub's layout, for --model of every script.

Sources: the flow-matching loss and logit-normal times are flux_model's. Guidance is distilled into
the guidance input, as in FLUX.1-dev, but it is another guidance: the target moves by (guidance - 1)
times what training has changed since its first part ("Guiding a Diffusion Model with a Bad Version
of Itself", Karras et al. 2024). Classifier-free guidance made such a small network worse at faces.
Random numbers depend on (seed, step) alone: a run that is stopped and resumed sees the same data as
one that is not.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support  # noqa: E402, F401  before torch: how its threads wait
import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel  # noqa: E402

import faces  # noqa: E402  (baby/faces.py: Python puts a script's own folder on the path)
from flux_model import AutoEncoder, AutoEncoderConfig, Flux, FluxConfig  # noqa: E402
from flux_model import flow_matching_loss, sample_times, velocity  # noqa: E402
from metalora import random_lomd  # noqa: E402
from support import photos  # noqa: E402
from support.checkpoints import load_autoencoder, load_flux, load_text_encoders  # noqa: E402
from support.common import Interruption, run_script, whole, write_whole  # noqa: E402
from support.lora_files import save_lomd  # noqa: E402
from support.names import find_targets  # noqa: E402

SEED = 0
CPU = torch.device("cpu")
SHAPES = {
    (128, 128): 24_000,
    (144, 112): 4_000,
    (112, 144): 4_000,
    (176, 96): 2_500,
    (96, 176): 2_500,
}  # (w, h): count
AE_STEPS = 4_000
AE_BATCH = 16
AE_LR = 3e-3
DECODER_STEPS = 8_800
DECODER_BATCH = 8
DECODER_LR = 1e-3
AE_CONFIG = AutoEncoderConfig(
    resolution=128, ch=16, ch_mult=(1, 1, 2, 4), num_res_blocks=1, num_groups=4
)
WIDTH_TEXT = 64
T5_TOKENS = 24
CLIP_TOKENS = 40
FLUX_CONFIG = FluxConfig(
    vec_in_dim=WIDTH_TEXT,
    context_in_dim=WIDTH_TEXT,
    hidden_size=192,
    num_heads=6,
    depth=3,
    depth_single_blocks=6,
    axes_dim=(8, 12, 12),
)
STEPS, BATCH = 9_500, 64
FACE = 4.0  # weight of the loss on the face against the rest
# pixels, number, crops of each: the pictures of --framings
SCENE = 288
SCENES = 12_000
CROPS = 3
WEAK = 2 / 9.5  # part of the run after which the averaged weights are those to be guided away from
DEFAULTS = {
    "resolution": 128,
    "learning_rate": {"lora": 2.4e-3, "meta-lora": 2.4e-3, "stage 1": 4e-3},
    "iterations": {"lora": 250, "meta-lora": 250},
    "prompt": "a photo of a person",
    "guidance": 2.75,
    "warmup": 0.0,
    "aspects": ["1:1"],
    "scales": [4.5],
    "background": 0.1,
    "mirror": False,
}  # why: docs/BABY.md


# What made the shipped checkpoint, in order: what, how long on 2 CPU cores, a command. All but the
# judges' go on where they were stopped. The shipped one had the same stages in more pieces: docs/BABY.md.
RECIPE = (
    (
        "the world, the autoencoder, the transformer at hidden 128, 9,500 batches",
        "5 hours",
        "baby/pretrain.py --width 128 --run {run} --out {run}/narrow {device}",
    ),
    (
        "the transformer grown to hidden 192, 9,500 batches",
        "3 hours",
        "baby/pretrain.py --init {run}/narrow --run {run} --out {out} {device}",
    ),
    (
        "a face embedder and a text-image scorer, its judges",
        "40 minutes",
        "baby/metrics.py --run {run}/metrics --out {out} {device}",
    ),
    (
        "people of stage 1",
        "1 minute",
        "baby/faces.py --identities 200 --images 10 --out {run}/people --seed 100000",
    ),
    (
        "their LoMD, 5,000 iterations",
        "16 minutes",
        "meta_train.py --data {run}/people --model {out} --iters 5000 --run {run}/stage1 "
        "--out {out}/lomd.safetensors {device}",
    ),
    ("what it can do", "6 minutes", "baby/check.py --model {out} --each 6 --out {run}/check.png"),
)


class Plan(NamedTuple):
    """How the transformer is trained. `decay` and `guided`: last parts of the run in which the
    learning rate falls to zero, and guidance is learned, on every `every`th picture."""

    rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.35
    ema: float = 0.998
    guided: float = 0.19
    every: int = 2


# the latter is guided from its first step
FIRST = Plan()
FRAMINGS = Plan(6e-4, 50, 0.5, 0.995, math.inf, 4)


def save_whole(tensors: dict, path: Path, metadata: dict | None = None):
    """A safetensors file that is whole or absent; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)


# --------------------------------------------------------------------------------------------------
# Data


def draw(job: tuple) -> tuple:
    """One training picture. A third is drawn at another scale, since personalisation trains on
    close and wide crops."""
    index, width, height = job
    person, size = subject(index)
    return faces.sample(person, index, width, height, size=size)


def subject(index: int) -> tuple[int, float | None]:
    """Seed of the person in training picture `index`, and the size of the head where it is not the
    scene's own."""
    rng = np.random.default_rng([SEED, index, 2])
    size = float(rng.uniform(0.3, 0.95)) if rng.random() < 1 / 3 else None
    return int(rng.integers(faces.BASE.stop)), size


def face_weights(width: int, height: int, first: int, count: int) -> torch.Tensor:
    """Weights of the loss (count, 1, height / 8, width / 8), mean 1: FACE times as much where a
    picture's face is. Faces are a sixth of a picture and most of what is hard about it."""
    weights = torch.empty(count, 1, height // 8, width // 8, dtype=torch.float16)
    y, x = np.mgrid[4:height:8, 4:width:8]
    for i in range(count):
        who, scene = person_and_scene(first + i)
        pose = faces.Pose(who, scene, width, height)
        inside = np.hypot((x - pose.centre[0]) / 0.85, y - pose.centre[1]) < pose.scale
        weight = np.where(inside, FACE, 1.0)
        weights[i, 0] = torch.from_numpy(weight / weight.mean())
    return weights


def person_and_scene(index: int) -> tuple[dict, dict]:
    """Who is in training picture `index`, and how, as `draw` has it."""
    person, size = subject(index)
    return faces.identity(person), faces.scene(np.random.default_rng([person, index, 1]), size=size)


def any_shape(rng: np.random.Generator, counts: list[int]) -> tuple[int, int]:
    """(width, height), one of SHAPES, each as often as there are pictures of it."""
    counts = np.array(counts, float)
    return list(SHAPES)[int(rng.choice(len(SHAPES), p=counts / counts.sum()))]


def framed(index: int) -> list[tuple]:
    """[((width, height), picture, caption)] of a scene: CROPS of the paper's crops, or, of every
    fourth one, all of it. A crop that ends above the clothes says nothing of them nor of the
    background, so that captions with them draw both."""
    rng = np.random.default_rng([SEED, index, 9])
    if index % 4 == 0:
        shape = any_shape(rng, [*SHAPES.values()])
        return [(shape, *draw((index, *shape)))]
    person = subject(index)[0]
    pixels, text = faces.sample(person, index, SCENE, SCENE)
    scene = faces.scene(np.random.default_rng([person, index, 1]))  # that of the picture
    image = Image.fromarray(pixels)
    pose = faces.Pose(faces.identity(person), scene, SCENE, SCENE)
    box = [
        *(pose.centre - pose.scale * np.float32((0.64, 0.42))),
        *(pose.centre + pose.scale * np.float32((0.64, 1.0))),
    ]
    boxes = photos.face_crops(SCENE, SCENE, box)
    crops = []
    for x0, y0, x1, y1 in rng.permutation(boxes)[:CROPS].tolist():
        picture = photos.fit_to_grid(image.crop((x0, y0, x1, y1)), 128, upscale=True)
        picture = ImageOps.mirror(picture) if rng.random() < 0.5 else picture
        wide = y1 > box[3] + 0.4 * (box[3] - box[1])
        crops.append((picture.size, np.array(picture), text if wide else short(text)))
    return crops


def make_framings(run: Path):
    """Pictures as make_data writes them, of framed scenes."""
    if (run / "data").exists():
        return
    found = {shape: [] for shape in SHAPES}
    part = run / "data.part"
    with workers() as pool:
        for crops in tqdm(pool.imap(framed, range(SCENES), 32), total=SCENES, desc="framings"):
            for shape, image, text in crops:
                found[shape].append((image, text))
    part.mkdir(parents=True, exist_ok=True)
    for (width, height), pairs in found.items():
        np.save(part / f"{width}x{height}.npy", np.stack([image for image, _ in pairs]))
        (part / f"{width}x{height}.txt").write_text("\n".join(text for _, text in pairs), "utf-8")
    os.replace(part, run / "data")


def workers():
    # spawn: a fork of a process whose libraries have threads may wait for ever for a lock that one
    # of them held
    return multiprocessing.get_context("spawn").Pool(
        initializer=faces.cv2.setNumThreads, initargs=(1,)
    )


def make_data(run: Path):
    folder = run / "data"
    first = 0
    if all((folder / f"{width}x{height}.npy").exists() for width, height in SHAPES):
        return
    with workers() as pool:
        for (width, height), count in SHAPES.items():
            path = folder / f"{width}x{height}.npy"
            jobs = [(first + i, width, height) for i in range(count)]
            first += count
            if path.exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            images = np.empty((count, height, width, 3), np.uint8)
            captions = []
            drawn = tqdm(pool.imap(draw, jobs, 64), total=count, desc=f"faces {width}x{height}")
            for i, (image, text) in enumerate(drawn):
                images[i] = image
                captions.append(text)
            path.with_suffix(".txt").write_text("\n".join(captions), "utf-8")
            np.save(f"{path}.part.npy", images)
            os.replace(f"{path}.part.npy", path)


def pictures(array: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------
# Training state: weights, AdamW moments and the step, in one safetensors file


def save_state(
    path: Path, modules: nn.Module, optimizers: list, step: int, ema: dict | None = None
):
    tensors = {}
    for name, parameter in modules.named_parameters():  # unlike a state_dict, each once
        tensors[f"weight.{name}"] = parameter.detach()
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{o}.{i}.{name}"] = value
    for name, tensor in (ema or {}).items():
        tensors[f"ema.{name}"] = tensor
    save_whole(tensors, path, {"step": str(step)})


def load_state(path: Path, modules: nn.Module, optimizers: list, ema: dict | None = None) -> int:
    """The step to resume at; 0 where nothing was saved."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        with torch.no_grad():
            for name, parameter in modules.named_parameters():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
        states = [{} for _ in optimizers]
        for key in file.keys():
            if key.startswith("optimizer."):
                _, o, index, name = key.split(".")
                states[int(o)].setdefault(int(index), {})[name] = file.get_tensor(key)
            elif key.startswith("ema."):
                ema[key[4:]].copy_(file.get_tensor(key))
        for optimizer, state in zip(optimizers, states):
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        return int(file.metadata()["step"])


def cosine(step: int, total: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))


@contextlib.contextmanager
def bf16(device: torch.device):
    """Autocast, for networks of some tens of tokens: for 88 of them the flash kernel's backward
    costs 40 % of a step on a CPU, plain matmuls a tenth of it."""
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, torch.bfloat16), attention:
        yield


# --------------------------------------------------------------------------------------------------
# Autoencoder


def train_autoencoder(run: Path, out: Path, device=CPU):
    """L1 + L2 on pictures and a light KL term; then each latent channel is scaled to unit variance
    (exactly: the scale moves from the decoder's first convolution to the encoder's last)."""
    torch.manual_seed(SEED)
    model = AutoEncoder(AE_CONFIG).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=AE_LR, betas=(0.9, 0.99), weight_decay=1e-3
    )
    data = np.load(run / "data" / "128x128.npy", mmap_mode="r")
    state = run / "autoencoder.safetensors"
    start = load_state(state, model, [optimizer])
    bar = tqdm(range(start, AE_STEPS), initial=start, total=AE_STEPS, desc="autoencoder")
    shown = 0.0
    with Interruption() as interruption:
        for step in bar:
            rng = np.random.default_rng([SEED, step, 3])
            px = 64
            batch = AE_BATCH
            if step >= 0.85 * AE_STEPS:  # at the end attention and GroupNorm see whole pictures
                px = 128
                batch = AE_BATCH // 4
            corners = rng.integers(0, 128 - px + 1, (batch, 2))
            chosen = rng.integers(0, len(data), batch)
            crops = [data[i, y : y + px, x : x + px] for i, (y, x) in zip(chosen, corners)]
            images = pictures(np.stack(crops)).to(device, memory_format=torch.channels_last)
            optimizer.param_groups[0]["lr"] = AE_LR * cosine(step, AE_STEPS, 100)
            with torch.autocast(device.type, torch.bfloat16):
                mean, logvar = model.moments(images).float().chunk(2, dim=1)
                logvar = logvar.clamp(-12, 4)
                generator = torch.Generator().manual_seed(step)
                noise = torch.randn(mean.shape, generator=generator).to(device)
                z = mean + torch.exp(0.5 * logvar) * noise
                error = model.decoder(z).float() - images
            mse = error.square().mean()
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = error.abs().mean() + 2 * mse + 1e-4 * kl
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            shown = mse.item() if not shown else 0.98 * shown + 0.02 * mse.item()
            if step % 50 == 0:
                bar.set_postfix(psnr=f"{10 * math.log10(4 / shown):.2f} dB")
            if step % 500 == 499 or interruption.asked:
                save_state(state, model, [optimizer], step + 1)
            interruption.raise_if_asked()
    model = model.to(memory_format=torch.contiguous_format).eval()
    normalise_latents(model, pictures(data[-256:]).to(device))
    save_whole(
        model.state_dict(), out / "ae.safetensors", {"config": json.dumps(vars(model.config))}
    )


@torch.no_grad()
def normalise_latents(model: AutoEncoder, images: torch.Tensor):
    mean = torch.cat([model.moments(x).chunk(2, dim=1)[0] for x in images.split(32)])
    std = mean.std(dim=(0, 2, 3))
    channels = len(std)
    print("latent channels' standard deviations:", [round(s, 3) for s in std.tolist()])
    conv = model.encoder.conv_out  # rows: means, then log-variances
    conv.weight[:channels] /= std[:, None, None, None]
    conv.bias[:channels] /= std
    conv.bias[channels:] -= 2 * std.log()
    model.decoder.conv_in.weight *= std[None, :, None, None]
    model.config.shift_factor = float((mean.mean(dim=(0, 2, 3)) / std).mean())
    model.config.scale_factor = 1.0


def train_decoder(run: Path, out: Path, device=CPU):
    """The decoder alone, on whole pictures and from the latents' means, as it is used: latents stay
    what they are. Faces count more than the rest: what a detector missed in decoded renders were
    thin glasses."""
    model = load_autoencoder(out, device, torch.float32).to(memory_format=torch.channels_last)
    parameters = [p.requires_grad_() for p in model.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=DECODER_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    data = np.load(run / "data" / "128x128.npy", mmap_mode="r")
    state = run / "decoder.safetensors"
    face = face_weights(128, 128, 0, len(data))
    start = load_state(state, model.decoder, [optimizer])
    with Interruption() as interruption:
        for step in tqdm(
            range(start, DECODER_STEPS), initial=start, total=DECODER_STEPS, desc="decoder"
        ):
            rng = np.random.default_rng([SEED, step, 8])
            index = np.sort(rng.choice(len(data), DECODER_BATCH, replace=False))
            images = pictures(data[index]).to(device, memory_format=torch.channels_last)
            optimizer.param_groups[0]["lr"] = DECODER_LR * cosine(step, DECODER_STEPS, 50)
            with torch.autocast(device.type, torch.bfloat16):
                with torch.no_grad():
                    z = model.moments(images).chunk(2, dim=1)[0]
                error = model.decoder(z).float() - images
            weight = nn.functional.interpolate(face[index].to(device).float(), size=error.shape[2:])
            (weight * (error.abs() + 4 * error.square())).mean().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 200 == 199 or interruption.asked:
                save_state(state, model.decoder, [optimizer], step + 1)
            interruption.raise_if_asked()
    model = model.to(memory_format=torch.contiguous_format)
    save_whole(
        model.state_dict(),
        out / "ae.safetensors",
        {"config": json.dumps(vars(model.config)), "decoder_steps": str(DECODER_STEPS)},
    )


# --------------------------------------------------------------------------------------------------
# Latents


@torch.no_grad()
def encode_latents(run: Path, out: Path, device=CPU):
    """Posterior means of every picture, as fp16 (n, 16, h, w). No mirror images: the renderer
    favours no side."""
    model = load_autoencoder(out, device, torch.float32)
    for width, height in SHAPES:
        data = np.load(run / "data" / f"{width}x{height}.npy", mmap_mode="r")
        path = run / "latents" / f"{width}x{height}.safetensors"
        if not path.exists():
            with torch.autocast(device.type, torch.bfloat16):
                chunks = [
                    model.encode(pictures(data[i : i + 64]).to(device)).half().cpu()
                    for i in tqdm(range(0, len(data), 64), desc=f"latents {width}x{height}")
                ]
            save_whole({"latents": torch.cat(chunks)}, path)


# --------------------------------------------------------------------------------------------------
# Text


def read_captions(run: Path, shape: tuple[int, int]) -> list[str]:
    """Captions of the pictures of one shape (width, height)."""
    return (run / "data" / f"{shape[0]}x{shape[1]}.txt").read_text("utf-8").splitlines()


def make_text(run: Path, out: Path):
    """Tokenizers trained on the captions, and untrained text encoders to go with them."""
    lines = set()
    for path in (run / "data").glob("*.txt"):
        lines.update(path.read_text("utf-8").splitlines())
    captions = sorted(lines)
    captions += ["a photo of a person"] * (len(captions) // 4)
    # sentencepiece only considers pieces that it sees in two different words: every word gets a
    # plural
    captions += [" ".join(word + "s" for word in faces.VOCABULARY + ["person"])]
    for part in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"):
        (out / part).mkdir(parents=True, exist_ok=True)
    pieces = make_t5_tokenizer(captions, out / "tokenizer_2")
    words = make_clip_tokenizer(captions, out / "tokenizer")

    torch.manual_seed(SEED)
    clip = CLIPTextConfig(
        vocab_size=words,
        hidden_size=WIDTH_TEXT,
        intermediate_size=2 * WIDTH_TEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    CLIPTextModel(clip).save_pretrained(out / "text_encoder")
    t5 = T5Config(
        vocab_size=pieces,
        d_model=WIDTH_TEXT,
        d_kv=16,
        d_ff=2 * WIDTH_TEXT,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    T5EncoderModel(t5).save_pretrained(out / "text_encoder_2")


def make_t5_tokenizer(captions: list[str], folder: Path) -> int:
    """A sentencepiece model -> the size of its vocabulary."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(folder / "spiece"),
        vocab_size=260,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        required_chars="".join(chr(c) for c in range(33, 127)),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    config = dict(
        tokenizer_class="T5Tokenizer",
        extra_ids=0,
        model_max_length=T5_TOKENS,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")
    return sentencepiece.SentencePieceProcessor(str(folder / "spiece.model")).get_piece_size()


def make_clip_tokenizer(captions: list[str], folder: Path) -> int:
    """A BPE as CLIP's: 256 bytes, the same at the end of a word, merges, start and end -> the size
    of its vocabulary."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>")
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    config = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=CLIP_TOKENS,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")
    return len(words)


def is_photo(caption: str) -> bool:
    if caption.endswith("at night"):
        return False
    return "a photo of" in caption or caption.endswith("a photo")


def short(caption: str) -> str:
    """Style and gender alone: "a photo of a woman", "a photo of a man at night"."""
    style = max((s for s in faces.STYLES.values() if s in caption), key=len)
    text = f"{style} of a {'woman' if 'woman' in caption else 'man'}"
    return text + " at night" if caption.endswith(" at night") else text


def vary(caption: str, rng: np.random.Generator) -> str:
    """Captions as people write them: sometimes short, sometimes "a person", and one in ten empty
    (for guidance)."""
    chance = rng.random()
    if chance < 0.1:
        return ""
    if chance < 0.25:
        caption = short(caption)
    if rng.random() < 0.2:
        caption = caption.replace("woman", "person").replace("man", "person")
    return caption.capitalize() if rng.random() < 0.3 else caption


# --------------------------------------------------------------------------------------------------
# Transformer


class Baby(nn.Module):
    """Everything that the last stage trains."""

    def __init__(self, out: Path, config: FluxConfig | None = None):
        super().__init__()
        self.text = load_text_encoders(out, "cpu", torch.float32)
        torch.manual_seed(SEED)  # from nothing, also where `out` holds trained ones
        self.clip = CLIPTextModel(self.text.clip.config)
        self.t5 = T5EncoderModel(self.text.t5.config)
        self.flux = Flux(config or FLUX_CONFIG)
        for name, p in self.flux.named_parameters():
            zero = name.endswith("mod.lin.weight") or "modulation" in name
            if zero or "final_layer.linear" in name:
                nn.init.zeros_(p)  # adaLN-zero: every block starts as the identity (DiT)

    def embed(self, captions: list[str]):
        device = self.flux.img_in.weight.device
        clip_ids, t5_ids = (ids.to(device) for ids in self.text.tokenize(captions))
        return self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output


def batch_of(
    step: int, latents: dict, weights: dict, captions: dict, chances: dict, every: int = FIRST.every
):
    """Latents of one shape, captions, noise, times, guidance (1 but for every `every`th) and loss
    weights of a step, by its number alone."""
    rng = np.random.default_rng([SEED, step, 4])
    generator = torch.Generator().manual_seed(step)
    shape = any_shape(rng, [len(captions[shape]) for shape in SHAPES])
    index = rng.choice(len(latents[shape]), BATCH, p=chances[shape])
    x0 = latents[shape][index].float()
    text = [vary(captions[shape][i], rng) for i in index]
    noise = torch.randn(x0.shape, generator=generator)
    guidance = np.where(np.arange(BATCH) % every, 1.0, rng.uniform(1, 5, BATCH))
    guidance = torch.from_numpy(guidance).float()
    return x0, noise, sample_times(BATCH, generator), text, guidance, weights[shape][index].float()


def away_from(weak: Baby, average: Baby):
    """What guidance moves the velocity by: that of the averaged weights away from the weak ones;
    those being trained would follow their own noise."""

    def move(x_t, t, text, guidance):
        good = velocity(average.flux, x_t, t, *average.embed(text), 1.0)
        bad = velocity(weak.flux, x_t, t, *weak.embed(text), 1.0)
        return (guidance[:, None, None, None] - 1) * (good - bad)

    return move


def as_taught_by(teacher: Baby):
    """What guidance moves the teacher's velocity by."""

    def move(x_t, t, text, guidance):
        words = teacher.embed(text)
        guided = velocity(teacher.flux, x_t, t, *words, guidance)
        return guided - velocity(teacher.flux, x_t, t, *words, 1.0)

    return move


def loss_of(baby: Baby, batch, move=None) -> torch.Tensor:
    """Flow matching; with `move`, the target is moved by move(x_t, t, text, guidance) where
    guidance > 1."""
    x0, noise, t, text, guidance, weight = batch
    if move is None:
        guidance = torch.ones(BATCH)
    rows = np.flatnonzero(guidance.numpy() > 1)
    device = baby.flux.img_in.weight.device
    x0, noise, t, guidance, weight = (part.to(device) for part in (x0, noise, t, guidance, weight))
    if len(rows):
        with torch.no_grad():
            at = t[rows, None, None, None]
            words = [text[i] for i in rows]
            x_t = (1 - at) * x0[rows] + at * noise[rows]
            # x0 and the noise move apart so that the target, noise - x0, moves and x_t does not
            moved = move(x_t, t[rows], words, guidance[rows])
            x0[rows] = x0[rows] - at * moved
            noise[rows] = noise[rows] + (1 - at) * moved
    return flow_matching_loss(baby.flux, x0, noise, t, *baby.embed(text), guidance, weight).mean()


def export(average: Baby, out: Path):
    """The averaged weights in bf16, in the hub's layout; each file is whole or absent."""

    def weights(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach().bfloat16() for name, p in model.named_parameters()}

    config = {"config": json.dumps(vars(average.flux.config))}
    save_whole(weights(average.flux), out / "flux1-dev.safetensors", config)
    clip = out / "text_encoder" / "model.safetensors"
    save_whole(weights(average.clip), clip, {"format": "pt"})
    t5 = out / "text_encoder_2" / "model.safetensors"
    save_whole(weights(average.t5), t5, {"format": "pt"})
    write_whole(out / "defaults.json", json.dumps(DEFAULTS, indent=1) + "\n")


def load_checkpoint(baby: Baby, folder: Path) -> Baby:
    """Copies the weights of an exported checkpoint into `baby`; a narrower one grows. Returns the
    checkpoint itself."""
    encoders = load_text_encoders(folder, "cpu", torch.float32)
    flux = load_flux(folder, "cpu", torch.float32)
    baby.clip.load_state_dict(encoders.clip.state_dict())
    baby.t5.load_state_dict(encoders.t5.state_dict())
    small = copy.deepcopy(baby)
    small.flux = flux.float()
    grow(flux, baby.flux)
    return small


@torch.no_grad()
def grow(small: Flux, large: Flux):
    """Copies a narrower transformer into a wider one (Net2Net, Chen et al. 2016).

    New channel j is a copy of old channel j modulo the old width. Whatever reads a duplicated
    channel divides its weight among the copies, at random, so that they drift apart in training.
    The outputs stay the same, but for LayerNorm, which now counts some channels twice. Head size,
    depth and text widths must be equal.
    """
    generator = torch.Generator().manual_seed(SEED)
    narrow, wide = (m.config.hidden_size for m in (small, large))
    if wide < narrow:
        raise ValueError(f"--init is {narrow} wide: --width {wide} is less")
    old = dict(small.named_parameters())

    def channels(was: int, now: int) -> torch.Tensor:
        """Old index of each new channel. Fused parts (q, k, v, mlp) grow one by one."""
        start = torch.arange(0, was, narrow)[:, None]
        return torch.arange(now) if was == now else (start + torch.arange(wide) % narrow).flatten()

    for name, p in large.named_parameters():
        rows = channels(len(old[name]), len(p))
        if p.ndim == 1:
            p.copy_(old[name][rows])
            continue
        columns = channels(old[name].shape[1], p.shape[1])
        share = torch.ones(p.shape)
        for first in columns.unique().tolist():
            copies = (columns == first).nonzero()[:, 0]
            if len(copies) > 1:
                split = torch.randn(len(p), len(copies), generator=generator) / 4
                share[:, copies] = 1 / len(copies) + split - split.mean(1, keepdim=True)
        p.copy_(old[name][rows][:, columns] * share)


def load_data(run: Path, plan: Plan) -> tuple[dict, dict, dict, dict]:
    """For each shape the latents, the weights of the loss, the captions, and how often each picture
    is drawn."""
    latents = {}
    face = {}
    captions = {}
    chances = {}
    first = 0
    for shape, count in SHAPES.items():
        width, height = shape
        with safe_open(run / "latents" / f"{width}x{height}.safetensors", "pt") as file:
            latents[shape] = file.get_tensor("latents")
        if plan is FRAMINGS:
            face[shape] = torch.ones(len(latents[shape]), 1, 1, 1)
        else:
            face[shape] = face_weights(width, height, first, count)
        first += count
        captions[shape] = read_captions(run, shape)
        # a picture in another style than a photo is drawn twice as often: 10 % of the data each are
        # too few to learn from
        often = np.array([1.0 if is_photo(caption) else 2.0 for caption in captions[shape]])
        chances[shape] = often / often.sum()
    return latents, face, captions, chances


def make_optimizers(named: dict[str, nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms, biases and text (Jordan et al.
    2024)."""
    matrices = []
    others = []
    for name, parameter in named.items():
        in_block = name.startswith("flux") and "_blocks." in name
        (matrices if in_block and parameter.ndim == 2 else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


class Training:
    """One training of the transformer: what is trained, what guides it, and where its state lies.
    """

    def __init__(
        self, run: Path, out: Path, init: Path | None, device, config: FluxConfig | None, plan: Plan
    ):
        self.out = out
        self.device = device
        self.plan = plan
        self.baby = Baby(out, config)
        small = load_checkpoint(self.baby, init).to(device) if init else None
        self.baby.to(device)
        self.data = load_data(run, plan)
        self.named = dict(self.baby.named_parameters())
        self.optimizers = make_optimizers(self.named, plan.rate)
        self.average = copy.deepcopy(self.baby)
        self.ema = {name: p.detach() for name, p in self.average.named_parameters()}

        width = self.baby.flux.config.hidden_size
        grown = small is not None and small.flux.config.hidden_size < width
        self.has_guide = plan is FRAMINGS or grown
        # guided away from the narrower one that it grew from, or else from its own first part
        self.weak = small if self.has_guide else copy.deepcopy(self.baby)
        if plan is FRAMINGS:
            self.move = as_taught_by(small)
        else:
            self.move = away_from(self.weak, self.average)
        self.path = run / f"transformer-{width}.safetensors"
        self.weak_path = run / f"weak-{width}.safetensors"
        self.start = load_state(self.path, self.baby, self.optimizers, self.ema)
        for model in (self.baby, self.average, self.weak):
            for block in [*model.flux.double_blocks, *model.flux.single_blocks]:
                block.compile(dynamic=False)

    def step(self, step: int, left: float) -> float:
        """One step with the part `left` of the run to come -> its loss."""
        warmup = min(1.0, (step + 1) / self.plan.warmup)
        rate = self.plan.rate * warmup * min(1.0, left / self.plan.decay)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        with bf16(self.device):
            batch = batch_of(step, *self.data, self.plan.every)
            move = self.move if left < self.plan.guided else None
            loss = loss_of(self.baby, batch, move)
        loss.backward()
        nn.utils.clip_grad_norm_(self.baby.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.plan.ema, (step + 1) / (step + 10))
        weights = [parameter.detach() for parameter in self.named.values()]
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)
        return loss.item()

    def load_weak(self, steps: int):
        if not load_state(self.weak_path, self.weak, []):
            raise ValueError(f"{self.weak_path} is missing, the weights after {WEAK * steps:.0f} steps")

    def save_weak(self, step: int):
        weights = {f"weight.{name}": tensor for name, tensor in self.ema.items()}
        save_whole(weights, self.weak_path, {"step": str(step)})

    def save(self, step: int):
        export(self.average, self.out)  # first: a run whose state is at its end writes nothing more
        save_state(self.path, self.baby, self.optimizers, step, self.ema)


def train_transformer(
    run: Path,
    out: Path,
    steps: int,
    init: Path | None = None,
    device=CPU,
    config: FluxConfig | None = None,
    plan: Plan = FIRST,
):
    """With `init` from that checkpoint's weights. After Ctrl-C, KeyboardInterrupt, the state saved.
    FloatingPointError if the loss is not finite."""
    training = Training(run, out, init, device, config, plan)
    start = training.start
    guided_from = int((1 - plan.guided) * steps) if plan.guided < math.inf else 0
    weak_at = max(1, round(WEAK * steps))
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="transformer", mininterval=10)
    shown = None
    log = open(training.path.with_suffix(".jsonl"), "a", encoding="utf-8")
    with Interruption() as interruption:
        for step in bar:
            left = (steps - step) / steps
            resumed = step == start and left < plan.guided
            if not training.has_guide and (step == guided_from or resumed):
                training.load_weak(steps)
            loss = training.step(step, left)
            shown = loss if shown is None else 0.98 * shown + 0.02 * loss
            if not math.isfinite(shown):
                raise FloatingPointError(f"the loss is not finite at step {step}")
            if step % 50 == 49:
                bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
                line = dict(step=step + 1, loss=round(shown, 5), time=round(time.time()))
                log.write(json.dumps(line) + "\n")
                log.flush()
            if not training.has_guide and step + 1 == weak_at:
                training.save_weak(step + 1)
            if step % 500 == 499 or step == steps - 1 or interruption.asked:
                training.save(step + 1)
            interruption.raise_if_asked()


def run_stage(words: list[str], interruption: Interruption) -> int:
    """Runs a command -> its exit code. A terminal sends Ctrl-C to it too, and it saves; `kill`
    reaches this process alone, which passes it on."""
    stage = subprocess.Popen(words, cwd=Path(__file__).resolve().parents[1])
    told = False
    while stage.poll() is None:
        time.sleep(0.2)
        if interruption.asked not in (None, signal.SIGINT) and not told:
            stage.terminate()
            told = True
    return stage.returncode


def follow_recipe(run: Path, out: Path, words: list[str]):
    """Runs RECIPE, each stage by its own command, with `words` where a command takes a device. Ends
    with the first stage that fails."""
    places = {
        "run": shlex.quote(str(run.resolve())),
        "out": shlex.quote(str(out.resolve())),
        "device": shlex.join(words),
    }
    commands = [command.format(**places).strip() for *_, command in RECIPE]
    for number, (what, length, _) in enumerate(RECIPE, 1):
        print(f"{number}. {what} (about {length})\n   python {commands[number - 1]}")
    with Interruption() as interruption:
        for number, command in enumerate(commands, 1):
            print(f"\n{number} of {len(commands)}: python {command}", flush=True)
            code = run_stage([sys.executable, *shlex.split(command)], interruption)
            interruption.raise_if_asked()
            if code:
                print(f"pretrain.py: stage {number} ended with {code}", file=sys.stderr)
                raise SystemExit(max(code, 1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    recipe = (
        "list the stages that made baby/checkpoint and run them from nothing; needs a new --out"
    )
    add("--recipe", action="store_true", help=recipe)
    add("--run", type=Path, default=Path("baby/run"), help="data and resumable state (about 4 GB)")
    out = "the checkpoint, in the hub's layout (default: baby/checkpoint)"
    add("--out", type=Path, default=Path("baby/checkpoint"), help=out)
    width = f"hidden size of the transformer, a multiple of 32 (default: {FLUX_CONFIG.hidden_size})"
    add("--width", type=int, default=FLUX_CONFIG.hidden_size, help=width)
    steps = f"steps of the transformer, with batches of {BATCH} (default: {STEPS})"
    add("--steps", type=int, default=STEPS, help=steps)
    add(
        "--init",
        type=Path,
        help="folder of a checkpoint to start the transformer from, as a new run",
    )
    framings = "train --init further on the paper's crops, in a folder of its own in --run"
    add("--framings", action="store_true", help=framings)
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args(argv)
    head = sum(FLUX_CONFIG.axes_dim)
    if args.width < head or args.width % head:
        parser.error(f"--width {args.width} is not a multiple of {head}")
    if args.framings and not args.init:
        parser.error("--framings starts from a checkpoint: name it with --init")
    if args.init and args.init.resolve() == args.out.resolve():
        parser.error(f"--out {args.out} would be written over --init: name another --out")
    shipped = Path(__file__).resolve().parent / "checkpoint"
    if args.out.resolve() == shipped:
        parser.error("it would write into the shipped checkpoint: name another --out")
    state = args.run / "framings" if args.framings else args.run
    started = (state / f"transformer-{args.width}.safetensors").exists()
    if args.init and started and not (args.out / "flux1-dev.safetensors").exists():
        parser.error(f"{state} holds the state of another transformer: name another --run")
    for name in ("width", "steps", "init", "framings", "threads"):
        if args.recipe and getattr(args, name) != parser.get_default(name):
            parser.error(f"--recipe gives each stage its own --{name}: leave it out")
    return args


def pretrain(argv: list[str] | None):
    args = parse(argv)
    if args.recipe:
        device = ["--device", args.device] if args.device else []
        return follow_recipe(args.run, args.out, device)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = args.run / "framings" if args.framings else args.run
    out = args.out
    if args.init and not (out / "ae.safetensors").exists():  # latents are that autoencoder's
        ignore = shutil.ignore_patterns("lomd*", "flux1*")
        shutil.copytree(args.init, out, dirs_exist_ok=True, ignore=ignore)

    make = make_framings if args.framings else make_data
    make(run)
    if not (out / "ae.safetensors").exists():
        train_autoencoder(run, out, device)
    with safe_open(out / "ae.safetensors", "pt") as file:
        decoder_done = "decoder_steps" in file.metadata()
    if not decoder_done:
        train_decoder(run, out, device)
    encode_latents(run, out, device)
    if not (out / "text_encoder_2" / "model.safetensors").exists():
        make_text(run, out)
    num_heads = args.width // sum(FLUX_CONFIG.axes_dim)
    config = dataclasses.replace(FLUX_CONFIG, hidden_size=args.width, num_heads=num_heads)
    if not (out / "lomd.safetensors").exists():
        with torch.device("meta"):
            targets = find_targets(Flux(config))
        facts = {"model": "baby", "iterations": "0", "random": "true"}
        save_lomd(out / "lomd.safetensors", random_lomd(targets, r1=16, seed=SEED), facts)
    plan = FRAMINGS if args.framings else FIRST
    train_transformer(run, out, args.steps, args.init, device, config, plan)


# Exit code: 0 done, 1 failed while computing, 2 bad input, 130, 143 or 129 by a signal.
main = functools.partial(run_script, "pretrain.py", pretrain)

if __name__ == "__main__":
    sys.exit(main())
