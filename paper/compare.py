"""The paper's comparison: methods, ranks, and iteration counts, on many people at once.

    python -m paper.compare --data people/ --methods lora lora-crops meta-lora --ranks 1 4 --seeds 2

Every method trains a LoRA of every person from one photo, and samples every prompt at every seed.
The results in --out: scores.json, tables.md, figures, contact sheets, LoRAs, and images. Rerun the
command to resume; --methods, --ranks, --iters, and --seeds may then list more than before.

Source: "Meta-LoRA" (Topal et al. 2025), section 4 and appendix F.
"""
import argparse
import collections
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import support  # before torch: how its threads wait
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import personalize
from eval_rfacesim import Judges, add_options, embed_real, report, score_all
from flux_model import Flux, flow_matching_loss
from metalora import IdentityBank, MetaLoRA, apply_loras, random_lomd
from paper.report import METHODS, figures, sheets
from sample import STEPS, decode_latent, sample_latents
from support import photos
from support.checkpoints import (add_speed_options, autoencoder_fingerprint,
                                 check_training_memory, encode_prompts, flux_fingerprint, is_small,
                                 learning_rate, load_autoencoder, model_defaults, open_flux,
                                 take_model)
from support.common import (Interruption, JsonFile, Parser, check_writable, check_training, digest,
                            finite_number, free, note, pick_device, positive, run_script, save_png,
                            whole, write_whole)
from support.judges import Picture, own_folder, prompts_for
from support.lora_files import load_lora, read_lomd, save_lora
from support.memory import fit_training
from support.names import find_targets
from support.people import Person, captions_beside, fill, read_people, tell

SAVE_EVERY = 30                                  # seconds between two saved states of a training


class Setting(NamedTuple):
    """A row of the tables: one method at one rank after so many iterations; 0 without a LoRA."""
    method: str
    rank: int = 0
    iterations: int = 0

    @property
    def label(self) -> str:
        if not self.rank:
            return self.method
        return f"{self.method}_r{self.rank}_i{self.iterations}"

    @classmethod
    def read(cls, label: str) -> "Setting":
        match = re.fullmatch(r"(.+)_r(\d+)_i(\d+)", label)
        if not match:
            return cls(label)
        method, rank, iterations = match.groups()
        return cls(method, int(rank), int(iterations))

    @property
    def title(self) -> str:
        name = METHODS.get(self.method, self.method)
        if not self.rank:
            return name
        return f"Rank-{self.rank} {name}, {self.iterations} iterations"


def describe(label: str) -> dict:
    """The title of a row in tables and figures, and its method, rank, and iterations."""
    setting = Setting.read(label)
    return {"title": setting.title, **setting._asdict()}


def kind_of(method: str) -> str:
    """The method as metalora.py knows it: "lora" or "meta-lora"."""
    return "lora" if method.startswith("lora") else "meta-lora"


def iterations_of(method: str, given: list[int] | None) -> list[int]:
    """Iteration counts in ascending order, by default the paper's."""
    if given:
        return sorted(given)
    return [personalize.ITERATIONS[kind_of(method)]]


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """All rows of the tables, method after method."""
    settings = []
    for method in args.methods:
        if method == "none":
            settings.append(Setting(method))
            continue
        for rank in args.ranks:
            for iterations in iterations_of(method, args.iters):
                settings.append(Setting(method, rank, iterations))
    return settings


def references_of(person: Person) -> list[Path]:
    """The photos that a method may see."""
    return [person.reference, *person.more]


# --------------------------------------------------------------------------------------------------
# Many people in one batch


def people_at_once(flux: Flux, rank: int) -> int:
    """The fastest number of people per step, as measured on the baby at ranks 1 to 16: each person
    widens every layer by the rank. A large model fills the device with one person."""
    parameters = sum(parameter.numel() for parameter in flux.parameters())
    if parameters >= 1e9:
        return 1
    return max(1, round(16 / rank ** 0.5))


