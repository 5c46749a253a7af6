"""Trains the baby: a complete FLUX of a few million parameters on drawn faces, from nothing, on a laptop.

    python baby/pretrain.py --recipe --out baby/new       # all that made the shipped checkpoint, in order
    python baby/pretrain.py --out baby/new                # one transformer, from nothing or from --init
    python baby/pretrain.py --framings --init baby/checkpoint --out baby/run/framed --steps 2600

Stages, each resumable by the same command; Ctrl-C saves first, a crash costs at most 500 steps:
  data         faces of BASE identities in five aspect ratios, with captions         -> run/data
  autoencoder  the product's AutoEncoder, small, on 64-pixel crops                    -> out/ae.safetensors
  decoder      its decoder a while longer, on whole pictures                          -> out/ae.safetensors
  latents      every picture, encoded once                                            -> run/latents
  text         tokenizers on the captions (sentencepiece for T5, BPE for CLIP)        -> out/tokenizer*, run
  lomd         a random LoMD, so that stage 2 runs, until meta_train.py makes one     -> out/lomd.safetensors
  transformer  the product's Flux, small, with T5 and CLIP trained jointly            -> out/flux1-dev.safetensors, ...
With --framings the data are the paper's crops of drawn scenes, and --init's guidance is kept; no part of the recipe.
The result is a folder in the hub's layout that every script of the project takes as --model baby.

Sources: the flow-matching loss and logit-normal times are flux_model's. Guidance is distilled into the guidance input,
as in FLUX.1-dev, but it is another guidance: the target moves by (guidance - 1) times what training has changed since its
first part ("Guiding a Diffusion Model with a Bad Version of Itself", Karras et al. 2024). Classifier-free guidance made
this small a network worse at faces. Random numbers depend on (seed, step) alone: a run that is stopped and resumed
sees the same data as one that is not.
"""
import argparse
import contextlib
import copy
import dataclasses
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
from flux_model import (AutoEncoder, AutoEncoderConfig, Flux, FluxConfig, flow_matching_loss, sample_times,  # noqa: E402
                        velocity)
from metalora import random_lomd  # noqa: E402
from support import photos  # noqa: E402
from support.checkpoints import load_autoencoder, load_flux, load_text_encoders  # noqa: E402
from support.common import whole  # noqa: E402
from support.lora_files import save_lomd  # noqa: E402
from support.names import find_targets  # noqa: E402

SEED, CPU = 0, torch.device("cpu")
SHAPES = {(128, 128): 24_000, (144, 112): 4_000, (112, 144): 4_000, (176, 96): 2_500, (96, 176): 2_500}  # (w, h): count
AE_STEPS, AE_BATCH, AE_LR = 4_000, 16, 3e-3
DECODER_STEPS, DECODER_BATCH, DECODER_LR = 8_800, 8, 1e-3
AE_CONFIG = AutoEncoderConfig(resolution=128, ch=16, ch_mult=(1, 1, 2, 4), num_res_blocks=1, num_groups=4)
WIDTH_TEXT, T5_TOKENS, CLIP_TOKENS = 64, 24, 40
FLUX_CONFIG = FluxConfig(vec_in_dim=WIDTH_TEXT, context_in_dim=WIDTH_TEXT, hidden_size=192, num_heads=6, depth=3,
                         depth_single_blocks=6, axes_dim=(8, 12, 12))
STEPS, BATCH = 9_500, 64
FACE = 4.0                            # weight of the loss on the face against the rest
SCENE, SCENES, CROPS = 288, 12_000, 3  # pixels, number, crops of each: the pictures of --framings
WEAK = 2 / 9.5                        # part of the run after which the averaged weights are those to be guided away from
DEFAULTS = {"resolution": 128, "learning_rate": {"lora": 6e-4, "meta-lora": 1.2e-3, "stage 1": 4e-3}, "prompt": "a photo of a person",
            "guidance": 2.75, "warmup": 0.0, "aspects": ["1:1"], "scales": [4.5], "background": 0.1, "mirror": False}       # why: docs/BABY.md


