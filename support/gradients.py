"""A LoMD in minutes: Fisher's discriminant among people, each of whom is two gradients of the loss.

What two different pictures of a person ask of a frozen weight is G1 and G2, the loss's gradients with respect
to it. What they agree on, and other people do not share, is worth a row of A; what they disagree on is
background, clothes, light and noise. With

    K_b = mean over people of sym((G1 - mean G1)^T (G2 - mean G2))      what tells people apart
    K_w = mean over people of (G1 - G2)^T (G1 - G2) / 4                 what one person's pictures differ in

the rows of A are the first solutions v of K_b v = lambda (K_w + rho tr(K_w) / d_in I) v, orthonormalised.

G (d_out x d_in) is never formed. With a random frozen U (d_out x 64) and C at zero, the gradient of C is the
sketch U^T G, at a LoRA's cost. The first of two passes over the people finds the range of K_b, 128 columns Q;
the second finds both matrices within it.

Sources: the discriminant is Fisher's (1936), the range finder that of Halko, Martinsson and Tropp (2011).
LoRA-GA (Wang et al. 2024) and EVA (Paischer et al. 2024) start one LoRA from gradients or activations.
"""
from argparse import Namespace
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor, linalg
from tqdm import tqdm

from flux_model import flow_matching_loss
from support.checkpoints import check_fit, is_small
from support.common import Interruption, note, to_device
from support.lora_files import load_lomd, save_lomd
from support.people import Buckets, Cache, Picture, draw_batch, generator
from support.runs import Checkpoints, Group
from support.speed import Work, plan_recompute, recompute_blocks

SKETCH, RANGE = 64, 128                   # columns of U and of Q
RHO, NORM = 1.0, 6.0                      # NORM: of a row of A, so that a trained A's learning rate suits it
PEOPLE, PICTURES, DRAWS = 120, 10, 2      # at most; of each person; of noise for each picture in each pass
HALVES, SKETCHES = 4, 5                   # what a stream of random numbers is for; others in meta_train.py


def sketches(adapter: object, batches: Iterator[list[Tensor]]) -> list[Tensor]:
    """U^T G, its mean over all pictures of batches (latent, noise, t, txt, y): for each of the model's widths
    (targets, SKETCH, d_in). adapter: a MetaLoRA without LoMD, whose one identity has C = 0 and this U."""
    *shapes, ups = adapter.shapes
    total, count = 0, 0
    for latent, noise, t, txt, y in batches:
        adapter.assign(torch.zeros(len(latent), dtype=int))
        flow_matching_loss(adapter.flux, latent, noise, t, txt, y, guidance=1.0).sum().backward()
        total, count = total + adapter.rows.grad[0, :-prod(ups)], count + len(latent)
    return [part.view(shape) for part, shape in zip((total / count).split([*map(prod, shapes)]), shapes)]


def discriminant(between: Tensor, within: Tensor, floor: Tensor, count: int) -> Tensor:
    """The first `count` solutions v of between v = lambda (within + floor I) v, orthonormalised in order.

    between, within: (n, k, k), symmetric; floor: (n,), above 0. -> (n, count, k), fp64."""
    eye = torch.eye(within.shape[-1], dtype=torch.float64, device=within.device)
    lower = linalg.cholesky(within.double() + floor.double()[:, None, None] * eye)
    half = linalg.solve_triangular(lower, between.double(), upper=False)
    vectors = linalg.eigh(linalg.solve_triangular(lower, half.mT, upper=False))[1].flip(-1)[..., :count]
    return linalg.qr(linalg.solve_triangular(lower.mT, vectors, upper=True))[0].mT


def agreement(first: Tensor, second: Tensor, right: Tensor | None) -> Tensor:
    """sym(first^T second), times `right` if there is one."""
    if right is None:
        return (first.mT @ second + second.mT @ first) / 2
    return (first.mT @ (second @ right) + second.mT @ (first @ right)) / 2