def train_together(
    flux: Flux,
    adapter: MetaLoRA,
    latents: list[list[Tensor]],
    weights: list[list[Tensor]],
    txt: list[Tensor],
    y: list[Tensor],
    iters: int,
    lr: float,
    seed: int = 0,
    on_step: Callable[[int, int], object] | None = None,
) -> None:
    """personalize.train for many people: each trains as if alone, up to step `iters` of its row.

    latents, weights, txt, y: the arguments of `train`, one for each row of the adapter's bank. A
    row that has trained before skips the batches that it has seen. on_step(iteration, person) is
    called after each step, from 1. Raises NotFinite, with the index of the person.
    """
    streams = []
    for crops, crop_weights in zip(latents, weights):
        streams.append(personalize.batches(crops, crop_weights, seed))
    done = adapter.bank.steps.tolist()
    waiting = {}                                 # {person: the next batch}
    for person, stream in enumerate(streams):
        for _ in range(done[person]):
            next(stream)
        if done[person] < iters:
            waiting[person] = next(stream)

    while waiting:
        group = next_group(waiting, done, adapter.slots)
        batches = [waiting.pop(person) for person in group]
        crops = [batch[0] for batch in batches]
        losses = batch_losses(flux, adapter, group, batches, txt, y)
        losses.sum().backward()
        try:
            adapter.step(lr)
        except FloatingPointError:
            finite = losses.isfinite().tolist()
            bad = 0 if all(finite) else finite.index(False)
            error = personalize.NotFinite(done[group[bad]] + 1, crops[bad])
            error.person = group[bad]
            raise error from None

        for person in group:
            done[person] += 1
            if done[person] < iters:
                waiting[person] = next(streams[person])
            if on_step:
                on_step(done[person], person)


def next_group(waiting: dict[int, tuple], done: list[int], slots: int) -> list[int]:
    """At most `slots` people whose next batches have the same shape: the most frequent one."""
    by_shape = collections.defaultdict(list)
    for person in sorted(waiting, key=done.__getitem__):         # whoever is behind goes first
        _, latent, *_ = waiting[person]
        by_shape[latent.shape].append(person)
    return max(by_shape.values(), key=len)[:slots]


def batch_losses(
    flux: Flux,
    adapter: MetaLoRA,
    group: list[int],
    batches: list[tuple],
    txt: list[Tensor],
    y: list[Tensor],
) -> Tensor:
    """The flow matching loss of a group of people (B,), one batch of `personalize.batches` each."""
    crops, *tensors = zip(*batches)
    latent, noise, weight, t = [torch.cat(parts).to(adapter.device) for parts in tensors]
    group_txt, group_y = [], []
    for person, crop in zip(group, crops):
        caption = crop if len(txt[person]) > 1 else 0            # or one caption for all crops
        group_txt.append(txt[person][caption])
        group_y.append(y[person][caption])
    adapter.assign(torch.tensor(group))
    return flow_matching_loss(
        flux,
        latent,
        noise,
        t,
        torch.stack(group_txt),
        torch.stack(group_y),
        guidance=1.0,
        weight=weight,
    )


# --------------------------------------------------------------------------------------------------
# Everything that --out holds


