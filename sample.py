"""Prompt + LoRA -> picture.

    python sample.py --lora out.safetensors "a photo of a person on the beach"
    python sample.py --lora out.safetensors:0.8 --num 4 "a photo of a person" "a watercolour of a person"

Text encoders, transformer and autoencoder come and go in turn: the peak of memory is the largest of them,
not their sum. Each picture is made alone, from noise drawn on the CPU, so that a seed means the same on any
device and whatever else the run draws. LoRAs ride in spare columns of the frozen weights (metalora.py).

Source: the defaults are Meta-LoRA's evaluation settings (30 steps, guidance 3.5, true CFG 1, strength 1); a model's
defaults.json may name another size and guidance.
"""
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from flux_model import (Parser, add_speed_options, check_fit, denoise, find_model, flux_files, free, get_noise, load_autoencoder,
                        load_text_encoders, model_defaults, open_flux, pick_device, pick_dtype, run_script)
from lora_files import load_lora
from metalora import apply_loras
from photos import SUFFIXES, to_image


def encode_prompts(folder, prompts, device, dtype):
    """Prompts -> {prompt: (txt (1, T, context_in_dim), y (1, vec_in_dim))} on the CPU; drops the encoders."""
    encoders = load_text_encoders(folder, device, dtype)
    embeddings = {prompt: tuple(part.cpu() for part in encoders.encode([prompt])) for prompt in prompts}
    del encoders
    free(device)
    return embeddings


def sample_latents(flux, embeddings, jobs, width, height, steps, guidance, negative=None, true_cfg=1.0,
                   on_step=None, batch_size=1):
    """Yields the latent (1, 16, height / 8, width / 8), fp32, of each (prompt, seed) in jobs, in their order.

    embeddings: of encode_prompts, with `negative` among them where true_cfg is not 1. width and height in
    pixels, multiples of 16. A batch larger than 1 gives the same up to rounding, and pays for small models only.
    FloatingPointError names the first picture that is not finite.
    """
    device = flux.img_in.weight.device
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start:start + batch_size]

        def texts(prompts):
            return (torch.cat(parts).to(device) for parts in zip(*(embeddings[prompt] for prompt in prompts)))
        negatives = texts([negative] * len(batch)) if true_cfg != 1.0 else (None, None)
        noise = torch.cat([get_noise(height, width, seed) for _, seed in batch]).to(device)
        latents = denoise(flux, noise, *texts([prompt for prompt, _ in batch]), steps, guidance, *negatives,
                          true_cfg, on_step)
        for (prompt, seed), latent in zip(batch, latents):
            if not latent.isfinite().all():
                raise FloatingPointError(f"seed {seed} of {shorten(prompt)} gave values that are not finite; "
                                         "a LoRA or --true-cfg may be too strong")
            yield latent[None]


@torch.no_grad()
def decode_latent(autoencoder, latent):
    """Latent (1, 16, h, w) -> PIL image of 8 w x 8 h pixels."""
    return to_image(autoencoder.decode(latent.to(autoencoder.decoder.conv_in.weight.device))[0])


