"""What a long run needs: torchrun's processes, settings, lock, checkpoints, log, figure."""
import collections
import itertools
import json
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from flux_model import denoise, get_noise
from support.checkpoints import flux_fingerprint, load_autoencoder, model_defaults, take_model
from support.common import (JsonFile, check_out, check_readable, check_writable,
                            is_out_of_memory, naming, note, pick_device, save_figure, save_png,
                            write_whole)
from support.people import Buckets, Photo, data_fingerprint, save_state
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


def check_stage_1(args: Namespace, device: torch.device) -> None:
    """Fills in the model's defaults. ValueError for what is refused before loading."""
    if not args.data.is_dir():
        raise ValueError(f"--data: no such folder: {args.data}")
    check_out(args.out, ".safetensors")
    check_writable(args.run, "--run", [args.data])
    if args.run.exists() and not (args.run / "settings.json").exists():
        early = "pictures.json", "settings.json", "lock", "cache"        # of a run killed early
        if not all(path.name.startswith(early) for path in visible(args.run)):
            raise ValueError(f"--run {args.run} holds other files: name a new folder")
    if args.warmup is not None and not 0 <= args.warmup < 1:
        raise ValueError(f"--warmup is a share from 0 to below 1, not {args.warmup}")
    if args.r2 > args.r1:
        raise ValueError(f"--r2 {args.r2} is more than the --r1 {args.r1} rows of LoMD that it "
                         "combines")
    take_model(args, device, "stage 1")
    args.resolution = sorted(set(args.resolution))
    if any(resolution % 16 for resolution in args.resolution):
        raise ValueError("--resolution takes multiples of 16")


def check_settings(args: Namespace, buckets: Buckets, group: "Group") -> None:
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
    }
    path = args.run / "settings.json"
    before = JsonFile(path) if path.exists() else args.settings
    changed = [f"{name} was {before[name]} and is {value}"
               for name, value in args.settings.items() if before[name] != value]
    if changed:
        raise ValueError(f"{args.run} is another run: {', '.join(changed)}; "
                         "resume it with its settings, or name a new --run")


def announce(run: Any, buckets: Buckets) -> None:
    """The first process prints what a meta_train.Run is about to do."""
    if run.group.rank:
        return
    captions = []
    for photos in itertools.chain.from_iterable(map(dict.values, buckets.values())):
        captions += [photo.caption for photo in photos]
    missing = captions.count(None)
    resuming = f"; resuming from iteration {run.iteration}" if run.iteration else ""
    print(f"{run.args.people} people, {len(captions)} pictures, {len(buckets)} buckets; "
          f"{run.args.iters} iterations, {len(run.passes)} passes over a bucket{resuming}")
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
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        note(f"{what} is left out: {error}")


# --------------------------------------------------------------------------------------------------
# Processes


class Group:
    """The processes that torchrun started, or this one alone. Counts the bytes that it sends."""
    def __init__(self, device_name: str | None):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.sent = 0
        if self.size > 1 and device_name is None and torch.cuda.is_available():
            device_name = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        self.device = pick_device(device_name)
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"       # a flag on the CPU does not wait for the GPU
        if self.size > 1:
            self.meet(backend)

    def meet(self, backend: str) -> None:
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
        timeout = timedelta(hours=2)             # a bucket may take long to encode
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

    def first(self, work: Callable[[], Any]) -> Any:
        """The first process calls work(); all return its result, or raise its error."""
        outcome = [None, None]                   # result, error
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (ValueError, OSError, KeyboardInterrupt) as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        result, error = outcome
        if error:
            raise error
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            self.sent += tensor.numel() * tensor.element_size()
        return tensor

    def gather(self, thing: object) -> list:
        """A list of the things that all processes passed."""
        things = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing)
        return things

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# State on disk


State = dict[str, Tensor]


def read_state(path: Path, device: torch.device) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of a safetensors file of a run."""
    with safe_open(path, "pt", device=str(device)) as file:
        # clone: on a CPU the bits of a matmul depend on alignment, and a file's is odd
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return tensors, file.metadata() or {}


class WaitingRows(NamedTuple):
    """Where one process's people wait for the next pass over their bucket: a file for each finished
    pass, pass0007.safetensors. A pass starts from the file of the previous pass over its bucket."""
    folder: Path
    members: list[int]                           # this process's people in each bucket
    size: int                                    # numbers in a row

    def path(self, number: int) -> Path:
        return self.folder / f"pass{number:04d}.safetensors"

    def bytes(self, bucket: int) -> int:
        """Size of a bucket's file: weights and both moments in fp32, and the step counts."""
        return self.members[bucket] * (3 * 4 * self.size + 8)

    def save(self, number: int, tensors: State) -> None:
        """Writes the rows at the end of a pass.

        By now every process has a checkpoint of the end of the pass before it, so that none resumes
        from before that, and the file which that pass started from can go."""
        self.path(number - 1 - len(self.members)).unlink(missing_ok=True)
        save_state(self.path(number), tensors)

    def load(self, number: int, device: torch.device) -> State | None:
        """The rows that a pass starts from, or None if its people have never been trained."""
        before = number - len(self.members)
        return read_state(self.path(before), device)[0] if before >= 0 else None

    def check(self, open_pass: int, passes: int) -> None:
        """ValueError unless the files are there from which the passes after the open one start."""
        buckets = len(self.members)
        for number in range(max(0, open_pass + 1 - buckets), min(open_pass, passes - buckets)):
            path = self.path(number)
            try:
                with safe_open(path, "pt") as file:
                    shape = file.get_slice("weight").get_shape()
                if shape != [self.members[number % buckets], self.size]:
                    raise OSError(f"it holds rows of {shape}, of another run")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is missing or damaged, and this run cannot resume "
                                 f"without it: name a new --run ({error})") from None


