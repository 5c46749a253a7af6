"""Prompt + LoRA -> picture.

    python sample.py --lora out.safetensors "a photo of a person on the beach"
    python sample.py --lora out.safetensors:0.8 --num 4 "a photo of a person" "a watercolor"
    python sample.py "a photo of a person" --compare out-000250.safetensors out.safetensors

The text encoders are freed before the transformer is loaded. The autoencoder stays beside it where
memory allows, so that each picture is saved as soon as it is sampled; else the two take turns,
eight pictures at a time. Pictures are sampled one at a time, from noise drawn on the CPU: a seed
gives the same noise on any device, so the same picture up to rounding, whatever else is sampled.
LoRAs are applied in spare columns or rows of the frozen weights (metalora.py).

Source: the defaults are Meta-LoRA's evaluation settings (30 steps, guidance 3.5, true CFG 1,
strength 1). A model's defaults.json may name another size and guidance.
"""
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import support  # before torch: sets how its threads wait
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux_model import AutoEncoder, Flux, FluxConfig, denoise, get_noise
from metalora import apply_loras
from support.checkpoints import (add_speed_options, check_sampling_memory, choose_model,
                                 encode_prompts, flux_files, load_autoencoder, model_defaults,
                                 open_flux)
from support.common import (Interruption, Parser, batched, count, expand, finite_number, free, keep,
                            note, peak_memory, pick_device, positive, read_prompts, run_script,
                            save_png, shorten, side, suppress_out_of_memory, use_threads,
                            write_whole)
from support.lora_files import load_loras, split_lora
from support.memory import fit_sampling, memory_left
from support.photos import picture_fields, plan_files, to_image
from support.sheets import PROMPTS, draw_comparison, plan_comparison, tile

STEPS = 30                     # of the Euler sampler
SCHNELL_STEPS = 4              # for models without a guidance input
DECODING = 4096                # bytes per pixel that must be free to keep the autoencoder loaded
FEW = 8                        # latents to collect before decoding where it is not kept


def sample_latents(
    flux: Flux,
    embeddings: dict,
    jobs: list[tuple[str, int]],
    width: int,
    height: int,
    steps: int,
    guidance: float,
    negative: str | None = None,
    true_cfg: float = 1.0,
    on_step: Callable[[], object] | None = None,
    batch_size: int = 1,
) -> Iterator[Tensor]:
    """Yields the latent (1, 16, height / 8, width / 8), fp32, of each (prompt, seed) in jobs.

    embeddings: from encode_prompts; with `negative` unless true_cfg is 1. width, height: pixels,
    multiples of 16. A larger batch gives the same up to rounding, and only helps with small models.
    FloatingPointError names the first picture that is not finite.
    """
    device = flux.img_in.weight.device

    def embed(prompts: list[str]) -> tuple[Tensor, Tensor]:
        txt, y = zip(*(embeddings[prompt] for prompt in prompts))
        return torch.cat(txt).to(device), torch.cat(y).to(device)             # (B, T, _), (B, _)

    for batch in batched(jobs, batch_size):
        noise = torch.cat([get_noise(height, width, seed) for _, seed in batch])
        txt, y = embed([prompt for prompt, _ in batch])
        neg_txt = neg_y = None
        if true_cfg != 1.0:
            neg_txt, neg_y = embed([negative] * len(batch))
        latents = denoise(
            flux,
            noise.to(device),
            txt,
            y,
            steps,
            guidance,
            neg_txt,
            neg_y,
            true_cfg,
            on_step,
        )
        for (prompt, seed), latent in zip(batch, latents):
            if not latent.isfinite().all():
                raise FloatingPointError(f"seed {seed} of {shorten(prompt)} gave values that are "
                                         "not finite; a LoRA or --true-cfg may be too strong")
            yield latent[None]


@torch.no_grad()
def decode_latent(autoencoder: AutoEncoder, latent: Tensor) -> Image.Image:
    """Latent (1, 16, h, w) -> picture of 8 w x 8 h pixels. FloatingPointError if not finite."""
    device = autoencoder.decoder.conv_in.weight.device
    pixels = autoencoder.decode(latent.to(device))                                # (1, 3, 8 h, 8 w)
    return to_image(pixels[0])