class Run:
    """Trains every method on every person, then samples every prompt at every seed.

    What exists in --out is kept. Results do not depend on interruptions: people train as if alone,
    and a batch of images is always sampled as a whole."""
    def __init__(
        self,
        args: argparse.Namespace,
        people: list[Person],
        prompts: dict[str, list[str | None]],
        interruption: Interruption,
    ) -> None:
        self.args = args
        self.people = people
        self.prompts = prompts
        self.interruption = interruption
        self.batch_size = 16 if is_small(args.folder) else 1     # of sampling
        self.flux = None                                         # until `load`
        self.encoded = {}

    def lora_path(self, setting: Setting, person: Person) -> Path:
        return self.args.out / "loras" / setting.label / f"{person.name}.safetensors"

    def pictures(self, setting: Setting, person: Person) -> list[Picture]:
        """All images of a person with a setting, seed after seed, whether they exist or not."""
        folder = self.args.out / "images" / setting.label / person.name
        pictures = []
        for seed in range(self.args.seeds):
            for i, text in enumerate(self.prompts[person.name]):
                if text is not None:
                    path = folder / f"{i}_{seed}.png"
                    pictures.append(Picture(setting.label, person.name, i, seed, path, text))
        return pictures

    def missing_batches(self, setting: Setting, person: Person) -> list[list[Picture]]:
        """Batches with a missing image. How images are grouped does not depend on what exists,
        since rounding depends on the batch."""
        pictures = self.pictures(setting, person)
        missing = []
        for seed in range(self.args.seeds):
            of_seed = [picture for picture in pictures if picture.seed == seed]
            for start in range(0, len(of_seed), self.batch_size):
                batch = of_seed[start:start + self.batch_size]
                if not all(picture.path.is_file() for picture in batch):
                    missing.append(batch)
        return missing

    def load(self) -> None:
        """Encodes all texts, then loads the autoencoder and the transformer; once in a run."""
        if self.flux is not None:
            return
        args = self.args
        texts = []
        for prompts in self.prompts.values():
            texts += [text for text in prompts if text]
        for captions in args.captions.values():
            texts += captions.values()
        self.texts = encode_prompts(args.folder, texts, args.device, args.dtype)
        self.autoencoder = load_autoencoder(args.folder, args.device, args.dtype)
        steps = max(args.iters or [0]) + args.steps
        self.flux = open_flux(args, args.device, steps)

    def encode(self, augment: bool) -> tuple[list, list, list, list]:
        """Everybody's latents (on the CPU), weights, txt, and y, as `train_together` takes them."""
        if augment in self.encoded:
            return self.encoded[augment]
        args = self.args
        latents, weights, txt, y = [], [], [], []
        name = "crops" if augment else "photos"
        for person in tqdm(self.people, name, disable=None, leave=False):
            crops = photos.load_crops(
                references_of(person), args.resolution, augment, args.aspects, args.scales)
            crop_latents, crop_weights = personalize.encode_crops(
                self.autoencoder, crops, args.background, args.mirror)
            latents.append([latent.cpu() for latent in crop_latents])
            weights.append(crop_weights)

            captions = args.captions[person.name]
            texts = [self.texts[captions[crop.photo]] for crop in crops]
            crop_txt, crop_y = zip(*texts)
            txt.append(torch.cat(crop_txt).to(args.device))
            y.append(torch.cat(crop_y).to(args.device))
            self.interruption.raise_if_asked()
        self.encoded[augment] = latents, weights, txt, y
        return self.encoded[augment]

    def sample(self, setting: Setting, person: Person, bar: tqdm) -> None:
        """Samples the missing images of a person with a setting."""
        batches = self.missing_batches(setting, person)
        if not batches:
            return
        self.load()
        args = self.args
        loras = []
        if setting.rank:
            lora = load_lora(self.lora_path(setting, person), self.flux.config)
            loras.append((lora, 1.0))
        apply_loras(self.flux, loras)
        for batch in batches:
            latents = sample_latents(
                self.flux,
                self.texts,
                jobs=[(picture.text, picture.seed) for picture in batch],
                width=args.size,
                height=args.size,
                steps=args.steps,
                guidance=args.guidance,
                batch_size=len(batch),
                on_step=self.interruption.raise_if_asked,
            )
            for picture, latent in zip(batch, list(latents)):
                image = decode_latent(self.autoencoder, latent)
                save_png(image, picture.path, {
                    "prompt_text": picture.text,
                    "seed": picture.seed,
                    "identity": person.name,
                    "method": setting.title,
                })
                bar.update()

    def finish(self) -> list[Picture]:
        """Trains and samples all that is missing, and frees the models -> all images."""
        settings = settings_of(self.args)
        for method, rank in dict.fromkeys((s.method, s.rank) for s in settings if s.rank):
            Training(self, method, rank).finish()

        pairs = list(itertools.product(settings, self.people))
        missing = 0
        for setting, person in pairs:
            missing += sum(map(len, self.missing_batches(setting, person)))
        with tqdm(total=missing, desc="sampling", unit="image", disable=None) as bar:
            for setting, person in pairs:
                self.sample(setting, person, bar)

        self.flux = None
        self.autoencoder = None
        free(self.args.device)
        pictures = []
        for setting, person in pairs:
            pictures += self.pictures(setting, person)
        return pictures


