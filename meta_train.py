"""Stage 1 of Meta-LoRA: learns LoMD, the down-projection that all people share, from many people.

    python meta_train.py --data buckets/                          # FLUX.1-dev -> lomd.safetensors
    python meta_train.py --data faces/ --model baby               # the same on a laptop
    torchrun --nproc-per-node 8 meta_train.py --data buckets/     # a share of the people each

The data are buckets/<bucket>/<person>/<pictures and captions>; a flat faces/<person>/ is split into
buckets. Rerun the command to resume, however the last run ended: --run holds its checkpoints and
everybody's M and U. All random numbers follow from the seed and the iteration, so a resumed run is
bit-identical (on a GPU with --deterministic).

Source: Meta-LoRA, Algorithm 1, and the settings of its trainer, ai-toolkit.
Deviations: the run ends at --iters (q_total), where the algorithm as printed continues to the last
bucket. A person's M and U wait for the next pass; the paper does not say where the next bucket's
people start. The gradients of LoMD and of each person are clipped separately, and a person's is the
mean over their own pictures, so that it does not depend on who shares the batch; the paper's
trainer clips them all by one norm. With several resolutions, each use of a picture takes one at
random. The paper gives neither r1, nor the people's rank here, nor how M starts.
"""
import collections
import math
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import support  # before torch: how its threads wait
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

import flux_model
from metalora import IdentityBank, MetaLoRA, random_lomd
from support.checkpoints import (add_speed_options, check_training_memory, open_flux,
                                 text_length)
from support.common import (Interruption, Parser, count, free, is_out_of_memory, keep, note,
                            positive, positive_number, resolution, run_script, save_settings,
                            to_device)
from support.lora_files import save_lomd
from support.memory import fit_training
from support.names import find_targets
from support.people import Buckets, Cache, Photo, read_buckets
from support.runs import (DATA, Checkpoints, Group, Log, WaitingRows, announce, check_room,
                          check_stage_1, draw_preview, locked, plot, take_settings,
                          what_is_not_finite)

USES = 10                                        # of a picture in one pass, as in the paper
ROWS, ORDER, DRAW = 1, 2, 3                      # keys of the streams of random numbers


# --------------------------------------------------------------------------------------------------
# Algorithm 1


class BucketPass(NamedTuple):
    """q_bucket iterations on one bucket: LoMD is frozen in the first q_warm-up of them."""
    bucket: int
    start: int                                   # its first iteration, counted from 0 over the run
    joint: int                                   # the first with LoMD learning: start + q_warm-up
    stop: int                                    # start + q_bucket; --iters may end the run before


def schedule(pictures: list[int], iters: int, batch_size: int, warmup: float,
             bucket_iters: int | None = None) -> list[BucketPass]:
    """Passes over one bucket after the other, again and again, until `iters` (q_total).

    pictures: how many each bucket has. batch_size: bs, over all GPUs. warmup: q_warm-up / q_bucket.
    bucket_iters: q_bucket; by default as many iterations as show each picture 10 times."""
    passes = []
    start = 0
    while start < iters:
        bucket = len(passes) % len(pictures)
        q_bucket = bucket_iters or math.ceil(USES * pictures[bucket] / batch_size)
        q_warmup = int(warmup * q_bucket + 1e-9)             # 0.29 * 100 is a little less than 29
        passes.append(BucketPass(bucket, start, start + q_warmup, start + q_bucket))
        start += q_bucket
    return passes


