"""Stage 2: one photo in, a LoRA of the person out.

    python personalize.py face.jpg                  # FLUX.1-dev and its lomd.safetensors -> out.safetensors
    python personalize.py face.jpg --model baby     # the same on a laptop
    python personalize.py face.jpg --method lora    # the paper's baseline; needs no LoMD

Sources: Meta-LoRA, "Stage-2: Test-time ID Personalization" (crops, flips, what is trained and how long);
ai-toolkit, the paper's trainer (times, loss, guidance input 1.0, a latent drawn anew from the posterior).
Deviations: sides are multiples of 16 pixels and not of 64, which keeps aspect ratios closer; a crop is seen
at one resolution unless --resolution names more; small crops are enlarged, see `to_sizes`. An iteration is
one step of the optimiser, as in the paper's tables; its Algorithm 2, read literally, would count epochs.
"""
import argparse
import collections
import gc
import hashlib
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import flux_model
import photos
from lora_files import save_lora
from metalora import MetaLoRA, check_lomd, find_targets, load_lomd
from speed import seconds_compiling

ITERATIONS = {"meta-lora": 375, "lora": 625}     # the paper's
FLOOR = 512                                      # pixels; FLUX.1 was not made for less


class NotFinite(FloatingPointError):
    """Training of a person diverged at `iteration`, on the images of these indices."""
    def __init__(self, iteration, images, person):
        super().__init__(f"the loss or its gradient is not finite at iteration {iteration}")
        self.iteration, self.images, self.person = iteration, images, person


# ----------------------------------------------------------------------------------------------------------
# The method: crops, latents, training


class Crop(NamedTuple):
    picture: Image.Image                         # as the model sees it
    photo: Path
    box: tuple                                   # where in the photo, x0, y0, x1, y1
    head: Image.Image | None = None              # white where the head is, of the picture's size; None: not looked for


def to_sizes(picture, resolutions):
    """PIL image -> [PIL image]: once for each resolution, on the 16-pixel grid, no size twice.

    Never enlarged beyond its own area, but for one case: below 512 x 512 (or the resolution, where that is
    less) it is enlarged to that. A tight crop of a small photo would be a handful of tokens, a size that the
    model was never trained at; blur is the smaller evil.
    """
    sized = {}
    for resolution in resolutions:
        floor = min(resolution, FLOOR)
        small = picture.width * picture.height < floor ** 2
        fitted = photos.fit_to_grid(picture, floor if small else resolution, upscale=small)
        sized.setdefault(fitted.size, fitted)
    return list(sized.values())


def load_crops(paths, resolutions, augment=True, aspects=None, scales=None):
    """Photos of one person -> [Crop], the crops of all of them; without `augment` each photo as a whole.

    Of several faces the largest counts, with a note on stderr. The detector runs on the CPU, so that crops
    are the same on any device. ValueError names the photo that cannot be read or shows no face.
    """
    crops = []
    for path in map(Path, paths):
        photo = photos.read_photo(path)
        boxes, head = [(0, 0, *photo.size)], None
        if augment:
            faces = photos.find_faces(photo)
            if not faces:
                raise ValueError(f"no face found in {path}; --no-augment takes whole photos, faces or not")
            if len(faces) > 1:
                x0, y0, x1, y1 = map(round, faces[0][:4])
                print(f"note: {len(faces)} faces in {path}; taking the largest, {x1 - x0} x {y1 - y0} pixels "
                      f"at ({x0}, {y0})", file=sys.stderr)
            boxes, head = photos.face_crops(*photo.size, faces[0], aspects, scales), Image.new("L", photo.size)
            head.paste(255, photos.head_box(faces[0]))
        for box in boxes:
            pictures = to_sizes(photo.crop(box), resolutions)
            heads = to_sizes(head.crop(box), resolutions) if head else [None] * len(pictures)
            crops += [Crop(picture, path, box, own) for picture, own in zip(pictures, heads)]
    return crops


@torch.no_grad()
def encode(autoencoder, pictures, mirror=True):
    """PIL images -> for each a tensor (views, 2, 16, H / 8, W / 8), fp32: mean and deviation of its latent.

    The views are the picture and, with `mirror`, its mirror image: encoded, since a flipped latent is not the
    latent of a flipped picture. From mean and deviation each step draws anew, as the paper's trainer does, at
    the price of one randn.
    """
    device, latents = next(autoencoder.parameters()).device, []
    for picture in pictures:
        pixels = photos.to_tensor(picture).to(device)
        latents.append(autoencoder.posterior(torch.stack([pixels, pixels.flip(-1)] if mirror else [pixels])))
    return latents