# What made the shipped checkpoint, in order: what, how long on 2 CPU cores, a command. Each goes on where it was stopped.
# The shipped one had the same stages in more pieces: docs/BABY.md.
RECIPE = (
    ("the world, the autoencoder, the transformer at hidden 128, 9,500 batches", "5 hours",
     "baby/pretrain.py --width 128 --run {run} --out {run}/narrow {device}"),
    ("the transformer grown to hidden 192, 9,500 batches", "3 hours", "baby/pretrain.py --init {run}/narrow --run {run} --out {out} {device}"),
    ("a face embedder and a text-image scorer, its judges", "40 minutes", "baby/metrics.py --run {run}/metrics --out {out} {device}"),
    ("people of stage 1", "1 minute", "baby/faces.py --identities 200 --images 10 --out {run}/people --seed 100000"),
    ("their LoMD, 5,000 iterations", "16 minutes",
     "meta_train.py --data {run}/people --model {out} --iters 5000 --run {run}/stage1 --out {out}/lomd.safetensors {device}"),
    ("what it can do", "6 minutes", "baby/check.py --model {out} --each 6 --out {run}/check.png"))


class Plan(NamedTuple):
    """How the transformer is trained. `decay` and `guided`: last parts of the run in which the learning rate falls to zero,
    and guidance is learned, on every `every`th picture."""
    rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.35
    ema: float = 0.998
    guided: float = 0.19
    every: int = 2


FIRST, FRAMINGS = Plan(), Plan(6e-4, 50, 0.5, 0.995, math.inf, 4)              # the latter is guided from its first step


def save_whole(tensors: dict, path: Path, metadata: dict | None = None):
    """A safetensors file that is whole or absent; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def draw(job: tuple) -> tuple:
    """One training picture. A third is drawn at another scale, since personalisation trains on close and wide crops."""
    index, width, height = job
    person, size = subject(index)
    return faces.sample(person, index, width, height, size=size)


def subject(index: int) -> tuple[int, float | None]:
    """Seed of the person in training picture `index`, and the size of the head where it is not the scene's own."""
    rng = np.random.default_rng([SEED, index, 2])
    size = float(rng.uniform(0.3, 0.95)) if rng.random() < 1 / 3 else None
    return int(rng.integers(faces.BASE.stop)), size


def face_weights(width: int, height: int, first: int, count: int) -> torch.Tensor:
    """Weights of the loss (count, 1, height / 8, width / 8), mean 1: FACE times as much where a picture's face is. Faces
    are a sixth of a picture and most of what is hard about it."""
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
    """[((width, height), picture, caption)] of a scene: CROPS of the paper's crops, or, of every fourth one, all of it. A
    crop that ends above the clothes says nothing of them nor of the background, so that captions with them draw both."""
    rng = np.random.default_rng([SEED, index, 9])
    if index % 4 == 0:
        shape = any_shape(rng, [*SHAPES.values()])
        return [(shape, *draw((index, *shape)))]
    person = subject(index)[0]
    pixels, text = faces.sample(person, index, SCENE, SCENE)
    scene = faces.scene(np.random.default_rng([person, index, 1]))                                # that of the picture
    image, pose = Image.fromarray(pixels), faces.Pose(faces.identity(person), scene, SCENE, SCENE)
    box = [*(pose.centre - pose.scale * np.float32((0.64, 0.42))), *(pose.centre + pose.scale * np.float32((0.64, 1.0)))]
    boxes, crops = photos.face_crops(SCENE, SCENE, box), []
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
    found, part = {shape: [] for shape in SHAPES}, run / "data.part"
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
    # spawn: a fork of a process whose libraries have threads may wait for ever for a lock that one of them held
    return multiprocessing.get_context("spawn").Pool(initializer=faces.cv2.setNumThreads, initargs=(1,))


