"""Around a run of personalize.py: checks before it, facts in its LoRA file, what it prints."""
from argparse import Namespace
from pathlib import Path
from typing import Any

from support import photos
from support.checkpoints import DEFAULTS, model_words, take_model
from support.common import check_out, command_line, expand, note, pick_device, use_threads
from support.finding import HUB, home_of
from support.lora_files import find_lomd, tell_replaced
from support.people import captions_beside, named_photos


def check_stage_2(args: Namespace, iterations: dict[str, int]):
    """ValueError for bad input, before anything large is read. Fills in the model's defaults.

    iterations: {method: number}, where the model has no others."""
    if home_of(args.model) is None:                  # to be downloaded: it has no defaults.json
        take_iterations(args, iterations[args.method])
    args.outputs = [args.out, *(numbered(args.out, iteration) for iteration in args.save_at)]
    for path in args.outputs:
        check_out(path, ".safetensors")
    if args.save_crops:
        check_out(args.save_crops, option="--save-crops")
    check_lomd_options(args)
    check_pictures(args)
    # now, since a photo may be gone when the LoRA is saved
    args.seen = photos.fingerprints(args.photos)
    tell_replaced(args.out, args.seen["photo_digests"])

    args.switches = model_words(args)
    args.device = pick_device(args.device)
    take_model(args, args.method)
    take_iterations(args, args.iterations or iterations[args.method])
    use_threads(args.dtype)
    args.captions = captions_beside(args.photos, args.prompt)
    for photo, caption in args.captions.items():
        if caption != args.prompt:
            print(f"{photo.name} is called {caption!r}, by the caption beside it")
    args.mirror = args.mirror and not args.no_augment


def take_iterations(args: Namespace, default: int):
    args.iters = args.iters or default
    last = max(args.save_at, default=0)
    if last > args.iters:
        raise ValueError(f"--save-at {last} is beyond the last of {args.iters} iterations")


def check_lomd_options(args: Namespace):
    if args.lomd and args.method == "lora":
        raise ValueError("--method lora trains its own A and takes no --lomd")
    # a missing LoMD is an error before the model is downloaded
    if args.method == "meta-lora" and (args.lomd or args.model in HUB):
        find_lomd(home_of(args.model), args.lomd)
    if args.lomd and args.out.exists() and args.out.samefile(args.lomd):
        raise ValueError(f"--out would overwrite the LoMD {args.lomd}")
    if args.out.name == "lomd.safetensors":      # by which a LoMD is found
        raise ValueError(f"--out {args.out} is the name of a LoMD: name the LoRA otherwise")


def check_pictures(args: Namespace):
    """args.photos: files, folders, patterns -> files that can be read, without masks of others."""
    for folder in map(Path, expand(args.photos)):
        if args.save_crops and folder.resolve() == args.save_crops.resolve():
            raise ValueError(f"--save-crops {folder} is the folder of the photos: name another, or "
                             "the next run would train on crops of crops")
    named = named_photos(args.photos)
    args.photos = photos.without_masks(named)
    for mask in sorted(set(named) - set(args.photos)):
        note(f"{mask} is the mask of another photo, and is not used")
    for path in args.photos:
        width, height = photos.read_photo(path).size
    if args.box:
        if len(args.photos) > 1 or args.no_augment:
            raise ValueError("--box takes a single photo, and no --no-augment")
        x0, y0, x1, y1 = args.box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"--box {x0} {y0} {x1} {y1} must be X0 < X1 and Y0 < Y1 within "
                             f"{path}, which is {width} x {height} pixels")


def numbered(out: Path, iteration: int) -> Path:
    """The file for the LoRA after an earlier iteration."""
    return out.with_name(f"{out.stem}-{iteration:06d}.safetensors")


def metadata(args: Namespace, done: int, lomd: str) -> dict[str, str]:
    """Fields of the LoRA file: how it was made."""
    given = "method", "rank", "seed", "prompt", "background", "box"
    facts = {name: getattr(args, name) for name in given}
    facts |= {
        "iterations": done,
        "learning_rate": f"{args.lr:g}",
        "resolution": joined(args.resolution),
        "augment": str(not args.no_augment).lower(),
        "mirror": str(args.mirror).lower(),
        "aspects": joined(args.aspects or photos.ASPECTS),
        "scales": joined(args.scales or photos.FACE_SCALES),
        "captions": " | ".join(dict.fromkeys(args.captions.values())),
        "model": Path(args.model).name,
        "lomd": lomd,
        "made_by": "personalize.py",
    }
    facts |= args.seen
    return {name: str(fact) for name, fact in facts.items() if fact is not None}


def joined(values: object) -> str:
    return " ".join(map(str, values))


def lora_size(adapter: Any, format: str) -> int:
    """An upper bound on the bytes of a MetaLoRA's LoRA file."""
    numbers = adapter.rank * sum(target.d_in + target.rows for target in adapter.targets)
    # fp16; the layouts with fused layers fill up with zeros
    return numbers * (2 if format == "diffusers" else 8) + 2 ** 18


def print_next_commands(args: Namespace):
    """How to sample with the LoRA and, after --save-at, how to compare all that were saved."""
    model = args.switches
    # sample.py takes no empty prompt, and --compare none of several lines
    prompt = command_line(" ".join(args.prompt.split()) or DEFAULTS["prompt"][0])
    print(f"try it:  python sample.py {model}--lora {command_line(args.out)} {prompt}")
    if args.save_at:
        files = [str(numbered(args.out, iteration)) for iteration in sorted({*args.save_at})]
        if args.iters not in args.save_at:
            files.append(str(args.out))
        print(f"which one?  python sample.py {model}{prompt} --compare {command_line(*files)}")