class Training:
    """All LoRAs of one method and rank: everybody is a row of one identity bank."""
    def __init__(self, run: Run, method: str, rank: int) -> None:
        self.run = run
        self.args = run.args
        self.method = method
        self.rank = rank
        self.settings = {}                       # {iterations: Setting}
        for iterations in iterations_of(method, self.args.iters):
            self.settings[iterations] = Setting(method, rank, iterations)
        self.state = self.args.out / "state" / f"{method}_r{rank}.safetensors"

    def finish(self) -> None:
        """Trains until every LoRA is saved."""
        run = self.run
        if not any(map(self.missing, run.people)):
            return
        run.load()
        latents, weights, txt, y = run.encode(augment=self.method != "lora")
        self.adapter = self.make_adapter()
        self.resume()
        sizes = set()
        for person_latents in latents:
            sizes |= {latent.shape[-2:] for latent in person_latents}
        largest = max(sizes, key=math.prod)
        fit_training(self.adapter, largest, txt[0].shape[1], self.args.recompute)

        steps = self.adapter.bank.steps.tolist()
        for index, done in enumerate(steps):
            if done in self.settings:            # the process may have died before saving the LoRA
                self.save_lora(index, done)
        last = max(self.settings)
        left = sum(max(0, last - done) for done in steps)
        name = f"{self.method}, rank {self.rank}"
        lr = self.args.rates[self.method]
        self.saved = time.monotonic()
        try:
            with tqdm(total=left, desc=f"training {name}", disable=None) as self.bar:
                train_together(run.flux, self.adapter, latents, weights, txt, y, last, lr,
                               self.args.seed, self.on_step)
        except personalize.NotFinite as error:
            person = run.people[error.person].name
            raise FloatingPointError(f"{name}, {person}: {error}; try a learning rate below "
                                     f"--lr {self.method}={lr:g}") from None
        self.save_state()
        apply_loras(run.flux, [])

    def missing(self, person: Person) -> list[int]:
        """The iterations whose LoRA of this person does not exist."""
        path = self.run.lora_path
        return [i for i, setting in self.settings.items() if not path(setting, person).is_file()]

    def make_adapter(self) -> MetaLoRA:
        """The adapter, with a row for each person. All rows start alike, as in separate runs."""
        args = self.args
        run = self.run
        lomd = args.learned_lomd if kind_of(self.method) == "meta-lora" else None
        if self.method == "random-lomd":
            r1 = len(next(iter(lomd.values())))
            lomd = random_lomd(find_targets(run.flux), r1, args.seed)
        slots = min(len(run.people), people_at_once(run.flux, self.rank))
        adapter = MetaLoRA(run.flux, self.rank, lomd, num_identities=0, slots=slots)
        row = adapter.new_row(torch.Generator().manual_seed(args.seed))
        rows = row.repeat(len(run.people), 1).to(args.device)
        adapter.bank = IdentityBank(rows)
        return adapter

    def resume(self) -> None:
        """Loads the saved rows, unless they are past an iteration whose LoRA is missing."""
        if not self.state.is_file():
            return
        parts = {}
        for name, value in load_file(self.state).items():
            parts[name] = value.clone().to(self.args.device)
        for person, done in zip(self.run.people, parts["steps"].tolist()):
            if any(iterations < done for iterations in self.missing(person)):
                return
        if parts["weight"].shape == self.adapter.bank.weight.shape:
            self.adapter.bank = IdentityBank(*(parts[name] for name in IdentityBank.PARTS))

    def on_step(self, iteration: int, index: int) -> None:
        self.bar.update()
        if iteration in self.settings:
            self.save_lora(index, iteration)
        interruption = self.run.interruption
        if interruption.asked or time.monotonic() - self.saved > SAVE_EVERY:
            self.save_state()
            self.saved = time.monotonic()
        interruption.raise_if_asked()

    def save_state(self) -> None:
        """All rows with their moments and step counts, from which training resumes."""
        bank = self.adapter.bank
        parts = {name: getattr(bank, name).cpu() for name in IdentityBank.PARTS}
        self.state.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.state) as part:
            save_file(parts, part)

    def save_lora(self, index: int, iterations: int) -> None:
        args = self.args
        person = self.run.people[index]
        path = self.run.lora_path(self.settings[iterations], person)
        captions = dict.fromkeys(args.captions[person.name].values())
        path.parent.mkdir(parents=True, exist_ok=True)
        save_lora(path, self.adapter.collapse(index), metadata={
            "method": self.method,
            "rank": str(self.rank),
            "iterations": str(iterations),
            "seed": str(args.seed),
            "learning_rate": f"{args.rates[self.method]:g}",
            "prompt": " | ".join(captions),
            "model": Path(args.model).name,
            "made_by": "paper/compare.py",
            **photos.fingerprints(references_of(person)),
        })


