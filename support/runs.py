"""What a long run needs: torchrun's processes, settings, lock, checkpoints, log, figure."""
import collections
import json
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from flux_model import denoise, get_noise
from support.checkpoints import (flux_files, flux_fingerprint, load_autoencoder, part_fingerprints,
                                 take_model, targets_of, text_length)
from support.common import (check_out, check_settings, check_writable, is_out_of_memory, naming,
                            note, pick_device, save_figure, save_png, write_whole)
from support.people import (Buckets, Photo, State, data_fingerprint, open_state, read_state,
                            save_state)
from support.photos import read_photo, to_image, visible

try:
    import fcntl
except ImportError:                              # Windows: no lock
    fcntl = None

MEETING = 10                                     # minutes that processes wait for each other
T_BINS = 10                                      # bins of the loss by time
DATA = "data (pictures, captions, buckets)"      # the name of this setting in settings.json

# --------------------------------------------------------------------------------------------------
# Before a run: options, settings, lock


def check_stage_1(args: Namespace, device: torch.device):
    """Fills in the model's defaults. ValueError for what is refused before loading."""
    if not args.data.is_dir():
        raise ValueError(f"--data: no such folder: {args.data}")
    check_out(args.out, ".safetensors")
    check_writable(args.run, "--run", [args.data])
    if args.run.exists() and not (args.run / "settings.json").exists():
        # of a run killed early; another process may be trying to write
        early = "pictures.json", "settings.json", "lock", "cache", "try."
        if not all(path.name.startswith(early) for path in visible(args.run)):
            raise ValueError(f"--run {args.run} holds other files: name a new folder")
    if args.warmup is not None and not 0 <= args.warmup < 1:
        raise ValueError(f"--warmup is a share from 0 to below 1, not {args.warmup}")
    if args.r2 > args.r1:
        raise ValueError(f"--r2 {args.r2} is more than the --r1 {args.r1} rows of LoMD that it "
                         "combines")
    args.device = device
    take_model(args, "stage 1")
    args.resolution = sorted(set(args.resolution))
    if any(resolution % 16 for resolution in args.resolution):
        raise ValueError("--resolution takes multiples of 16")


def take_settings(args: Namespace, buckets: Buckets, group: "Group"):
    """Sets args.settings, which may not change when a run resumes. ValueError if they did."""
    for bucket, members in buckets.items():
        if len(members) < group.size:
            raise ValueError(f"bucket {bucket} has {len(members)} people for {group.size} "
                             "processes: too few")
    args.people = sum(map(len, buckets.values()))
    args.settings = {
        "model": flux_fingerprint(args.folder),
        DATA: data_fingerprint(buckets),
        "dtype": f"{args.dtype} fp8" if args.fp8 else str(args.dtype),
        "processes": group.size,
        "order of a row's numbers": "by width",
        "AdamW's eps": 1e-6,
        "batch-size": args.batch_size,
        "r1": args.r1,
        "r2": args.r2,
        "lr": args.lr,
        "warmup": args.warmup,
        "prompt": args.prompt,
        "resolution": args.resolution,
        "seed": args.seed,
        **part_fingerprints(args.folder),
    }
    check_settings(args.run / "settings.json", args.settings)


def announce(run: Any, buckets: Buckets):
    """The first process prints what a meta_train.Run is about to do."""
    if run.group.rank:
        return
    captions = []
    for people in buckets.values():
        for photos in people.values():
            captions += [photo.caption for photo in photos]
    missing = captions.count(None)
    resuming = f"; resuming from iteration {run.iteration}" if run.iteration else ""
    print(f"{run.args.people} people, {len(captions)} pictures, {len(buckets)} buckets; "
          f"{run.args.iters} iterations of {run.batch_size} pictures, {len(run.passes)} passes "
          f"over a bucket{resuming}")
    if 0 < missing < len(captions):
        print(f"{missing} of {len(captions)} pictures have no caption of their own, and take that "
              "of --prompt")
    if len(run.passes) < len(buckets):
        note(f"{len(buckets) - len(run.passes)} buckets are never used; raise --iters")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a run's lock. ValueError if another process has it."""
    with open(path, "wb") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in {path.parent}") from None
        except OSError as error:                 # NFS, Lustre
            note(f"{path.parent} cannot be locked ({error.strerror}): let no other process use it")
        yield


