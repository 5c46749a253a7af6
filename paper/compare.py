"""The paper's comparison: methods, ranks, and iteration counts, on many people at once.

    python -m paper.compare --data people/ --methods lora lora-crops meta-lora --ranks 1 4 --seeds 2

Every method trains a LoRA of every person from one photo, and samples every prompt at every seed.
The results in --out: scores.json, tables.md, a figure, a contact sheet, LoRAs, and images. Rerun
the command to resume; --methods, --ranks, --iters, and --seeds may then list more than before.

Source: "Meta-LoRA" (Topal et al. 2025), section 4 and appendix F.
"""
import collections
import math
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from functools import partial
from itertools import chain, groupby, islice, product
from pathlib import Path

import support  # before torch: how its threads wait
import torch
from tqdm import tqdm

import personalize
from eval_rfacesim import Judges, add_options, collect, embed_real, write_report
from flux_model import flow_matching_loss
from metalora import IdentityBank, MetaLoRA, apply_loras, random_lomd
from paper.report import METHODS, Lines, draw_scores, draw_sheet
from sample import STEPS, decode_latent, sample_latents
from support import photos
from support.checkpoints import (LONG_RUN, add_speed_options, check_training_memory,
                                 encode_prompts, flux_fingerprint, is_small, load_autoencoder,
                                 model_defaults, open_flux, part_fingerprints, take_model)
from support.common import (Interruption, Parser, batched, check_settings, check_writable, count,
                            finite_number, free, pick_device, positive, positive_number, progress,
                            resolution, run_script, save_png, save_settings, side)
from support.judges import Picture, prompts_for
from support.lora_files import load_lora, read_lomd, save_lora
from support.memory import fit_training
from support.names import find_targets
from support.people import fill, read_people, read_state, save_state

WITH_LOMD = {"meta-lora", "random-lomd"}
SAVE_EVERY = 30                                  # seconds between two saved states of a training


def kind_of(method: str) -> str:
    """The method as personalize.py knows it: "lora" or "meta-lora"."""
    return "lora" if method.startswith("lora") else "meta-lora"


def label_of(method: str, rank: int, iterations: int) -> str:
    """The name of a row in files and folders."""
    return f"{method}_r{rank}_i{iterations}" if rank else method


def rows_of(args: Namespace) -> dict[str, dict]:
    """{label: title, method, rank, and iterations} of all rows of the tables; rank 0: no LoRA."""
    rows = {}
    for method, rank in product(args.methods, args.ranks):
        for count in sorted(args.iters or [personalize.ITERATIONS[kind_of(method)]]):
            row = {
                "title": f"Rank-{rank} {METHODS[method]}, {count} iterations",
                "method": method,
                "rank": rank,
                "iterations": count,
            }
            if method == "none":
                row |= {"title": METHODS[method], "rank": 0, "iterations": 0}
            rows[label_of(method, row["rank"], row["iterations"])] = row
    return rows


def lora_path(args: Namespace, label: str, person: str) -> Path:
    return args.out / "loras" / label / f"{person}.safetensors"


# --------------------------------------------------------------------------------------------------
# Many people in one batch


def train_together(
    adapter: MetaLoRA,
    people: list[tuple],
    iters: int,
    lr: float,
    seed: int,
) -> Iterator[list[int]]:
    """personalize.train for many people: each trains as if alone, up to step `iters` of its row.

    people: for each row of the adapter's bank the latents, loss weights, and (txt, y) of its crops.
    A row that has trained before skips the batches that it has seen. Yields after each step those
    who took it."""
    streams = []
    for (latents, weights, _), done in zip(people, adapter.bank.steps.tolist()):
        stream = personalize.batches(latents, weights, seed)
        streams.append(islice(stream, done, iters))
    for _ in range(iters):
        # everybody's next batch, if there is one; those of one shape can be trained together
        by_shape = collections.defaultdict(dict)     # {shape: {person: batch}}
        for person, stream in enumerate(streams):
            for crop, latent, *others in islice(stream, 1):
                text = people[person][2][crop]
                by_shape[latent.shape][person] = latent, *others, *text

        for batches in by_shape.values():
            for group in batched([*batches], adapter.slots):
                parts = zip(*map(batches.get, group))
                batch = [torch.cat(tensors).to(adapter.device) for tensors in parts]
                latent, noise, weight, t, txt, y = batch
                adapter.assign(torch.tensor(group))
                loss = flow_matching_loss(adapter.flux, latent, noise, t, txt, y, weight=weight)
                loss.sum().backward()
                adapter.step(lr)
                yield group


# --------------------------------------------------------------------------------------------------
# Everything that --out holds