# --------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="paper.compare", allow_abbrev=False,
                    description="Compares methods, ranks, and iteration counts as the paper does.")
    add = parser.add_argument
    add_options(add)
    add("--methods", nargs="+", choices=tuple(METHODS), default=["meta-lora", "lora-crops", "lora"],
        help="methods to compare; random-lomd is Meta-LoRA over random weights, none is the model "
        "without a LoRA (default: meta-lora lora-crops lora)")
    add("--ranks", type=positive, nargs="+", default=[1], metavar="R",
        help="ranks of the LoRAs (default: 1)")
    add("--iters", type=positive, nargs="+", metavar="N",
        help="iteration counts, all from one training (default: 375; LoRA methods 625)")
    add("--seeds", type=positive, default=5, help="images per prompt (default: 5)")
    add("--photos", type=positive, default=1, metavar="N",
        help="photos per person to train on (default: 1)")
    add("--lr", nargs="+", default=[], metavar="[METHOD=]LR",
        help="learning rates (default: the model's; 4e-4 for FLUX.1)")
    add("--lomd", type=Path,
        help="weights of stage 1 (default: lomd.safetensors in the model's folder, else here)")
    add("--prompt", help="caption of photos without a caption file; may contain [man/woman] "
        "(default: the model's)")
    add("--resolution", type=positive, nargs="+", metavar="PIXELS",
        help="resolutions of training crops (default: the model's; 1024 for FLUX.1)")
    add("--size", type=positive,
        help="width and height of generated images (default: the model's; 1024 for FLUX.1)")
    add("--steps", type=positive, default=STEPS, help=f"Euler steps (default: {STEPS})")
    add("--guidance", type=float, help="guidance input (default: the model's; 3.5 for FLUX.1)")
    add("--seed", type=int, default=0, help="seed of the training (default: 0)")
    add_speed_options(add, training=True, parts=False)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for bad options before anything large is read."""
    check_writable(args.out, "--out", args.data)
    args.methods = list(dict.fromkeys(args.methods))
    args.ranks = sorted(set(args.ranks))
    if args.iters:
        args.iters = sorted(set(args.iters))
    args.device = pick_device(args.device)
    args.rates = read_rates(args.lr)
    for args.lr in [*args.rates.values(), None]:
        check_training(args)
    if args.size and args.size % 16:
        raise ValueError(f"--size must be a multiple of 16, not {args.size}")


def read_rates(words: list[str]) -> dict[str, float]:
    """Words of --lr -> {method: learning rate}; "" stands for all other methods."""
    rates = {}
    for word in words:
        method, _, rate = word.rpartition("=")
        if method and method not in METHODS:
            raise ValueError(f"--lr {word}: no method {method!r}; there are {', '.join(METHODS)}")
        try:
            rates[method] = finite_number(rate)
        except ValueError:
            raise ValueError(f"--lr {word}: {rate!r} is not a number") from None
    return rates


def take_defaults(args: argparse.Namespace) -> None:
    """Finds the model (may download it) and its LoMD, and collects in args.settings all that
    decides about results."""
    take_model(args, args.device, "lora")
    general = args.rates.pop("", None)
    given = args.rates
    args.rates = {}
    for method in METHODS:
        if method != "none":
            default = learning_rate(args.folder, kind_of(method))
            args.rates[method] = given.get(method) or general or default
    args.size = args.size or model_defaults(args.folder)["resolution"]

    lomd = "none"
    args.learned_lomd = None
    if {"meta-lora", "random-lomd"} & set(args.methods):
        args.learned_lomd, lomd, untrained = read_lomd(args.folder, args.lomd)
        if untrained and "meta-lora" in args.methods:
            note("this LoMD is random and was never trained")

    args.settings = {
        "layout": "numbers of a row by width",
        "model": flux_fingerprint(args.folder),
        "autoencoder": autoencoder_fingerprint(args.folder),
        "lomd": lomd,
        "learning rates": args.rates,
        "dtype": f"{args.dtype} fp8" if args.fp8 else str(args.dtype),
    }
    for name in ("resolution", "size", "steps", "guidance", "seed", "aspects", "scales",
                 "background", "mirror"):
        args.settings[name] = getattr(args, name)


def settings_now(args: argparse.Namespace, people: list[Person], prompts: dict) -> dict:
    """args.settings, and what the people, their captions, and their prompts are, as JSON has it."""
    references = []
    captions = {}
    for person in people:
        digests = [digest(path.read_bytes()) for path in references_of(person)]
        references.append(" ".join([person.name, *digests]))
        captions[person.name] = list(args.captions[person.name].values())
    now = dict(args.settings)
    now["people and their references"] = references
    now["captions"] = captions
    now["prompts"] = prompts
    return json.loads(json.dumps(now))


def check_settings(out: Path, now: dict) -> None:
    """Writes settings.json; raises ValueError if --out was made with other settings."""
    path = out / "settings.json"
    if path.exists():
        before = JsonFile(path)
        if "none" in (now["lomd"], before["lomd"]):      # a LoMD may come in with a later command
            now["lomd"] = before["lomd"] = max(now["lomd"], before["lomd"])
        for name, value in now.items():
            was = before.get(name, "not written down")
            if was == value:
                continue
            detail = ""
            if len(f"{was}{value}") < 200:
                detail = f": it was {was} and is {value}"
            raise ValueError(f"--out {out} was made with another setting of {name}{detail}; "
                             "choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(now, indent=1).encode())


def compare(argv: list[str] | None = None, quiet: bool = False) -> None:
    """The command. quiet: only scores.json and tables.md, for a script that reads them."""
    start = time.perf_counter()
    args = parse(argv)
    check(args)
    people = read_people(args.data, args.reference, args.gender, args.photos)
    prompts = prompts_for(people, args.prompts, own_folder(args.model))
    judges = Judges(args.model, args.face_weights, args.clip, args.device)
    real = embed_real(judges, people)
    take_defaults(args)
    largest = max(args.size, *args.resolution) // 8
    check_training_memory(args, args.device, (largest, largest), max(args.ranks), r1=16,
                          people=len(people))
    args.captions = {}
    for person in people:
        prompt = fill(args.prompt, person.gender)
        args.captions[person.name] = captions_beside(references_of(person), prompt)
    check_settings(args.out, settings_now(args, people, prompts))

    with Interruption() as interruption:
        pictures = Run(args, people, prompts, interruption).finish()
    sampled = time.perf_counter()
    rows, problems = score_all(judges, real, pictures, args.out / "parts")
    tell(problems)
    methods, quoted = report(
        args.out,
        people,
        rows,
        real,
        judges,
        problems,
        args.no_face_as_zero,
        args.paper,
        base=Path(args.model).name,
        settings=args.settings | {"reference": args.reference},
        describe=describe,
    )
    if quiet:
        return
    figures(methods, quoted, args.out)
    sheets(pictures, people, args.out, describe)
    print((args.out / "tables.md").read_text("utf-8"))
    images = sorted(path.name for path in args.out.glob("*.png"))
    print(f"{args.out}: scores.json, tables.md, {', '.join(images)}")
    end = time.perf_counter()
    print(f"seconds: {sampled - start:.0f} for the images, {end - sampled:.0f} for the rest")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 training diverged or out of memory, 2 bad input, 130 Ctrl-C."""
    return run_script("paper.compare", compare, argv)


if __name__ == "__main__":
    sys.exit(main())
