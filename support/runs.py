"""What a long run stands on: the processes of torchrun, settings, lock, checkpoints, log and figure."""
import json
import math
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from flux_model import denoise, get_noise
from support.checkpoints import load_autoencoder, model_defaults
from support.common import (JsonFile, check_readable, is_out_of_memory, naming, note, pick_device,
                            save_figure, save_png, whole, write_whole)
from support.people import Photo
from support.photos import read_photo, to_image, visible

try:
    import fcntl
    import resource
except ImportError:                              # Windows: no lock, and no peak memory without a GPU
    fcntl = resource = None

MEETING = 10                                     # minutes that processes wait for each other
T_BINS = 10                                      # of the loss by time


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a run's lock. ValueError where another process does."""
    with open(path, "wb") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in {path.parent}") from None
        except OSError as error:                 # NFS, Lustre
            note(f"{path.parent} cannot be locked ({error.strerror}): let no other process use it")
        yield


def check_run(run: Path) -> None:
    """ValueError where a run's folder holds other files; those of one that was killed early are fine."""
    early = "pictures.json", "settings.json", "lock", "cache"
    if run.exists() and not (run / "settings.json").exists() and any(
            not path.name.startswith(early) for path in visible(run)):
        raise ValueError(f"--run {run} holds other files: name a new folder")


@contextmanager
def only_to_be_seen(what: str) -> Iterator[None]:
    """What fails within is a note, and the run goes on."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        note(f"{what} is left out: {error}")


def compare_settings(run: Path, settings: dict) -> None:
    """ValueError, in words, where a run's folder holds another run."""
    path = run / "settings.json"
    if path.exists():
        before = JsonFile(path)
        changed = [f"{name} was {before[name]} and is {value}" for name, value in settings.items()
                   if before[name] != value]
        if changed:
            raise ValueError(f"{run} is another run: {', '.join(changed)}; "
                             "go on with its settings, or name a new --run")


class Group:
    """The processes that torchrun started; one alone without it. Counts the bytes that it sends."""
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
            backend = "cpu:gloo,cuda:nccl"       # a flag of the CPU does not wait for the card
        if self.size > 1:
            self.meet(backend)

    def meet(self, backend: str) -> None:
        """Waits for the other processes. ValueError where they do not come: WORLD_SIZE may be left over."""
        others = f"WORLD_SIZE is {self.size}, from the environment: {self.size - 1} other processes are"
        if self.rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:       # torchrun's
            note(f"{others} waited for; if there are none, unset it")
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=MEETING)))
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{others} missing ({reason}): unset it, or start with torchrun") from None
        patience = timedelta(hours=2)            # a bucket may take long to encode
        store.set_timeout(patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)

    def first(self, work: Callable[[], Any]) -> Any:
        """What work() of the first process gives, or raises, for all."""
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (ValueError, OSError, KeyboardInterrupt) as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1]:
            raise outcome[1]
        return outcome[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            self.sent += tensor.numel() * tensor.element_size()
        return tensor

    def gather(self, thing: object) -> list:
        """Python objects of all processes."""
        things = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing)
        return things

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


State = dict[str, Tensor]


def save_state(path: Path, tensors: State, metadata: dict[str, str] | None = None) -> None:
    with whole(path) as part:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, part, metadata)


def read_state(path: Path, device: torch.device) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of a file of a run."""
    tensors = {}
    with safe_open(path, "pt", device=str(device)) as file:
        for name in file.keys():
            # clone: on a CPU a matmul's bits depend on how its operands lie, and a file's lie oddly
            tensors[name] = file.get_tensor(name).clone()
        return tensors, file.metadata() or {}


class WaitingRows:
    """Where one process's people wait for the next pass over their bucket: a file for each pass that has
    ended, pass0007.safetensors. A pass starts from the file of the pass before it over the same bucket.

    members: how many of its people each bucket has. size: numbers in a row.
    """
    def __init__(self, folder: Path, members: list[int], size: int):
        self.folder = folder
        self.members = members
        self.size = size

    def path(self, number: int) -> Path:
        return self.folder / f"pass{number:04d}.safetensors"

    def bytes(self, bucket: int) -> int:
        """Of a bucket's file: weights and both moments in fp32, and the step counts."""
        row = 3 * 4 * self.size + 8
        return self.members[bucket] * row

    def save(self, number: int, tensors: State) -> None:
        """The rows at the end of a pass. By now every process has saved the end of the pass before it, so
        nobody goes back to before that, and the file which that pass started from can go."""
        self.path(number - 1 - len(self.members)).unlink(missing_ok=True)
        save_state(self.path(number), tensors)

    def load(self, number: int, device: torch.device) -> State | None:
        """What a pass starts from; None: its people have never trained."""
        before = number - len(self.members)
        if before < 0:
            return None
        return read_state(self.path(before), device)[0]

    def check(self, open_pass: int, passes: int) -> None:
        """ValueError unless the files are there that the passes after the open one will start from."""
        buckets = len(self.members)
        first = max(0, open_pass + 1 - buckets)
        for number in range(first, min(open_pass, passes - buckets)):
            path = self.path(number)
            shape = [self.members[number % buckets], self.size]
            try:
                with safe_open(path, "pt") as file:
                    found = file.get_slice("weight").get_shape()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is missing or damaged, and this run cannot go on without it: name "
                                 f"a new --run ({error})") from None
            if found != shape:
                raise ValueError(f"{path} holds rows of {found}, not {shape}: it is of another run")


