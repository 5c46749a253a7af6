"""Stage 1: learns LoMD, the part of Meta-LoRA that all people share, over buckets of identities.

    python meta_train.py --data buckets/                          # FLUX.1-dev -> lomd.safetensors
    python meta_train.py --data faces/ --model baby               # the same on a laptop
    torchrun --nproc-per-node 8 meta_train.py --data buckets/     # each GPU its own share of the people

buckets/<bucket>/<person>/<pictures, captions beside them as .txt>; a flat faces/<person>/ is cut into
buckets. The same command goes on where the last one ended, however it ended: the run's state is its
checkpoints and the bank of people in --run, and every random number depends on the seed and on where the run
is, nothing else.

Source: Meta-LoRA, Algorithm 1, and the settings of its trainer, ai-toolkit.
Deviations: the last visit ends at --iters, where the algorithm as printed would finish its pass over the
buckets. LoMD's gradient and those of each person are clipped apart, and a person's is the mean over their own
pictures, so that they train the same in any company; the paper's trainer clips all of them by one norm. Of
several resolutions each use of a picture takes one at random.
"""
import argparse
import collections
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import support  # before torch: how its threads wait
import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import flux_model
from metalora import IdentityBank, MetaLoRA, random_lomd
from support import photos
from support.checkpoints import (add_speed_options, find_targets, flux_fingerprint, load_autoencoder, model_defaults,
                                 open_flux, take_model)
from support.common import (Interruption, JsonFile, Parser, check_out_file, check_training, check_writable, free, positive,
                            run_script, save_png, whole, write_whole)
from support.lora_files import save_lomd
from support.people import Buckets, Cache, DiskBank, data_fingerprint, make_buckets, read_people
from support.runs import Group, Log, peak_memory, plot
from support.speed import plan_recompute, recompute_blocks

try:
    import fcntl
except ImportError:                              # Windows: no lock
    fcntl = None

USES = 10                 # of each picture in one visit of its bucket
ROWS, ORDER, DRAW = 1, 2, 3                                       # what a stream of random numbers is for


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the integers of `key` and on nothing else."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


# ----------------------------------------------------------------------------------------------------------
# The schedule


class Visit(NamedTuple):
    bucket: int
    start: int                                   # its first iteration, counted from 0 over the whole run
    joint: int                                   # the first one in which LoMD learns too
    stop: int                                    # one after its last


def schedule(pictures: list[int], iters: int, batch_size: int, warmup: float,
             bucket_iters: int | None = None) -> list[Visit]:
    """Algorithm 1: number of pictures in each bucket -> [Visit], bucket after bucket, round after round.

    batch_size: of all GPUs together. A visit lasts `bucket_iters`, else until each picture was used 10 times.
    """
    visits, start = [], 0
    while start < iters:
        bucket = len(visits) % len(pictures)
        length = bucket_iters or math.ceil(USES * pictures[bucket] / batch_size)
        joint = start + int(warmup * length + 1e-9)                   # 0.29 * 100 is a little less than 29
        visits.append(Visit(bucket, start, min(joint, iters), min(start + length, iters)))
        start += length
    return visits


def draw_order(shapes: list[list], count: int, batch_size: int,
               rng: torch.Generator) -> list[list[tuple[int, int]]]:
    """[[shape of each view of picture 0], ...] -> `count` batches of (picture, view), each of one shape.

    Pictures come in random order, all of them before any comes again; a use takes one view at random.
    """
    waiting, batches = collections.defaultdict(list), []
    while len(batches) < count:
        for picture in torch.randperm(len(shapes), generator=rng).tolist():
            view = torch.randint(len(shapes[picture]), (), generator=rng).item()
            queue = waiting[shapes[picture][view]]
            queue.append((picture, view))
            if len(queue) == batch_size:
                batches.append(waiting.pop(shapes[picture][view]))
    return batches[:count]


# ----------------------------------------------------------------------------------------------------------
# The run