def sample_rows(
    args: Namespace,
    rows: list[list],
    embeddings: dict,
    jobs: list[tuple[str, int]],
    on_step: Callable[[], object],
    start: int,
    **settings,
) -> Iterator[tuple[Tensor, Image.Image | None]]:
    """Samples all jobs with each set of LoRAs in `rows`, less the first `start` -> each latent, and
    its picture unless the autoencoder does not fit beside the transformer."""
    size = settings["height"] // 8, settings["width"] // 8
    text_tokens = embeddings[jobs[0][0]][0].shape[1]
    flux = open_flux(args, len(rows) * len(jobs) * settings["steps"])
    autoencoder = None
    if memory_left(args.device) > DECODING * settings["height"] * settings["width"]:
        autoencoder = load_autoencoder(args.folder, args.device, args.dtype)
    for i, loras in enumerate(rows):
        left = jobs[max(0, start - i * len(jobs)):]
        if not left:
            continue
        apply_loras(flux, [(lora, strength) for lora, strength in loras if strength])
        fit_sampling(flux, size, text_tokens, settings.get("batch_size", 1))
        for latent in sample_latents(flux, embeddings, left, on_step=on_step, **settings):
            picture = None
            if autoencoder:
                with suppress_out_of_memory():
                    picture = decode_latent(autoencoder, latent)
            yield latent.cpu(), picture


# --------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(
        prog="sample.py",
        usage="sample.py prompt [prompt ...] [options]",
        description="Generate pictures from prompts, with any number of LoRAs.",
        epilog="Several prompts or seeds: every combination is saved in a folder, as "
        "<number of the prompt, from 0>_<seed>.png, together with grid.png",
    )
    add = parser.add_argument
    add("words", metavar="prompt", nargs="*", help="what to generate")
    add("--prompts", metavar="FILE", type=Path,
        help="text file with one prompt per line; # starts a comment")
    add("--lora", metavar="FILE[:STRENGTH]", action="append", default=[],
        help="LoRA file in any common format (default strength: 1); may be repeated")
    add("--compare", metavar="FILE[:STRENGTH]", nargs="+", action="extend", default=[],
        help="sample every prompt without these LoRAs and with each of them; prompts come first. "
        "Writes a sheet with one row per LoRA, and a folder for eval_rfacesim.py --images")
    add("--person", default="person", metavar="NAME",
        help="with --compare: name of the person's folder, as in eval_rfacesim.py --data "
        "(default: person)")
    add("--steps", type=positive, help=f"Euler steps (default: {STEPS}; schnell: {SCHNELL_STEPS})")
    add("--guidance", type=finite_number,
        help="guidance input of dev models (default: the model's. FLUX.1: 3.5; baby: 2.75)")
    add("--width", type=side,
        help="pixels, a multiple of 16 (default: the model's. FLUX.1: 1024; baby: 128)")
    add("--height", type=side, help="same as --width")
    add("--seed", type=count, default=0, help="seed of the initial noise (default: 0)")
    add("--num", type=positive, default=1,
        help="number of seeds, counting up from --seed (default: 1)")
    add("--negative", metavar="PROMPT", help="what to steer away from; needs --true-cfg")
    add("--true-cfg", type=finite_number, default=1.0,
        help="how far to steer away from the negative or empty prompt; doubles the time "
        "(default: 1, off)")
    add("--out", type=Path,
        help="PNG file for one picture, folder for several (default: out.png; samples/; compare/). "
        "Replaces files with the same name. PNG text fields hold all settings")
    add_speed_options(add, training=False)
    args = parser.parse_intermixed_args(argv)
    if args.person != "person" and not args.compare:
        raise ValueError(f"--person {args.person} does nothing without --compare")
    return args


def draw_all(
    args: Namespace,
    rows: list[list],
    embeddings: dict,
    jobs: list[tuple[str, int]],
    save: Callable[[int, Image.Image], object],
    **settings,
):
    """Calls save(number, picture) for all jobs with each set of LoRAs in `rows`.

    Whatever stops the run early (a signal, a lack of memory, a value that is not finite) is raised
    once every finished picture is saved."""
    total = len(rows) * len(jobs)
    done = 0
    stopped = None
    with (
        Interruption() as interruption,
        tqdm(total=total * settings["steps"], desc="denoising", unit="step", disable=None) as bar,
    ):
        def on_step():
            bar.update()
            interruption.raise_if_asked()

        while done < total and not stopped:
            waiting = {}                         # {number: latent without a picture yet}
            autoencoder = None
            sampled = sample_rows(args, rows, embeddings, jobs, on_step, done, **settings)
            try:
                for latent, picture in sampled:
                    if picture:
                        save(done, picture)
                    else:
                        waiting[done] = latent
                    done += 1
                    if len(waiting) == FEW:
                        break
            except (KeyboardInterrupt, FloatingPointError, RuntimeError, OSError) as error:
                # a traceback would keep the transformer alive
                stopped = error.with_traceback(None)
            sampled.close()
            free(args.device)
            if waiting:
                autoencoder = load_autoencoder(args.folder, args.device, args.dtype)
            for number, latent in waiting.items():
                try:
                    save(number, decode_latent(autoencoder, latent))
                except (OSError, RuntimeError, FloatingPointError) as error:
                    stopped = error
                    done -= 1
        if interruption.asked:
            stopped = stopped or KeyboardInterrupt(interruption.asked)
    if stopped:
        note(f"stopped: {done} of {total} pictures are saved")
        raise stopped


