"""The paper's comparison: methods, ranks and numbers of iterations, many people as rows of one bank, drawn and scored.

    python -m paper.compare --data people/ --methods lora lora-crops meta-lora --ranks 1 4 --iters 250 375 --seeds 2

Everybody is personalised by every method from one picture, every prompt is drawn at every seed, and eval_rfacesim.py scores.
To --out go scores.json, tables.md, figures, contact sheets, LoRAs and pictures: the same command goes on where it was stopped
and adds what is new.

Source: "Meta-LoRA" (Topal et al. 2025), section 4 and appendix F.
"""
import argparse
import collections
import json
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
from eval_rfacesim import (Judges, Person, Picture, add_judges, check_out, digest, embed_real, fill, own_folder, prompts_for,
                           read_people, report, score_all)
from flux_model import Flux, flow_matching_loss
from metalora import IdentityBank, MetaLoRA, apply_loras, random_lomd
from paper.report import METHODS, figures, sheets
from sample import decode_latent, encode_prompts, sample_latents
from support import photos
from support.checkpoints import (add_speed_options, autoencoder_fingerprint, find_targets, flux_fingerprint, is_small,
                                 learning_rate, load_autoencoder, model_defaults, open_flux, take_model)
from support.common import (Interruption, JsonFile, Parser, check_training, free, note, pick_device, positive, run_script,
                            save_png, whole, write_whole)
from support.lora_files import load_lora, read_lomd, save_lora
from support.speed import blocks_of, recompute_blocks

CROPS = "aspects", "scales", "background", "mirror"


class Setting(NamedTuple):
    """A row of the tables: who was trained how, for how long. rank and iterations 0: nothing was."""
    method: str
    rank: int = 0
    iterations: int = 0

    @property
    def label(self) -> str:
        return f"{self.method}_r{self.rank}_i{self.iterations}" if self.rank else self.method

    @classmethod
    def read(cls, label: str):
        match = re.fullmatch(r"(.+)_r(\d+)_i(\d+)", label)
        return cls(match[1], int(match[2]), int(match[3])) if match else cls(label)

    @property
    def title(self) -> str:
        name = METHODS.get(self.method, self.method)
        return f"Rank-{self.rank} {name}, {self.iterations} iterations" if self.rank else name


def kind_of(method: str) -> str:
    """What metalora.py calls a method: "lora" or "meta-lora"."""
    return "lora" if method.startswith("lora") else "meta-lora"


def iterations_of(method: str, given: list[int] | None) -> list[int]:
    return sorted(given or [personalize.ITERATIONS[kind_of(method)]])


def settings_of(args: argparse.Namespace) -> list[Setting]:
    return [setting for method in args.methods for setting in ([Setting(method)] if method == "none" else [
        Setting(method, rank, i) for rank in args.ranks for i in iterations_of(method, args.iters)])]


def people_at_once(flux: Flux, rank: int) -> int:
    """How many people together make the most of a step: each widens every layer by its rank.

    Measured on the baby at ranks 1 to 16 (`bench.py --people 16`). A large model fills the machine with one.
    """
    small = sum(parameter.numel() for parameter in flux.parameters()) < 1e9
    return max(1, round(16 / rank ** 0.5)) if small else 1


