"""The paper's comparison: methods, ranks, iterations; many people as rows of one bank, drawn and scored.

    python -m paper.compare --data people/ --methods lora lora-crops meta-lora --ranks 1 4 --seeds 2

Everybody is personalised by every method from one picture, and every prompt is drawn at every seed. To --out
go scores.json, tables.md, figures, contact sheets, LoRAs and pictures. The same command goes on where it was
stopped; --methods, --ranks, --iters and --seeds may name more.

Source: "Meta-LoRA" (Topal et al. 2025), section 4 and appendix F.
"""
import argparse
import collections
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
from support.checkpoints import (add_speed_options, autoencoder_fingerprint, check_training_memory, encode_prompts,
                                 flux_fingerprint, is_small, learning_rate, load_autoencoder, model_defaults,
                                 open_flux, take_model)
from support.common import (Interruption, JsonFile, check_apart, check_training, digest, finite_number, free,
                            note, Parser, pick_device, positive, run_script, save_png, whole, write_whole)
from support.judges import Picture, own_folder, prompts_for
from support.lora_files import load_lora, read_lomd, save_lora
from support.memory import fit_training
from support.names import find_targets
from support.people import Person, captions_beside, fill, read_people


class Setting(NamedTuple):
    """A row of the tables: who was trained how, for how long. rank and iterations 0: nothing was."""
    method: str
    rank: int = 0
    iterations: int = 0

    @property
    def label(self) -> str:
        return f"{self.method}_r{self.rank}_i{self.iterations}" if self.rank else self.method

    @classmethod
    def read(cls, label: str) -> "Setting":
        match = re.fullmatch(r"(.+)_r(\d+)_i(\d+)", label)
        return cls(match[1], int(match[2]), int(match[3])) if match else cls(label)

    @property
    def title(self) -> str:
        name = METHODS.get(self.method, self.method)
        return f"Rank-{self.rank} {name}, {self.iterations} iterations" if self.rank else name


def describe(label: str) -> dict:
    """What the tables and figures call a row, and its method, rank and iterations."""
    setting = Setting.read(label)
    return {"title": setting.title, **setting._asdict()}


def kind_of(method: str) -> str:
    """What metalora.py calls a method: "lora" or "meta-lora"."""
    return "lora" if method.startswith("lora") else "meta-lora"


def iterations_of(method: str, given: list[int] | None) -> list[int]:
    return sorted(given or [personalize.ITERATIONS[kind_of(method)]])


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """All rows of the tables, method after method."""
    return [setting for method in args.methods for setting in ([Setting(method)] if method == "none" else [
        Setting(method, rank, i) for rank in args.ranks for i in iterations_of(method, args.iters)])]


def people_at_once(flux: Flux, rank: int) -> int:
    """How many people make the most of a step, as measured on the baby at ranks 1 to 16: each widens every
    layer by its rank. A large model fills the machine with one."""
    small = sum(parameter.numel() for parameter in flux.parameters()) < 1e9
    return max(1, round(16 / rank ** 0.5)) if small else 1