def head_weights(crop, background, mirror=True):
    """A crop -> (views, 1, H / 8, W / 8): how much the loss counts at each place of the latents that `encode` gives, with a
    mean of 1; `background` is the share of what is not head, 1 to count all alike."""
    head = torch.from_numpy(np.array(crop.head)).float()[None] / 255
    weights = background + (1 - background) * F.avg_pool2d(head, 8)
    weights /= weights.mean()
    return torch.stack([weights, weights.flip(-1)] if mirror else [weights])


def encode_crops(autoencoder, crops, background=1.0, mirror=True):
    """What `train` takes of one person, of `load_crops` -> ([latents of `encode`], [weights of `head_weights`]), one of each for
    every crop. Of whole photos, whose heads nobody looked for, all places count alike, and there is no mirror image."""
    latents, weights = [], []
    for crop in crops:
        views = mirror and crop.head is not None
        latents += encode(autoencoder, [crop.picture], views)
        weights.append(torch.ones(1, 1, 1, 1) if crop.head is None else head_weights(crop, background, views))
    return latents, weights


def draw(latent, generator):
    """One element of `encode` -> which view, by a coin, and its latent (16, h, w), drawn from the posterior."""
    view = torch.randint(len(latent), (), generator=generator)
    mean, deviation = latent[view]
    return view, mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device)