@contextmanager
def only_to_be_seen(what: str) -> Iterator[None]:
    """A failure inside becomes a note, and the run continues."""
    try:
        yield
    except (OSError, ValueError, FloatingPointError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        note(f"{what} is left out: {error}")


# --------------------------------------------------------------------------------------------------
# Processes


class Group:
    """The processes that torchrun started, or this one alone."""
    def __init__(self, device_name: str | None):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1 and device_name in (None, "cuda") and torch.cuda.is_available():
            device_name = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        self.device = pick_device(device_name)
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)       # it takes no "cuda" alone
            backend = "cpu:gloo,cuda:nccl"       # a flag on the CPU does not wait for the GPU
        if self.size > 1:
            self.meet(backend)

    def meet(self, backend: str):
        """Waits for the other processes. ValueError if they do not come."""
        others = (f"WORLD_SIZE is {self.size}, from the environment: {self.size - 1} other "
                  "processes are")
        if self.rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:       # torchrun sets it
            note(f"{others} waited for; if there are none, unset it")
        try:
            timeout = timedelta(minutes=MEETING)
            meeting = dist.rendezvous("env://", timeout=timeout)
            # in a thread, since a signal is only seen once torch returns
            store, rank, size = ThreadPool(1).apply(next, [meeting])
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{others} missing ({reason}): unset it, or start with "
                             "torchrun") from None
        timeout = timedelta(hours=12)            # the first may read 100,000 pictures meanwhile
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

    def first(self, work: Callable[[], Any]) -> Any:
        """The first process calls work(); all return its result, or raise its error."""
        outcome = [None]                         # its result or error
        if self.rank == 0:
            try:
                outcome = [work()]
            except (ValueError, OSError, KeyboardInterrupt) as error:
                outcome = [error]
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing: object) -> list:
        """A list of the things that all processes passed."""
        things = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing)
        return things

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# State on disk


class WaitingRows(NamedTuple):
    """Where one process's people wait for the next pass over their bucket: a file for each finished
    pass, pass0007.safetensors. A pass starts from the file of the previous pass over its bucket."""
    folder: Path
    buckets: int                                 # how many

    def path(self, number: int) -> Path:
        return self.folder / f"pass{number:04d}.safetensors"

    def save(self, number: int, tensors: State):
        """Writes the rows at the end of a pass.

        By now every process has a checkpoint of the end of the pass before it, so that none resumes
        from before that, and the file which that pass started from can go."""
        self.path(number - 1 - self.buckets).unlink(missing_ok=True)
        save_state(self.path(number), tensors)

    def load(self, number: int, device: torch.device) -> State:
        """The rows that a pass starts from, unless it is the first over its bucket."""
        return read_state(self.path(number - self.buckets), device)

    def check(self, open_pass: int, passes: int):
        """ValueError unless the files are there from which the passes after the open one start."""
        first = max(0, open_pass + 1 - self.buckets)
        for number in range(first, min(open_pass, passes - self.buckets)):
            with open_state(self.path(number), "or missing, and this run cannot resume without it; "
                            "name a new --run"):
                pass


def check_room(run: Any, photos: list[Photo], captions: list[str]):
    """ValueError if the disk lacks room for what all processes together will keep on it: rows of
    people, checkpoints, and the latents and text of what is not encoded yet."""
    args = run.args
    config = flux_files(args.folder)[1]
    targets = targets_of(config)
    # a weight and two moments in fp32
    row = 12 * args.r2 * sum(args.r1 + target.rows for target in targets)
    lomd = 12 * args.r1 * sum(target.d_in for target in targets)
    sizes = [len(members) * row for members in run.members]
    largest = max(sizes)
    # two checkpoints are kept, with several processes three, while another is written
    count = 3 if run.group.size == 1 else 4
    cache = len(captions) * text_length(args.folder) * config.context_in_dim * args.dtype.itemsize
    for photo in photos:
        # mean and deviation of 16 channels, 2 bytes each, for 8 x 8 pixels: a byte a pixel
        cache += sum(map(math.prod, run.cache.sizes(photo)))
    there = sum(path.stat().st_size for path in run.folder.glob("*.safetensors"))
    mine = [sum(sizes) + largest, count * (largest + lomd), cache, there]
    rows, checkpoints, cache, there = torch.tensor(run.group.gather(mine)).sum(dim=0).tolist()
    room = shutil.disk_usage(run.folder).free + there
    if rows + checkpoints + cache > room:
        raise ValueError(f"{args.run} has no room for this run: people {rows / 1e9:.3g} GB, "
                         f"checkpoints {checkpoints / 1e9:.3g} GB, latents and text "
                         f"{cache / 1e9:.3g} GB; {room / 1e9:.3g} GB are free or its own")