def check_room(rows: WaitingRows, used: set[int], lomd: int, cache: int, group: Group) -> None:
    """ValueError if the disk lacks room for what all processes together are still going to write.

    used: the buckets that the run reaches. lomd: numbers in LoMD. cache: bytes of latents, text."""
    def left(size: int, pattern: str) -> int:
        there = [path.stat().st_size for path in rows.folder.glob(pattern)]
        return max(0, size - sum(there))

    sizes = [rows.bytes(bucket) for bucket in used]
    largest = max(sizes, default=0)
    # two checkpoints are kept, with several processes three, while another is written
    count = 3 if group.size == 1 else 4
    mine = [
        left(sum(sizes) + largest, "pass*"),
        left(count * (largest + 3 * 4 * lomd), "*-*"),
        cache,
    ]
    people, checkpoints, cache = torch.tensor(group.gather(mine)).sum(dim=0).tolist()
    free_bytes = shutil.disk_usage(rows.folder).free
    if people + checkpoints + cache > free_bytes:
        raise ValueError(f"{rows.folder.parent} has no room for this run: people "
                         f"{people / 1e9:.3g} GB, checkpoints {checkpoints / 1e9:.3g} GB, latents "
                         f"and text {cache / 1e9:.3g} GB; {free_bytes / 1e9:.3g} GB are free")


class Checkpoints:
    """One process's checkpoints: <iteration>-<steps of LoMD>.safetensors in its folder, all with
    eight digits, so that they sort by name."""
    def __init__(self, folder: Path, group: Group):
        self.folder = folder
        self.group = group
        folder.mkdir(exist_ok=True)
        for part in folder.glob("*.part"):       # of a process that was killed while writing
            part.unlink()

    def found(self) -> list[Path]:
        """All of them, the newest last."""
        return sorted(self.folder.glob("*-*.safetensors"))

    def save(self, iteration: int, lomd_steps: int, tensors: State, at: str) -> None:
        """Writes a checkpoint in pass `at` and keeps the last two. With several processes it keeps
        also the last from before LoMD's latest step: another may not have saved since."""
        steps = f"{lomd_steps:08d}"
        save_state(self.folder / f"{iteration:08d}-{steps}.safetensors", tensors, {"pass": at})
        found = self.found()
        kept = found[-2:]
        if self.group.size > 1:
            kept += [path for path in found if path.stem[9:] < steps][-1:]
        for path in found:
            if path not in kept:
                path.unlink()

    def newest(self, device: torch.device) -> tuple[Path | None, str, State]:
        """(path, pass, tensors) of the newest state that all processes have, or (None, "", {}).

        In a warm-up their iterations may differ, as long as LoMD has made the same steps."""
        readable = {}                            # {steps of LoMD: the newest}
        for path in self.found():
            check_readable(path)
            try:
                with safe_open(path, "pt"):
                    readable[path.stem[9:]] = path
            except (SafetensorError, OSError) as error:
                note(f"{path} is damaged and passed over: {error}")
        common = set.intersection(*self.group.gather(set(readable)))
        if not common:
            return None, "", {}
        path = readable[max(common)]
        tensors, metadata = read_state(path, device)
        return path, metadata["pass"], tensors


# --------------------------------------------------------------------------------------------------
# Log, figure, previews