def make_data(run: Path):
    folder, first = run / "data", 0
    with workers() as pool:
        for (width, height), count in SHAPES.items():
            path, jobs = folder / f"{width}x{height}.npy", [(first + i, width, height) for i in range(count)]
            first += count
            if path.exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            images, captions = np.empty((count, height, width, 3), np.uint8), []
            for i, (image, text) in enumerate(tqdm(pool.imap(draw, jobs, 64), total=count, desc=f"faces {width}x{height}")):
                images[i] = image
                captions.append(text)
            path.with_suffix(".txt").write_text("\n".join(captions), "utf-8")
            np.save(f"{path}.part.npy", images)
            os.replace(f"{path}.part.npy", path)


def pictures(array: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Training state: weights, AdamW moments and the step, in one safetensors file


def save_state(path: Path, modules: nn.Module, optimizers: list, step: int, ema: dict | None = None):
    tensors = {f"weight.{k}": v.detach() for k, v in modules.named_parameters()}   # unlike a state_dict, each once
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{o}.{i}.{k}": v for k, v in state.items()})
    tensors.update({f"ema.{k}": v for k, v in (ema or {}).items()})
    save_whole(tensors, path, {"step": str(step)})


def load_state(path: Path, modules: nn.Module, optimizers: list, ema: dict | None = None) -> int:
    """Step to go on from; 0 where nothing was saved."""
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
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(file.metadata()["step"])


class Interrupted:
    """Ctrl-C and SIGTERM as a flag, to be read between two steps: a state saved in the middle of one is none."""
    def __init__(self):
        self.now = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.set)

    def set(self, number, frame):
        self.now = True


def cosine(step: int, total: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))


@contextlib.contextmanager
def bf16(device: torch.device):
    """Autocast, for networks of some tens of tokens: for 88 of them the flash kernel's backward costs 40 % of a step on a CPU,
    plain matmuls a tenth of it."""
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, torch.bfloat16), attention:
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder


def train_autoencoder(run: Path, out: Path, device=CPU):
    """L1 + L2 on pictures and a light KL term; then each latent channel is scaled to unit variance (exactly: the scale
    moves from the decoder's first convolution to the encoder's last)."""
    torch.manual_seed(SEED)
    model = AutoEncoder(AE_CONFIG).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=AE_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    data = np.load(run / "data" / "128x128.npy", mmap_mode="r")
    state = run / "autoencoder.safetensors"
    start = load_state(state, model, [optimizer])
    interrupted = Interrupted()
    bar, shown = tqdm(range(start, AE_STEPS), initial=start, total=AE_STEPS, desc="autoencoder"), 0.0
    for step in bar:
        rng = np.random.default_rng([SEED, step, 3])
        full = step >= 0.85 * AE_STEPS                    # the end on whole pictures: attention and GroupNorm see them all
        px, batch = (128, AE_BATCH // 4) if full else (64, AE_BATCH)
        corner = rng.integers(0, 128 - px + 1, (batch, 2))
        images = pictures(np.stack([data[i, y:y + px, x:x + px] for i, (y, x) in
                                    zip(rng.integers(0, len(data), batch), corner)])).to(device, memory_format=torch.channels_last)
        optimizer.param_groups[0]["lr"] = AE_LR * cosine(step, AE_STEPS, 100)
        with torch.autocast(device.type, torch.bfloat16):
            mean, logvar = model.moments(images).float().chunk(2, dim=1)
            logvar = logvar.clamp(-12, 4)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step)).to(device)
            z = mean + torch.exp(0.5 * logvar) * noise
            error = model.decoder(z).float() - images
        mse = error.square().mean()
        loss = error.abs().mean() + 2 * mse + 1e-4 * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shown = mse.item() if not shown else 0.98 * shown + 0.02 * mse.item()
        if step % 50 == 0:
            bar.set_postfix(psnr=f"{10 * math.log10(4 / shown):.2f} dB")
        if step % 500 == 499 or interrupted.now:
            save_state(state, model, [optimizer], step + 1)
        if interrupted.now:
            sys.exit(130)
    model = model.to(memory_format=torch.contiguous_format).eval()
    normalise_latents(model, pictures(data[-256:]).to(device))
    save_whole(model.state_dict(), out / "ae.safetensors", {"config": json.dumps(vars(model.config))})