def train_together(flux: Flux, adapter: MetaLoRA, people: list[list[Tensor]], txt: Tensor, y: Tensor, iters: int, lr: float,
                   seed: int = 0, on_step: Callable[[int, float, int], object] | None = None,
                   weights: list[list[Tensor]] | None = None) -> None:
    """personalize.train for many people: `iters` steps of flow matching for each row of the adapter.

    flux with `adapter` in it; people and weights: for each row what `encode_crops` gave; weights None: all places count alike;
    txt (N, T, _) and y (N, _): one caption for each. Rows that have steps behind them go on where they were.
    A person trains as if alone. But whose next batches have the same shape go through the network together, up
    to `adapter.slots` people: nobody waits for anybody, so the most frequent shape goes first.
    on_step(iteration, loss, person) is called after each step, counted from 1. Raises NotFinite.
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
        for person in sorted(waiting, key=done.__getitem__):                          # who is behind goes first
            alike[waiting[person][1].shape].append(person)
        group = max(alike.values(), key=len)[:adapter.slots]
        images, *tensors = zip(*(waiting[person] for person in group))
        latent, noise, weight, t = (torch.cat(parts).to(txt.device) for parts in tensors)          # (B, 16, h, w), .., (B,)
        rows = torch.tensor(group)

        adapter.assign(rows)
        losses = flow_matching_loss(flux, latent, noise, t, txt[rows], y[rows], 1.0, weight)        # (B,)
        losses.sum().backward()
        of_person = losses.detach().view(len(group), -1).cpu()
        try:
            adapter.step(lr)
        except FloatingPointError:
            at = next((i for i, own in enumerate(of_person) if not own.isfinite().all()), 0)
            error = personalize.NotFinite(done[group[at]] + 1, images[at])
            error.person = group[at]
            raise error from None
        for person in group:
            done[person] += 1
            if done[person] < iters:
                waiting[person] = next(streams[person])
            else:
                del waiting[person]
        if on_step:
            for person, loss in zip(group, of_person.mean(dim=1).tolist()):
                on_step(done[person], loss, person)


class Run:
    """Personalises everybody by every method, and draws every prompt at every seed; what is there already stays.

    Results do not depend on interruptions: people train alone though together, and a batch of pictures is drawn whole.
    """
    def __init__(self, args, people: list[Person], prompts: dict, interruption: Interruption):
        self.args, self.people, self.prompts, self.interruption = args, people, prompts, interruption
        self.device, self.out = args.device, args.out
        self.small = is_small(args.folder)
        self.flux = self.texts = self.autoencoder = None
        self.encoded = {}

    def lora_path(self, setting: Setting, person: Person) -> Path:
        return self.out / "loras" / setting.label / f"{person.name}.safetensors"

    def pictures(self, setting: Setting, person: Person) -> list[Picture]:
        """What is to be there in the end: seed after seed, so that more seeds come after what is there."""
        folder = self.out / "images" / setting.label / person.name
        return [Picture(setting.label, person.name, i, seed, folder / f"{i}_{seed}.png", text)
                for seed in range(self.args.seeds) for i, text in enumerate(self.prompts[person.name]) if text is not None]

    def batches(self, setting: Setting, person: Person) -> list[list[Picture]]:
        """Batches of which a picture is missing. They are the same whatever is there, and so are their pictures' bits."""
        size, batches, pictures = 16 if self.small else 1, [], self.pictures(setting, person)
        for seed in range(self.args.seeds):
            own = [p for p in pictures if p.seed == seed]
            batches += [own[i:i + size] for i in range(0, len(own), size)]
        return [batch for batch in batches if not all(p.path.is_file() for p in batch)]

    def load(self):
        """Texts, encoded; then the transformer and the autoencoder, which stay."""
        if self.flux is None:
            captions = [fill(self.args.prompt, p.gender) for p in self.people]
            words = dict.fromkeys(captions + [text for texts in self.prompts.values() for text in texts if text])
            self.texts = encode_prompts(self.args.folder, list(words), self.device, self.args.dtype)
            self.captions = [torch.cat(parts) for parts in zip(*(self.texts[caption] for caption in captions))]
            self.autoencoder = load_autoencoder(self.args.folder, self.device, self.args.dtype)
            tokens = max(self.args.size, *self.args.resolution) ** 2 // 256 + self.captions[0].shape[1]
            self.flux = open_flux(self.args, self.device, max(self.args.iters or [0]) + self.args.steps, tokens, training=True)
            every = 0 if self.small else len(blocks_of(self.flux))
            recompute_blocks(self.flux, every if self.args.recompute is None else self.args.recompute)

    def latents(self, augment: bool) -> tuple[tuple[list[Tensor], ...], tuple[list[Tensor], ...]]:
        """Of everybody's reference: what personalize.py trains on, kept on the CPU, and the weights of the loss beside it."""
        if augment not in self.encoded:
            everybody = []
            for person in tqdm(self.people, "crops" if augment else "photos", disable=None, leave=False):
                crops = photos.load_crops([person.reference, *person.more], self.args.resolution, augment,
                                               self.args.aspects, self.args.scales)
                latents, weights = personalize.encode_crops(self.autoencoder, crops, self.args.background, self.args.mirror)
                everybody.append(([latent.cpu() for latent in latents], weights))
                self.interruption.raise_if_asked()
            self.encoded[augment] = tuple(zip(*everybody))
        return self.encoded[augment]

    def personalise(self, method: str, rank: int):
        """All LoRAs of a method and rank, of one training run: everybody is a row of one identity bank."""
        args, settings = self.args, [Setting(method, rank, i) for i in iterations_of(method, self.args.iters)]
        if all(self.lora_path(s, person).is_file() for s in settings for person in self.people):
            return
        self.load()
        augment, kind, lomd = method != "lora", kind_of(method), None
        if kind == "meta-lora":
            lomd = args.learned_lomd
            if method == "random-lomd":
                lomd = random_lomd(find_targets(self.flux), len(next(iter(lomd.values()))), args.seed)
        people, weights = self.latents(augment)
        slots = min(len(people), people_at_once(self.flux, rank))
        adapter = MetaLoRA(self.flux, rank, lomd, num_identities=0, slots=slots)
        row = adapter.new_row(torch.Generator().manual_seed(args.seed))         # as everybody starts in a run of their own
        adapter.bank = IdentityBank(row.repeat(len(people), 1).to(self.device))
        state, by_iterations = self.out / "state" / f"{method}_r{rank}.safetensors", {s.iterations: s for s in settings}

        def save_lora_of(person: int, iterations: int):
            path = self.lora_path(by_iterations[iterations], self.people[person])
            path.parent.mkdir(parents=True, exist_ok=True)
            save_lora(path, adapter.collapse(person), metadata={
                "method": method, "rank": str(rank), "iterations": str(iterations), "seed": str(args.seed),
                "learning_rate": f"{args.rates[method]:g}", "prompt": fill(args.prompt, self.people[person].gender),
                "model": Path(args.model).name, "made_by": "paper/compare.py"})

        def save_state():
            state.parent.mkdir(parents=True, exist_ok=True)
            with whole(state) as part:
                save_file({name: getattr(adapter.bank, name).cpu() for name in IdentityBank.PARTS}, part)

        if state.is_file():
            parts = {name: value.clone().to(self.device) for name, value in load_file(state).items()}
            lost = [i for i, steps in enumerate(parts["steps"].tolist()) for s in settings
                    if s.iterations < steps and not self.lora_path(s, self.people[i]).is_file()]
            if parts["weight"].shape == adapter.bank.weight.shape and not lost:
                adapter.bank = IdentityBank(*(parts[part] for part in IdentityBank.PARTS))       # else: an earlier iteration is asked for now; from the start
        for person, steps in enumerate(adapter.bank.steps.tolist()):
            if steps in by_iterations:                     # a kill may come after the state and before the LoRA
                save_lora_of(person, steps)
        last = max(by_iterations)
        saved, left = time.monotonic(), sum(max(0, last - steps) for steps in adapter.bank.steps.tolist())

        def on_step(iteration, loss, person):
            nonlocal saved
            bar.update()
            if iteration in by_iterations:
                save_lora_of(person, iteration)
            if time.monotonic() - saved > 30 or self.interruption.asked:
                save_state()
                saved = time.monotonic()
            self.interruption.raise_if_asked()

        txt, y = (part.to(self.device) for part in self.captions)
        with tqdm(total=left, desc=f"training {method}, rank {rank}, {len(people)} people", disable=None) as bar:
            try:
                train_together(self.flux, adapter, people, txt, y, last, args.rates[method], seed=args.seed, on_step=on_step,
                                  weights=weights)
            except personalize.NotFinite as error:
                raise FloatingPointError(f"{method}, rank {rank}, {self.people[error.person].name}: {error}; a smaller --lr "
                                         f"{method}={args.rates[method]:g} may help") from None
        save_state()
        apply_loras(self.flux, [])

    def draw(self, setting: Setting, person: Person, bar):
        batches = self.batches(setting, person)
        if not batches:
            return
        self.load()
        apply_loras(self.flux, [])
        if setting.rank:
            apply_loras(self.flux, [(load_lora(self.lora_path(setting, person), self.flux.config), 1.0)])
        for batch in batches:
            jobs = [(p.text, p.seed) for p in batch]
            latents = sample_latents(self.flux, self.texts, jobs, self.args.size, self.args.size, self.args.steps,
                                     self.args.guidance, batch_size=len(jobs), on_step=self.interruption.raise_if_asked)
            for picture, latent in zip(batch, list(latents)):
                save_png(decode_latent(self.autoencoder, latent), picture.path, {
                    "prompt": picture.text, "seed": picture.seed, "identity": person.name, "method": setting.title})
                bar.update()

    def everything(self) -> list[Picture]:
        settings, pictures = settings_of(self.args), []
        for method, rank in dict.fromkeys((s.method, s.rank) for s in settings if s.rank):
            self.personalise(method, rank)
        todo = sum(len(batch) for s in settings for p in self.people for batch in self.batches(s, p))
        with tqdm(total=todo, desc="drawing", unit="picture", disable=None) as bar:
            for setting in settings:
                for person in self.people:
                    self.draw(setting, person, bar)
                    pictures += self.pictures(setting, person)
        self.flux = self.autoencoder = None
        free(self.device)
        return pictures