def draw_order(shapes: list[list], count: int, batch_size: int,
               rng: torch.Generator) -> list[tuple[object, list[int]]]:
    """The `count` batches of a pass: a shape, and the indices of pictures that have it.

    shapes: of each picture, at each of its resolutions. Pictures come in random order, every one
    before any comes again; each time one of its resolutions is drawn. Pictures of a shape too rare
    to fill a batch get one in which they repeat, in the place of one of the most frequent shape."""
    def draw() -> Iterator[tuple[int, object]]:
        while True:
            for picture in torch.randperm(len(shapes), generator=rng).tolist():
                choice = torch.randint(len(shapes[picture]), (), generator=rng).item()
                yield picture, shapes[picture][choice]

    waiting = collections.defaultdict(list)      # {shape: the batch that is being filled}
    batches = []
    drawn = draw()
    while len(batches) < count:
        picture, shape = next(drawn)
        waiting[shape].append(picture)
        if len(waiting[shape]) == batch_size:
            batches.append((shape, waiting.pop(shape)))

    shown = set()
    for _, pictures in batches:
        shown.update(pictures)
    for shape, pictures in waiting.items():
        rare = [picture for picture in pictures if picture not in shown]
        if rare:
            frequent = statistics.mode(other for other, _ in batches)
            places = [i for i, (other, _) in enumerate(batches) if other == frequent]
            repeated = rare * batch_size
            batches[places[-1]] = shape, repeated[:batch_size]
            shown.update(rare)
    return batches