@torch.no_grad()
def normalise_latents(model: AutoEncoder, images: torch.Tensor):
    mean = torch.cat([model.moments(x).chunk(2, dim=1)[0] for x in images.split(32)])
    std = mean.std(dim=(0, 2, 3))
    channels = len(std)
    print("latent channels' standard deviations:", [round(s, 3) for s in std.tolist()])
    conv = model.encoder.conv_out                                      # rows: means, then log-variances
    conv.weight[:channels] /= std[:, None, None, None]
    conv.bias[:channels] /= std
    conv.bias[channels:] -= 2 * std.log()
    model.decoder.conv_in.weight *= std[None, :, None, None]
    model.config.shift_factor = float((mean.mean(dim=(0, 2, 3)) / std).mean())
    model.config.scale_factor = 1.0


def train_decoder(run: Path, out: Path, device=CPU):
    """The decoder alone, on whole pictures and from the latents' means, as it is used: latents stay what they are. Faces count
    more than the rest: what a detector missed in decoded renders were thin glasses."""
    model = load_autoencoder(out, device, torch.float32).to(memory_format=torch.channels_last)
    parameters = [p.requires_grad_() for p in model.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=DECODER_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    data, state = np.load(run / "data" / "128x128.npy", mmap_mode="r"), run / "decoder.safetensors"
    face = face_weights(128, 128, 0, len(data))
    start, interrupted = load_state(state, model.decoder, [optimizer]), Interrupted()
    for step in tqdm(range(start, DECODER_STEPS), initial=start, total=DECODER_STEPS, desc="decoder"):
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
        if step % 200 == 199 or interrupted.now:
            save_state(state, model.decoder, [optimizer], step + 1)
        if interrupted.now:
            sys.exit(130)
    model = model.to(memory_format=torch.contiguous_format)
    save_whole(model.state_dict(), out / "ae.safetensors", {"config": json.dumps(vars(model.config)), "decoder_steps": str(DECODER_STEPS)})


# ---------------------------------------------------------------------------------------------------------------------
# Latents


@torch.no_grad()
def encode_latents(run: Path, out: Path, device=CPU):
    """Posterior means of every picture, as fp16 (n, 16, h, w). No mirror images: the renderer favours no side."""
    model = load_autoencoder(out, device, torch.float32)
    for width, height in SHAPES:
        data = np.load(run / "data" / f"{width}x{height}.npy", mmap_mode="r")
        path = run / "latents" / f"{width}x{height}.safetensors"
        if not path.exists():
            with torch.autocast(device.type, torch.bfloat16):
                chunks = [model.encode(pictures(data[i:i + 64]).to(device)).half().cpu()
                          for i in tqdm(range(0, len(data), 64), desc=f"latents {width}x{height}")]
            save_whole({"latents": torch.cat(chunks)}, path)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def make_text(run: Path, out: Path):
    """Tokenizers on the captions, and untrained text encoders to go with them."""
    captions = sorted({line for path in (run / "data").glob("*.txt") for line in path.read_text("utf-8").splitlines()})
    captions += ["a photo of a person"] * (len(captions) // 4)
    # sentencepiece only considers pieces that it sees in two different words: give every word a plural
    captions += [" ".join(word + "s" for word in faces.VOCABULARY + ["person"])]
    for part in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"):
        (out / part).mkdir(parents=True, exist_ok=True)
    letters = "".join(chr(c) for c in range(33, 127))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_prefix=str(out / "tokenizer_2" / "spiece"), vocab_size=260,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, required_chars=letters, hard_vocab_limit=False, minloglevel=2)
    (out / "tokenizer_2" / "spiece.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(str(out / "tokenizer_2" / "spiece.model")).get_piece_size()
    (out / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="T5Tokenizer", extra_ids=0, model_max_length=T5_TOKENS, eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>"), indent=1), "utf-8")
    # CLIP's BPE: 256 bytes, the same at the end of a word, merges, start and end
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bpe.train_from_iterator(captions, tokenizers.trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (out / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (out / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    (out / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="CLIPTokenizer", model_max_length=CLIP_TOKENS, bos_token="<|startoftext|>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"), indent=1), "utf-8")
    torch.manual_seed(SEED)
    CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH_TEXT, intermediate_size=2 * WIDTH_TEXT, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=CLIP_TOKENS, bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1, pad_token_id=len(words) - 1)).save_pretrained(out / "text_encoder")
    T5EncoderModel(T5Config(
        vocab_size=pieces, d_model=WIDTH_TEXT, d_kv=16, d_ff=2 * WIDTH_TEXT, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)).save_pretrained(out / "text_encoder_2")


def is_photo(caption: str) -> bool:
    return ("a photo of" in caption or caption.endswith("a photo")) and not caption.endswith("at night")


def short(caption: str) -> str:
    """Style and gender alone: "a photo of a woman", "a photo of a man at night"."""
    style = max((s for s in faces.STYLES.values() if s in caption), key=len)
    return f"{style} of a {'woman' if 'woman' in caption else 'man'}" + " at night" * caption.endswith(" at night")


def vary(caption: str, rng: np.random.Generator) -> str:
    """Captions as people write them: sometimes short, sometimes "a person", and one in ten empty (for guidance)."""
    chance = rng.random()
    if chance < 0.1:
        return ""
    if chance < 0.25:
        caption = short(caption)
    if rng.random() < 0.2:
        caption = caption.replace("woman", "person").replace("man", "person")
    return caption.capitalize() if rng.random() < 0.3 else caption


# ---------------------------------------------------------------------------------------------------------------------
# Transformer


class Baby(nn.Module):
    """Everything that the last stage trains."""
    def __init__(self, out: Path, config: FluxConfig | None = None):
        super().__init__()
        self.text = load_text_encoders(out, "cpu", torch.float32, T5_TOKENS)
        torch.manual_seed(SEED)                           # from nothing, also where `out` holds trained ones
        self.clip, self.t5 = CLIPTextModel(self.text.clip.config), T5EncoderModel(self.text.t5.config)
        self.flux = Flux(config or FLUX_CONFIG)
        for name, p in self.flux.named_parameters():
            if name.endswith("mod.lin.weight") or "modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(p)                         # adaLN-zero: every block starts as the identity (DiT)

    def embed(self, captions: list[str]):
        clip_ids, t5_ids = (ids.to(self.flux.img_in.weight.device) for ids in self.text.tokenize(captions))
        return self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output


def batch_of(step: int, latents: dict, weights: dict, captions: dict, chances: dict, every: int = FIRST.every):
    """Latents of one shape, captions, noise, times, guidance (1 but for every `every`th) and loss weights of a step, by its
    number alone."""
    rng, generator = np.random.default_rng([SEED, step, 4]), torch.Generator().manual_seed(step)
    shape = any_shape(rng, [len(captions[shape]) for shape in SHAPES])
    index = rng.choice(len(latents[shape]), BATCH, p=chances[shape])
    x0 = latents[shape][index].float()
    text = [vary(captions[shape][i], rng) for i in index]
    noise = torch.randn(x0.shape, generator=generator)
    guidance = torch.from_numpy(np.where(np.arange(BATCH) % every, 1.0, rng.uniform(1, 5, BATCH))).float()
    return x0, noise, sample_times(BATCH, generator), text, guidance, weights[shape][index].float()


def away_from(weak: Baby, average: Baby):
    """What guidance moves the velocity by: that of the averaged weights away from the weak ones; those being trained
    would follow their own noise."""
    def move(x_t, t, text, guidance):
        good, bad = (velocity(model.flux, x_t, t, *model.embed(text), 1.0) for model in (average, weak))
        return (guidance[:, None, None, None] - 1) * (good - bad)
    return move


def as_taught_by(teacher: Baby):
    """What guidance moves the teacher's velocity by."""
    def move(x_t, t, text, guidance):
        words = teacher.embed(text)
        return velocity(teacher.flux, x_t, t, *words, guidance) - velocity(teacher.flux, x_t, t, *words, 1.0)
    return move


def loss_of(baby: Baby, batch, move=None) -> torch.Tensor:
    """Flow matching; with `move`, the target is moved by move(x_t, t, text, guidance) where guidance > 1."""
    x0, noise, t, text, guidance, weight = batch
    if move is None:
        guidance = torch.ones(BATCH)
    rows, device = np.flatnonzero(guidance.numpy() > 1), baby.flux.img_in.weight.device
    x0, noise, t, guidance, weight = (part.to(device) for part in (x0, noise, t, guidance, weight))
    if len(rows):
        with torch.no_grad():
            at, words = t[rows, None, None, None], [text[i] for i in rows]
            x_t = (1 - at) * x0[rows] + at * noise[rows]
            # moving x0 and the noise apart by the same amount moves the target, noise - x0, and not x_t
            moved = move(x_t, t[rows], words, guidance[rows])
            x0[rows], noise[rows] = x0[rows] - at * moved, noise[rows] + (1 - at) * moved
    return flow_matching_loss(baby.flux, x0, noise, t, *baby.embed(text), guidance, weight).mean()


def export(average: Baby, out: Path):
    """The averaged weights in bf16, in the hub's layout; each file is whole or absent."""
    part = lambda name: {k: v.detach().bfloat16() for k, v in getattr(average, name).named_parameters()}
    save_whole(part("flux"), out / "flux1-dev.safetensors", {"config": json.dumps(vars(average.flux.config))})
    for name, folder in (("clip", "text_encoder"), ("t5", "text_encoder_2")):
        save_whole(part(name), out / folder / "model.safetensors", {"format": "pt"})
    (out / "defaults.json").write_text(json.dumps(DEFAULTS, indent=1) + "\n", "utf-8")


def load_checkpoint(baby: Baby, folder: Path) -> Baby:
    """Weights of an exported checkpoint, in place of those drawn at the start; a narrower one grows. -> the checkpoint"""
    encoders, flux = load_text_encoders(folder, "cpu", torch.float32, T5_TOKENS), load_flux(folder, "cpu", torch.float32)
    baby.clip.load_state_dict(encoders.clip.state_dict())
    baby.t5.load_state_dict(encoders.t5.state_dict())
    small = copy.deepcopy(baby)
    small.flux = flux.float()
    grow(flux, baby.flux)
    return small


@torch.no_grad()
def grow(small: Flux, large: Flux):
    """Weights of a narrower transformer into a wider one (Net2Net, Chen et al. 2016): new channel j is a copy of channel j
    modulo the old number, and whatever reads a channel that there is twice divides its weight among the copies, at
    random, so that the copies part when they are trained. Were it not for LayerNorm, which now counts some channels
    twice, the outputs would be the same. Head size, depth, and text widths have to be."""
    generator, (narrow, wide) = torch.Generator().manual_seed(SEED), (m.config.hidden_size for m in (small, large))
    old = dict(small.named_parameters())

    def channels(was: int, now: int) -> torch.Tensor:
        """Old index of every new one. What has several parts, as q, k, v and mlp, grows part by part."""
        start = torch.arange(0, was, narrow)[:, None]
        return torch.arange(now) if was == now else (start + torch.arange(wide) % narrow).flatten()

    for name, p in large.named_parameters():
        rows = channels(len(old[name]), len(p))
        if p.ndim == 1:
            p.copy_(old[name][rows])
            continue
        columns = channels(*(weight.shape[1] for weight in (old[name], p)))
        share = torch.ones(p.shape)
        for first in columns.unique().tolist():
            copies = (columns == first).nonzero()[:, 0]
            if len(copies) > 1:
                split = torch.randn(len(p), len(copies), generator=generator) / 4
                share[:, copies] = 1 / len(copies) + split - split.mean(1, keepdim=True)
        p.copy_(old[name][rows][:, columns] * share)


def load_data(run: Path, plan: Plan) -> tuple[dict, dict, dict, dict]:
    """Of each shape the latents, the weights of the loss, the captions, and how often each picture is drawn."""
    # a picture in another style than a photo is drawn twice as often: 10 % each of the data are too few to learn from
    chances, captions = {}, {s: (run / "data" / f"{s[0]}x{s[1]}.txt").read_text("utf-8").splitlines() for s in SHAPES}
    latents, face, first = {}, {}, 0
    for (width, height), count in SHAPES.items():
        with safe_open(run / "latents" / f"{width}x{height}.safetensors", "pt") as file:
            latents[width, height] = file.get_tensor("latents")
        face[width, height] = (torch.ones(len(latents[width, height]), 1, 1, 1) if plan is FRAMINGS
                               else face_weights(width, height, first, count))
        first += count
        often = np.array([2.0 - photo for photo in map(is_photo, captions[width, height])])
        chances[width, height] = often / often.sum()
    return latents, face, captions, chances


def train_transformer(run: Path, out: Path, steps: int, init: Path | None = None, device=CPU, config: FluxConfig | None = None,
                      plan: Plan = FIRST):
    baby = Baby(out, config)
    small = load_checkpoint(baby, init).to(device) if init else None
    baby.to(device)
    data = load_data(run, plan)
    # Muon for the blocks' matrices, AdamW for embeddings, norms, biases and text (Jordan et al. 2024)
    named = dict(baby.named_parameters())
    matrices = [p for k, p in named.items() if "_blocks." in k and p.ndim == 2 and k.startswith("flux")]
    others = [p for p in named.values() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=plan.rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0)]
    average = copy.deepcopy(baby)
    given = plan is FRAMINGS or small is not None and small.flux.config.hidden_size < baby.flux.config.hidden_size
    weak = small if given else copy.deepcopy(baby)        # guided away from the narrower one that it grew from, if there is one
    move = as_taught_by(small) if plan is FRAMINGS else away_from(weak, average)
    ema = {k: p.detach() for k, p in average.named_parameters()}
    path, weak_path = (run / f"{name}-{baby.flux.config.hidden_size}.safetensors" for name in ("transformer", "weak"))
    start = load_state(path, baby, optimizers, ema)
    for flux in (baby.flux, average.flux, weak.flux):
        for block in [*flux.double_blocks, *flux.single_blocks]:
            block.compile(dynamic=False)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="transformer", mininterval=10)
    interrupted = Interrupted()
    shown, log = None, open(path.with_suffix(".jsonl"), "a", encoding="utf-8")
    for step in bar:
        left = (steps - step) / steps
        if not given and (step == int((1 - plan.guided) * steps) or step == start and left < plan.guided):
            if not load_state(weak_path, weak, []):
                raise SystemExit(f"pretrain.py: {weak_path} is missing; it was written at step {WEAK * steps:.0f}")
        for optimizer in optimizers:                                                     # warm up, hold, fall
            optimizer.param_groups[0]["lr"] = plan.rate * min(1.0, (step + 1) / plan.warmup) * min(1.0, left / plan.decay)
        with bf16(device):
            batch = batch_of(step, *data, plan.every)
            loss = loss_of(baby, batch, move if left < plan.guided else None)
        loss.backward()
        nn.utils.clip_grad_norm_(baby.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(plan.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in named.values()], 1 - decay)
        shown = loss.item() if shown is None else 0.98 * shown + 0.02 * loss.item()
        if not math.isfinite(shown):
            raise SystemExit(f"pretrain.py: the loss is not finite at step {step}; the last state is in {path}")
        if step % 50 == 49:
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
            log.write(json.dumps(dict(step=step + 1, loss=round(shown, 5), time=round(time.time()))) + "\n")
            log.flush()
        if not given and step + 1 == max(1, round(WEAK * steps)):
            save_whole({f"weight.{k}": v for k, v in ema.items()}, weak_path, {"step": str(step + 1)})
        if step % 500 == 499 or step == steps - 1 or interrupted.now:
            save_state(path, baby, optimizers, step + 1, ema)
            export(average, out)
        if interrupted.now:
            sys.exit(130)