# ------------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="paper.compare", allow_abbrev=False, description="Personalise, draw and score: the paper's comparison.")
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="DIR", help="real pictures, as of eval_rfacesim.py")
    add("--out", type=Path, default=Path("report"), help="folder of all results; the same command goes on (default: report)")
    add("--model", default="flux-dev", help="flux-dev (default), flux-schnell, baby, or a folder; baby also judges by itself")
    add("--methods", nargs="+", choices=tuple(METHODS), default=["meta-lora", "lora-crops", "lora"],
        help="what to compare (default: meta-lora lora-crops lora); random-lomd is a control, none the floor")
    add("--ranks", type=positive, nargs="+", default=[1], metavar="R", help="ranks of the LoRAs (default: 1)")
    add("--iters", type=positive, nargs="+", metavar="N", help="iterations, of one run each (default: 375, LoRA 625)")
    add("--seeds", type=positive, default=5, help="pictures of each prompt (default: 5)")
    add("--prompts", type=Path, help="text file, as of eval_rfacesim.py")
    add("--reference", choices=("first", "all"), default="first", help="as of eval_rfacesim.py")
    add("--photos", type=positive, default=1, metavar="N", help="how many pictures of a person the methods see (default: 1)")
    add("--gender", choices=("man", "woman"), help="of people whose folder and captions do not say")
    add("--lr", nargs="+", default=[], metavar="[METHOD=]LR", help="learning rates (default: the model's)")
    add("--lomd", type=Path, help="weights of stage 1 (default: lomd.safetensors of the model's folder, else here)")
    add("--prompt", help="what the crops are called in training; may have [man/woman] (default: the model's)")
    add("--resolution", type=positive, nargs="+", metavar="PIXELS", help="of the crops (default: the model's)")
    add("--size", type=positive, help="side of the pictures (default: the model's; FLUX.1's is 1024)")
    add("--steps", type=positive, default=30, help="Euler steps (default: 30)")
    add("--guidance", type=float, help="guidance input (default: the model's; FLUX.1's is 3.5)")
    add("--seed", type=int, default=0, help="of the training (default: 0)")
    add_judges(add)
    add_speed_options(add, training=True)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """ValueError for what can be refused before anything large is read; fills in the defaults."""
    check_out(args.out, args.data)
    args.methods, args.ranks = list(dict.fromkeys(args.methods)), sorted(set(args.ranks))
    args.iters = args.iters and sorted(set(args.iters))
    args.device = pick_device(args.device)
    args.rates = {}
    for word in args.lr:
        method, _, rate = word.rpartition("=")
        if method and method not in METHODS:
            raise ValueError(f"--lr {word}: no method {method!r}; there are {', '.join(METHODS)}")
        try:
            args.rates[method] = float(rate)
        except ValueError:
            raise ValueError(f"--lr {word}: {rate!r} is no number") from None
    for args.lr in [*args.rates.values(), None]:
        check_training(args)
    if args.size and args.size % 16:
        raise ValueError(f"--size takes multiples of 16, not {args.size}")