def train_together(flux: Flux, adapter: MetaLoRA, people: list[list[Tensor]], txt: list[Tensor],
                   y: list[Tensor], iters: int, lr: float, seed: int = 0,
                   on_step: Callable[[int, float, int], object] | None = None,
                   weights: list[list[Tensor]] | None = None) -> None:
    """personalize.train for each row of the adapter: `iters` steps, less those that a row has behind it.

    people, weights: for each row what `encode_crops` gave; None: all places count alike. txt (K, T, _) and
    y (K, _) of each: captions of the K crops, or one of all, as in `train`. A person trains as if alone.
    Those whose next batches have the same shape go through the network together, at most `adapter.slots`; the
    most frequent shape goes first.
    on_step(iteration, loss, person) comes after each step, from 1. Raises NotFinite, with the person.
    """
    weights = weights or [[torch.ones(len(latent), 1, 1, 1) for latent in latents] for latents in people]
    streams = [personalize.batches(latents, own, seed) for latents, own in zip(people, weights)]
    done, waiting = adapter.bank.steps.tolist(), {}
    for person, stream in enumerate(streams):
        for _ in range(done[person]):
            next(stream)
        if done[person] < iters:
            waiting[person] = next(stream)
    while waiting:
        alike = collections.defaultdict(list)
        for person in sorted(waiting, key=done.__getitem__):                   # who is behind goes first
            alike[waiting[person][1].shape].append(person)
        group = max(alike.values(), key=len)[:adapter.slots]
        crops, *tensors = zip(*(waiting[person] for person in group))
        latent, noise, weight, t = (torch.cat(parts).to(adapter.device) for parts in tensors)
        adapter.assign(torch.tensor(group))
        text = (torch.stack([part[person][crop % len(part[person])] for person, crop in zip(group, crops)])
                for part in (txt, y))
        losses = flow_matching_loss(flux, latent, noise, t, *text, 1.0, weight)                        # (B,)
        losses.sum().backward()
        of_person = losses.detach().view(len(group), -1).mean(dim=1).tolist()
        try:
            adapter.step(lr)
        except FloatingPointError:
            at = next((i for i, loss in enumerate(of_person) if not abs(loss) < float("inf")), 0)
            error = personalize.NotFinite(done[group[at]] + 1, crops[at])
            error.person = group[at]
            raise error from None
        for person, loss in zip(group, of_person):
            done[person] += 1
            waiting.pop(person)
            if done[person] < iters:
                waiting[person] = next(streams[person])
        for person, loss in zip(group, of_person) if on_step else ():
            on_step(done[person], loss, person)