def sampling_settings(args: Namespace, config: FluxConfig) -> dict[str, object]:
    """What `sample_latents` takes beside the jobs; names on stderr what has no effect."""
    if args.negative and args.true_cfg == 1.0:
        note("--negative does nothing without --true-cfg")
    if not config.guidance_embed:
        if args.guidance is not None:
            note("--guidance does nothing: this model has no guidance input")
        if args.true_cfg == 1.0 and "schnell" not in str(args.folder).lower():
            note("this model has no guidance input: if it is a de-distilled one and not schnell, "
                 f"it wants --steps {STEPS} --true-cfg 3.5")

    defaults = model_defaults(args.folder)
    return {
        "width": args.width or defaults["resolution"],
        "height": args.height or defaults["resolution"],
        "steps": args.steps or (STEPS if config.guidance_embed else SCHNELL_STEPS),
        "guidance": defaults["guidance"] if args.guidance is None else args.guidance,
        "true_cfg": args.true_cfg,
        "negative": args.negative or "",
    }


def draw(argv: list[str] | None):
    """From the command line to the files: cheap checks first, then one model after the other."""
    args = parse(argv)
    prompts = read_prompts(args.words, args.prompts)
    seeds = range(args.seed, args.seed + args.num)
    named = [split_lora(text) for text in args.lora]
    compared = [split_lora(text, "--compare") for text in expand(args.compare)]
    if compared:
        out = args.out or Path("compare")
        base = "none of these" if named else "no LoRA"
        files = plan_comparison(out, args.person, compared, prompts, seeds, base)
    else:
        files = plan_files(args.out, len(prompts), seeds)
    device = args.device = pick_device(args.device)
    choose_model(args)
    use_threads(args.dtype)
    _, config = flux_files(args.folder)
    settings = sampling_settings(args, config)
    width = settings["width"]
    height = settings["height"]
    lora_files = [named, *([*named, lora] for lora in compared)]
    loras = load_loras(named, config)
    rows = [loras, *([*loras, lora] for lora in load_loras(compared, config))]
    check_sampling_memory(args, (height // 8, width // 8), rows)
    jobs = list(product(prompts, seeds))

    def fields(number: int) -> dict[str, object]:
        row, job = divmod(number, len(jobs))
        return picture_fields(*jobs[job], settings, Path(args.model).name, lora_files[row])

    def save(number: int, picture: Image.Image):
        keep(files[number], lambda path: save_png(picture, path, fields(number)))
        tqdm.write(f"saved {files[number]}")

    print(f"{args.model} on {device}, {width} x {height}, {settings['steps']} steps, "
          f"pictures: {len(files)}")
    start = time.perf_counter()
    negative = [settings["negative"]] if args.true_cfg != 1.0 else []
    embeddings = encode_prompts(args.folder, prompts + negative, args.text_device, args.dtype)
    if compared:
        # before the pictures: eval_rfacesim.py must not score them by other prompts
        write_whole(out / PROMPTS, "\n".join([*prompts, ""]))
    draw_all(args, rows, embeddings, jobs, save, **settings)
    if compared:
        print(f"saved {draw_comparison(out, files, prompts, seeds)}")
    elif len(files) > 1:
        grid_file = files[0].with_name("grid.png")
        texts = {"prompt_text": "\n".join(prompts), "seed": " ".join(map(str, seeds))}
        grid = tile(files, len(seeds))
        keep(grid_file, lambda path: save_png(grid, path, fields(0) | texts))
        print(f"saved {grid_file}")
    print(f"{time.perf_counter() - start:.1f} s{peak_memory(device)}")


# Exit code: 0 done, 1 failed while computing, 2 bad input, 130, 143 or 129 by a signal.
main = partial(run_script, "sample.py", draw)

if __name__ == "__main__":
    sys.exit(main())