class Run:
    """Trains and samples what is missing in --out. Results do not depend on interruptions: people
    train as if alone, and a batch of images is always sampled as a whole."""
    def __init__(self, args: Namespace, interruption: Interruption):
        """Encodes all texts, then loads the autoencoder and the transformer."""
        self.args = args
        self.interruption = interruption
        texts = []
        for own in (*args.prompts.values(), *args.captions.values()):
            texts += own.values()
        self.texts = encode_prompts(args.folder, texts, args.text_device, args.dtype)
        self.autoencoder = load_autoencoder(args.folder, args.device, args.dtype)
        self.flux = open_flux(args, LONG_RUN)

    def encode(self, augment: bool) -> list[tuple]:
        """Everybody's crops, as `train_together` takes them, on the CPU."""
        args = self.args
        people = []
        for captions in progress(args.captions.values(), "crops"):
            crops = photos.load_crops(
                [*captions],
                args.resolution,
                augment,
                aspects=args.aspects,
                scales=args.scales,
            )
            latents, weights = personalize.encode_crops(
                self.autoencoder,
                crops,
                args.background,
                args.mirror,
            )
            texts = [self.texts[captions[crop.photo]] for crop in crops]
            people.append(([latent.cpu() for latent in latents], weights, texts))
            self.interruption.raise_if_asked()
        return people

    def make_adapter(self, method: str, rank: int) -> MetaLoRA:
        """With a row for each person; all rows start alike, as in separate runs."""
        args = self.args
        count = len(args.people)
        # the fastest number of people per step, as measured on the baby at ranks 1 to 16: each
        # widens every layer by the rank. A large model fills the device with one person
        slots = max(1, round(16 / rank ** 0.5)) if is_small(args.folder) else 1
        lomd = args.learned_lomd if kind_of(method) == "meta-lora" else None
        if method == "random-lomd":
            r1 = len(next(iter(lomd.values())))
            lomd = random_lomd(find_targets(self.flux), r1, args.seed)
        adapter = MetaLoRA(self.flux, rank, lomd, seed=args.seed, slots=min(slots, count))
        adapter.bank = IdentityBank(adapter.bank.weight.repeat(count, 1))
        return adapter

    def train(self, method: str, rank: int, missing: dict[tuple[int, int], str]):
        """Trains the LoRAs of one method and rank. missing: {(person, iterations): label}."""
        args = self.args
        people = self.encode(augment=method != "lora")
        adapter = self.make_adapter(method, rank)

        # the saved rows, unless they are past an iteration whose LoRA is missing
        state = args.out / "state" / f"{method}_r{rank}.safetensors"
        if state.is_file():
            bank = IdentityBank(**read_state(state, args.device))
            if all(bank.steps[person] < count for person, count in missing):
                adapter.bank = bank
        latents = chain.from_iterable(crops[0] for crops in people)
        largest = max((latent.shape[-2:] for latent in latents), key=math.prod)
        txt, _ = next(iter(self.texts.values()))
        fit_training(adapter, largest, txt.shape[1], args.recompute)
        steps = adapter.bank.steps
        last = max(count for _, count in missing)
        left = (last - steps).clamp(min=0).sum().item()
        name = f"{method}, rank {rank}"
        lr = args.rates[method]
        saved = time.monotonic()
        try:
            with tqdm(total=left, desc=f"training {name}", disable=None) as bar:
                for group in train_together(adapter, people, last, lr, args.seed):
                    bar.update(len(group))
                    for person in group:
                        label = missing.get((person, steps[person].item()))
                        if label:
                            self.save_lora(adapter, label, person)
                    if self.interruption.asked or time.monotonic() - saved > SAVE_EVERY:
                        save_state(state, vars(adapter.bank))
                        saved = time.monotonic()
                    self.interruption.raise_if_asked()
        except FloatingPointError:
            finite = adapter.rows.grad.isfinite().all(dim=1)
            person = adapter.present[finite.int().argmin()]
            raise FloatingPointError(
                f"{name}, {args.people[person].name}: the loss or its gradient is not finite at "
                f"iteration {steps[person] + 1}; try a learning rate below --lr {method}={lr:g}"
            ) from None
        save_state(state, vars(adapter.bank))

    def save_lora(self, adapter: MetaLoRA, label: str, person: int):
        args = self.args
        row = args.rows[label]
        name = args.people[person].name
        captions = args.captions[name]
        path = lora_path(args, label, name)
        save_lora(path, adapter.collapse(person), metadata={
            **row,
            "seed": args.seed,
            "learning_rate": f"{args.rates[row['method']]:g}",
            "prompt": " | ".join(dict.fromkeys(captions.values())),
            "model": Path(args.model).name,
            "made_by": "paper/compare.py",
            **photos.fingerprints([*captions]),
        })

    def sample(self, pictures: list[Picture]):
        args = self.args
        size = 16 if is_small(args.folder) else 1
        applied = None
        bar = tqdm(pictures, "sampling", unit="image", disable=None)
        # images share a batch whether they exist or not, since rounding depends on the batch
        together = groupby(bar, lambda it: (*it[:2], it.seed, it.number // size))
        for (label, person, *_), group in together:
            batch = [*group]
            if all(picture.path.is_file() for picture in batch):
                continue
            row = args.rows[label]
            if applied != (label, person):
                loras = []
                if row["rank"]:
                    path = lora_path(args, label, person)
                    loras.append((load_lora(path, self.flux.config), 1.0))
                apply_loras(self.flux, loras)
                applied = label, person
            latents = sample_latents(
                self.flux,
                self.texts,
                jobs=[(picture.prompt, picture.seed) for picture in batch],
                width=args.size,
                height=args.size,
                steps=args.steps,
                guidance=args.guidance,
                batch_size=len(batch),
                on_step=self.interruption.raise_if_asked,
            )
            for picture, latent in zip(batch, latents):
                save_png(decode_latent(self.autoencoder, latent), picture.path, {
                    "prompt_text": picture.prompt,
                    "seed": picture.seed,
                    "identity": person,
                    "method": row["title"],
                })


def plan_pictures(args: Namespace) -> list[Picture]:
    """All images, whether they exist or not."""
    pictures = []
    for label, person, seed in product(args.rows, args.prompts, range(args.seeds)):
        folder = args.out / "images" / label / person
        for number, text in args.prompts[person].items():
            path = folder / f"{number}_{seed}.png"
            pictures.append(Picture(label, person, number, seed, text, path))
    return pictures


def produce(args: Namespace) -> list[Picture]:
    """Trains and samples all that is missing, and frees the models -> all images."""
    loras = {}                                   # {(method, rank): as Run.train takes the missing}
    for (label, row), (i, person) in product(args.rows.items(), enumerate(args.people)):
        if row["rank"] and not lora_path(args, label, person.name).is_file():
            training = row["method"], row["rank"]
            loras.setdefault(training, {})[i, row["iterations"]] = label
    pictures = plan_pictures(args)
    if loras or not all(picture.path.is_file() for picture in pictures):
        with Interruption() as interruption:
            run = Run(args, interruption)
            for (method, rank), missing in loras.items():
                run.train(method, rank, missing)
            run.sample(pictures)
        del run
        free(args.device)
    return pictures


# --------------------------------------------------------------------------------------------------
# The command


def rate(text: str) -> tuple[str, float]:
    """A word of --lr -> method and learning rate; "" stands for all other methods."""
    method, _, number = text.rpartition("=")
    if method and method not in METHODS:
        raise ArgumentTypeError(f"no method {method!r}; there are {', '.join(METHODS)}")
    return method, positive_number(number)


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(prog="paper.compare",
                    description="Compares methods, ranks, and iteration counts as the paper does.")
    add = parser.add_argument
    add_options(add)
    add("--methods", nargs="+", choices=METHODS, default=["meta-lora", "lora-crops", "lora"],
        help="methods to compare; random-lomd is Meta-LoRA over random weights, none is the model "
        "without a LoRA (default: meta-lora lora-crops lora)")
    add("--ranks", type=positive, nargs="+", default=[1], metavar="R",
        help="ranks of the LoRAs (default: 1)")
    add("--iters", type=positive, nargs="+", metavar="N",
        help="iteration counts, all from one training (default: 375; LoRA methods 625)")
    add("--seeds", type=positive, default=5, help="images per prompt (default: 5)")
    add("--photos", type=positive, default=1, metavar="N",
        help="photos per person to train on (default: 1)")
    add("--lr", type=rate, nargs="+", default=[], metavar="[METHOD=]LR",
        help="learning rates (default: the model's; 4e-4 for FLUX.1)")
    add("--lomd", type=Path,
        help="weights of stage 1 (default: lomd.safetensors in the model's folder, else here)")
    add("--prompt", help="caption of photos without a caption file; may contain [man/woman] "
        "(default: the model's)")
    add("--resolution", type=resolution, nargs="+", metavar="PIXELS",
        help="resolutions of training crops (default: the model's; 1024 for FLUX.1)")
    add("--size", type=side,
        help="width and height of generated images (default: the model's; 1024 for FLUX.1)")
    add("--steps", type=positive, default=STEPS, help=f"Euler steps (default: {STEPS})")
    add("--guidance", type=finite_number,
        help="guidance input (default: the model's; 3.5 for FLUX.1)")
    add("--seed", type=count, default=0, help="seed of the training (default: 0)")
    add_speed_options(add, training=True, model=False)
    return parser.parse_args(argv)


def take_defaults(args: Namespace):
    """Finds the model (may download it), its LoMD, and the captions, and collects in args.settings
    all that decides about results."""
    given = dict(args.lr)
    take_model(args, "lora")
    args.rates = {}
    for method in METHODS:
        if method != "none":
            defaults = model_defaults(args.folder, kind_of(method))
            args.rates[method] = given.get(method) or given.get("") or defaults["learning_rate"]
    args.size = args.size or model_defaults(args.folder)["resolution"]

    lomd = "none"
    if WITH_LOMD & set(args.methods):
        args.learned_lomd, lomd = read_lomd(args.folder, args.lomd)
    elif args.lomd:
        raise ValueError("--lomd is for meta-lora and random-lomd, and --methods has neither")

    references = []
    args.captions = {}                           # {person: {reference: its caption}}
    for person in args.people:
        paths = [person.reference, *person.more]
        prompt = fill(args.prompt, person.gender)
        if prompt is None:
            raise ValueError(f"--prompt {args.prompt!r} is no caption for {person.name}")
        texts = [caption or prompt for caption in person.captions]
        args.captions[person.name] = dict(zip(paths, texts))
        references.append(f"{person.name} {photos.fingerprints(paths)['photo_digests']}")
    args.settings = {
        "layout": "numbers of a row by width",
        "model": flux_fingerprint(args.folder),
        "lomd": lomd,
        "learning rates": args.rates,
        "dtype": f"{args.dtype} fp8" if args.fp8 else str(args.dtype),
        "people and their references": references,
        "captions": {name: [*captions.values()] for name, captions in args.captions.items()},
        "prompts": {name: [*texts.values()] for name, texts in args.prompts.items()},
        **part_fingerprints(args.folder),
    }
    for name in ("resolution", "size", "steps", "guidance", "seed", "aspects", "scales",
                 "background", "mirror"):
        args.settings[name] = getattr(args, name)


def lines_of(methods: list[dict]) -> Lines:
    """The summaries of scores.json that have both scores, a line for each method and rank."""
    lines = collections.defaultdict(dict)
    for row in methods:
        likeness = row["r_facesim"]
        text = row["clip_t"]
        if likeness and text:
            name = f"rank {row['rank']}" if row["rank"] else ""
            lines[row["method"], name][row["iterations"]] = {
                "likeness": (likeness["mean"], likeness["error"] or 0),
                "text": (text["mean"], text["error"] or 0),
            }
    return lines


def compare(argv: list[str] | None) -> tuple[Namespace, dict]:
    """Writes scores.json and tables.md -> the settings, and what scores.json holds."""
    args = parse(argv)
    check_writable(args.out, "--out", args.data)
    args.device = pick_device(args.device)
    args.rows = rows_of(args)
    args.people = read_people(args.data, args.reference, args.gender, args.photos)
    args.prompts = prompts_for(args.people, args.prompts, args.model)
    take_defaults(args)
    largest = max(args.size, *args.resolution) // 8
    r1 = 0 if "lora" in map(kind_of, args.methods) else 16       # plain LoRA has the larger rows
    check_training_memory(args, (largest, largest), max(args.ranks), r1, people=len(args.people))
    path = args.out / "settings.json"
    before = check_settings(path, args.settings, later="lomd")
    if args.settings["lomd"] == "none":          # one that this command does not need
        args.settings["lomd"] = before["lomd"]
    save_settings(path, args.settings)

    judges = Judges(args.model, args.face_weights, args.clip, args.device)
    real = embed_real(judges, args.people)
    pictures = produce(args)
    scores = collect(args, judges, args.people, real, pictures, problems=[])
    scores["settings"] |= args.settings
    for method in scores["methods"]:
        method |= args.rows[method["label"]]
    write_report(args.out, scores, base=Path(args.model).name)
    return args, scores


def command(argv: list[str] | None):
    args, scores = compare(argv)
    lines = lines_of(scores["methods"])
    if lines:
        draw_scores(args.out / "scores.png", ("likeness", "text"), lines)
    folders = {row["title"]: args.out / "images" / label for label, row in args.rows.items()}
    draw_sheet(args.out / "sheet.png", args.people, args.prompts, folders)
    print((args.out / "tables.md").read_text("utf-8"))
    print(f"{args.out}: scores.json, tables.md, figures")


# Exit code: 0 done, 1 training diverged or out of memory, 2 bad input, 130 Ctrl-C.
main = partial(run_script, "paper.compare", command)


if __name__ == "__main__":
    sys.exit(main())