def size_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def check_room(rows: WaitingRows, used: set[int], lomd: int, cache: int, group: Group) -> None:
    """ValueError where the disk lacks room for what all processes together are still going to write.

    used: the buckets that the run gets to. lomd: numbers in LoMD. cache: bytes of latents and text.
    """
    sizes = [rows.bytes(bucket) for bucket in used]
    largest = max(sizes, default=0)
    # two checkpoints are kept, of several processes three, while another is written
    count = 3 if group.size == 1 else 4
    people = sum(sizes) + largest - size_of(rows.folder, "pass*")
    checkpoints = count * (largest + 3 * 4 * lomd) - size_of(rows.folder, "*-*")
    mine = [max(0, people), max(0, checkpoints), cache]
    people, checkpoints, cache = torch.tensor(group.gather(mine)).sum(dim=0).tolist()
    free_bytes = shutil.disk_usage(rows.folder).free
    if people + checkpoints + cache > free_bytes:
        raise ValueError(f"{rows.folder.parent} has no room for this run: people {people / 1e9:.3g} GB, "
                         f"checkpoints {checkpoints / 1e9:.3g} GB, latents and text {cache / 1e9:.3g} GB; "
                         f"{free_bytes / 1e9:.3g} GB are free")


class Checkpoints:
    """One process's states of a run: <iteration>-<steps that LoMD has made>.safetensors in its folder."""
    def __init__(self, folder: Path, group: Group):
        self.folder = folder
        self.group = group
        folder.mkdir(exist_ok=True)
        for part in folder.glob("*.part"):       # of a process that was killed while it wrote
            part.unlink()

    def found(self) -> list[tuple[int, int, Path]]:
        """[(iteration, steps of LoMD, path)], the newest last."""
        found = []
        for path in self.folder.glob("*-*.safetensors"):
            iteration, steps = path.stem.split("-")
            found.append((int(iteration), int(steps), path))
        return sorted(found)

    def save(self, iteration: int, steps: int, tensors: dict[str, Tensor], at: str) -> None:
        """Two are kept; of several processes also the last from before LoMD's latest step, since another
        process may not have saved after it."""
        path = self.folder / f"{iteration:08d}-{steps:08d}.safetensors"
        save_state(path, tensors, {"pass": at})
        found = self.found()
        kept = found[-2:]
        if self.group.size > 1:
            kept += [each for each in found if each[1] < steps][-1:]
        for each in found:
            if each not in kept:
                each[2].unlink()

    def newest(self, device: torch.device) -> tuple[Path | None, str, dict[str, Tensor]]:
        """(path, `at`, tensors) of the newest state that all processes have, (None, "", {}) without one: in a
        warm-up they need not be at the same iteration, but LoMD must have made the same steps."""
        readable = {}
        for _, steps, path in self.found():
            check_readable(path)
            try:
                with safe_open(path, "pt"):
                    readable[steps] = path
            except (SafetensorError, OSError) as error:
                note(f"{path} is damaged and passed over: {error}")
        common = set.intersection(*map(set, self.group.gather(set(readable))))
        if not common:
            return None, "", {}
        path = readable[max(common)]
        tensors, metadata = read_state(path, device)
        return path, metadata["pass"], tensors


