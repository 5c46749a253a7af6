"""Stage 2: one photo in, a LoRA of the person out.

    python personalize.py face.jpg                  # FLUX.1-dev and its lomd.safetensors -> out.safetensors
    python personalize.py face.jpg --model baby     # the same on a laptop
    python personalize.py face.jpg --method lora    # the paper's baseline; needs no LoMD

Sources: Meta-LoRA, "Stage-2: Test-time ID Personalization" (crops, flips, what is trained and how long);
ai-toolkit, the paper's trainer (times, loss, guidance input 1.0, a latent drawn anew from the posterior).
Deviations: sides are multiples of 16 pixels and not of 64, which keeps aspect ratios closer; a crop is seen
at one resolution unless --resolution names more; small crops are enlarged, see photos.to_sizes. An iteration
is one step of the optimiser, as in the paper's tables; its Algorithm 2, read literally, would count epochs.
"""
import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import support  # before torch: how its threads wait
import torch
from torch import Tensor
from tqdm import tqdm

from flux_model import AutoEncoder, Flux, flow_matching_loss, sample_times
from metalora import MetaLoRA
from support import photos
from support.checkpoints import (add_speed_options, check_training_memory, encode_texts, is_small,
                                 load_autoencoder, open_flux, speed_words, take_model)
from support.common import (Interruption, Parser, check_out_file, check_out_folder, check_training, free,
                            is_out_of_memory, keep, note, pick_device, positive, reserved, run_script,
                            to_device, use_threads)
from support.finding import HUB, home_of, model_name, model_words
from support.lora_files import find_lomd, lora_bytes, read_lomd, save_lora, tell_replaced
from support.memory import blocks_of, fit_training, is_compiled, seconds_compiling
from support.people import captions_beside, named_photos

ITERATIONS = {"meta-lora": 375, "lora": 625}     # the paper's


# ------------------------------------------------------------------------------------------------------------
# The method: crops, latents, training


class NotFinite(FloatingPointError):
    """Training diverged at `iteration`, on the crop of this index."""
    def __init__(self, iteration: int, crop: int):
        super().__init__(f"the loss or its gradient is not finite at iteration {iteration}")
        self.iteration, self.crop = iteration, crop