def epoch(latents, batch_size, generator):
    """Every image once, in random order: [[index, ...], ...]. The images of a batch have one shape."""
    of_shape = collections.defaultdict(list)
    for i in torch.randperm(len(latents), generator=generator).tolist():
        of_shape[latents[i].shape[-2:]].append(i)
    batches = [same[i:i + batch_size] for same in of_shape.values() for i in range(0, len(same), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def batches(latents, weights, batch_size, seed):
    """Endless training batches of one person, (image indices, latent (B, 16, h, w), noise, weight (B, 1, h, w), t (B,)), of
    one seed. weights: of `head_weights`, beside the latents."""
    generator, order = torch.Generator().manual_seed(seed), []
    while True:
        order = order or epoch(latents, batch_size, generator)
        batch = order.pop()
        views, drawn = zip(*(draw(latents[i], generator) for i in batch))
        latent, weight = torch.stack(drawn), torch.stack([weights[i][view] for i, view in zip(batch, views)])
        noise = torch.randn(latent.shape, generator=generator).to(latent.device)
        yield batch, latent, noise, weight, flux_model.sample_times(len(batch), generator).to(latent.device)


def people_at_once(flux, rank):
    """How many people together make the most of a step: each widens every layer by its rank.

    Measured on the baby at ranks 1 to 16 (`bench.py --people 16`). A large model fills the machine with one.
    """
    small = sum(parameter.numel() for parameter in flux.parameters()) < 1e9
    return max(1, round(16 / rank ** 0.5)) if small else 1


def train(flux, adapter, people, txt, y, iters, lr, batch_size=1, seed=0, on_step=None, weights=None):
    """`iters` steps of flow matching for each row of the adapter; the base stays as it is.

    flux with `adapter` in it; people: for each row what `encode` gave; weights: beside it of `head_weights`, None to count
    all places alike; txt (N, T, _) and y (N, _): one caption for each. Every random number of a person comes from
    one CPU generator, and lr is constant, so a longer run begins as a shorter one, and rows that have steps behind
    them go on where they were.
    A person trains as if alone. But whose next batches have the same shape go through the network together, up
    to `adapter.slots` people: nobody waits for anybody, so the most frequent shape goes first.
    on_step(iteration, loss, person) is called after each step, counted from 1. Raises NotFinite.
    """
    weights = weights or [[torch.ones(len(latent), 1, 1, 1) for latent in latents] for latents in people]
    streams = [batches(latents, own, batch_size, seed) for latents, own in zip(people, weights)]
    done, waiting = adapter.bank.steps.tolist(), {}
    for person, stream in enumerate(streams):
        for _ in range(done[person]):
            next(stream)
        if done[person] < iters:
            waiting[person] = next(stream)
    while waiting:
        alike = collections.defaultdict(list)
        for person in sorted(waiting, key=done.__getitem__):                          # who is behind goes first
            alike[waiting[person][1].shape].append(person)
        group = max(alike.values(), key=len)[:adapter.slots]
        images, *tensors = zip(*(waiting[person] for person in group))
        latent, noise, weight, t = (torch.cat(parts).to(txt.device) for parts in tensors)          # (B, 16, h, w), .., (B,)
        rows = torch.tensor(group).repeat_interleave(len(images[0]))

        adapter.assign(rows)
        losses = flux_model.flow_matching_loss(flux, latent, noise, t, txt[rows], y[rows], 1.0, weight)        # (B,)
        losses.sum().backward()
        of_person = losses.detach().view(len(group), -1).cpu()
        try:
            adapter.step(lr)
        except FloatingPointError:
            at = next((i for i, own in enumerate(of_person) if not own.isfinite().all()), 0)
            bad = [i for i, loss in zip(images[at], of_person[at].tolist()) if not math.isfinite(loss)]
            raise NotFinite(done[group[at]] + 1, bad or images[at], group[at]) from None
        for person in group:
            done[person] += 1
            if done[person] < iters:
                waiting[person] = next(streams[person])
            else:
                del waiting[person]
        if on_step:
            for person, loss in zip(group, of_person.mean(dim=1).tolist()):
                on_step(done[person], loss, person)


# ----------------------------------------------------------------------------------------------------------
# The command


CROPS = ("aspects", "scales", "background", "mirror")


def add_crop_options(add):
    """How crops are made and weighed, for the parser of a script; each defaults to the model's (`model_defaults`)."""
    add("--aspects", nargs="+", choices=tuple(photos.ASPECTS), metavar="W:H", help="of the crops (default: the model's; "
        f"{' '.join(photos.ASPECTS)} for FLUX.1)")
    add("--scales", nargs="+", type=flux_model.number(1, 100), metavar="X", help="shorter side of a crop / longer side of "
        f"the face (default: the model's; {' '.join(map(str, photos.FACE_SCALES))} for FLUX.1)")
    add("--background", type=flux_model.number(0, 1), metavar="WEIGHT", help="of the loss outside of the head "
        "(default: the model's; 1, the paper's, for FLUX.1)")
    add("--mirror", action=argparse.BooleanOptionalAction, help="train on mirror images, too (default: the model's; yes for "
        "FLUX.1)")


def parse(argv):
    parser = flux_model.Parser(prog="personalize.py", usage="personalize.py photo [photo ...] [options]",
                    description="Turns one photo of a person, or a few, into a LoRA.", allow_abbrev=False)
    add = parser.add_argument
    add("photos", nargs="+", metavar="photo", help="photos of one person")
    add("--model", default="flux-dev", help="flux-dev (default), flux-schnell, baby, or a folder like these")
    add("--out", default="out.safetensors", help="LoRA file to write (default: out.safetensors)")
    add("--format", choices=("diffusers", "kohya", "original"), default="diffusers", help="names in it")
    add("--method", choices=tuple(ITERATIONS), default="meta-lora", help="lora is the paper's baseline")
    add("--lomd", help="weights of stage 1 (default: lomd.safetensors of the model's folder, else here)")
    add("--rank", type=flux_model.positive, default=1, help="rank of the LoRA (default: 1)")
    add("--iters", type=flux_model.positive, help="steps of training (default: 375, with --method lora 625)")
    add("--batch-size", type=flux_model.positive, default=1, help="crops per step, of one shape (default: 1)")
    add("--lr", type=float, help="learning rate (default: the model's; 4e-4 for FLUX.1)")
    add("--resolution", type=flux_model.positive, nargs="+", metavar="PIXELS", help="train at the area of a square "
        "of this side; several: every crop at each (default: the model's; 1024 for FLUX.1)")
    add("--prompt", help="what every crop is called (default: the model's; 'a photo of a person' for FLUX.1)")
    add_crop_options(add)
    add("--no-augment", action="store_true", help="the whole photo instead of crops and mirror images")
    add("--seed", type=int, default=0, help="one CPU and one seed: the same weights to the bit (default: 0)")
    add("--save-at", type=flux_model.positive, nargs="+", default=[], metavar="N",
        help="also write out-00000N.safetensors after N steps, and so on")
    add("--save-crops", type=Path, metavar="DIR", help="write the pictures that are trained on, as PNG")
    flux_model.add_speed_options(add, training=True)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    return parser.parse_intermixed_args(argv)


def check(args):
    """ValueError for what can be refused before anything large is read; then fills in the defaults."""
    args.iters = args.iters or ITERATIONS[args.method]
    out = args.out = Path(args.out)
    for path, what in ((out.parent, "--out"), (args.save_crops and args.save_crops.parent, "--save-crops")):
        if path and not path.is_dir():
            raise ValueError(f"the folder of {what} does not exist: {path}")
        if path and not os.access(path, os.W_OK):
            raise ValueError(f"the folder of {what} cannot be written to: {path.absolute()}")
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(f"--out must be a file that ends in .safetensors, not {out}")
    if args.save_crops and args.save_crops.exists() and not args.save_crops.is_dir():
        raise ValueError(f"--save-crops is not a folder: {args.save_crops}")
    if max(args.save_at, default=0) > args.iters:
        raise ValueError(f"--save-at {max(args.save_at)} is beyond the last of {args.iters} iterations")
    flux_model.check_training(args)
    given = [name for name in CROPS if getattr(args, name) is not None]
    if args.no_augment and given:
        raise ValueError(f"--{given[0]} is about crops, and --no-augment takes none")
    if args.lomd and args.method == "lora":
        raise ValueError("--method lora trains its own A and takes no --lomd")
    if args.lomd and not Path(args.lomd).is_file():
        raise ValueError(f"no such LoMD: {args.lomd}")
    if args.lomd and out.exists() and out.samefile(args.lomd):
        raise ValueError(f"--out would overwrite the LoMD {args.lomd}")
    for path in args.photos:
        photos.read_photo(path)

    args.device = flux_model.pick_device(args.device)
    flux_model.take_model(args, args.device, args.method)
    args.mirror = args.mirror and not args.no_augment


def read_lomd(folder, path=None):
    """The LoMD for the model in `folder` -> ({path: (r1, d_in)}, its hash, was it never trained?).

    ValueError where there is none, or where it is another model's.
    """
    places = [Path(path)] if path else [Path(folder) / "lomd.safetensors", Path("lomd.safetensors")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"no LoMD, neither {places[0]} nor ./{places[1]}: train one with meta_train.py, "
                         "name yours with --lomd, or train a plain LoRA with --method lora")
    lomd, metadata = load_lomd(path)
    with torch.device("meta"):                       # shapes only
        flux = flux_model.Flux(flux_model.flux_files(folder)[1])
    try:
        check_lomd(lomd, find_targets(flux))
        if metadata.get("model_fingerprint", mine := flux_model.flux_fingerprint(folder)) != mine:
            raise ValueError(f"it was trained on another model of this shape, {metadata.get('model', 'unnamed')} "
                             f"with fingerprint {metadata['model_fingerprint']}; this one has {mine}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return lomd, f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}", metadata.get("random") == "true"


def save_crops(crops, folder):
    """One PNG for each, numbered and named by size and photo."""
    folder.mkdir(exist_ok=True)
    for i, (picture, photo, *_) in enumerate(crops):
        path = folder / f"{i:02d}-{picture.width}x{picture.height}-{photo.stem}.png"
        picture.save(f"{path}.part", format="PNG")
        os.replace(f"{path}.part", path)


def personalize(args):
    """The command after `check`: three models that come and go in turn, so that the peak of memory is the
    largest of them and not the sum."""
    start, seconds = time.perf_counter(), {}

    def lap(part):
        flux_model.free(args.device)
        seconds[part] = time.perf_counter() - start - sum(seconds.values())

    lomd, lomd_name, untrained = None, "none", False
    if args.method == "meta-lora":
        lomd, lomd_name, untrained = read_lomd(args.folder, args.lomd)
        r1 = len(next(iter(lomd.values())))
        if args.rank > r1:
            print(f"note: over a LoMD of {r1} rows --rank {args.rank} can do no more than {r1}", file=sys.stderr)
    crops = load_crops(args.photos, args.resolution, not args.no_augment, args.aspects, args.scales)
    if args.save_crops:
        save_crops(crops, args.save_crops)
    if untrained:
        lomd_name = f"random, {lomd_name}"
        print("note: this LoMD is random and was never trained", file=sys.stderr)
    lap("photos")
    # where the transformer has no room on the device, T5 has none either
    text_device = torch.device("cpu") if args.offload else args.device
    txt, y = (part.to(args.device) for part in
              flux_model.load_text_encoders(args.folder, text_device, args.dtype).encode([args.prompt]))
    gc.collect()                                     # transformers' models hold reference cycles
    lap("text")
    latents, weights = encode_crops(flux_model.load_autoencoder(args.folder, args.device, args.dtype),
                                    tqdm(crops, "encoding", disable=None, leave=False), args.background, args.mirror)
    lap("pictures")
    largest = max(latent[0, 0, 0].numel() // 4 for latent in latents)
    flux = flux_model.open_flux(args, args.device, args.iters, largest + txt.shape[1], training=True)
    adapter = MetaLoRA(flux, args.rank, method=args.method, lomd=lomd, seed=args.seed)
    flux.recompute = adapter.blocks_to_recompute(largest, txt.shape[1], args.batch_size) if args.recompute is None else args.recompute
    if flux.recompute:
        print(f"{min(flux.recompute, len(flux.blocks))} of {len(flux.blocks)} blocks are run twice, to save memory")
    lap("model")

    out, done, smooth, memory = args.out, 0, math.nan, ""

    def save(path):
        save_lora(path, adapter.collapse(), args.format, {
            "method": args.method, "rank": str(args.rank), "iterations": str(done), "seed": str(args.seed),
            "prompt": args.prompt, "resolution": " ".join(map(str, args.resolution)),
            "learning_rate": f"{args.lr:g}", "batch_size": str(args.batch_size),
            "augment": str(not args.no_augment).lower(), "aspects": " ".join(args.aspects or photos.ASPECTS),
            "scales": " ".join(map(str, args.scales or photos.FACE_SCALES)), "background": f"{args.background:g}",
            "mirror": str(args.mirror).lower(), "model": Path(args.model).name, "lomd": lomd_name,
            "made_by": "personalize.py"})

    def on_step(iteration, loss, person):
        nonlocal done, smooth, memory
        done, smooth = iteration, loss if iteration == 1 else 0.95 * smooth + 0.05 * loss
        if args.device.type == "cuda":
            memory = f", peak {torch.cuda.max_memory_allocated(args.device) / 2 ** 30:.1f} GiB"
        bar.set_postfix_str(f"loss {smooth:.4f}{memory}", refresh=False)
        bar.update()
        if iteration in args.save_at:
            save(out.with_name(f"{out.stem}-{iteration:06d}.safetensors"))

    with tqdm(total=args.iters, desc="training", disable=None) as bar:
        try:
            train(flux, adapter, [latents], txt, y, args.iters, args.lr, args.batch_size, args.seed, on_step, [weights])
        except NotFinite as error:
            crop = crops[error.images[0]]
            raise FloatingPointError(f"{error}, on {crop.photo} {crop.box}; a --lr below {args.lr:g} may "
                                     f"help; {out} was not written") from None
        except KeyboardInterrupt:
            if done:
                kept = out.with_name(f"{out.stem}-interrupted-{done:06d}.safetensors")
                save(kept)
                print(f"note: the {done} iterations so far are in {kept}", file=sys.stderr)
            raise
    save(out)
    lap("training")
    print(f"{out}: rank {args.rank}, {out.stat().st_size / 1e3:.0f} kB, {len(crops)} pictures, "
          f"{args.iters} iterations, loss {smooth:.4f}{memory}")
    if flux.compiled:
        print(f"of training {seconds_compiling():.1f} s went into compiling")
    print(f"seconds: {', '.join(f'{part} {value:.1f}' for part, value in seconds.items())}; in all "
          f"{sum(seconds.values()):.1f}, an iteration {seconds['training'] / args.iters:.3f}")
    model = "" if args.model == "flux-dev" else f"--model {shlex.quote(args.model)} "
    print(f"try it:  python sample.py {model}--lora {shlex.quote(str(out))} {shlex.quote(args.prompt)}")


def main(argv=None):
    """Exit code: 0 done, 1 training diverged or memory ran out, 2 bad input, 130 Ctrl-C, work saved."""
    def script(argv):
        args = parse(argv)
        check(args)
        personalize(args)
    return flux_model.run_script("personalize.py", script, argv)


if __name__ == "__main__":
    sys.exit(main())