class Checkpoints:
    """One process's checkpoints: <iteration>-<steps of LoMD>.safetensors in its folder, all with
    eight digits, so that they sort by name."""
    def __init__(self, folder: Path, group: Group):
        self.folder = folder
        self.group = group
        folder.mkdir(exist_ok=True)
        for part in folder.glob("*.part"):       # of a process that was killed while writing
            part.unlink(missing_ok=True)

    def found(self) -> list[Path]:
        """All of them, the newest last."""
        return sorted(self.folder.glob("[!.]*-*.safetensors"))

    def save(self, iteration: int, open_pass: int, tensors: State):
        """Writes a checkpoint and keeps the last two. With several processes it keeps also the last
        from before LoMD's latest step: another may not have saved since."""
        steps = f"{tensors['lomd.steps'].item():08d}"
        path = self.folder / f"{iteration:08d}-{steps}.safetensors"
        save_state(path, tensors, {"pass": str(open_pass)})
        found = self.found()
        kept = found[-2:]
        if self.group.size > 1:
            kept += [path for path in found if path.stem[9:] < steps][-1:]
        for path in {*found} - {*kept}:
            path.unlink()

    def newest(self, device: torch.device) -> tuple[int, int, State] | None:
        """(iteration, open pass, tensors) of the newest state that all processes have, if any.

        In a warm-up their iterations may differ, as long as LoMD has made the same steps."""
        readable = {}                            # {steps of LoMD: the newest}
        for path in self.found():
            try:
                with open_state(path, "and passed over") as file:
                    readable[path.stem[9:]] = path, file.metadata()
            except ValueError as error:
                note(error)
        everyones = self.group.gather(set(readable))
        common = set.intersection(*everyones)
        if not common:
            if max(map(len, everyones)) > 1:     # not only just begun: a folder is missing
                raise ValueError(f"{self.folder.parent}: no checkpoint in common to all processes; "
                                 "bring back the folders rank0, rank1, ..., or name a new --run")
            return None
        path, metadata = readable[max(common)]
        for newer in self.found():
            if newer > path:                     # a GPU may take another course from here on
                newer.unlink()
        return int(path.stem[:8]), int(metadata["pass"]), read_state(path, device)


# --------------------------------------------------------------------------------------------------
# Log, figure, previews


