"""Prompt + LoRA -> picture.

    python sample.py --lora out.safetensors "a photo of a person on the beach"
    python sample.py --lora out.safetensors:0.8 --num 4 "a photo of a person" "a watercolour of a person"
    python sample.py "a photo of a person" --compare out-000250.safetensors out.safetensors

Text encoders, transformer and autoencoder come and go in turn: the peak of memory is the largest of them, not
their sum. Each picture is made alone, from noise drawn on the CPU, so that a seed means the same on any
device and whatever else the run draws. LoRAs ride in spare columns of the frozen weights (metalora.py).

Source: the defaults are Meta-LoRA's evaluation settings (30 steps, guidance 3.5, true CFG 1, strength 1); a
model's defaults.json may name another size and guidance.
"""
import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import support  # before torch: how its threads wait
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux_model import AutoEncoder, Flux, denoise, get_noise
from metalora import apply_loras
from support.checkpoints import (add_speed_options, check_sampling_memory, encode_prompts, find_model, flux_files,
                                 is_small, load_autoencoder, model_defaults, open_flux, pick_dtype,
                                 text_device)
from support.common import (Parser, finite_number, free, note, pick_device, positive, read_prompts,
                            run_script, save_png, shorten, side, use_threads)
from support.finding import model_name
from support.lora_files import load_loras, split_lora
from support.memory import fit_sampling
from support.photos import plan_files, to_image
from support.sheets import plan_comparison

STEPS, SCHNELL_STEPS = 30, 4        # of Euler; the second of models without a guidance input
Embeddings = dict[str, tuple[Tensor, Tensor]]      # {prompt: (txt (1, T, context_in_dim), y (1, vec_in_dim))}


def sample_latents(flux: Flux, embeddings: Embeddings, jobs: list[tuple[str, int]], width: int, height: int,
                   steps: int, guidance: float, negative: str | None = None, true_cfg: float = 1.0,
                   on_step: Callable[[], object] | None = None, batch_size: int = 1) -> Iterator[Tensor]:
    """Yields the latent (1, 16, height / 8, width / 8), fp32, of each (prompt, seed) in jobs, in their order.

    embeddings: of encode_prompts, with `negative` among them where true_cfg is not 1. width and height in
    pixels, multiples of 16. A batch larger than 1 gives the same up to rounding, and pays for small models
    only. FloatingPointError names the first picture that is not finite.
    """
    device = flux.img_in.weight.device
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start:start + batch_size]

        def texts(prompts: list[str]) -> Iterator[Tensor]:
            return (torch.cat(parts).to(device) for parts in zip(*(embeddings[prompt] for prompt in prompts)))
        negatives = texts([negative] * len(batch)) if true_cfg != 1.0 else (None, None)
        noise = torch.cat([get_noise(height, width, seed) for _, seed in batch]).to(device)
        prompts = texts([prompt for prompt, _ in batch])
        latents = denoise(flux, noise, *prompts, steps, guidance, *negatives, true_cfg, on_step)
        for (prompt, seed), latent in zip(batch, latents):
            if not latent.isfinite().all():
                raise FloatingPointError(f"seed {seed} of {shorten(prompt)} gave values that are not finite; "
                                         "a LoRA or --true-cfg may be too strong")
            yield latent[None]


@torch.no_grad()
def decode_latent(autoencoder: AutoEncoder, latent: Tensor) -> Image.Image:
    """Latent (1, 16, h, w) -> picture of 8 w x 8 h pixels."""
    return to_image(autoencoder.decode(latent.to(autoencoder.decoder.conv_in.weight.device))[0])


# ------------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="sample.py", allow_abbrev=False, usage="sample.py prompt [prompt ...] [options]",
                    description="Draw prompts, with any number of LoRAs.", epilog="Several prompts or seeds: "
                    "each with each, in a folder: <number of the prompt, from 0>_<seed>.png, and grid.png")
    add = parser.add_argument
    add("words", metavar="prompt", nargs="*", help="what to draw")
    add("--prompts", metavar="FILE", type=Path, help="text file of prompts, one per line; # starts a comment")
    add("--lora", metavar="FILE[:STRENGTH]", action="append", default=[],
        help="LoRA file in any of the usual formats (default strength: 1); may be repeated")
    add("--compare", metavar="FILE[:STRENGTH]", nargs="+", default=[],
        help="draw everything without these LoRAs and with each; prompts come before it. A sheet with a "
        "row for each, and the pictures as eval_rfacesim.py --images reads them")
    add("--person", default="person", metavar="NAME",
        help="with --compare: who it is, as eval_rfacesim.py --data has it (default: person)")
    add("--steps", type=positive, help=f"Euler steps (default: {STEPS}; schnell: {SCHNELL_STEPS})")
    add("--guidance", type=finite_number, help="input of dev models (default: the model's; FLUX.1's is 3.5)")
    add("--width", type=side, help="pixels, a multiple of 16 (default: the model's; FLUX.1's is 1024)")
    add("--height", type=side, help="as --width")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--num", type=positive, default=1, help="how many seeds, from --seed upwards (default: 1)")
    add("--negative", metavar="PROMPT", help="what to steer away from; needs --true-cfg")
    add("--true-cfg", type=finite_number, default=1.0,
        help="how far to steer away from the negative or empty prompt; twice the time (default: 1, off)")
    add("--out", type=Path, help="PNG file for one picture, folder for several (default: out.png, samples/, "
        "compare/); replaces files of the same name. Their text fields hold all settings")
    add("--model", type=model_name, default="flux-dev",
        help="flux-dev (default), flux-schnell, baby, a folder or a file")
    add_speed_options(add, training=False)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.seed <= 2 ** 63 - args.num:
        raise ValueError(f"--seed is an integer from 0 to {2 ** 63 - 1}, not {args.seed}")
    if args.person != "person" and not args.compare:
        raise ValueError(f"--person {args.person} does nothing without --compare")
    return args


