"""Stage 2: one photo in, a LoRA of the person out.

    python personalize.py face.jpg                # FLUX.1-dev, lomd.safetensors -> out.safetensors
    python personalize.py face.jpg --model baby   # the same on a laptop
    python personalize.py face.jpg --method lora  # the paper's baseline; needs no LoMD

Sources: Meta-LoRA, "Stage-2: Test-time ID Personalization" (crops, flips, what is trained, and for
how long); ai-toolkit, the paper's trainer (times, loss, guidance input 1.0, a new sample of the
posterior each time).

Deviations: sides are multiples of 16 pixels instead of 64, which keeps aspect ratios closer. A crop
is used at one resolution unless --resolution names more. Small crops are enlarged, see
photos.to_sizes. An iteration is one optimizer step, as in the paper's tables; its Algorithm 2, read
literally, would count epochs.
"""
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import support  # before torch: sets how its threads wait
import torch
from torch import Tensor
from tqdm import tqdm

from flux_model import AutoEncoder, Flux, flow_matching_loss, sample_times
from metalora import MetaLoRA
from support import photos
from support.checkpoints import (add_speed_options, check_training_memory, encode_prompts,
                                 load_autoencoder, open_flux)
from support.common import (Interruption, Parser, count, free, keep, note, peak_memory, positive,
                            positive_number, progress, reserved, resolution, run_script,
                            to_device)
from support.lora_files import FORMATS, read_lomd, save_lora
from support.memory import blocks_of, fit_training
from support.stage_2 import check_stage_2, lora_size, metadata, numbered, print_next_commands

# the paper's; a model's defaults.json may have others
ITERATIONS = {"meta-lora": 375, "lora": 625}


# --------------------------------------------------------------------------------------------------
# The method: crops, latents, training