@torch.no_grad()
def encode_crops(autoencoder: AutoEncoder, crops: list[photos.Crop], background: float = 1.0,
                 mirror: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Of each crop latents (K, 2, 16, H / 8, W / 8), fp32, and weights of the loss, as `train` takes them.

    The K latents, as mean and standard deviation, are those of the crop and, with `mirror`, of its mirror
    image: encoded, since a flipped latent is not the latent of a flipped picture. Whole photos, whose heads
    nobody looked for, have none.
    """
    device, latents, weights = next(autoencoder.parameters()).device, [], []
    for crop in crops:
        pixels, own = photos.to_tensor(crop.picture).to(device), photos.head_weights(crop, background)
        both = mirror and crop.head
        latents.append(autoencoder.posterior(torch.stack([pixels, pixels.flip(-1)] if both else [pixels])))
        weights.append(torch.stack([own, own.flip(-1)] if both else [own]))
    return latents, weights


def batches(latents: list[Tensor], weights: list[Tensor],
            seed: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Endless batches of one person: which crop, latent (1, 16, h, w), noise, weight (1, 1, h, w), t (1,).

    Every crop comes once before any comes again; a coin decides about the mirror image, and the latent is
    drawn anew from the posterior, as the paper's trainer does. One CPU generator draws all.
    """
    generator, device = torch.Generator().manual_seed(seed), latents[0].device
    while True:
        for crop in torch.randperm(len(latents), generator=generator).tolist():
            image = torch.randint(len(latents[crop]), (), generator=generator).item()
            mean, deviation = latents[crop][image][:, None]                                    # (1, 16, h, w)
            draws = [torch.randn(mean.shape, generator=generator) for _ in range(2)]
            draws += weights[crop][image][None], sample_times(1, generator)
            own, noise, weight, t = (to_device(draw, device) for draw in draws)
            yield crop, mean + deviation * own, noise, weight, t


def train(flux: Flux, adapter: MetaLoRA, latents: list[Tensor], weights: list[Tensor],
          txt: Sequence[Tensor], y: Sequence[Tensor], iters: int, lr: float, seed: int = 0,
          on_step: Callable[[int, float], object] | None = None):
    """Algorithm 2: `iters` steps of flow matching on one person's crops; the base stays as it is.

    flux with `adapter` in it; latents and weights of `encode_crops`; captions of the K crops, or one of all,
    K times txt (T, _) and y (_). lr is constant, so a longer run begins as a shorter one. on_step(iteration,
    loss) comes after each. Raises NotFinite.
    """
    for iteration, batch in zip(range(1, iters + 1), batches(latents, weights, seed)):
        crop, latent, noise, weight, t = batch
        adapter.assign(torch.tensor([0]))
        text = (part[crop % len(part)][None] for part in (txt, y))
        loss = flow_matching_loss(flux, latent, noise, t, *text, guidance=1.0, weight=weight).sum()
        loss.backward()
        try:
            adapter.step(lr)
        except FloatingPointError:
            raise NotFinite(iteration, crop) from None
        if on_step:
            on_step(iteration, loss.item())


# ------------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="personalize.py", usage="personalize.py photo [photo ...] [options]",
                    description="Turns one photo of a person, or a few, into a LoRA.", allow_abbrev=False)
    add = parser.add_argument
    add("photos", nargs="+", metavar="photo", help="photos of one person, or a folder of them")
    add("--model", type=model_name, default="flux-dev",
        help="flux-dev (default), flux-schnell, baby, a folder or a file")
    add("--out", type=Path, default=Path("out.safetensors"), help="file to write (default: out.safetensors)")
    add("--format", choices=("diffusers", "kohya", "original"), default="diffusers", help="read by "
        "most programs | most, and sd-scripts | ComfyUI, Forge, InvokeAI, not diffusers (docs/LORAS.md)")
    add("--method", choices=tuple(ITERATIONS), default="meta-lora", help="lora is the paper's baseline")
    add("--lomd", help="weights of stage 1 (default: lomd.safetensors of the model's folder, else here)")
    add("--rank", type=positive, default=1, help="rank of the LoRA (default: 1)")
    add("--iters", type=positive, help="steps of training (default: 375, with --method lora 625)")
    add("--lr", type=float, help="learning rate (default: the model's; 4e-4 for FLUX.1)")
    add("--resolution", type=positive, nargs="+", metavar="PIXELS", help="train at the area of a square of "
        "this side; several: every crop at each (default: the model's; 1024 for FLUX.1)")
    add("--prompt", help="what a photo without a caption beside it (a.txt) is called (default: the model's)")
    add("--no-augment", action="store_true", help="the whole photo instead of crops and mirror images")
    add("--box", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="the subject, if it is no face")
    add("--seed", type=int, default=0, help="one CPU and one seed: the same weights to the bit (default: 0)")
    add("--save-at", type=positive, nargs="+", default=[], metavar="N",
        help="also write out-00000N.safetensors after N steps, and so on")
    add("--save-crops", type=Path, metavar="DIR", help="write the pictures that are trained on, as PNG")
    add_speed_options(add, training=True)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    return parser.parse_intermixed_args(argv)