def follow_recipe(run: Path, out: Path, words: list[str]):
    """RECIPE, each stage by its own command, with `words` where it takes a device; ends where one does not go well."""
    root, interrupted = Path(__file__).resolve().parents[1], Interrupted()       # Ctrl-C reaches the stage too, which saves
    places = {"run": shlex.quote(str(run.resolve())), "out": shlex.quote(str(out.resolve())), "device": shlex.join(words)}
    commands = [command.format(**places).strip() for *_, command in RECIPE]
    for number, ((what, length, _), command) in enumerate(zip(RECIPE, commands), 1):
        print(f"{number}. {what} (about {length})\n   python {command}")
    for number, command in enumerate(commands, 1):
        print(f"\n{number} of {len(commands)}: python {command}", flush=True)
        code = subprocess.run([sys.executable, *shlex.split(command)], cwd=root).returncode
        if code or interrupted.now:
            raise SystemExit(130 if interrupted.now or code < 0 else code)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", action="store_true", help="list the stages that made baby/checkpoint, and run them, from nothing; "
                        "--out is then a new folder")
    parser.add_argument("--run", type=Path, default=Path("baby/run"), help="data and resumable state (about 4 GB)")
    parser.add_argument("--out", type=Path, default=Path("baby/checkpoint"), help="the checkpoint, in the hub's layout")
    parser.add_argument("--width", type=int, default=FLUX_CONFIG.hidden_size, help="hidden size of the transformer, a multiple of a head's 32")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the transformer, with batches of 64")
    parser.add_argument("--init", type=Path, help="folder of a checkpoint whose transformer to go on from, as a new run")
    parser.add_argument("--framings", action="store_true", help="train --init further, on the paper's crops, in a folder of its own in --run")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    head = sum(FLUX_CONFIG.axes_dim)
    if args.width < head or args.width % head:
        parser.error(f"--width {args.width} is no multiple of {head}")
    if args.framings and not args.init:
        parser.error("--framings goes on from a checkpoint: name it with --init")
    if args.init and args.init.resolve() == args.out.resolve():
        parser.error(f"--out {args.out} would be written over --init: name another --out")
    if args.recipe:
        if args.out.resolve() == Path(__file__).resolve().parent / "checkpoint":
            parser.error("--recipe would write into the shipped checkpoint: name another --out")
        return follow_recipe(args.run, args.out, ["--device", args.device] * bool(args.device))
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.init and not (args.out / "ae.safetensors").exists():             # latents are that autoencoder's
        shutil.copytree(args.init, args.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lomd*", "flux1*"))
    if args.framings:
        args.run /= "framings"
    (make_framings if args.framings else make_data)(args.run)
    if not (args.out / "ae.safetensors").exists():
        train_autoencoder(args.run, args.out, device)
    with safe_open(args.out / "ae.safetensors", "pt") as file:
        whole = "decoder_steps" in file.metadata()
    if not whole:
        train_decoder(args.run, args.out, device)
    encode_latents(args.run, args.out, device)
    if not (args.out / "text_encoder_2" / "model.safetensors").exists():
        make_text(args.run, args.out)
    config = dataclasses.replace(FLUX_CONFIG, hidden_size=args.width, num_heads=args.width // head)
    if not (args.out / "lomd.safetensors").exists():
        with torch.device("meta"):
            targets = find_targets(Flux(config))
        save_lomd(args.out / "lomd.safetensors", random_lomd(targets, r1=16, seed=SEED),
                  {"model": "baby", "iterations": "0", "random": "true"})
    train_transformer(args.run, args.out, args.steps, args.init, device, config, FRAMINGS if args.framings else FIRST)


if __name__ == "__main__":
    main()