class Run:
    """Personalises everybody by every method, and draws every prompt at every seed; what is there stays.

    Results do not depend on interruptions: people train alone though together, a batch is drawn whole.
    """
    def __init__(self, args: argparse.Namespace, people: list[Person], prompts: dict[str, list[str | None]],
                 interruption: Interruption) -> None:
        self.args, self.people, self.prompts, self.interruption = args, people, prompts, interruption
        self.device, self.out, self.small = args.device, args.out, is_small(args.folder)
        self.flux = self.texts = self.autoencoder = None
        self.encoded = {}

    def lora_path(self, setting: Setting, person: Person) -> Path:
        return self.out / "loras" / setting.label / f"{person.name}.safetensors"

    def pictures(self, setting: Setting, person: Person) -> list[Picture]:
        """What is to be there in the end, seed after seed."""
        folder, texts = self.out / "images" / setting.label / person.name, self.prompts[person.name]
        return [Picture(setting.label, person.name, i, seed, folder / f"{i}_{seed}.png", text)
                for seed in range(self.args.seeds) for i, text in enumerate(texts) if text is not None]

    def batches(self, setting: Setting, person: Person) -> list[list[Picture]]:
        """Batches of which a picture is missing: the same whatever is there, and so are the pictures."""
        size, batches, pictures = 16 if self.small else 1, [], self.pictures(setting, person)
        for seed in range(self.args.seeds):
            own = [p for p in pictures if p.seed == seed]
            batches += [own[i:i + size] for i in range(0, len(own), size)]
        return [batch for batch in batches if not all(p.path.is_file() for p in batch)]

    def load(self) -> None:
        """Texts, encoded; then the transformer and the autoencoder, which stay."""
        if self.flux is None:
            args, words = self.args, [text for own in self.prompts.values() for text in own if text]
            words += [text for own in args.captions.values() for text in own.values()]
            self.texts = encode_prompts(args.folder, words, self.device, args.dtype)
            self.autoencoder = load_autoencoder(args.folder, self.device, args.dtype)
            steps = max(args.iters or [0]) + args.steps
            self.flux = open_flux(args, self.device, steps)

    def latents(self, augment: bool) -> tuple[tuple, ...]:
        """What personalize.py trains on, of everybody's references: latents on the CPU, weights of the loss,
        txt and y."""
        if augment not in self.encoded:
            args, everybody = self.args, []
            for person in tqdm(self.people, "crops" if augment else "photos", disable=None, leave=False):
                crops = photos.load_crops([person.reference, *person.more], args.resolution, augment,
                                          args.aspects, args.scales)
                latents, own = personalize.encode_crops(self.autoencoder, crops, args.background, args.mirror)
                texts = [self.texts[args.captions[person.name][crop.photo]] for crop in crops]
                everybody.append(([latent.cpu() for latent in latents], own,
                                  *(torch.cat(parts).to(self.device) for parts in zip(*texts))))
                self.interruption.raise_if_asked()
            self.encoded[augment] = tuple(zip(*everybody))
        return self.encoded[augment]

    def adapter(self, method: str, rank: int) -> MetaLoRA:
        """A row for each person; all start alike, as in runs of their own."""
        args, lomd = self.args, self.args.learned_lomd if kind_of(method) == "meta-lora" else None
        if method == "random-lomd":
            lomd = random_lomd(find_targets(self.flux), len(next(iter(lomd.values()))), args.seed)
        slots = min(len(self.people), people_at_once(self.flux, rank))
        adapter = MetaLoRA(self.flux, rank, lomd, num_identities=0, slots=slots)
        row = adapter.new_row(torch.Generator().manual_seed(args.seed))
        adapter.bank = IdentityBank(row.repeat(len(self.people), 1).to(self.device))
        return adapter

    def resume(self, adapter: MetaLoRA, state: Path, settings: list[Setting]) -> None:
        """Takes the rows of a run before, unless a LoRA of an earlier iteration is asked for now."""
        if not state.is_file():
            return
        parts = {name: value.clone().to(self.device) for name, value in load_file(state).items()}
        lost = [person.name for person, steps in zip(self.people, parts["steps"].tolist()) for s in settings
                if s.iterations < steps and not self.lora_path(s, person).is_file()]
        if parts["weight"].shape == adapter.bank.weight.shape and not lost:
            adapter.bank = IdentityBank(*(parts[part] for part in IdentityBank.PARTS))

    def personalise(self, method: str, rank: int) -> None:
        """All LoRAs of a method and rank, of one training run: everybody is a row of one identity bank."""
        args = self.args
        settings = {i: Setting(method, rank, i) for i in iterations_of(method, args.iters)}
        if all(self.lora_path(s, person).is_file() for s in settings.values() for person in self.people):
            return
        self.load()
        latents, weights, txt, y = self.latents(method != "lora")
        adapter, state = self.adapter(method, rank), self.out / "state" / f"{method}_r{rank}.safetensors"
        self.resume(adapter, state, [*settings.values()])
        sizes = {latent.shape[-2:] for own in latents for latent in own}
        fit_training(adapter, max(sizes, key=math.prod), txt[0].shape[1], args.recompute)

        def save_lora_of(index: int, iterations: int) -> None:
            person = self.people[index]
            path = self.lora_path(settings[iterations], person)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_lora(path, adapter.collapse(index), metadata={
                "method": method, "rank": str(rank), "iterations": str(iterations), "seed": str(args.seed),
                "learning_rate": f"{args.rates[method]:g}",
                "prompt": " | ".join(dict.fromkeys(args.captions[person.name].values())),
                "model": Path(args.model).name, "made_by": "paper/compare.py",
                **photos.fingerprints([person.reference, *person.more])})

        def save_state() -> None:
            state.parent.mkdir(parents=True, exist_ok=True)
            with whole(state) as part:
                save_file({name: getattr(adapter.bank, name).cpu() for name in IdentityBank.PARTS}, part)

        for index, steps in enumerate(adapter.bank.steps.tolist()):
            if steps in settings:                  # a kill may come after the state and before the LoRA
                save_lora_of(index, steps)
        last, saved = max(settings), time.monotonic()
        left = sum(max(0, last - steps) for steps in adapter.bank.steps.tolist())

        def on_step(iteration: int, loss: float, index: int) -> None:
            nonlocal saved
            bar.update()
            if iteration in settings:
                save_lora_of(index, iteration)
            if time.monotonic() - saved > 30 or self.interruption.asked:
                save_state()
                saved = time.monotonic()
            self.interruption.raise_if_asked()

        try:
            with tqdm(total=left, desc=f"training {method}, rank {rank}", disable=None) as bar:
                train_together(self.flux, adapter, latents, txt, y, last, args.rates[method], args.seed,
                               on_step, weights)
        except personalize.NotFinite as error:
            raise FloatingPointError(f"{method}, rank {rank}, {self.people[error.person].name}: {error}; a "
                                     f"smaller --lr {method}={args.rates[method]:g} may help") from None
        save_state()
        apply_loras(self.flux, [])

    def draw(self, setting: Setting, person: Person, bar: tqdm) -> None:
        """A person's missing pictures of one setting."""
        batches = self.batches(setting, person)
        if not batches:
            return
        self.load()
        lora = load_lora(self.lora_path(setting, person), self.flux.config) if setting.rank else None
        apply_loras(self.flux, [(lora, 1.0)] if lora else [])
        side = self.args.size
        for batch in batches:
            jobs = [(p.text, p.seed) for p in batch]
            latents = sample_latents(self.flux, self.texts, jobs, side, side, self.args.steps,
                                     self.args.guidance, batch_size=len(jobs),
                                     on_step=self.interruption.raise_if_asked)
            for picture, latent in zip(batch, list(latents)):
                save_png(decode_latent(self.autoencoder, latent), picture.path, {
                    "prompt_text": picture.text, "seed": picture.seed, "identity": person.name,
                    "method": setting.title})
                bar.update()

    def everything(self) -> list[Picture]:
        """Trains and draws all that is missing -> all pictures; the models are dropped."""
        settings = settings_of(self.args)
        for method, rank in dict.fromkeys((s.method, s.rank) for s in settings if s.rank):
            self.personalise(method, rank)
        both = [(setting, person) for setting in settings for person in self.people]
        todo = sum(len(batch) for one in both for batch in self.batches(*one))
        with tqdm(total=todo, desc="drawing", unit="picture", disable=None) as bar:
            for one in both:
                self.draw(*one, bar)
        self.flux = self.autoencoder = None
        free(self.device)
        return [picture for one in both for picture in self.pictures(*one)]