def check(args: argparse.Namespace) -> None:
    """ValueError for what can be refused before anything large is read; fills in the model's defaults."""
    args.iters = args.iters or ITERATIONS[args.method]
    for path in (args.out, *(numbered(args.out, iteration) for iteration in args.save_at)):
        check_out_file(path, ".safetensors")
    if args.save_crops:
        check_out_folder(args.save_crops, "--save-crops")
    if max(args.save_at, default=0) > args.iters:
        raise ValueError(f"--save-at {max(args.save_at)} is beyond the last of {args.iters} iterations")
    check_training(args)
    if args.lomd and args.method == "lora":
        raise ValueError("--method lora trains its own A and takes no --lomd")
    if args.method == "meta-lora" and (args.lomd or args.model in HUB):      # before a download of the model
        find_lomd(home_of(args.model), args.lomd)
    if args.lomd and args.out.exists() and args.out.samefile(args.lomd):
        raise ValueError(f"--out would overwrite the LoMD {args.lomd}")
    args.photos = named_photos(args.photos)
    pictures = photos.without_masks([Path(path) for path in args.photos])
    for mask in sorted({*map(Path, args.photos)} - {*pictures}):
        note(f"{mask} is the mask of another photo, and is not used")
    args.photos = [str(path) for path in pictures]
    photos.check_photos(args.photos, args.box, not args.no_augment)
    args.seen = photos.fingerprints(args.photos)     # now: a photo may be gone when the LoRA is saved
    tell_replaced(args.out, args.seen["photo_digests"])
    args.switches = speed_words(args)
    args.device = pick_device(args.device)
    take_model(args, args.device, args.method)
    use_threads(args.device.type == "cpu" and is_small(args.folder))
    args.captions = captions_beside(args.photos, args.prompt, tell=True)
    args.mirror = args.mirror and not args.no_augment


def numbered(out: Path, iteration: int) -> Path:
    """Where the LoRA of an earlier iteration goes."""
    return out.with_name(f"{out.stem}-{iteration:06d}.safetensors")


def metadata(args: argparse.Namespace, done: int, lomd: str) -> dict[str, str]:
    """What the LoRA's file says of how it was made."""
    words = lambda values: " ".join(map(str, values))
    own = ["method", "rank", "seed", "prompt", "background", "mirror"] + ["box"] * bool(args.box)
    facts = {name: getattr(args, name) for name in own}
    facts |= {"iterations": done, "learning_rate": f"{args.lr:g}", "resolution": words(args.resolution),
              "augment": not args.no_augment,
              "aspects": words(args.aspects or photos.ASPECTS),
              "scales": words(args.scales or photos.FACE_SCALES),
              "captions": " | ".join(dict.fromkeys(args.captions.values())),
              "model": Path(args.model).name, "lomd": lomd, "made_by": "personalize.py"} | args.seen
    return {name: str(fact).lower() if isinstance(fact, bool) else str(fact) for name, fact in facts.items()}


def prepare(args: argparse.Namespace, lap: Callable[[str], None]) -> tuple:
    """Crops, caption and latents, the adapted transformer -> all that training takes, and the LoMD's hash.

    Three models come and go in turn, so that the peak of memory is the largest of them and not the sum.
    """
    lomd, lomd_name, untrained, r1 = None, "none", False, 0
    if args.method == "meta-lora":
        lomd, lomd_name, untrained = read_lomd(args.folder, args.lomd)
        r1 = len(next(iter(lomd.values())))
        if args.rank > r1:
            note(f"over a LoMD of {r1} rows --rank {args.rank} can do no more than {r1}")
    crops = photos.load_crops(args.photos, args.resolution, not args.no_augment, args.aspects, args.scales,
                              args.box)
    if args.save_crops:
        photos.save_crops(crops, args.save_crops)
    if untrained:
        lomd_name = f"random, {lomd_name}"
        note("this LoMD is random and was never trained")
    width, height = max((crop.picture.size for crop in crops), key=math.prod)
    largest = height // 8, width // 8
    check_training_memory(args, args.device, largest, args.rank, r1)
    lap("photos")
    texts = encode_texts(args, [*args.captions.values()])
    # a crop refers to its caption's text: T5's states of one are 4 MB, kept once however many crops there are
    captions = [texts[args.captions[crop.photo]] for crop in crops]
    txt = [states[0] for states, _ in captions]
    y = [pooled[0] for _, pooled in captions]
    lap("text")
    autoencoder = load_autoencoder(args.folder, args.device, args.dtype)
    bar = tqdm(crops, "encoding", disable=None, leave=False)
    latents, weights = encode_crops(autoencoder, bar, args.background, args.mirror)
    del autoencoder
    lap("pictures")
    flux = open_flux(args, args.device, args.iters)
    adapter = MetaLoRA(flux, args.rank, lomd, seed=args.seed)
    blocks = fit_training(adapter, largest, len(txt[0]), args.recompute)
    if blocks:
        print(f"{blocks} of {len(blocks_of(flux))} blocks are run twice, to save memory")
    lap("model")
    return flux, adapter, crops, (latents, weights, txt, y), lomd_name