def peak_gb(device: torch.device) -> float:
    """Of the GPU since the start, or of this process since the last call, without mapped files.

    0 where neither is known: without a GPU on macOS and Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = 0.0
    with suppress(OSError, ValueError):          # gVisor's lacks these fields
        words = Path("/proc/self/status").read_text("utf-8").split()
        resident, mapped = (int(words[words.index(name) + 1]) for name in ("VmHWM:", "RssFile:"))
        peak = 1024 * (resident - mapped) / 1e9
        Path("/proc/self/clear_refs").write_text("5", "utf-8")               # begins a new peak
    return peak


def rounded(numbers: np.ndarray | float) -> float:
    """Their mean, to five digits."""
    return float(f"{np.mean(numbers):.5g}")


class Log:
    """The first process's progress bar and log.jsonl, which has a line for each iteration.

    A run that resumes first drops the lines after its checkpoint."""
    def __init__(self, args: Namespace, iteration: int, group: Group):
        self.path = args.run / "log.jsonl"
        self.device = group.device
        self.recent = collections.deque(maxlen=100)          # losses, whose mean the bar shows
        self.peak = 0.0
        self.bar = tqdm(
            total=args.iters,
            initial=iteration,
            desc="meta-training",
            smoothing=0.02,
            disable=True if group.rank else None,
        )
        peak_gb(self.device)                     # begins a new peak: loading is not of interest
        if group.rank == 0:
            self.path.touch()
            kept = []
            for line in self.path.read_text("utf-8").splitlines():
                # a kill may tear the last
                if line.endswith("}") and json.loads(line)["iteration"] <= iteration:
                    kept.append(line + "\n")
            write_whole(self.path, "".join(kept))

    def write(
        self,
        line: dict,
        losses: Tensor,
        t: Tensor,
        norms: Tensor,
        lomd_norm: Tensor,
    ):
        """Completes and writes the line of an iteration.

        losses and t (B,), gradient norms of the rows (n,) and of LoMD ()."""
        # one wait for the GPU: all values come in one piece
        values = np.array(torch.cat([lomd_norm[None], norms, losses]).tolist())
        lomd_norm, norms, losses = np.split(values, [1, 1 + len(norms)])
        bins = (T_BINS * t.numpy()).astype(int)
        by_t = [losses[bins == i] for i in range(T_BINS)]
        self.peak = max(self.peak, peak_gb(self.device))
        line |= {
            "loss": rounded(losses),
            "gradient_rows": rounded(norms),
            "gradient_lomd": rounded(lomd_norm),
            "loss_by_t": [rounded(part) if len(part) else None for part in by_t],
            "peak_gb": rounded(self.peak),
        }
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.recent.append(line["loss"])
        words = f"{line['phase']}, loss {np.mean(self.recent):.4f}, peak {self.peak:.1f} GB"
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update()


def what_is_not_finite(run: Any, shown: list[Photo], losses: Tensor) -> str:
    """A meta_train.Run's batch whose losses (B,) or gradients are not finite, in words."""
    bad = [photo for photo, loss in zip(shown, losses.tolist()) if not math.isfinite(loss)]
    if not bad and (run.group.size == 1 or not run.adapter.rows.grad.isfinite().all()):
        bad = shown                              # the losses are finite, a gradient is not
    names = "; ".join(f"{photo.path.parent.name}, {photo.path}" for photo in bad)
    bucket = run.bucket_names[run.passes[run.open].bucket]
    return (f"the loss or its gradient is not finite at iteration {run.iteration} "
            f"(bucket {bucket}: {names or 'in another process'})")


@only_to_be_seen("loss.png")
def plot(log: Path, path: Path):
    """loss.png: the loss of both phases over the run, and the loss by time, early and late."""
    from matplotlib.figure import Figure
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    if not lines:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    over, by_t = figure.subplots(1, 2)
    for phase in ("warm-up", "joint"):
        points = [(line["iteration"], line["loss"]) for line in lines if line["phase"] == phase]
        if points:
            # a point is the mean of some iterations
            parts = np.array_split(points, min(len(points), 500))
            means = [part.mean(axis=0) for part in parts]
            over.plot(*zip(*means), ".", markersize=3, label=phase)
    over.set(xlabel="iteration", ylabel="loss", title="loss by phase")
    over.legend()

    values = np.array([line["loss_by_t"] for line in lines], float)           # None becomes nan
    fifth = 1 + len(lines) // 5
    for label, part in ("first fifth", values[:fifth]), ("last fifth", values[-fifth:]):
        by_t.plot(np.ma.masked_invalid(part).mean(axis=0), "o-", label=label)
    by_t.set(xlabel="tenths of t (the last is noise)", title="loss by time")
    by_t.legend()
    save_figure(figure, path)


@only_to_be_seen("a preview")
@torch.no_grad()
def draw_preview(run: Any):
    """Two people of a meta_train.Run's open bucket: a photo, and a sample with their row."""
    args = run.args
    device = run.group.device
    size = max(args.resolution)
    text = run.cache.load(run.cache.text_path(args.prompt))
    txt, y = (text[name][None].to(device) for name in ("txt", "y"))
    people = run.members[run.passes[run.open].bucket][:2]
    autoencoder = load_autoencoder(args.folder, device, args.dtype)
    rows = []
    for row, (_, photos) in enumerate(people):
        run.adapter.assign(torch.tensor([row]))
        noise = get_noise(size, size, seed=row).to(device)
        latent = denoise(run.adapter.flux, noise, txt, y, 30, args.guidance)
        photo = ImageOps.fit(read_photo(photos[0].path), (size, size))
        sample = to_image(autoencoder.decode(latent)[0])
        rows.append(np.hstack([photo, sample]))
    sheet = Image.fromarray(np.vstack(rows))
    save_png(sheet, args.run / "previews" / f"{run.iteration:08d}.png")