def take_defaults(args: argparse.Namespace) -> None:
    """Finds the model (may download) and its LoMD, and what decides about results into args.settings."""
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
    args.settings = {"model": flux_fingerprint(args.folder), "autoencoder": autoencoder_fingerprint(args.folder),
                     "lomd": lomd, "learning rates": args.rates, "seed": args.seed, "caption": args.prompt,
                     "resolution": args.resolution, "size": args.size, "steps": args.steps,
                     "guidance": args.guidance, "dtype": str(args.dtype) + " fp8" * args.fp8,
                     **{name: getattr(args, name) for name in CROPS},
                     "order of a row's numbers": "by width"}


def check_settings(args: argparse.Namespace, people: list[Person], prompts: dict) -> None:
    """What --out was made with: written by the first command; ValueError for one that differs. --methods, --ranks, --iters and
    --seeds may change: what they name is added."""
    now = json.loads(json.dumps(args.settings | {
        "people and their references": [" ".join([p.name, *(digest(path.read_bytes()) for path in (p.reference, *p.more))]) for p in people],
        "prompts": prompts}))
    path = args.out / "settings.json"
    if path.exists():
        before = JsonFile(path)
        if now["lomd"] == "none" or before["lomd"] == "none":             # methods without one came first, or come now
            now["lomd"] = before["lomd"] = max(now["lomd"], before["lomd"])
        for name, value in now.items():
            was = before.get(name, "not written down")
            if was != value:
                detail = f": it was {was} and is {value}" if len(f"{was}{value}") < 200 else ""
                raise ValueError(f"--out {args.out} was made with another setting of {name}{detail}; name a new folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(now, indent=1).encode())


def describe(label: str) -> dict:
    """What the tables and figures call a row, and its method, rank and iterations."""
    setting = Setting.read(label)
    return {"title": setting.title, **setting._asdict()}


def compare(argv: list[str] | None = None, quiet: bool = False) -> None:
    """The command. `quiet`: scores.json and tables.md alone, for a script that goes on with them."""
    args = parse(argv)
    start = time.perf_counter()
    check(args)
    people = read_people(args.data, args.reference, args.gender, args.photos)
    prompts = prompts_for(people, args.prompts, own_folder(args.model))
    judges = Judges(args.model, args.face_weights, args.clip, args.device)
    real = embed_real(judges, people)
    take_defaults(args)
    check_settings(args, people, prompts)
    with Interruption() as interruption:
        pictures = Run(args, people, prompts, interruption).everything()
    drawn = time.perf_counter()
    rows, problems = score_all(judges, real, pictures, args.out / "parts")
    for problem in problems:
        note(" ".join(problem.split()))
    settings = args.settings | {"reference": args.reference}
    methods, quoted = report(args.out, people, rows, real, judges, problems, args.no_face_as_zero, args.paper,
                             Path(args.model).name, settings, describe)
    if quiet:
        return
    figures(methods, quoted, args.out)
    sheets(pictures, people, args.out, describe)
    print((args.out / "tables.md").read_text())
    print(f"{args.out}: scores.json, tables.md, {', '.join(sorted(p.name for p in args.out.glob('*.png')))}")
    print(f"seconds: {drawn - start:.0f} until all pictures were there, {time.perf_counter() - drawn:.0f} to score and report")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 training diverged or memory ran out, 2 bad input, 130 Ctrl-C; the same command goes on."""
    return run_script("paper.compare", compare, argv)


if __name__ == "__main__":
    sys.exit(main())