def peak_memory(device: torch.device) -> float:
    """GB: of the GPU since the start, or of this process since the last call, but mapped files.

    0 where neither is known: without a GPU on macOS and Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        words = Path("/proc/self/status").read_text("utf-8").split()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "utf-8")           # begins a new peak
    except OSError:
        return 0.0
    resident, mapped = (int(words[words.index(name) + 1]) for name in ("VmHWM:", "RssFile:"))
    return 1024 * (resident - mapped) / 1e9


def rounded(numbers: Iterable[float]) -> float:
    """Their mean, to five digits."""
    return float(f"{np.mean(numbers):.5g}")


class Log:
    """The first process's progress bar and log.jsonl, whose lines are means over iterations.

    A run that resumes first drops the lines after its checkpoint."""
    def __init__(self, args: Namespace, iteration: int, group: Group):
        self.path = args.run / "log.jsonl"
        self.group = group
        self.values = collections.defaultdict(list)      # since the last line
        self.smooth = None                       # moving average of the loss, for the bar
        self.peak = 0.0
        self.bar = tqdm(
            total=args.iters,
            initial=iteration,
            desc="meta-training",
            smoothing=0.02,
            disable=True if group.rank else None,
        )
        peak_memory(group.device)                # begins a new peak: loading is not of interest
        if group.rank == 0:
            kept = []
            for line in self.path.read_text("utf-8").splitlines() if self.path.exists() else []:
                # a kill may tear the last
                if line.endswith("}") and json.loads(line)["iteration"] <= iteration:
                    kept.append(line + "\n")
                    self.smooth = json.loads(line)["loss"]
            write_whole(self.path, "".join(kept))

    def start(self) -> None:
        """An iteration starts."""
        self.time = time.perf_counter()
        self.sent = self.group.sent

    def add(
        self,
        iteration: int,
        joint: bool,
        bucket: str,
        losses: Tensor,
        t: Tensor,
        norms: Tensor,
        lomd_norm: Tensor,
    ) -> None:
        """An iteration has ended: losses and t (B,), gradient norms of rows (n,) and LoMD ()."""
        # one wait for the GPU: all values come in one piece
        values = torch.cat([losses, norms, lomd_norm[None]]).tolist()
        new = {
            "loss": values[:len(losses)],
            "gradient_rows": values[len(losses):-1],
            "gradient_lomd": values[-1:],
            "loss_by_t": t.tolist(),             # `write` sorts the losses by it
            "seconds": [time.perf_counter() - self.time],
            "bytes_sent": [self.group.sent - self.sent],
        }
        for name, values in new.items():
            self.values[name] += values
        loss = sum(new["loss"]) / len(losses)
        self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        self.peak = max(self.peak, peak_memory(self.group.device))
        phase = "joint" if joint else "warm-up"
        self.place = {"iteration": iteration, "phase": phase, "bucket": bucket}
        self.bar.set_postfix_str(
            f"{phase}, loss {self.smooth:.4f}, peak {self.peak:.1f} GB",
            refresh=False,
        )
        self.bar.update()

    def write(self) -> None:
        """Appends a line for the iterations since the last."""
        losses = np.array(self.values["loss"])
        bins = np.minimum((np.array(self.values["loss_by_t"]) * T_BINS).astype(int), T_BINS - 1)
        by_t = [losses[bins == i] for i in range(T_BINS)]
        line = self.place | {name: rounded(numbers) for name, numbers in self.values.items()}
        line["loss_by_t"] = [rounded(part) if len(part) else None for part in by_t]
        line["bytes_sent"] = int(np.mean(self.values["bytes_sent"]))
        line["peak_gb"] = rounded([self.peak])
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.values.clear()


@only_to_be_seen("loss.png")
def plot(log: Path, path: Path) -> None:
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
            over.plot(*zip(*points), ".", markersize=3, label=phase)
    over.set(xlabel="iteration", ylabel="loss", title="loss by phase")
    over.legend()

    times = (np.arange(T_BINS) + 0.5) / T_BINS
    values = np.array([line["loss_by_t"] for line in lines], float)           # None becomes nan
    fifth = max(1, len(lines) // 5)
    for label, part in ("first fifth", values[:fifth]), ("last fifth", values[-fifth:]):
        by_t.plot(times, np.ma.masked_invalid(part).mean(axis=0), "o-", label=label)
    by_t.set(xlabel="t (1 is noise)", title="loss by time")
    by_t.legend()
    save_figure(figure, path)


@only_to_be_seen("a preview")
@torch.no_grad()
def draw_preview(
    adapter: Any,
    photos: dict[int, Photo],
    text: dict[str, Tensor],
    args: Namespace,
    iteration: int,
) -> None:
    """Two people of {row: a photo of theirs}: the photo, and a sample with their row."""
    device = next(adapter.flux.parameters()).device
    size = max(args.resolution)
    guidance = model_defaults(args.folder)["guidance"]
    txt, y = (text[name][None].to(device) for name in ("txt", "y"))
    shown = sorted(photos.items())[:2]
    sheet = Image.new("RGB", (2 * size, size * len(shown)))
    autoencoder = load_autoencoder(args.folder, device, args.dtype)
    for i, (row, photo) in enumerate(shown):
        adapter.assign(torch.tensor([row]))
        noise = get_noise(size, size, seed=i).to(device)
        latent = denoise(adapter.flux, noise, txt, y, 30, guidance)
        sheet.paste(ImageOps.fit(read_photo(photo.path), (size, size)), (0, size * i))
        sheet.paste(to_image(autoencoder.decode(latent)[0]), (size, size * i))
    save_png(sheet, args.run / "previews" / f"{iteration:08d}.png")
