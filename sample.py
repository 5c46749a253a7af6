"""Prompt + LoRA -> picture.

    python sample.py --lora out.safetensors "a photo of a person on the beach"
    python sample.py --lora out.safetensors:0.8 --num 4 "a photo of a person" "a watercolour of a person"
    python sample.py "a photo of a person" --compare out-000250.safetensors out.safetensors

The text encoders are gone when the transformer comes; the autoencoder stays beside it where there is room,
so that pictures are saved as they come. Each picture is made alone, from noise drawn on the CPU, so that a
seed means the same on any device and whatever else the run draws. LoRAs ride in spare columns of the frozen
weights (metalora.py).

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
from support.checkpoints import (add_speed_options, check_sampling_memory, encode_prompts, find_model,
                                 flux_files, is_small, load_autoencoder, model_defaults, open_flux,
                                 pick_dtype, text_device)
from support.common import (Interruption, Parser, Stopped, expand, finite_number, free,
                            is_out_of_memory, keep, note, pick_device, positive, read_prompts,
                            run_script, save_png, shorten, side, use_threads)
from support.finding import model_name
from support.lora_files import load_loras, split_lora
from support.memory import fit_sampling, memory_left
from support.photos import picture_fields, plan_files, to_image
from support.sheets import plan_comparison

STEPS, SCHNELL_STEPS = 30, 4        # of Euler; the second of models without a guidance input
FEW = 8                        # pictures that wait for the autoencoder, where it has no room yet
DECODING = 4096                # bytes that must be free for each pixel, for it to stay beside the transformer
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


def decode_if_it_fits(autoencoder: AutoEncoder | None, latent: Tensor) -> Image.Image | None:
    """As decode_latent; None without an autoencoder, or where the device's memory ends."""
    try:
        return decode_latent(autoencoder, latent) if autoencoder else None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


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


def draw_all(args: argparse.Namespace, rows: list[list], embeddings: Embeddings, jobs: list,
             save: Callable[[int, Image.Image], object], **settings) -> None:
    """Draws the jobs with the first set of LoRAs, then with the next; save(number, picture) as they come.

    Where the autoencoder does not fit beside the transformer, FEW at a time are decoded without it. What
    stops it early (a signal, memory, a value not finite) is raised when all that is drawn is saved.
    """
    total, done, beside = len(rows) * len(jobs), 0, True
    size = settings["height"] // 8, settings["width"] // 8
    text_tokens = next(iter(embeddings.values()))[0].shape[1]
    bar = tqdm(total=total * settings["steps"], desc="denoising", unit="step", disable=None)

    def on_step() -> None:
        bar.update()
        interruption.raise_if_asked()

    def latents(flux: Flux) -> Iterator[Tensor]:
        row, start = divmod(done, len(jobs))
        for loras in rows[row:]:
            apply_loras(flux, [(lora, strength) for lora, strength in loras if strength])
            fit_sampling(flux, size, text_tokens)
            yield from sample_latents(flux, embeddings, jobs[start:], on_step=on_step, **settings)
            start = 0

    while done < total:
        flux = open_flux(args, args.device, total * settings["steps"])
        beside = beside and memory_left(args.device) > DECODING * settings["width"] * settings["height"]
        autoencoder = load_autoencoder(args.folder, args.device, args.dtype) if beside else None
        waiting, stopped = [], None
        with Interruption() as interruption:
            try:
                for latent in latents(flux):
                    waiting.append(latent.cpu())
                    picture = decode_if_it_fits(autoencoder, latent)
                    if picture:
                        waiting.clear()
                        done += 1
                        save(done - 1, picture)
                        continue
                    beside, autoencoder = False, None
                    if len(waiting) >= FEW:
                        break
            except (KeyboardInterrupt, FloatingPointError, RuntimeError, OSError) as error:
                stopped = error.with_traceback(None)         # a traceback would keep the transformer alive
            flux = autoencoder = None
            free(args.device)
            if waiting:
                autoencoder = load_autoencoder(args.folder, args.device, args.dtype)
            for latent in waiting:
                done += 1
                try:
                    save(done - 1, decode_latent(autoencoder, latent))
                except OSError as error:
                    stopped = stopped or error
            stopped = stopped or (interruption.asked and Stopped(interruption.asked))
        if stopped:
            bar.close()
            note(f"stopped: {done} of {total} pictures are saved")
            raise stopped
    bar.close()


def draw(argv: list[str] | None) -> None:
    """From the command line to the files: cheap checks first, then one model after the other."""
    args = parse(argv)
    prompts, seeds = read_prompts(args.words, args.prompts), range(args.seed, args.seed + args.num)
    lora_files = [split_lora(text) for text in args.lora]
    compared = [split_lora(text, "--compare") for text in expand(args.compare)]
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
    sets = [lora_files, *([*lora_files, each] for each in compared)]
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    grid = Image.new("RGB", (len(seeds) * width, len(prompts) * height)) if grid_file else None

    def fields(number: int) -> dict[str, object]:
        return picture_fields(*jobs[number % len(jobs)], settings, Path(args.model).name,
                              sets[number // len(jobs)])

    def save(number: int, picture: Image.Image) -> None:
        keep(files[number], lambda path: save_png(picture, path, fields(number)))
        tqdm.write(f"saved {files[number]}")
        if grid:
            grid.paste(picture, (number % len(seeds) * width, number // len(seeds) * height))

    print(f"{args.model} on {device}, {width} x {height}, {settings['steps']} steps, pictures: {len(files)}")
    start = time.perf_counter()
    negative = [settings["negative"]] if args.true_cfg != 1.0 else []
    embeddings = encode_prompts(folder, prompts + negative, text_device(args, device), dtype)
    if compared:
        plan.save_prompts()
    draw_all(args, rows, embeddings, jobs, save, **settings)
    if grid:
        texts = {"prompt_text": "\n".join(prompts), "seed": " ".join(map(str, seeds))}
        keep(grid_file, lambda path: save_png(grid, path, fields(0) | texts))
        print(f"saved {grid_file}")
    if compared:
        print(f"saved {plan.draw()}")
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0
    print(f"{time.perf_counter() - start:.1f} s" + (f", peak GPU memory {memory:.1f} GB" if memory else ""))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130, 143 or 129 by a signal."""
    return run_script("sample.py", draw, argv)


if __name__ == "__main__":
    sys.exit(main())