# The command ------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="paper.compare", allow_abbrev=False, description="The paper's comparison.")
    add = parser.add_argument
    add_options(add)
    add("--methods", nargs="+", choices=tuple(METHODS), default=["meta-lora", "lora-crops", "lora"],
        help="what to compare (default: meta-lora lora-crops lora); random-lomd: a control, none: the floor")
    add("--ranks", type=positive, nargs="+", default=[1], metavar="R", help="of the LoRAs (default: 1)")
    add("--iters", type=positive, nargs="+", metavar="N", help="of one run each (default: 375, LoRA 625)")
    add("--seeds", type=positive, default=5, help="pictures of each prompt (default: 5)")
    add("--photos", type=positive, default=1, metavar="N", help="of a person, to personalise on (default: 1)")
    add("--lr", nargs="+", default=[], metavar="[METHOD=]LR", help="learning rates (default: the model's)")
    add("--lomd", type=Path, help="of stage 1 (default: lomd.safetensors of the model's folder, else here)")
    add("--prompt", help="of a picture without a caption beside it; may have [man/woman] (default: the "
        "model's)")
    add("--resolution", type=positive, nargs="+", metavar="PIXELS", help="of crops (default: the model's)")
    add("--size", type=positive, help="side of the pictures (default: the model's; FLUX.1's is 1024)")
    add("--steps", type=positive, default=STEPS, help=f"Euler steps (default: {STEPS})")
    add("--guidance", type=float, help="guidance input (default: the model's; FLUX.1's is 3.5)")
    add("--seed", type=int, default=0, help="of the training (default: 0)")
    add_speed_options(add, training=True, parts=False)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """ValueError for what can be refused before anything large is read."""
    check_apart(args.out, "--out", args.data)
    args.methods, args.ranks = list(dict.fromkeys(args.methods)), sorted(set(args.ranks))
    args.iters = args.iters and sorted(set(args.iters))
    args.device, args.rates = pick_device(args.device), {}
    for word in args.lr:
        method, _, rate = word.rpartition("=")
        if method and method not in METHODS:
            raise ValueError(f"--lr {word}: no method {method!r}; there are {', '.join(METHODS)}")
        try:
            args.rates[method] = finite_number(rate)
        except ValueError:
            raise ValueError(f"--lr {word}: {rate!r} is no number") from None
    for args.lr in [*args.rates.values(), None]:
        check_training(args)
    if args.size and args.size % 16:
        raise ValueError(f"--size takes multiples of 16, not {args.size}")