class Run:
    """One process's part of a run: its people's rows, LoMD, where it is, and how to get there again."""
    def __init__(self, args, buckets, group, shards=None, num_shards=None):
        self.args, self.group, self.interruption = args, group, Interruption()
        # shard s of a bucket: every num_shards-th of its people, from the s-th on. A process has one shard.
        self.num_shards = num_shards or group.size
        self.shards = shards or [group.rank]
        self.folder = args.run / f"rank{group.rank}"
        self.cache = Cache(args.cache or args.run / "cache", args.folder, group.device, args.dtype, args.resolution)
        self.bucket_names, self.members, first = list(buckets), [], 0
        for members in buckets.values():     # of each bucket: [(person, pictures)] by shard; numbers over all
            listed = [(first + i, person, pictures) for i, (person, pictures) in enumerate(members.items())]
            self.members.append([listed[s::self.num_shards] for s in self.shards])
            first += len(listed)
        self.visits = schedule([sum(map(len, members.values())) for members in buckets.values()], args.iters,
                               args.batch_size * self.num_shards, args.warmup, args.bucket_iters)
        self.local, first = [], 0                # rows of each bucket in this process's bank
        for shards_of_bucket in self.members:
            count = sum(map(len, shards_of_bucket))
            self.local.append(list(range(first, first + count)))
            first += count
        self.iteration, self.open, self.disk = 0, None, None

    def load(self):
        """The model with its adapter, and the bank on disk; then the newest checkpoint, where there is
        one."""
        args = self.args
        tokens, text = max(args.resolution) ** 2 // 256, 512                # at most: schnell has 256 of text
        flux = open_flux(args, self.group.device, args.iters, tokens + text, training=True)
        slots = args.batch_size * len(self.shards)
        self.adapter = MetaLoRA(flux, args.r2, lomd=random_lomd(find_targets(flux), args.r1, args.seed),
                                num_identities=0, slots=slots)
        blocks = plan_recompute(self.adapter, tokens, text, args.batch_size) if args.recompute is None else args.recompute
        recompute_blocks(flux, blocks)
        self.folder.mkdir(exist_ok=True)
        for part in self.folder.glob("*.part"):  # of a process that was killed while it wrote
            part.unlink()
        if not args.fresh_identities:
            count, size, bank = sum(map(len, self.local)), self.adapter.size, self.folder / "bank"
            needed, free = DiskBank.bytes(count, size), shutil.disk_usage(args.run).free
            if not bank.exists() and needed > free:
                raise ValueError(f"the bank of {count} people needs {needed / 1e9:.0f} GB in {args.run}, and "
                                 f"{free / 1e9:.0f} GB are free")
            self.disk = DiskBank(bank, count, size)
        self.resume()

    # -- checkpoints: <iteration>-<steps that LoMD has made>.safetensors

    def checkpoints(self):
        """[(iteration, steps of LoMD, path)], the newest last."""
        found = [(*map(int, path.stem.split("-")), path) for path in self.folder.glob("*-*.safetensors")]
        return sorted(found)

    def save(self):
        """Everything that is not on disk yet. Two are kept; of several processes also the last from before
        LoMD's latest step, since another process may not have saved after it."""
        banks = {"lomd": self.adapter.shared, "rows": self.adapter.bank}
        tensors = {f"{name}.{part}": getattr(bank, part).cpu() for name, bank in banks.items() for part in bank.PARTS}
        if self.disk:
            tensors["disk_steps"] = self.disk.steps()
        steps = int(self.adapter.shared.steps[0])
        path = self.folder / f"{self.iteration:08d}-{steps:08d}.safetensors"
        with whole(path) as part:                # its name too is on disk before the bank is written
            save_file(tensors, part, {"visit": str(self.open)})
        checkpoints = self.checkpoints()
        kept = checkpoints[-2:]
        if self.group.size > 1:
            kept += [checkpoint for checkpoint in checkpoints if checkpoint[1] < steps][-1:]
        for checkpoint in checkpoints:
            if checkpoint not in kept:
                checkpoint[2].unlink()

    def resume(self):
        """Finds the newest state that all processes have: during a warm-up they need not be at the same
        iteration, but LoMD must have made the same steps."""
        readable = {}
        for iteration, steps, path in self.checkpoints():
            try:
                with safe_open(path, "pt"):
                    readable[steps] = path
            except (SafetensorError, OSError) as error:
                print(f"note: {path} is damaged and passed over: {error}", file=sys.stderr)
        common = set.intersection(*map(set, self.group.gather(set(readable))))
        path, mine, expected = "a run without checkpoints", [], 0
        if common:
            path = readable[max(common)]
            self.iteration = int(path.stem.split("-")[0])
            with safe_open(path, "pt", device=str(self.group.device)) as file:
                # clone: on a CPU the bits of a matmul depend on how its operands lie in memory, and a file's
                # lie oddly
                self.adapter.shared, self.adapter.bank = (
                    IdentityBank(*(file.get_tensor(f"{bank}.{part}").clone() for part in IdentityBank.PARTS))
                    for bank in ("lomd", "rows"))
                self.open = int(file.metadata()["visit"])
                expected = file.get_tensor("disk_steps").cpu() if self.disk else 0
            mine = self.local[self.open % len(self.local)]        # the bank may have these as they were later
        if self.disk:
            differs = self.disk.steps() != expected
            differs[mine] = False
            if differs.any():
                raise ValueError(f"{self.folder / 'bank'} does not belong to {path}; use another --run")

    # -- buckets

    def pictures_and_texts(self, visit):
        members = [member for shard in self.members[self.visits[visit].bucket] for member in shard]
        pictures = [picture for _, _, pictures in members for picture in pictures]
        return pictures, [self.args.prompt] + [p.caption for p in pictures if p.caption is not None]

    def open_bucket(self, visit):
        """Latents, text and order of a visit; and its rows, from the bank, unless a checkpoint has brought
        them."""
        pictures, captions = self.pictures_and_texts(visit)
        self.cache.fill(pictures, captions, self.interruption.raise_if_asked, show=self.group.rank == 0)
        free(self.group.device)
        bucket, row = self.members[self.visits[visit].bucket], 0
        self.texts = {caption: self.cache.load(self.cache.text_path(caption)) for caption in set(captions)}
        self.views, self.order = [], []
        for shard, members in zip(self.shards, bucket):
            views, shapes = [], []                                # of each picture of the shard
            for _, person, mine in members:
                for picture in mine:
                    sizes = list(self.cache.sizes(picture))
                    latents = [self.cache.load(self.cache.latent_path(picture, size))["posterior"] for size in sizes]
                    views.append((row, person, picture, latents))
                    shapes.append(sizes)
                row += 1
            start, _, stop = self.visits[visit][1:]
            self.views.append(views)
            self.order.append(draw_order(shapes, stop - start, self.args.batch_size,
                                         generator(self.args.seed, ORDER, visit, shard)))
        if self.open == visit:
            return
        rows, self.open = self.local[self.visits[visit].bucket], visit
        people = [number for shard in bucket for number, _, _ in shard]
        if self.disk:
            bank = IdentityBank(*self.disk.read(rows, self.group.device))
            new = (bank.steps == 0).nonzero()[:, 0].tolist()
        else:
            bank = IdentityBank(torch.empty(len(rows), self.adapter.size, device=self.group.device))
            new = range(len(rows))
        for i in new:
            key = (self.args.seed, ROWS, people[i], *([] if self.disk else [visit]))
            bank.weight[i] = self.adapter.new_row(generator(*key)).to(self.group.device)
        self.adapter.bank = bank

    def close_bucket(self):
        """Rows back to the bank. The checkpoint before it holds them too, so that a kill while they are
        written does no harm."""
        if self.disk:
            if self.open == len(self.visits) - 1:
                self.group.gather(None)          # --iters may end in a warm-up, and others still be in the visit before
            self.disk.write(self.local[self.visits[self.open].bucket], self.adapter.bank)
        if self.group.rank == 0:
            self.export(self.args.run / "lomd.safetensors")

    # -- training

    def draw(self, offset):
        """What an iteration trains on: (people, pictures) for messages, and the tensors of `step`."""
        who, columns = [], []
        for shard, views, order in zip(self.shards, self.views, self.order):
            rng = generator(self.args.seed, DRAW, self.iteration, shard)
            chosen = [(*views[picture][:3], views[picture][3][view]) for picture, view in order[offset]]
            posterior = torch.stack([latents for *_, latents in chosen]).float()            # (b, 2, 16, h, w)
            shape = posterior[:, 0].shape
            latent = posterior[:, 0] + posterior[:, 1] * torch.randn(shape, generator=rng)
            texts = [self.texts[self.args.prompt if picture.caption is None else picture.caption]
                     for _, _, picture, _ in chosen]
            columns.append((torch.tensor([row for row, *_ in chosen]), latent, torch.randn(shape, generator=rng),
                            flux_model.sample_times(len(chosen), rng), torch.stack([text["txt"] for text in texts]),
                            torch.stack([text["y"] for text in texts])))
            who += [(person, picture) for _, person, picture, _ in chosen]
        return who, [torch.cat(parts).to(self.group.device) for parts in zip(*columns)]

    def step(self, visit):
        """One iteration -> (losses (B,), times (B,), gradient norms of the rows (n,), of LoMD).
        FloatingPointError names iteration, people and pictures, and then nothing has changed."""
        who, (ids, latent, noise, t, txt, y) = self.draw(self.iteration - visit.start)
        adapter = self.adapter
        adapter.train_lomd = self.iteration >= visit.joint
        adapter.assign(ids)
        losses = flux_model.flow_matching_loss(adapter.flux, latent, noise, t, txt, y, guidance=1.0)
        losses.sum().backward()
        try:
            norms, lomd_norm = adapter.step(self.args.lr, average=self.average)
        except FloatingPointError:
            bad = [who[i] for i, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
            if not bad and (self.group.size == 1 or not adapter.rows.grad.isfinite().all()):
                bad = who
            names = "; ".join(f"{person}, {picture.path}" for person, picture in bad) or "in another process"
            raise FloatingPointError(f"the loss or its gradient is not finite at iteration {self.iteration} "
                                     f"(bucket {self.bucket_names[visit.bucket] or 'of all'}: {names})") from None
        self.iteration += 1
        return losses.detach(), t, norms, lomd_norm

    def average(self, gradient):
        """LoMD's gradient: the mean over the batches of all processes."""
        return self.group.sum(gradient) / (self.args.batch_size * self.num_shards)

    def stop_asked(self, joint):
        """Ctrl-C of any process, where they wait for each other anyway; in a warm-up each looks after
        itself."""
        asked = torch.tensor([float(self.interruption.asked is not None)], device=self.group.device)
        return bool(self.group.sum(asked) if joint else asked)

    def train(self):
        """From where the run is to its end. KeyboardInterrupt and FloatingPointError leave a checkpoint
        behind."""
        with self.interruption:
            self.loop()

    def loop(self):
        log = Log(self.args.run / "log.jsonl", self.iteration) if self.group.rank == 0 else None
        bar = tqdm(total=self.args.iters, initial=self.iteration, desc="meta-training", unit="it", smoothing=0.02,
                   disable=None if log else True)
        try:
            for number, visit in enumerate(self.visits):
                if self.iteration >= visit.stop:
                    if self.open == number and self.iteration == visit.stop:
                        self.close_bucket()                       # the kill came between checkpoint and bank
                    continue
                self.open_bucket(number)
                while self.iteration < visit.stop:
                    joint, sent = self.iteration >= visit.joint, self.group.sent
                    start = time.perf_counter()
                    losses, t, norms, lomd_norm = self.step(visit)
                    stop = self.stop_asked(joint)
                    saving = stop or self.iteration == visit.stop or self.iteration % self.args.save_every == 0
                    if log:
                        memory = peak_memory(self.group.device)
                        log.add(self.iteration, joint, self.bucket_names[visit.bucket], losses.tolist(), t.tolist(),
                                norms.tolist(), lomd_norm, time.perf_counter() - start, self.group.sent - sent,
                                memory)
                        bar.set_postfix_str(f"{'joint' if joint else 'warm-up'}, loss {log.smooth:.4f}, "
                                            f"peak {memory:.1f} GB", refresh=False)
                        bar.update()
                        if self.iteration % self.args.log_every == 0 or self.iteration == visit.joint or saving:
                            log.write()
                        if self.args.preview_every and self.iteration % self.args.preview_every == 0:
                            self.preview()
                    if saving:
                        self.save()
                    if stop:
                        raise KeyboardInterrupt
                self.close_bucket()
        except FloatingPointError as error:
            self.save()
            raise FloatingPointError(f"{error}; the state before it is saved in {self.args.run}") from None
        finally:
            bar.close()

    def export(self, path):
        args = self.args
        save_lomd(path, self.adapter.lomd, {
            "model": Path(args.model).name, "model_fingerprint": args.settings["model"], "iterations": str(self.iteration),
            "data_fingerprint": args.settings["data (pictures, captions, buckets)"], "people": str(sum(len(m) for b in self.members for m in b)),
            "r2": str(args.r2), "learning_rate": f"{args.lr:g}", "batch_size": str(args.batch_size * self.num_shards),
            "warmup": f"{args.warmup:g}", "seed": str(args.seed), "prompt": args.prompt, "made_by": "meta_train.py"})

    @torch.no_grad()
    def preview(self):
        """Two people of the bucket: a photo, and a sample with their rows, from fixed seeds."""
        first = {row: picture for row, _, picture, _ in reversed(self.views[0])}
        size, pictures = max(self.args.resolution), []
        guidance = model_defaults(self.args.folder)["guidance"]
        text = self.texts[self.args.prompt]
        txt, y = (text[part][None].to(self.group.device) for part in ("txt", "y"))
        for seed, row in enumerate(sorted(first)[:2]):
            self.adapter.assign(torch.tensor([row]))
            noise = flux_model.get_noise(size, size, seed).to(self.group.device)
            pictures.append((first[row], flux_model.denoise(self.adapter.flux, noise, txt, y, 30, guidance)))
        autoencoder = load_autoencoder(self.args.folder, self.group.device, self.args.dtype)
        sheet = Image.new("RGB", (2 * size, size * len(pictures)))
        for i, (picture, latent) in enumerate(pictures):
            photo = photos.read_photo(picture.path)
            sheet.paste(ImageOps.fit(photo, (size, size)), (0, size * i))
            sheet.paste(photos.to_image(autoencoder.decode(latent)[0]), (size, size * i))
        path = self.args.run / "previews" / f"{self.iteration:08d}.png"
        save_png(sheet, path)


# ----------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="meta_train.py", description="Learns LoMD from buckets of people.", allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="buckets/<bucket>/<person>/<pictures>, or faces/<person>/<pictures>")
    add("--model", default="flux-dev", help="flux-dev (default), flux-schnell, baby, or a folder like these")
    add("--out", type=Path, default=Path("lomd.safetensors"), help="file to write at the end (default: lomd.safetensors)")
    add("--run", type=Path, default=Path("run"), help="folder of this run's state, log and previews (default: run)")
    add("--cache", type=Path, help="folder of encoded pictures and captions; may be shared (default: in --run)")
    add("--iters", type=positive, default=50_000, help="iterations in all; may be raised later (default: 50000)")
    add("--batch-size", type=positive, default=4, help="pictures per iteration, on each GPU (default: 4)")
    add("--r1", type=positive, default=16, help="rows of LoMD; bounds the ranks that stage 2 can use (default: 16)")
    add("--r2", type=positive, default=1, help="rank of the people's LoRAs in training (default: 1)")
    add("--lr", type=float, help="learning rate (default: the model's; 4e-4 for FLUX.1)")
    add("--warmup", type=float, help="share of a visit in which LoMD is frozen (default: the model's; 0.4, the paper's, for FLUX.1)")
    add("--bucket-iters", type=positive, help=f"iterations of a visit (default: until each picture was used {USES} times)")
    add("--identities-per-bucket", type=positive, default=50, help="for a flat folder of people (default: 50)")
    add("--fresh-identities", action="store_true", help="M and U of a bucket start anew at each of its visits")
    add("--prompt", help="caption of pictures without one (default: the model's; 'a photo of a person' for FLUX.1)")
    add("--resolution", type=positive, nargs="+", metavar="PIXELS", help="train at the area of a square of this side; "
        "several: each use takes one (default: the model's; 1024 for FLUX.1)")
    add("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    add("--skip-bad", action="store_true", help="go on without the files and people that are no good")
    add("--save-every", type=positive, default=500, metavar="N", help="iterations between checkpoints (default: 500)")
    add("--log-every", type=positive, default=10, metavar="N", help="iterations per line of log.jsonl (default: 10)")
    add("--preview-every", type=int, default=1000, metavar="N", help="iterations between pictures of two people; 0: none "
        "(default: 1000)")
    add("--deterministic", action="store_true", help="on a GPU: the same bits in each run, at some cost in speed")
    add_speed_options(add, training=True)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace, group: Group) -> None:
    """ValueError for what can be refused before anything large is read; fills in the model's defaults."""
    if not args.data.is_dir():
        raise ValueError(f"--data: no such folder: {args.data}")
    check_out_file(args.out, ".safetensors")
    for path, what in ((args.run, "--run"), (args.cache or args.run, "--cache")):
        check_writable(path, what)
        if path.resolve().is_relative_to(args.data.resolve()):  # a later command would take it for a person's
            raise ValueError(f"{what} {path} lies within --data {args.data}; name a folder outside of it")
    check_training(args)
    if args.warmup is not None and not 0 <= args.warmup < 1:
        raise ValueError(f"--warmup is a share from 0 to below 1, not {args.warmup}")
    if args.r2 > args.r1:
        raise ValueError(f"--r2 {args.r2} is more than the --r1 {args.r1} rows of LoMD that it combines")
    if args.preview_every < 0:
        raise ValueError(f"--preview-every must be 0 or more, not {args.preview_every}")
    take_model(args, group.device, "stage 1")
    args.resolution = sorted(set(args.resolution))
    if any(r % 16 for r in args.resolution):
        raise ValueError("--resolution takes multiples of 16")


def read_data(args: argparse.Namespace, group: Group) -> tuple[Buckets, dict]:
    """Buckets of the checked folder. ValueError, one line for each thing that is wrong; of --skip-bad
    notes."""
    listing = args.run / "pictures.json"
    known = JsonFile(listing) if listing.exists() else {}
    people, problems = read_people(args.data, max(map(Cache.step, args.resolution)), known, group.rank == 0)
    if problems and not args.skip_bad:
        for problem in problems[:-1]:
            print(f"meta_train.py: {' '.join(problem.split())}", file=sys.stderr)
        raise ValueError(problems[-1])
    if group.rank == 0:
        for problem in problems:
            print(f"note: skipped: {' '.join(problem.split())}", file=sys.stderr)
    buckets = make_buckets(people, args.identities_per_bucket, args.seed) if people else {}
    for bucket, members in buckets.items():
        if len(members) < group.size:
            raise ValueError(f"bucket {bucket} has {len(members)} people, fewer than the {group.size} processes")
    if not buckets:
        raise ValueError(f"{args.data} holds no people with pictures")
    return buckets, known


def check_settings(args: argparse.Namespace, buckets: Buckets, group: Group) -> None:
    """What makes a run this run: written by the first command, and ValueError for a later one that
    differs."""
    args.settings = {
        "model": flux_fingerprint(args.folder),
        "data (pictures, captions, buckets)": data_fingerprint(buckets), "dtype": str(args.dtype) + " fp8" * args.fp8,
        "batch-size": args.batch_size, "processes": group.size, "r1": args.r1, "r2": args.r2, "lr": args.lr,
        "warmup": args.warmup, "bucket-iters": args.bucket_iters, "prompt": args.prompt, "resolution": args.resolution,
        "seed": args.seed, "fresh-identities": args.fresh_identities, "order of a row's numbers": "by width"}
    path = args.run / "settings.json"
    if path.exists():
        before = JsonFile(path)
        changed = [f"{name} was {before[name]} and is {value}" for name, value in args.settings.items() if before[name] != value]
        if changed:
            raise ValueError(f"{args.run} is another run: {', '.join(changed)}; go on with its settings, or name a new --run")
    elif args.run.exists() and any(not p.name.startswith(("pictures.json", "settings.json", "lock", "cache"))
                                   and p != args.cache for p in args.run.iterdir()):  # those, if killed early
        raise ValueError(f"--run {args.run} holds other files: name a new folder")


def meta_train(argv: list[str] | None = None) -> None:
    args = parse(argv)
    group = Group(args.device)
    try:
        check(args, group)
        buckets, known = read_data(args, group)
        check_settings(args, buckets, group)
        run = Run(args, buckets, group)
        people, pictures = sum(map(len, buckets.values())), [p for m in buckets.values() for ps in m.values() for p in ps]
        if args.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)
        group.gather(None)                                 # nothing is written before all have found it sound
        if group.rank == 0:
            args.run.mkdir(parents=True, exist_ok=True)
            write_whole(args.run / "pictures.json", json.dumps(known).encode())
            write_whole(args.run / "settings.json", json.dumps(args.settings, indent=1).encode())
        group.gather(None)
        with open(args.run / f"lock{group.rank}", "w") as lock:
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is at work in {args.run}") from None
            run.load()
            if group.rank == 0:
                print(f"{people} people, {len(pictures)} pictures, {len(buckets)} buckets; {args.iters} iterations, "
                      f"{len(run.visits)} visits" + (f"; going on from iteration {run.iteration}" if run.iteration else ""))
                if len(run.visits) < len(buckets):
                    print(f"note: {len(buckets) - len(run.visits)} buckets are never visited; raise --iters", file=sys.stderr)
            try:
                run.train()
            except KeyboardInterrupt:
                print(f"note: at iteration {run.iteration} of {args.iters}; the same command goes on", file=sys.stderr)
                raise
            if group.rank == 0:
                plot(args.run / "log.jsonl", args.run / "loss.png")
                run.export(args.out)
                print(f"{args.out}: LoMD of r1 {args.r1} after {run.iteration} iterations; loss {args.run / 'loss.png'}")
    finally:
        group.close()


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 training diverged or memory ran out, 2 bad input, 130 Ctrl-C; work saved in each
    case."""
    return run_script("meta_train.py", meta_train, argv)


if __name__ == "__main__":
    sys.exit(main())