def save_png(image, path, fields):
    """Writes a PNG with text fields {name: value}, whole or not at all."""
    text = PngImagePlugin.PngInfo()
    for name, value in fields.items():
        text.add_text(name, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        image.save(beside, format="PNG", pnginfo=text)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def note(text):
    print(f"note: {text}", file=sys.stderr)


def shorten(prompt):
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")


def finite_number(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def parse_arguments(argv):
    parser = Parser(prog="sample.py", allow_abbrev=False, usage="sample.py prompt [prompt ...] [options]",
                    description="Draw prompts, with any number of LoRAs.",
                    epilog="Several prompts or seeds: each with each, and grid.png, prompts down, seeds across")
    add = parser.add_argument
    add("words", metavar="prompt", nargs="*", help="what to draw")
    add("--prompts", metavar="FILE", type=Path, help="text file of prompts, one per line; # starts a comment")
    add("--lora", metavar="FILE[:STRENGTH]", action="append", default=[],
        help="LoRA file in any of the usual formats (default strength: 1); may be repeated")
    add("--steps", type=int, help="Euler steps (default: 30; schnell: 4)")
    add("--guidance", type=finite_number, help="guidance input of dev models (default: the model's; FLUX.1's is 3.5)")
    add("--width", type=int, help="pixels, a multiple of 16 (default: the model's; FLUX.1's is 1024)")
    add("--height", type=int, help="as --width")
    add("--seed", nargs="+", action="append", help="one seed of the noise, or several (default: 0)")
    add("--num", type=int, default=1, help="how many seeds, from each --seed upwards (default: 1)")
    add("--negative", metavar="PROMPT", help="what to steer away from; needs --true-cfg")
    add("--true-cfg", type=finite_number, default=1.0,
        help="how far to steer away from the negative or empty prompt; twice the time (default: 1, off)")
    add("--out", type=Path, help="PNG file for one picture, folder for several (default: out.png, samples/); "
        "replaces files of the same name. Their text fields hold all settings")
    add("--model", default="flux-dev", help="flux-dev, flux-schnell, baby, or a folder (default: flux-dev)")
    add_speed_options(add, training=False)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_intermixed_args(argv)
    for name in ("steps", "num", "width", "height"):
        value, grid = getattr(args, name), 16 if name in ("width", "height") else 1
        if value is not None and (value < grid or value % grid):
            low = value - value % grid
            raise ValueError(f"--{name} must be at least {grid}, not {value}" if value < grid else
                             f"--{name} {value} is no multiple of 16; the nearest are {low} and {low + 16}")
    return args


def read_seeds(groups, num, words):
    """The seeds of every --seed, `num` from each upwards, without repetition.

    In `--seed 1 "a prompt"` argparse gives --seed the prompt too: what follows the integers goes to `words`.
    """
    seeds = []
    for group in groups or [["0"]]:
        count = next((i for i, value in enumerate(group) if not re.fullmatch(r"[-+]?\d+", value)), len(group))
        words += group[count:]
        seeds += [seed for value in group[:count] for seed in range(int(value), int(value) + num)]
        if not count or min(seeds) < 0 or max(seeds) >= 2 ** 63:
            raise ValueError(f"--seed takes integers from 0 to {2 ** 63 - 1}, not {shorten(' '.join(group))}")
    return list(dict.fromkeys(seeds))


def read_prompts(words, path):
    """The prompts of the command line and of the file, in their order, without repetition."""
    prompts = list(words)
    if path:
        try:
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {path} is not a text file in UTF-8") from None
        prompts += [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompt" if path else "no prompt: give one, or --prompts FILE")
    for prompt in prompts:
        if not prompt.strip() or prompt != prompt.encode("utf-8", "replace").decode():
            raise ValueError(f"a prompt is {'not text in UTF-8' if prompt.strip() else 'empty'}")
    return list(dict.fromkeys(prompts))


def split_lora(text):
    """`file[:strength]` -> (file, strength). File names may contain colons: an existing file wins."""
    path, _, strength = text.rpartition(":")
    if not Path(path).is_file() or Path(text).is_file():
        path, strength = text, "1"
    if not Path(path).is_file():
        raise ValueError(f"--lora {text}: there is no such file")
    try:
        return path, finite_number(strength)
    except ValueError:
        raise ValueError(f"--lora {text}: the strength {strength!r} is not a number") from None


def read_loras(files, config):
    """[(file, strength)] -> [(LoRA, strength)], checked against the model; warnings become notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loras = [(load_lora(path, config), strength) for path, strength in files]
    for warning in caught:
        note(warning.message)
    return loras


def name_prompts(prompts):
    """For each prompt its first words, as part of a file name; no name twice."""
    names = []
    for prompt in prompts:
        names.append(re.sub(r"[\W_]+", "-", prompt.lower())[:40].strip("-") or "prompt")
        while names[-1] in names[:-1]:
            names[-1] += "-2"
    return names


def plan_files(out, prompts, seeds):
    """Where each picture goes, by prompt and seed, and the grid (None for one picture). Writes nothing."""
    count = len(prompts) * len(seeds)
    out = out or Path("samples" if count > 1 else "out.png")
    is_file = out.suffix.lower() == ".png" and not out.is_dir()
    if is_file and count > 1:
        raise ValueError(f"--out {out} is one file, but there are {count} pictures: name a folder")
    if out.suffix.lower() in SUFFIXES - {".png"} and not out.is_dir():
        raise ValueError(f"--out {out}: pictures are written as PNG")
    folder = out.parent if is_file else out
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {parent} is {'not writable' if parent.is_dir() else 'not a folder'}")
    if is_file:
        return [out], None
    files = [out / f"{name}_{seed}.png" for name in name_prompts(prompts) for seed in seeds]
    return files, out / "grid.png" if count > 1 else None


def denoise_all(args, device, loras, embeddings, jobs, **settings):
    """Latents of the jobs, on the CPU, and what stopped them early (Ctrl-C, a value not finite) or None."""
    tokens = settings["width"] * settings["height"] // 256 + next(iter(embeddings.values()))[0].shape[1]
    flux = open_flux(args, device, len(jobs) * settings["steps"], tokens, training=False)
    apply_loras(flux, [(lora, strength) for lora, strength in loras if strength])
    latents = []
    try:
        with tqdm(total=len(jobs) * settings["steps"], desc="denoising", unit="step", disable=None) as bar:
            for latent in sample_latents(flux, embeddings, jobs, on_step=bar.update, **settings):
                latents.append(latent.cpu())
    except (KeyboardInterrupt, FloatingPointError) as error:
        return latents, error.with_traceback(None)           # a traceback would keep the transformer alive
    return latents, None


def save_pictures(autoencoder, latents, jobs, files, grid_file, fields):
    """Decodes and saves one picture after the other, and with a grid_file the grid of all."""
    prompts, seeds = (list(dict.fromkeys(parts)) for parts in zip(*jobs))
    for i, (latent, (prompt, seed), file) in enumerate(zip(latents, jobs, files)):
        picture = decode_latent(autoencoder, latent)
        save_png(picture, file, {"prompt": prompt, "seed": seed} | fields)
        print(f"saved {file}")
        if grid_file:
            width, height = picture.size
            grid = grid if i else Image.new("RGB", (len(seeds) * width, len(prompts) * height))
            grid.paste(picture, (i % len(seeds) * width, i // len(seeds) * height))
    if grid_file:
        save_png(grid, grid_file, {"prompt": "\n".join(prompts), "seed": " ".join(map(str, seeds))} | fields)
        print(f"saved {grid_file}")


def draw(argv):
    """From the command line to the files: cheap checks first, then one model after the other."""
    args = parse_arguments(argv)
    seeds = read_seeds(args.seed, args.num, args.words)
    prompts = read_prompts(args.words, args.prompts)
    files, grid_file = plan_files(args.out, prompts, seeds)
    lora_files = [split_lora(text) for text in args.lora]
    device = pick_device(args.device)
    folder = find_model(args.model)
    config, dtype = flux_files(folder)[1], pick_dtype(device, folder)
    args.folder, args.dtype = folder, dtype
    check_fit(args, device)
    loras = read_loras(lora_files, config)
    if args.negative and args.true_cfg == 1.0:
        note("--negative does nothing without --true-cfg")
    if not config.guidance_embed:
        note("this model has no guidance input: --guidance does nothing")

    defaults = model_defaults(folder)
    width, height = (size or defaults["resolution"] for size in (args.width, args.height))
    settings = {"width": width, "height": height, "steps": args.steps or (30 if config.guidance_embed else 4),
                "guidance": defaults["guidance"] if args.guidance is None else args.guidance,
                "true_cfg": args.true_cfg, "negative": args.negative or ""}
    names = ", ".join(f"{Path(path).name}:{strength:g}" for path, strength in lora_files)
    fields = settings | {"model": Path(args.model).name, "loras": names}
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    print(f"{args.model} on {device}, {width} x {height}, {settings['steps']} steps, pictures: {len(jobs)}")
    start = time.perf_counter()
    negative = [settings["negative"]] if args.true_cfg != 1.0 else []
    # where the transformer has no room on the device, T5 has none either
    embeddings = encode_prompts(folder, prompts + negative, torch.device("cpu") if args.offload else device, dtype)
    latents, stopped = denoise_all(args, device, loras, embeddings, jobs, **settings)
    free(device)
    if stopped and latents:
        note(f"stopped: saving the finished pictures, {len(latents)} of {len(jobs)}; Ctrl-C ends at once")
    if latents:
        save_pictures(load_autoencoder(folder, device, dtype), latents, jobs, files,
                      None if stopped else grid_file, fields)
    if stopped:
        raise stopped
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0
    print(f"{time.perf_counter() - start:.1f} s" + (f", peak GPU memory {memory:.1f} GB" if memory else ""))


def main(argv=None):
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C; one line on stderr for each."""
    return run_script("sample.py", draw, argv)


if __name__ == "__main__":
    sys.exit(main())