def take_defaults(args: argparse.Namespace) -> None:
    """Finds the model (may download) and its LoMD; what decides about results goes into args.settings."""
    general = args.rates.pop("", None)
    take_model(args, args.device, "lora")
    args.rates = {m: args.rates.get(m) or general or learning_rate(args.folder, kind_of(m))
                  for m in METHODS if m != "none"}
    args.size = args.size or model_defaults(args.folder)["resolution"]
    args.learned_lomd, lomd = None, "none"
    if {"meta-lora", "random-lomd"} & set(args.methods):
        args.learned_lomd, lomd, untrained = read_lomd(args.folder, args.lomd)
        if untrained and "meta-lora" in args.methods:
            note("this LoMD is random and was never trained")
    of_model = "resolution", "size", "steps", "guidance", "seed", "aspects", "scales", "background", "mirror"
    args.settings = {"layout": "numbers of a row by width", "model": flux_fingerprint(args.folder),
                     "autoencoder": autoencoder_fingerprint(args.folder), "lomd": lomd,
                     "learning rates": args.rates,
                     "dtype": str(args.dtype) + " fp8" * args.fp8,
                     **{name: getattr(args, name) for name in of_model}}


def check_settings(args: argparse.Namespace, people: list[Person], prompts: dict) -> None:
    """What --out was made with: written by the first command; ValueError for one that differs."""
    hashes = lambda paths: [digest(path.read_bytes()) for path in paths]
    shown = [" ".join([p.name, *hashes((p.reference, *p.more))]) for p in people]
    captions = {name: list(own.values()) for name, own in args.captions.items()}
    now = args.settings | {"people and their references": shown, "captions": captions, "prompts": prompts}
    now, path = json.loads(json.dumps(now)), args.out / "settings.json"
    if path.exists():
        before = JsonFile(path)
        if "none" in (now["lomd"], before["lomd"]):       # methods without one came first, or come now
            now["lomd"] = before["lomd"] = max(now["lomd"], before["lomd"])
        for name, value in now.items():
            if (was := before.get(name, "not written down")) != value:
                detail = f": it was {was} and is {value}" if len(f"{was}{value}") < 200 else ""
                raise ValueError(f"--out {args.out} was made with another setting of {name}{detail}; "
                                 "name a new folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(now, indent=1).encode())


def compare(argv: list[str] | None = None, quiet: bool = False) -> None:
    """The command. quiet: scores.json and tables.md alone, for a script that goes on with them."""
    args, start = parse(argv), time.perf_counter()
    check(args)
    people = read_people(args.data, args.reference, args.gender, args.photos)
    prompts = prompts_for(people, args.prompts, own_folder(args.model))
    judges = Judges(args.model, args.face_weights, args.clip, args.device)
    real = embed_real(judges, people)
    take_defaults(args)
    largest = max(args.size, *args.resolution) // 8
    check_training_memory(args, args.device, (largest, largest), max(args.ranks), 16, people=len(people))
    args.captions = {p.name: captions_beside([p.reference, *p.more], fill(args.prompt, p.gender))
                     for p in people}
    check_settings(args, people, prompts)
    with Interruption() as interruption:
        pictures = Run(args, people, prompts, interruption).everything()
    drawn = time.perf_counter()
    rows, problems = score_all(judges, real, pictures, args.out / "parts")
    for problem in problems:
        note(" ".join(problem.split()))
    methods, quoted = report(args.out, people, rows, real, judges, problems, args.no_face_as_zero, args.paper,
                             Path(args.model).name, args.settings | {"reference": args.reference}, describe)
    if quiet:
        return
    figures(methods, quoted, args.out)
    sheets(pictures, people, args.out, describe)
    print((args.out / "tables.md").read_text("utf-8"))
    print(f"{args.out}: scores.json, tables.md, {', '.join(sorted(p.name for p in args.out.glob('*.png')))}")
    print(f"seconds: {drawn - start:.0f} for the pictures, {time.perf_counter() - drawn:.0f} for the rest")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 training diverged or no memory, 2 bad input, 130 Ctrl-C; it goes on."""
    return run_script("paper.compare", compare, argv)


if __name__ == "__main__":
    sys.exit(main())