@torch.no_grad()
def encode_crops(
    autoencoder: AutoEncoder,
    crops: list[photos.Crop],
    background: float = 1.0,
    mirror: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Crops -> for each its latents (K, 2, 16, h, w), h = H / 8, and loss weights (K, 1, h, w).

    The K views are the crop and, with `mirror`, its mirror image, which is encoded too: a flipped
    latent is not the latent of a flipped picture. Whole photos, in which no head was looked for,
    have one view, and weights (1, 1, 1, 1). A latent is a mean and a standard deviation.
    `background`: weight of the loss outside the head.
    """
    device = next(autoencoder.parameters()).device
    latents = []
    weights = []
    for crop in crops:
        pixels = photos.to_tensor(crop.picture).to(device)[None]                      # (1, 3, H, W)
        weight = photos.head_weights(crop, background)[None]                          # (1, 1, h, w)
        if mirror and crop.head:
            pixels = torch.cat((pixels, pixels.flip(-1)))
            weight = torch.cat((weight, weight.flip(-1)))
        latents.append(autoencoder.posterior(pixels))
        weights.append(weight)
    return latents, weights


def batches(
    latents: list[Tensor],
    weights: list[Tensor],
    seed: int,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Endless batches: index of a crop, latent (1, 16, h, w), noise, weight (1, 1, h, w), t (1,).

    Each epoch shows every crop once, in random order. All draws come from one CPU generator, so a
    seed gives the same batches on any device.
    """
    generator = torch.Generator().manual_seed(seed)
    device = latents[0].device
    while True:
        order = torch.randperm(len(latents), generator=generator)
        for crop in order.tolist():
            # the crop or its mirror image
            views = len(latents[crop])
            view = torch.randint(views, (), generator=generator).item()
            mean, std = latents[crop][view].split(1)                                 # (1, 16, h, w)
            weight = weights[crop][view][None]                       # (1, 1, h, w) or (1, 1, 1, 1)

            # a new sample of the autoencoder's posterior each time, as in the paper's trainer
            epsilon = torch.randn(mean.shape, generator=generator)
            latent = mean + std * to_device(epsilon, device)

            # flow matching goes from this noise at t = 1 to the latent at t = 0
            noise = torch.randn(mean.shape, generator=generator)
            t = sample_times(1, generator)
            noise, weight, t = (to_device(tensor, device) for tensor in (noise, weight, t))
            yield crop, latent, noise, weight, t


def train(
    flux: Flux,
    adapter: MetaLoRA,
    latents: list[Tensor],
    weights: list[Tensor],
    txt: Sequence[Tensor],
    y: Sequence[Tensor],
    iters: int,
    lr: float,
    seed: int = 0,
    on_step: Callable[[int, float], object] | None = None,
):
    """Algorithm 2: `iters` steps of flow matching on one person's crops; flux itself stays frozen.

    flux: with `adapter` in it. latents, weights: from `encode_crops`. txt, y: a (T, context_in_dim)
    and a (vec_in_dim,) for each crop, or a single one for all. lr is constant, so a longer run
    starts out as a shorter one. on_step(iteration, loss) is called after each step. ValueError for
    any other number of captions; FloatingPointError(message, index of the crop) if it diverges.
    """
    crops = len(latents)
    if len(txt) != len(y) or len(txt) not in (1, crops):
        raise ValueError(f"txt holds {len(txt)} captions and y {len(y)}, for {crops} crops: "
                         "give each one caption for all crops, or one per crop")
    person = torch.tensor([0])                   # the bank's only row
    stream = batches(latents, weights, seed)
    for iteration in range(1, iters + 1):
        crop, latent, noise, weight, t = next(stream)
        caption = 0 if len(txt) == 1 else crop
        adapter.assign(person)
        loss = flow_matching_loss(
            flux,
            latent,
            noise,
            t,
            txt[caption][None],
            y[caption][None],
            guidance=1.0,
            weight=weight,
        ).sum()
        loss.backward()
        try:
            adapter.step(lr)
        except FloatingPointError:
            message = f"the loss or its gradient is not finite at iteration {iteration}"
            raise FloatingPointError(message, crop) from None
        if on_step:
            on_step(iteration, loss.item())


# --------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(
        prog="personalize.py",
        usage="personalize.py photo [photo ...] [options]",
        description="Turn one or more photos of a person into a LoRA.",
    )
    add = parser.add_argument
    add("photos", nargs="+", metavar="photo", help="photos of one person, or a folder of them")
    add("--out", type=Path, default="out.safetensors",
        help="file to write (default: out.safetensors)")
    add("--format", choices=FORMATS, default="diffusers",
        help="layout of the LoRA file. diffusers (default): most programs read it; kohya: "
        "sd-scripts too; original: ComfyUI, Forge and InvokeAI, but not diffusers (docs/LORAS.md)")
    add("--method", choices=ITERATIONS, default="meta-lora",
        help="meta-lora (default), or lora, the paper's baseline")
    add("--lomd", help="LoMD from stage 1 (default: lomd.safetensors in the model's folder, "
        "then in this one)")
    add("--rank", type=positive, default=1, help="rank of the LoRA (default: 1)")
    add("--iters", type=positive,
        help="training steps (default: the model's. FLUX.1: 375, with --method lora 625; "
        "baby: 250)")
    add("--lr", type=positive_number,
        help="learning rate (default: the model's. FLUX.1: 4e-4; baby: 2.4e-3)")
    add("--resolution", type=resolution, nargs="+", action="extend", metavar="PIXELS",
        help="train at the area of a square with this side; with several, use every crop at each "
        "(default: the model's. FLUX.1: 1024; baby: 128)")
    add("--prompt", help="caption of photos without one beside them, as a.txt is beside a.jpg "
        "(default: the model's. FLUX.1 and baby: a photo of a person)")
    add("--no-augment", action="store_true",
        help="train on the whole photo instead of crops and mirror images")
    add("--box", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"),
        help="where the subject is, in pixels, if it is not a face (default: the largest face)")
    add("--seed", type=count, default=0,
        help="seed of every random draw; repeats to the bit on the same CPU (default: 0)")
    add("--save-at", type=positive, nargs="+", action="extend", default=[], metavar="N",
        help="also save the LoRA after N steps, as out-00000N.safetensors")
    add("--save-crops", type=Path, metavar="DIR", help="save the training pictures as PNG files")
    add_speed_options(add, training=True)
    return parser.parse_intermixed_args(argv)