class Sums:
    """What one pass adds up over people, for each width: `first` and `second`, the sketches of both halves,
    and `agree`, of K_b; over a basis Q, and in its columns, also `differ`, K_w; and `trace`, of K_w.

    right: (targets, d_in, k) for each width: Q, or random columns to find it with."""
    def __init__(self, right: list[Tensor], is_basis: bool):
        self.right, self.is_basis, self.parts = right, is_basis, {"people": right[0].new_zeros(())}
        for width, (n, d_in, k) in enumerate(own.shape for own in right):
            inner = k if is_basis else d_in
            shapes = {"first": (n, SKETCH, inner), "second": (n, SKETCH, inner), "agree": (n, inner, k),
                      "differ": (n, k, k) if is_basis else (0,), "trace": (n,)}
            self.parts |= {f"{name} {width}": right[0].new_zeros(shape) for name, shape in shapes.items()}

    def add(self, halves: list[list[Tensor]]) -> None:
        """A person: of each half, for each width, (targets, SKETCH, d_in)."""
        self.parts["people"] += 1
        for width, (first, second, right) in enumerate(zip(*halves, self.right)):
            self.parts[f"trace {width}"] += (first - second).square().sum((1, 2)) / 4
            if self.is_basis:
                first, second = first @ right, second @ right
                self.parts[f"differ {width}"] += (first - second).mT @ (first - second) / 4
            self.parts[f"agree {width}"] += agreement(first, second, None if self.is_basis else right)
            self.parts[f"first {width}"] += first
            self.parts[f"second {width}"] += second

    def means(self, group: Group) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Over the people of all processes, for each width: K_b (in the basis, or times the random columns),
        K_w in the basis, tr(K_w)."""
        for part in self.parts.values():
            group.sum(part)
        for width, right in enumerate(self.right):
            first, second, agree, differ, trace = (
                self.parts[f"{name} {width}"] / self.parts["people"]
                for name in ("first", "second", "agree", "differ", "trace"))
            yield agree - agreement(first, second, None if self.is_basis else right), differ, trace


def batches(half: list[Picture], cache: Cache, prompt: str, rng: torch.Generator, device: torch.device,
            size: int) -> Iterator[list[Tensor]]:
    """Each picture DRAWS times, with noise and a time of its own: latent, noise, t, txt, y of at most `size`
    pictures of one shape."""
    alike = {}
    for picture in half * DRAWS:
        shapes = list(cache.sizes(picture))
        shape = shapes[torch.randint(len(shapes), (), generator=rng).item()]
        alike.setdefault(shape, []).append(picture)
    for shape, own in alike.items():
        for some in (own[i:i + size] for i in range(0, len(own), size)):
            texts = [cache.load(cache.text_path(prompt if p.caption is None else p.caption)) for p in some]
            posteriors = [cache.load(cache.latent_path(p, shape))["posterior"] for p in some]
            yield [to_device(part, device) for part in draw_batch(posteriors, texts, rng)]


def choose_people(buckets: Buckets, seed: int) -> list[tuple]:
    """At most PEOPLE of all, and at most PICTURES of each, at random: [(number, name, pictures)]."""
    members = [(name, pictures) for people in buckets.values() for name, pictures in people.items()]
    chosen = sorted(torch.randperm(len(members), generator=generator(seed, HALVES))[:PEOPLE].tolist())
    people = []
    for number in chosen:
        name, pictures = members[number]
        order = torch.randperm(len(pictures), generator=generator(seed, HALVES, number))[:PICTURES]
        people.append((number, name, [pictures[i] for i in order.tolist()]))
    return people


class Gradients:
    """LoMD from the gradients of `people`, [(number, name, pictures)], this process's share of them.

    adapter: a MetaLoRA of rank SKETCH without LoMD, with no identity yet. The sums are saved to `folder`
    every args.save_every pictures; a run that was killed goes on there, and ends with the same bits."""
    def __init__(self, adapter: object, people: list[tuple], args: Namespace, cache: Cache, group: Group,
                 folder: Path):
        self.adapter, self.people, self.cache, self.args, self.group = adapter, people, cache, args, group
        if args.r1 > (least := min(d_in for *_, d_in in adapter.shapes[:-1])):
            raise ValueError(f"--from-gradients finds at most {least} rows in this model, not --r1 {args.r1}")
        self.at_once = 10 if is_small(args.folder) else 1        # a large model fills the machine with one
        ups, rng = prod(adapter.shapes[-1]), generator(args.seed, SKETCHES)
        draws = torch.randn(ups, generator=rng) / SKETCH ** 0.5
        adapter.bank.weight = torch.cat((torch.zeros(adapter.size - ups), draws))[None].to(adapter.device)
        right = [torch.randn(n, d_in, min(max(RANGE, 2 * args.r1), d_in), generator=rng).to(adapter.device)
                 for n, _, d_in in adapter.shapes[:-1]]
        self.number, self.done, self.sums, self.unsaved = 0, 0, Sums(right, False), 0
        self.checkpoints = Checkpoints(folder, group)
        path, number, tensors = self.checkpoints.newest(adapter.device)
        if path:
            self.number, self.done = int(number), int(path.stem.split("-")[0])
            right = [tensors.pop(f"right {width}") for width in range(len(right))]
            self.sums = Sums(right, self.number == 1)
            self.sums.parts = tensors

    def plan(self) -> None:
        """How many blocks run twice, with room for C, U, their gradient and the sketches of two halves."""
        room = torch.empty(9 * self.adapter.size // 2, device=self.adapter.device)
        blocks = plan_recompute(self.adapter, self.args.work.tokens, self.args.recompute)
        del room
        recompute_blocks(self.adapter.flux, blocks)

    def save(self) -> None:
        right = {f"right {width}": own for width, own in enumerate(self.sums.right)}
        self.checkpoints.save(self.done, self.number, self.sums.parts | right, str(self.number))
        self.unsaved = 0

    def run(self, stop: Callable[[], object]) -> dict[str, Tensor]:
        """LoMD {path: (r1, d_in)}. FloatingPointError names the person; `stop()` may raise, all saved."""
        count = len(self.people)
        bar = tqdm(total=2 * count, initial=self.done, desc="gradients", unit="person",
                   disable=True if self.group.rank else None)
        with bar:
            for self.number in range(self.number, 2):
                while self.done < (self.number + 1) * count:
                    try:
                        self.add(*self.people[self.done % count])
                        bar.update()
                        stop()
                    except (KeyboardInterrupt, FloatingPointError, torch.OutOfMemoryError) as error:
                        self.save()
                        if isinstance(error, KeyboardInterrupt):
                            note(f"{self.done} of {2 * count} gradients of people; the same command goes on")
                        raise
                found = self.sums.means(self.group)
                if self.number == 0:
                    self.sums = Sums([linalg.qr(between)[0].contiguous() for between, *_ in found], True)
        return self.rows(found)

    def add(self, number: int, name: str, pictures: list[Picture]) -> None:
        halves = []
        for half in (0, 1):
            rng = generator(self.args.seed, HALVES, number, self.number, half)
            halves.append(sketches(self.adapter, batches(pictures[half::2], self.cache, self.args.prompt, rng,
                                                         self.adapter.device, self.at_once)))
        if not all(part.isfinite().all() for half in halves for part in half):
            raise FloatingPointError(f"the loss or its gradient is not finite at a picture of {name}; what "
                                     f"came before is saved in {self.checkpoints.folder}")
        self.sums.add(halves)
        self.done, self.unsaved = self.done + 1, self.unsaved + len(pictures) * DRAWS
        if self.unsaved >= self.args.save_every:
            self.save()

    def rows(self, found: Iterator[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
        lomd, targets = {}, iter(self.adapter.targets)
        for Q, (between, within, trace) in zip(self.sums.right, found):
            floor = RHO * trace / Q.shape[1]
            rows = NORM * discriminant(between, within, floor, self.args.r1).to(Q) @ Q.mT
            lomd |= {target.path: own for own, target in zip(rows, targets)}
        return {target.path: lomd[target.path] for target in self.adapter.found}


def plan_gradients(args: Namespace, device: torch.device) -> None:
    """args.work: what the gradients take, which is more than stage 1 after them. ValueError where it is too
    much for the device."""
    args.work = Work(args.work.tokens, rank=SKETCH, people=2, training=True)     # the sums: a second row
    check_fit(args, device, args.work)


def lomd_from_gradients(adapter: Callable[[int], object], people: list[tuple], args: Namespace, cache: Cache,
                        group: Group, folder: Path, interruption: Interruption) -> dict[str, Tensor]:
    """As `Gradients`, in the folder `gradients` of a process's; what was found before is read again.
    adapter(rank): a MetaLoRA without LoMD, made where it is needed."""
    folder = folder / "gradients"
    path = folder / "lomd.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if not all(group.gather(path.exists())):
        everybody = sum(group.gather(len(people)))
        if group.rank == 0:
            print(f"LoMD of r1 {args.r1} from the gradients of {everybody} people, two passes over them")
        adapter = adapter(SKETCH)
        gradients = Gradients(adapter, people, args, cache, group, folder)
        gradients.plan()
        with interruption:
            lomd = gradients.run(interruption.raise_if_asked)
        save_lomd(path, lomd, {"made_by": "meta_train.py"})
        group.gather(None)                       # all have it before the first gives up its state
        for state in folder.glob("*-*.safetensors"):
            state.unlink()
    return load_lomd(path)[0]
