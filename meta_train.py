"""Stage 1: learns LoMD, the part of Meta-LoRA that all people share, over buckets of identities.

    python meta_train.py --data buckets/                          # FLUX.1-dev -> lomd.safetensors
    python meta_train.py --data faces/ --model baby               # the same on a laptop
    torchrun --nproc-per-node 8 meta_train.py --data buckets/     # each GPU its own share of the people

buckets/<bucket>/<person>/<pictures and captions>; a flat faces/<person>/ is cut into buckets. The same
command goes on where the last one ended, however it ended: the run's state is its checkpoints and the rows of
people in --run. Every random number depends on the seed and on where the run is, nothing else.

Source: Meta-LoRA, Algorithm 1, and the settings of its trainer, ai-toolkit.
Deviations: the run ends at --iters, where the algorithm as printed goes on to the last bucket. The
gradients of LoMD and of each person are clipped apart, and a person's is the mean over their own pictures, so
that they train the same in any company; the paper's trainer clips all of them by one norm. Of several
resolutions each use of a picture takes one at random.
"""
import argparse
import collections
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import support  # before torch: how its threads wait
import torch

import flux_model
from metalora import IdentityBank, MetaLoRA, random_lomd
from support.checkpoints import (add_speed_options, check_training_memory, flux_files, flux_fingerprint,
                                 open_flux, take_model, targets_of, text_length)
from support.common import (Interruption, Parser, check_apart, check_out_file, check_training, count, free,
                            is_out_of_memory, keep, note, positive, run_script, to_device, write_whole)
from support.finding import model_name
from support.lora_files import save_lomd
from support.memory import fit_training
from support.names import find_targets
from support.people import (Buckets, Cache, data_fingerprint, draw_batch, generator, read_buckets, room_for,
                            tell_bare)
from support.runs import (Checkpoints, Group, Log, WaitingRows, check_room, check_run, compare_settings,
                          draw_preview, locked, plot)

USES = 10                                        # of each picture in one pass over its bucket
LOG_EVERY = 10                                   # iterations in a line of log.jsonl
ROWS, ORDER, DRAW = 1, 2, 3                      # what a stream of random numbers is for
DATA = "data (pictures, captions, buckets)"


# ----------------------------------------------------------------------------------------------------------
# Algorithm 1


class BucketPass(NamedTuple):
    bucket: int
    start: int                                   # its first iteration, counted from 0 over the whole run
    joint: int                                   # the first one in which LoMD learns too: start + q_warmup
    stop: int                                    # one after its last: start + q_bucket


def schedule(pictures: list[int], iters: int, batch_size: int, warmup: float,
             bucket_iters: int | None = None) -> list[BucketPass]:
    """Number of pictures in each bucket -> [BucketPass], bucket after bucket, until `iters`.

    batch_size: of all GPUs together. q_bucket is `bucket_iters`, else as many as use each picture 10 times.
    """
    passes, start = [], 0
    while start < iters:
        bucket = len(passes) % len(pictures)
        length = bucket_iters or math.ceil(USES * pictures[bucket] / batch_size)
        joint = start + int(warmup * length + 1e-9)                   # 0.29 * 100 is a little less than 29
        passes.append(BucketPass(bucket, start, min(joint, iters), min(start + length, iters)))
        start += length
    return passes


def draw_order(shapes: list[list], count: int, batch_size: int, rng: torch.Generator) -> list[list[tuple]]:
    """[[shape of picture 0 at each resolution], ..] -> `count` batches of (picture, resolution) of a shape.

    Pictures come in random order, all before any comes again; a use takes one resolution at random."""
    waiting, batches = collections.defaultdict(list), []
    while len(batches) < count:
        for picture in torch.randperm(len(shapes), generator=rng).tolist():
            which = torch.randint(len(shapes[picture]), (), generator=rng).item()
            queue = waiting[shapes[picture][which]]
            queue.append((picture, which))
            if len(queue) == batch_size:
                batches.append(waiting.pop(shapes[picture][which]))
    return batches[:count]