def peak_memory(device) -> float:
    """GB: of the GPU since the start, else of the process since the last call, without mapped files."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        words = Path("/proc/self/status").read_text("utf-8").split()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "utf-8")           # begins a new peak
        return 1024 * (int(words[words.index("VmHWM:") + 1]) - int(words[words.index("RssFile:") + 1])) / 1e9
    except (OSError, ValueError):                # not Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9 if resource else math.nan


class Log:
    """The first process's progress bar and log.jsonl, each line the mean over the iterations since the last.

    A run that goes on first drops the lines from after its checkpoint."""
    def __init__(self, args, iteration: int, group: Group):
        self.path = args.run / "log.jsonl"
        self.group = group
        self.entries = []
        self.smooth = None
        self.bar = tqdm(total=args.iters, initial=iteration, desc="meta-training", unit="it",
                        smoothing=0.02, disable=True if group.rank else None)
        self.peak = 0.0
        peak_memory(group.device)                # a new peak begins: loading is not of interest
        if group.rank == 0:
            self.drop_after(iteration)

    def drop_after(self, iteration: int):
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        kept = ""
        for line in lines:
            if not line.endswith("}"):           # a kill may tear the last
                continue
            entry = json.loads(line)
            if entry["iteration"] <= iteration:
                kept += line + "\n"
                self.smooth = entry["loss"]
        write_whole(self.path, kept.encode())

    def start(self):
        self.time = time.perf_counter()
        self.sent = self.group.sent

    def add(self, iteration, joint, bucket, losses, t, norms, lomd_norm):
        # one wait for the card: what lies there comes in one piece
        values = torch.cat([losses, norms, lomd_norm[None]]).tolist()
        images = len(losses)
        self.peak = memory = max(self.peak, peak_memory(self.group.device))
        phase = "joint" if joint else "warm-up"
        entry = {
            "iteration": iteration,
            "phase": phase,
            "bucket": bucket,
            "losses": values[:images],
            "t": t.tolist(),
            "norms": values[images:-1],
            "lomd_norm": values[-1],
            "seconds": time.perf_counter() - self.time,
            "sent": self.group.sent - self.sent,
            "memory": memory,
        }
        self.entries.append(entry)
        loss = sum(entry["losses"]) / images
        self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        self.bar.set_postfix_str(f"{phase}, loss {self.smooth:.4f}, peak {memory:.1f} GB", refresh=False)
        self.bar.update()

    def all_of(self, name: str) -> np.ndarray:
        return np.hstack([entry[name] for entry in self.entries])

    def write(self):
        losses = self.all_of("losses")
        bins = np.minimum((self.all_of("t") * T_BINS).astype(int), T_BINS - 1)
        by_t = []
        for number in range(T_BINS):
            inside = losses[bins == number]
            by_t.append(rounded(inside.mean()) if len(inside) else None)
        last = self.entries[-1]
        line = {
            "iteration": last["iteration"],
            "phase": last["phase"],
            "bucket": last["bucket"],
            "loss": rounded(losses.mean()),
            "gradient_rows": rounded(self.all_of("norms").mean()),
            "gradient_lomd": rounded(self.all_of("lomd_norm").mean()),
            "loss_by_t": by_t,
            "seconds": rounded(self.all_of("seconds").mean()),
            "bytes_sent": int(self.all_of("sent").mean()),
            "peak_gb": rounded(last["memory"]),
        }
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.entries = []


def rounded(number: float) -> float:
    """To five digits."""
    return float(f"{number:.5g}")


@only_to_be_seen("loss.png")
def plot(log: Path, path: Path) -> None:
    """loss.png: the loss of both phases over the run, and by time, early and late."""
    from matplotlib.figure import Figure
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    if not lines:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    over, by_t = figure.subplots(1, 2)
    for phase in ("warm-up", "joint"):
        some = [line for line in lines if line["phase"] == phase]
        if some:
            iterations = [line["iteration"] for line in some]
            losses = [line["loss"] for line in some]
            over.plot(iterations, losses, ".", markersize=3, label=phase)
    over.set(xlabel="iteration", ylabel="loss", title="loss by phase")
    centres = (np.arange(T_BINS) + 0.5) / T_BINS
    fifth = max(1, len(lines) // 5)
    for part, some in {"first fifth": lines[:fifth], "last fifth": lines[-fifth:]}.items():
        values = np.array([line["loss_by_t"] for line in some], float)                   # None becomes nan
        seen = ~np.isnan(values).all(axis=0)
        means = np.nanmean(values[:, seen], axis=0)
        by_t.plot(centres[seen], means, "o-", label=part)
    by_t.set(xlabel="t (1 is noise)", title="loss by time")
    over.legend()
    by_t.legend()
    save_figure(figure, path)


@only_to_be_seen("a preview")
@torch.no_grad()
def draw_preview(adapter: object, pictures: dict[int, Photo], text: dict[str, Tensor], args: Namespace,
                 iteration: int) -> None:
    """Two people of the bucket, {row: a picture of theirs}: that, and a sample with their rows."""
    device = next(adapter.flux.parameters()).device
    size = max(args.resolution)
    guidance = model_defaults(args.folder)["guidance"]
    txt = text["txt"][None].to(device)
    y = text["y"][None].to(device)
    rows = sorted(pictures)[:2]
    sheet = Image.new("RGB", (2 * size, size * len(rows)))
    autoencoder = load_autoencoder(args.folder, device, args.dtype)
    for i, row in enumerate(rows):
        adapter.assign(torch.tensor([row]))
        noise = get_noise(size, size, i).to(device)
        latent = denoise(adapter.flux, noise, txt, y, 30, guidance)
        photo = ImageOps.fit(read_photo(pictures[row].path), (size, size))
        sheet.paste(photo, (0, size * i))
        sheet.paste(to_image(autoencoder.decode(latent)[0]), (size, size * i))
    save_png(sheet, args.run / "previews" / f"{iteration:08d}.png")