def personalize(argv: list[str] | None) -> None:
    args = parse(argv)
    check(args)
    start, seconds = time.perf_counter(), {}
    def lap(part: str) -> None:
        free(args.device)
        seconds[part] = time.perf_counter() - start - sum(seconds.values())

    flux, adapter, crops, data, lomd = prepare(args, lap)
    done, smooth, memory = 0, math.nan, ""

    def save(path: Path) -> None:
        save_lora(path, adapter.collapse(), args.format, metadata(args, done, lomd))

    def on_step(iteration: int, loss: float) -> None:
        nonlocal done, smooth, memory
        done, smooth = iteration, loss if iteration == 1 else 0.95 * smooth + 0.05 * loss
        if args.device.type == "cuda":
            memory = f", peak {torch.cuda.max_memory_allocated(args.device) / 2 ** 30:.1f} GiB"
        bar.set_postfix_str(f"loss {smooth:.4f}{memory}", refresh=False)
        bar.update()
        if iteration in args.save_at:
            try:
                keep(numbered(args.out, iteration), save)
            except OSError as error:
                note(error)
        if iteration < args.iters:
            interruption.raise_if_asked()

    room = len(lora_bytes(adapter.collapse(), args.format, metadata(args, args.iters, lomd)))
    outputs = [args.out, *(numbered(args.out, iteration) for iteration in args.save_at)]
    with Interruption() as interruption:
        try:
            with reserved(outputs, room), tqdm(total=args.iters, desc="training", disable=None) as bar:
                train(flux, adapter, *data, args.iters, args.lr, args.seed, on_step)
                keep(args.out, save)
        except NotFinite as error:
            crop = crops[error.crop]
            raise FloatingPointError(f"{error}, on {crop.photo} {crop.box}; a --lr below {args.lr:g} may "
                                     f"help; {args.out} was not written") from None
        except (KeyboardInterrupt, RuntimeError) as error:
            if done and (isinstance(error, KeyboardInterrupt) or is_out_of_memory(error)):
                kept = args.out.with_name(f"{args.out.stem}-interrupted-{done:06d}.safetensors")
                keep(kept, save)
                note(f"the {done} iterations so far are in {kept}")
            raise
        interruption.raise_if_asked()
    lap("training")
    print(f"{args.out}: rank {args.rank}, {args.out.stat().st_size / 1e3:.0f} kB, {len(crops)} pictures, "
          f"{args.iters} iterations, loss {smooth:.4f}{memory}")
    if is_compiled(flux):
        print(f"of training {seconds_compiling():.1f} s went into compiling")
    print(f"seconds: {', '.join(f'{part} {value:.1f}' for part, value in seconds.items())}; in all "
          f"{sum(seconds.values()):.1f}, an iteration {seconds['training'] / args.iters:.3f}")
    model = model_words(args) + args.switches
    words = f"{model}--lora {shlex.quote(str(args.out))} {shlex.quote(args.prompt)}"
    print(f"try it:  python sample.py {words}")
    if args.save_at:
        files = [str(numbered(args.out, iteration)) for iteration in sorted({*args.save_at})]
        if args.iters not in args.save_at:
            files.append(str(args.out))
        words = f"{model}{shlex.quote(args.prompt)} --compare {shlex.join(files)}"
        print(f"which one?  python sample.py {words}")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 training diverged or memory ran out, 2 bad input, 130, 143 or 129 by a signal."""
    return run_script("personalize.py", personalize, argv)


if __name__ == "__main__":
    sys.exit(main())