class Run:
    """One process's part of a run: every size-th person of each bucket, LoMD, and where it is."""
    def __init__(self, args, buckets: Buckets, group: Group) -> None:
        self.args, self.group, self.interruption = args, group, Interruption()
        self.folder, self.buckets, self.bucket_names = args.run / f"rank{group.rank}", buckets, list(buckets)
        self.cache = Cache(args.run / "cache", args.folder, group.device, args.dtype, args.resolution)
        everyone = iter(range(sum(map(len, buckets.values()))))       # people are numbered over all buckets
        self.members = [[(next(everyone), *member) for member in people.items()][group.rank::group.size]
                        for people in buckets.values()]               # by bucket, [(number, name, pictures)]
        self.batch_size = args.batch_size * group.size
        self.passes = schedule([sum(map(len, people.values())) for people in buckets.values()], args.iters,
                               self.batch_size, args.warmup)
        self.iteration, self.open = 0, None                           # `open`: the pass whose rows are here
        self.used = {now.bucket for now in self.passes}
        self.pictures = []
        for bucket in sorted(self.used):
            for _, _, own in self.members[bucket]:
                self.pictures += own

    def largest(self) -> tuple[int, tuple[int, int]]:
        """Of what this process will train on: people in a bucket, and latent pixels of a picture."""
        sizes = {size for picture in self.pictures for size in self.cache.sizes(picture)}
        width, height = max(sizes, key=math.prod)
        return max(len(self.members[bucket]) for bucket in self.used), (height // 8, width // 8)

    def check_memory(self):
        """ValueError where it is known that the device is too small; before anything large is read."""
        args, (people, size) = self.args, self.largest()
        check_training_memory(args, self.group.device, size, args.r2, args.r1, args.batch_size, people, joint=True)

    def load(self):
        """Encodes all pictures and captions; then the adapted model, as the newest checkpoint has it."""
        args, device = self.args, self.group.device
        captions = [args.prompt] + [p.caption for p in self.pictures if p.caption is not None]

        config = flux_files(args.folder)[1]
        targets = targets_of(config)
        row = args.r2 * sum(args.r1 + target.rows for target in targets)                # a person's M and U
        self.checkpoints = Checkpoints(self.folder, self.group)
        self.waiting = WaitingRows(self.folder, [len(members) for members in self.members], row)
        text = 512 * config.context_in_dim * args.dtype.itemsize
        check_room(self.waiting, self.used, args.r1 * sum(target.d_in for target in targets),
                   room_for(self.cache, self.pictures, captions, text), self.group)

        if device.type != "cpu" and any(self.cache.missing(self.pictures, captions)):
            self.place()                         # what does not fit is known before hours of encoding
            self.adapter = None
            free(device)
        with self.interruption as stop:          # without the transformer: T5 takes 9.5 GB
            self.cache.fill(self.pictures, captions, stop.raise_if_asked, show=self.group.rank == 0)
        self.place()
        self.resume()

    def place(self):
        """The adapted transformer, after a step at the largest size beside the rows of the largest bucket."""
        args, (people, size) = self.args, self.largest()
        flux = open_flux(args, self.group.device, args.iters)
        lomd = random_lomd(find_targets(flux), args.r1, args.seed)
        self.adapter = MetaLoRA(flux, args.r2, lomd, num_identities=0, slots=args.batch_size)
        self.adapter.bank = IdentityBank(torch.zeros(people, self.adapter.size, device=self.group.device))
        self.adapter.train_lomd = True
        fit_training(self.adapter, size, text_length(args.folder), args.recompute)
        self.adapter.bank = None

    def open_bucket(self, number: int):
        """Latents, text and order of a pass; its people's rows, unless a checkpoint has brought them."""
        args, now = self.args, self.passes[number]
        members = self.members[now.bucket]
        pictures = [picture for *_, own in members for picture in own]
        captions = {args.prompt: None} | {p.caption: None for p in pictures if p.caption is not None}
        self.texts = {caption: self.cache.load(self.cache.text_path(caption)) for caption in captions}
        self.shown, shapes = [], [list(self.cache.sizes(picture)) for picture in pictures]
        owners = [(row, name) for row, (_, name, own) in enumerate(members) for _ in own]
        for owner, picture, sizes in zip(owners, pictures, shapes):
            latents = [self.cache.load(self.cache.latent_path(picture, size))["posterior"] for size in sizes]
            self.shown.append((*owner, picture, latents))
        self.order = draw_order(shapes, now.stop - now.start, args.batch_size,
                                generator(args.seed, ORDER, number, self.group.rank))
        if self.open != number:
            self.adapter.bank = None             # the rows of two buckets might not fit
            waiting = self.waiting.load(number, self.group.device)
            self.adapter.bank = IdentityBank(**waiting) if waiting else self.new_bank(members)
            self.open = number

    def new_bank(self, members: list[tuple]) -> IdentityBank:
        """The rows of a bucket's people before their first step."""
        weight = torch.empty(len(members), self.adapter.size, device=self.group.device)
        for row, (person, _, _) in zip(weight, members):
            row.copy_(self.adapter.new_row(generator(self.args.seed, ROWS, person)))
        bank = IdentityBank(weight)
        bank.make_moments()
        return bank

    def draw(self, offset: int):
        """A batch: [(person, picture)] for messages, and ids, latent, noise, t, txt, y.

        ids and t stay on the CPU, where they are read again."""
        rng = generator(self.args.seed, DRAW, self.iteration, self.group.rank)
        chosen = [(*self.shown[i][:3], self.shown[i][3][which]) for i, which in self.order[offset]]
        rows, people, pictures, posteriors = zip(*chosen)
        texts = [self.texts[self.args.prompt if p.caption is None else p.caption] for p in pictures]
        latent, noise, t, txt, y = draw_batch(posteriors, texts, rng)
        latent, noise, txt, y = (to_device(part, self.group.device) for part in (latent, noise, txt, y))
        return list(zip(people, pictures)), [torch.tensor(rows), latent, noise, t, txt, y]

    def step(self, now: BucketPass):
        """One iteration -> losses (B,), times (B,), gradient norms of the rows (n,), of LoMD.

        FloatingPointError names iteration, people and pictures, and then nothing has changed."""
        who, (ids, latent, noise, t, txt, y) = self.draw(self.iteration - now.start)
        adapter = self.adapter
        adapter.train_lomd = self.iteration >= now.joint
        adapter.assign(ids)
        losses = flux_model.flow_matching_loss(adapter.flux, latent, noise, to_device(t, self.group.device),
                                               txt, y, guidance=1.0)
        losses.sum().backward()
        try:
            norms, lomd_norm = adapter.step(self.args.lr, average=self.average)
        except FloatingPointError:
            bad = [each for each, loss in zip(who, losses.tolist()) if not math.isfinite(loss)]
            if not bad and (self.group.size == 1 or not adapter.rows.grad.isfinite().all()):
                bad = who
            names = "; ".join(f"{name}, {picture.path}" for name, picture in bad) or "in another process"
            place = f"{self.iteration} (bucket {self.bucket_names[now.bucket]}: {names})"
            raise FloatingPointError(f"the loss or its gradient is not finite at iteration {place}") from None
        self.iteration += 1
        return losses.detach(), t, norms, lomd_norm

    def average(self, gradient: torch.Tensor) -> torch.Tensor:
        """LoMD's gradient: the mean over the batches of all processes. Those of people never travel."""
        return self.group.sum(gradient) / self.batch_size

    def train(self):
        """From where the run is to its end. KeyboardInterrupt and FloatingPointError leave a checkpoint."""
        log = Log(self.args, self.iteration, self.group)
        with self.interruption, log.bar:
            try:
                for number, now in enumerate(self.passes):
                    if self.iteration < now.stop:
                        self.open_bucket(number)
                        while self.iteration < now.stop:
                            self.iterate(now, log)
                        self.close_bucket()
                    elif self.open == number and self.iteration == now.stop:
                        self.close_bucket()      # the kill came between the checkpoint and the rows' file
            except KeyboardInterrupt:
                note(f"at iteration {self.iteration} of {self.args.iters}; the same command goes on")
                raise
            except (FloatingPointError, RuntimeError, OSError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                self.save()
                saved = f"the state before it is saved in {self.args.run}"
                raise type(error)(f"{error}; {saved}") from None

    def iterate(self, now: BucketPass, log: Log):
        """A step, its line in the log, and, where it is time for one, a preview and a checkpoint."""
        joint, args = self.iteration >= now.joint, self.args
        log.start()
        result = self.step(now)
        stop = self.stop_asked(joint)
        saving = stop or self.iteration == now.stop or self.iteration % args.save_every == 0
        if self.group.rank == 0:
            log.add(self.iteration, joint, self.bucket_names[now.bucket], *result)
            if saving or self.iteration == now.joint or self.iteration % LOG_EVERY == 0:
                log.write()
            if args.preview_every and self.iteration % args.preview_every == 0:
                pictures = {row: picture for row, _, picture, _ in reversed(self.shown)}
                draw_preview(self.adapter, pictures, self.texts[args.prompt], args, self.iteration)
                free(self.group.device)
        if saving:
            self.save()
        if stop:
            self.interruption.raise_if_asked()
            raise KeyboardInterrupt              # another process was asked

    def stop_asked(self, joint: bool) -> bool:
        """Ctrl-C of any process, where all wait for each other anyway; in a warm-up each has its own."""
        asked = self.interruption.asked is not None
        if self.group.size == 1 or not joint:
            return asked
        return bool(self.group.sum(torch.tensor([float(asked)])))

    def save(self):
        """All that is not on disk yet: LoMD and the open bucket's rows."""
        tensors = {f"lomd.{part}": getattr(self.adapter.shared, part) for part in IdentityBank.PARTS}
        tensors |= {f"rows.{part}": getattr(self.adapter.bank, part) for part in IdentityBank.PARTS}
        steps = int(self.adapter.shared.steps[0])
        self.checkpoints.save(self.iteration, steps, tensors, str(self.open))

    def resume(self):
        """The newest state that all processes have, and the files that it will need."""
        path, open_at, tensors = self.checkpoints.newest(self.group.device)
        if path:
            self.iteration, self.open = int(path.stem.split("-")[0]), int(open_at)
            self.adapter.shared = IdentityBank(*(tensors[f"lomd.{part}"] for part in IdentityBank.PARTS))
            self.adapter.bank = IdentityBank(*(tensors[f"rows.{part}"] for part in IdentityBank.PARTS))
            self.waiting.check(self.open, len(self.passes))
        self.adapter.shared.make_moments()

    def close_bucket(self):
        """Puts the rows away. A kill meanwhile does no harm: the last checkpoint holds them too."""
        if self.open == len(self.passes) - 1:
            self.group.gather(None)              # if this is all warm-up, others may be in the pass before
        self.waiting.save(self.open, {part: getattr(self.adapter.bank, part) for part in IdentityBank.PARTS})
        if self.group.rank == 0:
            self.export(self.args.run / "lomd.safetensors")

    def export(self, path: Path):
        """LoMD alone, which is all that stage 2 takes, and where it is from."""
        args = self.args
        save_lomd(path, self.adapter.lomd, {
            "model": Path(args.model).name, "model_fingerprint": args.settings["model"],
            "data_fingerprint": args.settings[DATA], "people": str(args.people), "r2": str(args.r2),
            "iterations": str(self.iteration), "learning_rate": f"{args.lr:g}", "prompt": args.prompt,
            "batch_size": str(self.batch_size), "warmup": f"{args.warmup:g}", "seed": str(args.seed),
            "made_by": "meta_train.py"})


# ----------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="meta_train.py", allow_abbrev=False,
                    description="Learns LoMD, what all people share, from buckets of people.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="buckets/<bucket>/<person>/, or faces/<person>/")
    add("--model", type=model_name, default="flux-dev",
        help="flux-dev (default), flux-schnell, baby, a folder or a file")
    add("--out", type=Path, default=Path("lomd.safetensors"), help="file (default: lomd.safetensors)")
    add("--run", "--run-dir", type=Path, default=Path("run"), help="folder of state, log and previews "
        "(default: run); after torchrun --run-dir, since Python 3.11's takes --run for its own")
    add("--iters", type=positive, default=50_000, help="in all; may be raised later; 1000 with --warmup 0 "
        "for a first try (default: 50000, the paper's)")
    add("--batch-size", type=positive, default=4, help="pictures an iteration, on each GPU (default: 4)")
    add("--r1", type=positive, default=16, help="rows of LoMD; bounds the ranks of stage 2 (default: 16)")
    add("--r2", type=positive, default=1, help="rank of the people's LoRAs in training (default: 1)")
    add("--lr", type=float, help="learning rate (default: the model's; 4e-4 for FLUX.1)")
    add("--warmup", type=float, help="share of a bucket's iterations with LoMD frozen (default: 0.4; baby 0)")
    add("--identities-per-bucket", type=positive, default=50, help="of a flat folder (default: 50)")
    add("--people", type=positive, metavar="N",
        help="train on N of the people, drawn by the seed (default: all)")
    add("--prompt", help="caption of pictures without one (default: the model's)")
    add("--resolution", type=positive, nargs="+", metavar="PIXELS", help="train at the area of a square of "
        "this side; several: each use takes one (default: the model's; 1024 for FLUX.1)")
    add("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    add("--skip-bad", action="store_true", help="go on without the files and people that are no good")
    add("--save-every", type=positive, default=500, metavar="N", help="between checkpoints (default: 500)")
    add("--preview-every", type=count, default=1000, help="between previews; 0: none (default: 1000)")
    add("--deterministic", action="store_true", help="on a GPU: the same bits in each run, somewhat slower")
    add_speed_options(add, training=True)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace, device) -> None:
    """ValueError for what can be refused before anything large is read; fills in the model's defaults."""
    if not args.data.is_dir():
        raise ValueError(f"--data: no such folder: {args.data}")
    check_out_file(args.out, ".safetensors")
    check_apart(args.run, "--run", [args.data])
    check_run(args.run)
    check_training(args)
    if args.warmup is not None and not 0 <= args.warmup < 1:
        raise ValueError(f"--warmup is a share from 0 to below 1, not {args.warmup}")
    if args.r2 > args.r1:
        raise ValueError(f"--r2 {args.r2} is more than the --r1 {args.r1} rows of LoMD that it combines")
    take_model(args, device, "stage 1")
    args.resolution = sorted(set(args.resolution))
    if any(r % 16 for r in args.resolution):
        raise ValueError("--resolution takes multiples of 16")


def check_settings(args: argparse.Namespace, buckets: Buckets, group: Group) -> None:
    """args.settings: what makes a run this run. ValueError where --run holds another, or other files."""
    for bucket, members in buckets.items():
        if len(members) < group.size:
            raise ValueError(f"bucket {bucket} has {len(members)} people for {group.size} processes: too few")
    args.people = sum(map(len, buckets.values()))
    own = {"order of a row's numbers": "by width", "AdamW's eps": 1e-6}
    for name in ("batch_size", "r1", "r2", "lr", "warmup", "prompt", "resolution", "seed"):
        own[name.replace("_", "-")] = getattr(args, name)
    args.settings = {"model": flux_fingerprint(args.folder), DATA: data_fingerprint(buckets),
                     "dtype": str(args.dtype) + " fp8" * args.fp8, "processes": group.size, **own}
    compare_settings(args.run, args.settings)


def meta_train(argv: list[str] | None) -> None:
    args = parse(argv)
    group = Group(args.device)
    try:
        check(args, group.device)
        smallest = max(map(Cache.step, args.resolution))
        buckets = group.first(lambda: read_buckets(args.data, args.run / "pictures.json", smallest,
                                                   args.skip_bad, args.identities_per_bucket, args.seed,
                                                   args.people))
        check_settings(args, buckets, group)
        run = Run(args, buckets, group)
        if all(each.joint == each.stop for each in run.passes):
            raise ValueError(f"--iters {args.iters} is all warm-up: LoMD would not learn; try --warmup 0")
        run.check_memory()
        if args.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)
        group.gather(None)                       # nothing is written before all have found it sound
        if group.rank == 0:
            args.run.mkdir(parents=True, exist_ok=True)
            write_whole(args.run / "settings.json", json.dumps(args.settings, indent=1))
        group.gather(None)
        with locked(args.run / f"lock{group.rank}"):
            run.load()
            if group.rank == 0:
                pictures = sum(len(own) for members in buckets.values() for own in members.values())
                print(f"{args.people} people, {pictures} pictures, {len(buckets)} buckets; "
                      f"{args.iters} iterations, {len(run.passes)} passes over a bucket"
                      + (f"; going on from iteration {run.iteration}" if run.iteration else ""))
                tell_bare(buckets)
                if len(run.passes) < len(buckets):
                    note(f"{len(buckets) - len(run.passes)} buckets are never used; raise --iters")
            run.train()
            if group.rank == 0:
                with run.interruption as stop:
                    keep(args.out, run.export)
                    print(f"{args.out}: LoMD of r1 {args.r1} after {run.iteration} iterations")
                    plot(args.run / "log.jsonl", args.run / "loss.png")
                    stop.raise_if_asked()
    finally:
        group.close()


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 training diverged or memory ran out, 2 bad input, 130, 143 or 129 by a signal."""
    return run_script("meta_train.py", meta_train, argv)


if __name__ == "__main__":
    sys.exit(main())