def generator(*key: int) -> torch.Generator:
    """A CPU generator whose numbers depend on the integers of `key` alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


class Run:
    """One process's part of a run: LoMD, every size-th person of each bucket, the iteration."""
    def __init__(self, args: Namespace, buckets: Buckets, group: Group):
        self.args = args
        self.group = group
        self.interruption = Interruption()
        self.folder = args.run / f"rank{group.rank}"
        self.bucket_names = list(buckets)
        self.batch_size = args.batch_size * group.size        # bs
        pictures_in = [sum(map(len, people.values())) for people in buckets.values()]
        self.passes = schedule(pictures_in, args.iters, self.batch_size, args.warmup)
        self.iteration = 0
        self.open = None                         # index of the pass whose rows are in the bank

        # for each bucket that the run reaches, its people: (number over all data, photos) of each;
        # the index in this list is the row in the bank
        self.members = []
        self.photos = []                         # theirs, of all buckets
        number = 0
        for name in self.bucket_names[:len(self.passes)]:
            people = list(enumerate(buckets[name].values(), start=number))
            number += len(people)
            self.members.append(people[group.rank::group.size])
            for _, photos in self.members[-1]:
                self.photos += photos

        self.cache = Cache(args.run / "cache", args.folder, group.device, args.text_device,
                           args.dtype, args.resolution)
        sizes = set()
        for photo in self.photos:
            sizes.update(self.cache.sizes(photo))
        width, height = max(sizes, key=math.prod)
        self.largest = height // 8, width // 8   # in latent pixels
        self.most_people = max(map(len, self.members))

    def train(self):
        """Trains to the end. A first Ctrl-C, a loss that is not finite, and a full card or disk
        leave a checkpoint."""
        log = Log(self.args, self.iteration, self.group)
        with self.interruption, log.bar:
            try:
                self.run_passes(log)
            except KeyboardInterrupt:
                note(f"at iteration {self.iteration} of {self.args.iters}; "
                     "rerun the command to resume")
                raise
            except (FloatingPointError, RuntimeError, OSError, ValueError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                if self.adapter.bank:            # between two buckets, the last checkpoint has all
                    self.save()
                saved = f"the state before it is saved in {self.args.run}"
                raise type(error)(f"{error}; {saved}") from None

    def run_passes(self, log: Log):
        """Algorithm 1, from the current iteration."""
        # after a kill between its last checkpoint and its end, the open pass only has to be closed
        for number in range(self.open or 0, len(self.passes)):
            now = self.passes[number]
            self.open_bucket(number)
            while self.iteration < min(now.stop, self.args.iters):
                self.iterate(now, log)
            self.close_bucket()

    def iterate(self, now: BucketPass, log: Log):
        """A step, its line in the log, and, when due, a preview and a checkpoint."""
        args = self.args
        joint = self.iteration >= now.joint
        start = time.perf_counter()
        result = self.step(now)
        seconds = time.perf_counter() - start
        # Any process may have got Ctrl-C. In the joint phase, where they synchronize, all stop
        # together; in a warm-up each stops alone.
        asked = torch.tensor(float(self.interruption.asked or 0))
        stop = bool(self.group.sum(asked) if joint else asked)
        ends = self.iteration in (now.stop, args.iters)
        saving = stop or ends or self.iteration % args.save_every == 0
        if self.group.rank == 0:
            line = {
                "iteration": self.iteration,
                "phase": "joint" if joint else "warm-up",
                "bucket": self.bucket_names[now.bucket],
                "seconds": round(seconds, 5),
            }
            log.write(line, *result)
            if args.preview_every and self.iteration % args.preview_every == 0:
                draw_preview(self)
                free(self.group.device)
        if saving:
            self.save()
        if stop:
            self.interruption.raise_if_asked()
            raise KeyboardInterrupt              # another process was asked

    def step(self, now: BucketPass) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One iteration -> losses (B,), times (B,), gradient norms of the rows (n,) and of LoMD ().

        FloatingPointError names iteration, people and pictures; then nothing has changed."""
        shown, (ids, latent, noise, t, txt, y) = self.draw(self.iteration - now.start)
        adapter = self.adapter
        adapter.train_lomd = self.iteration >= now.joint
        adapter.assign(ids)
        t_device = to_device(t, self.group.device)
        losses = flux_model.flow_matching_loss(adapter.flux, latent, noise, t_device, txt, y,
                                               guidance=1.0)
        losses.sum().backward()

        def average(gradient: Tensor) -> Tensor:
            """LoMD's gradient is the mean over all processes' batches. People's stay local."""
            return self.group.sum(gradient) / self.batch_size

        try:
            norms, lomd_norm = adapter.step(self.args.lr, average=average)
        except FloatingPointError:
            raise FloatingPointError(what_is_not_finite(self, shown, losses)) from None
        self.iteration += 1
        return losses.detach(), t, norms, lomd_norm

    def draw(self, offset: int) -> tuple[list[Photo], list[Tensor]]:
        """A batch of the open pass -> its photos, and ids, latent, noise, t, txt, y.

        ids and t stay on the CPU, where they are read again."""
        cache = self.cache
        rng = generator(self.args.seed, DRAW, self.iteration, self.group.rank)
        size, indices = self.order[offset]
        rows, shown = zip(*[self.pictures[index] for index in indices])
        latents = [cache.load(cache.latent_path(photo, size)) for photo in shown]
        texts = [cache.load(cache.text_path(photo.caption or self.args.prompt)) for photo in shown]
        posteriors = default_collate(latents)["posterior"]                       # (B, 2, 16, h, w)
        text = default_collate(texts)                              # txt (B, T, _) and y (B, _)

        # a new sample of the autoencoder's posterior each time, as in the paper's trainer
        mean, std = posteriors.float().unbind(1)                                    # (B, 16, h, w)
        latent = mean + std * torch.randn(mean.shape, generator=rng)
        noise = torch.randn(mean.shape, generator=rng)
        t = flux_model.sample_times(len(rows), rng)
        device = self.group.device
        parts = latent, noise, text["txt"], text["y"]
        latent, noise, txt, y = [to_device(part, device) for part in parts]
        return shown, [torch.tensor(rows), latent, noise, t, txt, y]

    def open_bucket(self, number: int):
        """Draws the batches of a pass; loads its rows, unless a checkpoint has brought them."""
        args = self.args
        now = self.passes[number]
        members = self.members[now.bucket]
        self.pictures = []                       # (row, photo) of each
        for row, (_, photos) in enumerate(members):
            self.pictures += [(row, photo) for photo in photos]
        sizes = [self.cache.sizes(photo) for _, photo in self.pictures]
        rng = generator(args.seed, ORDER, number, self.group.rank)
        # the whole pass, also where --iters ends in it: it may be raised
        self.order = draw_order(sizes, now.stop - now.start, args.batch_size, rng)
        if self.open != number:
            self.adapter.bank = None             # the rows of two buckets might not fit
            if number < len(self.members):       # the first pass over this bucket
                rows = {"weight": self.new_rows(members)}
            else:
                rows = self.waiting.load(number, self.group.device)
            bank = IdentityBank(**rows)
            bank.make_moments()                  # may lack memory: then no bank is open
            self.adapter.bank = bank
            self.open = number

    def new_rows(self, members: list[tuple[int, list[Photo]]]) -> Tensor:
        """A bucket's people before their first step (N, P)."""
        rows = torch.empty(len(members), self.adapter.size, device=self.group.device)
        for row, (number, _) in zip(rows, members):
            rng = generator(self.args.seed, ROWS, number)
            row.copy_(self.adapter.new_row(rng))
        return rows

    def close_bucket(self):
        """Puts the rows away. If it is killed meanwhile, the last checkpoint has them too."""
        if self.open == len(self.passes) - 1:
            # the last pass may end in its warm-up: wait for processes that are a pass behind
            self.group.gather(None)
        self.waiting.save(self.open, vars(self.adapter.bank))
        if self.group.rank == 0:
            self.export(self.args.run / "lomd.safetensors")

    def check_memory(self):
        """ValueError if the device is known to be too small, before anything large is read."""
        args = self.args
        check_training_memory(args, self.largest, rank=args.r2, r1=args.r1, slots=args.batch_size,
                              people=self.most_people, joint=True)

    def load(self):
        """Encodes the pictures and captions that the run reaches, then loads the model and the
        newest checkpoint."""
        device = self.group.device
        self.checkpoints = Checkpoints(self.folder, self.group)
        self.waiting = WaitingRows(self.folder, len(self.members))
        prompt = self.args.prompt
        captions = [prompt] + [photo.caption or prompt for photo in self.photos]
        missing = self.cache.missing(self.photos, captions)
        check_room(self, *missing)
        if device.type != "cpu" and any(missing):
            self.place()                         # fails before hours of encoding if it does not fit
            self.adapter = None
            free(device)
        with self.interruption as stop:          # without the transformer: T5 takes 9.5 GB
            self.cache.fill(*missing, stop.raise_if_asked)
        self.place()
        self.resume()

    def place(self):
        """The adapted transformer; tries a step at the largest size, with the most rows."""
        args = self.args
        flux = open_flux(args, args.iters)
        lomd = random_lomd(find_targets(flux), args.r1, args.seed)
        self.adapter = MetaLoRA(flux, args.r2, lomd, num_identities=0, slots=args.batch_size)
        rows = torch.zeros(self.most_people, self.adapter.size, device=self.group.device)
        self.adapter.bank = IdentityBank(rows)
        self.adapter.train_lomd = True
        fit_training(self.adapter, self.largest, text_length(args.folder), args.recompute)
        self.adapter.bank = None

    def save(self):
        """A checkpoint: LoMD and the open bucket's rows. All else is on disk already."""
        adapter = self.adapter
        tensors = {f"lomd.{part}": tensor for part, tensor in vars(adapter.shared).items()}
        tensors |= {f"rows.{part}": tensor for part, tensor in vars(adapter.bank).items()}
        self.checkpoints.save(self.iteration, self.open, tensors)

    def resume(self):
        """Loads the newest state that all processes have, and checks the files it will need."""
        found = self.checkpoints.newest(self.group.device)
        if found:
            self.iteration, self.open, tensors = found
            parts = IdentityBank.PARTS
            self.adapter.shared = IdentityBank(*(tensors[f"lomd.{part}"] for part in parts))
            self.adapter.bank = IdentityBank(*(tensors[f"rows.{part}"] for part in parts))
            self.waiting.check(self.open, len(self.passes))
        self.adapter.shared.make_moments()

    def export(self, path: Path):
        """LoMD alone, which is all that stage 2 takes, and how it was made."""
        args = self.args
        metadata = {
            "model": Path(args.model).name, "made_by": "meta_train.py",
            "model_fingerprint": args.settings["model"],
            "data_fingerprint": args.settings[DATA],
            "people": args.people, "r2": args.r2, "prompt": args.prompt,
            "iterations": self.iteration, "batch_size": self.batch_size,
            "learning_rate": f"{args.lr:g}", "warmup": f"{args.warmup:g}", "seed": args.seed,
        }
        save_lomd(path, self.adapter.lomd, metadata)


# --------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(prog="meta_train.py",
                    description="Learns LoMD, what all people share, from buckets of people.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="buckets/<bucket>/<person>/, or faces/<person>/")
    add("--out", type=Path, default=Path("lomd.safetensors"),
        help="file (default: lomd.safetensors)")
    add("--run", "--run-dir", type=Path, default=Path("run"),
        help="folder for checkpoints, log and previews (default: run); after torchrun write "
             "--run-dir, since Python 3.11 takes --run for one of torchrun's options")
    add("--iters", type=positive, default=50_000,
        help="iterations in total, can be raised later (default: 50000, the paper's); for a first "
             "try 1000 with --warmup 0")
    add("--batch-size", type=positive, default=4, help="pictures per step and GPU (default: 4)")
    add("--r1", type=positive, default=16, help="rank of LoMD, the most for stage 2 (default: 16)")
    add("--r2", type=positive, default=1, help="rank of the people's LoRAs (default: 1)")
    add("--lr", type=positive_number,
        help="learning rate (default: 4e-4 for FLUX.1, 4e-3 for the baby)")
    add("--warmup", type=float, help="share of a bucket's iterations in which LoMD is frozen "
        "(default: 0.4, the paper's; 0 for the baby)")
    add("--identities-per-bucket", type=positive, default=50,
        help="people in each bucket made from a flat folder (default: 50)")
    add("--people", type=positive, metavar="N",
        help="train on N people, drawn by the seed (default: all)")
    add("--prompt", help='caption of pictures without one (default: "a photo of a person")')
    add("--resolution", type=resolution, nargs="+", action="extend", metavar="PIXELS",
        help="train at the area of a square with this side; with several, each use of a picture "
             "takes one at random (default: 1024 for FLUX.1, 128 for the baby)")
    add("--seed", type=count, default=0, help="seed of all random numbers (default: 0)")
    add("--skip-bad", action="store_true",
        help="skip unreadable files and people with too few pictures")
    add("--save-every", type=positive, default=500, metavar="N",
        help="iterations between checkpoints (default: 500)")
    add("--preview-every", type=count, default=1000,
        help="iterations between previews, 0 for none (default: 1000)")
    add("--deterministic", action="store_true",
        help="bit-identical runs on a GPU too, somewhat slower (default: off)")
    add_speed_options(add, training=True)
    return parser.parse_args(argv)


def meta_train(argv: list[str] | None):
    args = parse(argv)
    group = Group(args.device)
    check_stage_1(args, group.device)
    buckets = group.first(lambda: read_buckets(args))
    take_settings(args, buckets, group)
    run = Run(args, buckets, group)
    if args.iters <= run.passes[0].joint:
        raise ValueError(f"--iters {args.iters} is all warm-up: LoMD would not learn; "
                         "try --warmup 0")
    run.check_memory()
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    group.gather(None)                           # no process starts before all accept their input
    if group.rank == 0:
        save_settings(args.run / "settings.json", args.settings)
    group.gather(None)
    with locked(args.run / f"lock{group.rank}"):
        run.load()
        announce(run, buckets)
        run.train()
        if group.rank == 0:
            with run.interruption as stop:
                keep(args.out, run.export)
                print(f"{args.out}: LoMD of r1 {args.r1} after {run.iteration} iterations")
                plot(args.run / "log.jsonl", args.run / "loss.png")
                stop.raise_if_asked()
    group.close()                                # not after an error: NCCL would wait for the others


# Exit code: 0 done, 1 diverged or out of memory, 2 bad input, 130, 143 or 129 by a signal.
main = partial(run_script, "meta_train.py", meta_train)

if __name__ == "__main__":
    sys.exit(main())