def denoise_all(args: argparse.Namespace, rows: list[list], embeddings: Embeddings, jobs: list,
                **settings) -> tuple[list[Tensor], BaseException | None]:
    """Latents of the jobs, on the CPU, and what stopped them early (Ctrl-C, a value not finite) or None.

    rows: sets of LoRAs; all jobs are drawn with the first set, then with the next."""
    steps = len(rows) * len(jobs) * settings["steps"]
    flux = open_flux(args, args.device, steps)
    text_tokens = next(iter(embeddings.values()))[0].shape[1]
    latents = []
    try:
        with tqdm(total=steps, desc="denoising", unit="step", disable=None) as bar:
            for loras in rows:
                apply_loras(flux, [(lora, strength) for lora, strength in loras if strength])
                fit_sampling(flux, (settings["height"] // 8, settings["width"] // 8), text_tokens)
                for latent in sample_latents(flux, embeddings, jobs, on_step=bar.update, **settings):
                    latents.append(latent.cpu())
    except (KeyboardInterrupt, FloatingPointError) as error:
        return latents, error.with_traceback(None)           # a traceback would keep the transformer alive
    return latents, None


def save_pictures(autoencoder: AutoEncoder, latents: list[Tensor], jobs: list[tuple[str, int]],
                  files: list[Path], grid_file: Path | None, fields: dict) -> None:
    """Decodes and saves one picture after the other, and with a grid_file the grid of all."""
    prompts, seeds = (list(dict.fromkeys(parts)) for parts in zip(*jobs))
    grid = None
    for i, (latent, (prompt, seed), file) in enumerate(zip(latents, jobs, files)):
        picture = decode_latent(autoencoder, latent)
        save_png(picture, file, {"prompt": prompt, "seed": seed} | fields)
        print(f"saved {file}")
        if grid_file:
            width, height = picture.size
            grid = grid or Image.new("RGB", (len(seeds) * width, len(prompts) * height))
            grid.paste(picture, (i % len(seeds) * width, i // len(seeds) * height))
    if grid_file:
        save_png(grid, grid_file, {"prompt": "\n".join(prompts), "seed": " ".join(map(str, seeds))} | fields)
        print(f"saved {grid_file}")


def draw(argv: list[str] | None) -> None:
    """From the command line to the files: cheap checks first, then one model after the other."""
    args = parse(argv)
    prompts, seeds = read_prompts(args.words, args.prompts), range(args.seed, args.seed + args.num)
    lora_files = [split_lora(text) for text in args.lora]
    compared = [split_lora(text, "--compare") for text in args.compare]
    if compared:
        plan = plan_comparison(args.out, args.person, compared, prompts, seeds)
        files, grid_file = plan.files, None
    else:
        files, grid_file = plan_files(args.out, len(prompts), seeds)
    device = args.device = pick_device(args.device)
    folder = args.folder = find_model(args.model, args)
    config, dtype = flux_files(folder)[1], pick_dtype(device, folder)
    args.dtype = dtype
    use_threads(device.type == "cpu" and is_small(folder))
    loras = load_loras(lora_files, config)
    rows = [loras, *([*loras, lora] for lora in load_loras(compared, config))]
    if args.negative and args.true_cfg == 1.0:
        note("--negative does nothing without --true-cfg")
    if not config.guidance_embed:
        note("this model has no guidance input: --guidance does nothing")
        if args.true_cfg == 1.0 and "schnell" not in str(folder).lower():
            note(f"if it is a de-distilled one and not schnell, it wants --steps {STEPS} --true-cfg 3.5")

    defaults = model_defaults(folder)
    width, height = (size or defaults["resolution"] for size in (args.width, args.height))
    check_sampling_memory(args, device, (height // 8, width // 8), rows)
    steps = args.steps or (STEPS if config.guidance_embed else SCHNELL_STEPS)
    settings = {"width": width, "height": height, "steps": steps,
                "guidance": defaults["guidance"] if args.guidance is None else args.guidance,
                "true_cfg": args.true_cfg, "negative": args.negative or ""}
    fields = settings | {"model": Path(args.model).name}
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    print(f"{args.model} on {device}, {width} x {height}, {settings['steps']} steps, pictures: {len(files)}")
    start = time.perf_counter()
    negative = [settings["negative"]] if args.true_cfg != 1.0 else []
    embeddings = encode_prompts(folder, prompts + negative, text_device(args, device), dtype)
    latents, stopped = denoise_all(args, rows, embeddings, jobs, **settings)
    free(device)
    if stopped and latents:
        note(f"stopped: saving the finished pictures, {len(latents)} of {len(files)}; Ctrl-C ends at once")
    if latents:
        grid_file = None if stopped else grid_file
        autoencoder = load_autoencoder(folder, device, dtype)
        if compared:
            plan.save_prompts()
        for i, own in enumerate([lora_files, *([*lora_files, each] for each in compared)]):
            place = slice(i * len(jobs), (i + 1) * len(jobs))
            names = ", ".join(f"{Path(path).name}:{strength:g}" for path, strength in own)
            save_pictures(autoencoder, latents[place], jobs, files[place], grid_file,
                          fields | {"loras": names})
    if stopped:
        raise stopped
    if compared:
        print(f"saved {plan.draw()}")
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0
    print(f"{time.perf_counter() - start:.1f} s" + (f", peak GPU memory {memory:.1f} GB" if memory else ""))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C; one line on stderr for each."""
    return run_script("sample.py", draw, argv)


if __name__ == "__main__":
    sys.exit(main())