def prepare(args: Namespace) -> tuple:
    """Photos -> flux, its adapter, the crops, their data for `train`, and the LoMD's hash.

    Text encoders, autoencoder and transformer are loaded one after another, and the first two are
    dropped, so that peak memory is the largest of the three and not their sum.
    """
    crops = photos.load_crops(
        args.photos,
        args.resolution,
        augment=not args.no_augment,
        aspects=args.aspects,
        scales=args.scales,
        box=args.box,
    )
    if args.save_crops:
        photos.save_crops(crops, args.save_crops)

    lomd = None
    lomd_name = "none"
    r1 = 0
    if args.method == "meta-lora":
        lomd, lomd_name = read_lomd(args.folder, args.lomd)
        r1 = len(next(iter(lomd.values())))
        if args.rank > r1:
            note(f"this LoMD has {r1} rows: --rank {args.rank} can do no more than {r1}")

    width, height = max((crop.picture.size for crop in crops), key=math.prod)
    largest = height // 8, width // 8
    check_training_memory(args, largest, args.rank, r1)

    texts = encode_prompts(args.folder, [*args.captions.values()], args.text_device, args.dtype,
                           home=args.device)
    # crops share the tensors of their caption: T5's output for one is 4 MB
    captions = [texts[args.captions[crop.photo]] for crop in crops]
    txt = [states[0] for states, _ in captions]
    y = [pooled[0] for _, pooled in captions]

    autoencoder = load_autoencoder(args.folder, args.device, args.dtype)
    bar = progress(crops, "encoding")
    latents, weights = encode_crops(autoencoder, bar, args.background, args.mirror)
    del autoencoder
    free(args.device)

    flux = open_flux(args, args.iters)
    adapter = MetaLoRA(flux, args.rank, lomd, seed=args.seed)
    blocks = fit_training(adapter, largest, len(txt[0]), args.recompute)
    if blocks:
        print(f"gradient checkpointing in {blocks} of {len(blocks_of(flux))} blocks")
    return flux, adapter, crops, (latents, weights, txt, y), lomd_name


def personalize(argv: list[str] | None):
    args = parse(argv)
    check_stage_2(args, ITERATIONS)
    start = time.perf_counter()
    flux, adapter, crops, data, lomd = prepare(args)
    smooth = math.nan                            # running mean of the loss

    def save(path: Path):
        done = adapter.bank.steps.item()
        save_lora(path, adapter.collapse(), args.format, metadata(args, done, lomd))

    def on_step(iteration: int, loss: float):
        nonlocal smooth
        smooth = loss if iteration == 1 else 0.95 * smooth + 0.05 * loss
        bar.set_postfix_str(f"loss {smooth:.4f}{peak_memory(args.device)}", refresh=False)
        bar.update()
        if iteration in args.save_at:
            try:
                keep(numbered(args.out, iteration), save)
            except OSError as error:
                note(error)
        if iteration < args.iters:
            interruption.raise_if_asked()

    with Interruption() as interruption:
        try:
            with (
                reserved(args.outputs, lora_size(adapter, args.format)),
                tqdm(total=args.iters, desc="training", disable=None) as bar,
            ):
                train(flux, adapter, *data, args.iters, args.lr, args.seed, on_step)
                keep(args.out, save)
        except (KeyboardInterrupt, RuntimeError, FloatingPointError) as error:
            done = adapter.bank.steps.item()
            if done:
                kept = numbered(args.out.with_stem(f"{args.out.stem}-interrupted"), done)
                keep(kept, save)
                note(f"the LoRA after {done} iterations is in {kept}")
            if isinstance(error, FloatingPointError):
                message, index = error.args
                crop = crops[index]
                raise FloatingPointError(f"{message}, on {crop.photo} {crop.box}; try a --lr below "
                                         f"{args.lr:g}") from None
            raise
        interruption.raise_if_asked()
    size = args.out.stat().st_size / 1e3
    seconds = time.perf_counter() - start
    print(f"{args.out}: rank {args.rank}, {size:.0f} kB, {len(crops)} pictures, {args.iters} "
          f"iterations, loss {smooth:.4f}, {seconds:.1f} s{peak_memory(args.device)}")
    print_next_commands(args)


# Exit code: 0 done, 1 diverged or out of memory, 2 bad input, 130, 143 or 129 by a signal.
main = partial(run_script, "personalize.py", personalize)

if __name__ == "__main__":
    sys.exit(main())
