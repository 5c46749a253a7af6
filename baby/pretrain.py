"""Trains the baby: a complete FLUX of a few million parameters on drawn faces, from nothing, on a laptop.

    python baby/pretrain.py --run baby/run --out baby/checkpoint

Stages, each resumable by the same command (Ctrl-C loses nothing but the steps since the last save):
  data         faces of BASE identities in five aspect ratios, with captions         -> run/data
  autoencoder  the product's AutoEncoder, small, on 64-pixel crops                    -> out/ae.safetensors
  latents      every picture and its mirror image, encoded once                       -> run/latents
  text         tokenizers on the captions (sentencepiece for T5, BPE for CLIP)        -> out/tokenizer*, run
  transformer  the product's Flux, small, with T5 and CLIP trained jointly            -> out/flux1-dev.safetensors, ...
The result is a folder in the hub's layout that every script of the project takes as --model baby.

Sources: the flow-matching loss and logit-normal times are flux_model's; guidance is learned as in "Diffusion Models
without Classifier-free Guidance" (Tang et al. 2025): the target moves by (guidance - 1) times what the caption changes,
so that the guidance input means what it means in FLUX.1-dev. Random numbers depend on (seed, step) alone: a run that is
stopped and resumed sees the same data as one that is not.
"""
import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import faces  # noqa: E402  (baby/faces.py: Python puts a script's own folder on the path)
from flux_model import (AutoEncoder, AutoEncoderConfig, Flux, FluxConfig, flow_matching_loss,  # noqa: E402
                        sample_times, velocity)

SEED = 0
SHAPES = {(128, 128): 24_000, (144, 112): 4_000, (112, 144): 4_000, (176, 96): 2_500, (96, 176): 2_500}  # (w, h): count
AE_STEPS, AE_BATCH, AE_LR = 4_000, 16, 3e-3
AE_CONFIG = AutoEncoderConfig(resolution=128, ch=16, ch_mult=(1, 1, 2, 4), num_res_blocks=1, num_groups=4)


def save_whole(tensors: dict, path: Path, metadata: dict | None = None):
    """Writes beside, then renames: the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{path}.part", metadata)
    os.replace(f"{path}.part", path)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def draw(job: tuple) -> tuple:
    """One training picture. A third is drawn at another scale, since personalisation trains on close and wide crops."""
    index, width, height = job
    rng = np.random.default_rng([SEED, index, 2])
    size = float(rng.uniform(0.3, 0.95)) if rng.random() < 1 / 3 else None
    return faces.sample(int(rng.integers(faces.BASE.stop)), index, width, height, size=size)


def make_data(run: Path):
    folder, first = run / "data", 0
    with multiprocessing.Pool(initializer=faces.cv2.setNumThreads, initargs=(1,)) as pool:
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
            path.with_suffix(".txt").write_text("\n".join(captions))
            np.save(f"{path}.part.npy", images)
            os.replace(f"{path}.part.npy", path)


def pictures(array: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Training state: weights, AdamW moments and the step, in one safetensors file


def save_state(path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, step: int, **extra):
    tensors = {f"weight.{k}": v for k, v in modules.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{k}": v for k, v in state.items()})
    tensors.update({f"ema.{k}": v for k, v in extra.get("ema", {}).items()})
    save_whole(tensors, path, {"step": str(step)})


def load_state(path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, ema: dict | None = None) -> int:
    """Step to go on from; 0 where nothing was saved."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        modules.load_state_dict({k[7:]: file.get_tensor(k) for k in file.keys() if k.startswith("weight.")})
        state = {}
        for key in file.keys():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
            elif key.startswith("ema."):
                ema[key[4:]].copy_(file.get_tensor(key))
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(file.metadata()["step"])


def cosine(step: int, total: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder


def train_autoencoder(run: Path, out: Path):
    """L1 + L2 on pictures and a light KL term; then each latent channel is scaled to unit variance (exactly: the scale
    moves from the decoder's first convolution to the encoder's last)."""
    torch.manual_seed(SEED)
    model = AutoEncoder(AE_CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=AE_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    data = np.load(run / "data" / "128x128.npy", mmap_mode="r")
    state, start = run / "autoencoder.safetensors", 0
    start = load_state(state, model, optimizer)
    bar, shown = tqdm(range(start, AE_STEPS), initial=start, total=AE_STEPS, desc="autoencoder"), 0.0
    for step in bar:
        rng = np.random.default_rng([SEED, step, 3])
        full = step >= 0.85 * AE_STEPS                    # the end on whole pictures: attention and GroupNorm see them all
        px, batch = (128, AE_BATCH // 4) if full else (64, AE_BATCH)
        corner = rng.integers(0, 128 - px + 1, (batch, 2))
        images = pictures(np.stack([data[i, y:y + px, x:x + px] for i, (y, x) in
                                    zip(rng.integers(0, len(data), batch), corner)]))
        optimizer.param_groups[0]["lr"] = AE_LR * cosine(step, AE_STEPS, 100)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = model.moments(images.to(memory_format=torch.channels_last)).float().chunk(2, dim=1)
            logvar = logvar.clamp(-12, 4)
            z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
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
        if step % 500 == 499:
            save_state(state, model, optimizer, step + 1)
    model = model.to(memory_format=torch.contiguous_format).eval()
    normalise_latents(model, pictures(data[-256:]))
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("baby/run"), help="data and resumable state (about 4 GB)")
    parser.add_argument("--out", type=Path, default=Path("baby/checkpoint"), help="the checkpoint, in the hub's layout")
    args = parser.parse_args()
    make_data(args.run)
    if not (args.out / "ae.safetensors").exists():
        train_autoencoder(args.run, args.out)


if __name__ == "__main__":
    main()
