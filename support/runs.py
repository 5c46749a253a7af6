"""What a long run leans on: the processes that torchrun started, the log, and a figure of it."""
import json
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from support.common import pick_device, save_figure, write_whole

try:
    import resource
except ImportError:                              # Windows: no peak memory without a GPU
    resource = None

T_BINS = 10


class Group:
    """The processes that torchrun started; one alone without it. Counts the bytes that it sends."""
    def __init__(self, device_name: str | None):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1 and device_name is None and torch.cuda.is_available():
            device_name = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = pick_device(device_name)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.sent = 0
        if self.size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))    # a bucket may take long to encode

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


def peak_memory(device: torch.device) -> float:
    """GB: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


class Log:
    """Lines of JSON, each the mean over the iterations since the last, of one phase. A resumed run first
    drops the lines from after its checkpoint."""
    def __init__(self, path: Path, iteration: int):
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [line for line in lines if line.endswith("}")]                # a kill may tear the last
        kept = [line for line in whole if json.loads(line)["iteration"] <= iteration]
        self.smooth = json.loads(kept[-1])["loss"] if kept else None
        write_whole(path, "".join(line + "\n" for line in kept).encode())
        self.path, self.entries = path, []

    def add(self, iteration, joint, bucket, losses, t, norms, lomd_norm, seconds, sent, memory):
        loss = sum(losses) / len(losses)
        self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        self.entries.append((iteration, joint, bucket, losses, t, norms, lomd_norm, seconds, sent, memory))

    def write(self) -> None:
        iterations, joint, buckets, losses, t, norms, lomd_norms, seconds, sent, memory = zip(*self.entries)
        losses, t, norms = (np.concatenate(values) for values in (losses, t, norms))
        bins = np.minimum((t * T_BINS).astype(int), T_BINS - 1)
        phase = "joint" if joint[-1] else "warm-up"
        line = {"iteration": iterations[-1], "phase": phase, "bucket": buckets[-1],
                "loss": losses.mean(),
                "loss_by_t": [losses[bins == b].mean() if (bins == b).any() else None for b in range(T_BINS)],
                "gradient_rows": norms.mean(), "gradient_lomd": np.mean(lomd_norms),
                "seconds": np.mean(seconds),
                "bytes_sent": int(np.mean(sent)), "peak_gb": memory[-1]}
        short = lambda word: float(f"{float(word):.5g}")
        rounded = json.loads(json.dumps(line, default=float), parse_float=short)
        with open(self.path, "a") as file:
            file.write(json.dumps(rounded) + "\n")
        self.entries = []


def plot(log: Path, path: Path) -> None:
    """loss.png: the loss of both phases over the run, and by time, early and late."""
    from matplotlib.figure import Figure
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(11, 4), layout="constrained")
    over, by_t = figure.subplots(1, 2)
    for phase in ("warm-up", "joint"):
        if some := [line for line in lines if line["phase"] == phase]:
            x, y = ([line[name] for line in some] for name in ("iteration", "loss"))
            over.plot(x, y, ".", markersize=3, label=phase)
    over.set(xlabel="iteration", ylabel="loss", title="loss by phase")
    over.legend()
    centres = (np.arange(T_BINS) + 0.5) / T_BINS
    fifth = max(1, len(lines) // 5)
    for part, some in (("first fifth", lines[:fifth]), ("last fifth", lines[-fifth:])):
        values = np.array([line["loss_by_t"] for line in some], float)                   # None becomes nan
        seen = ~np.isnan(values).all(axis=0)
        by_t.plot(centres[seen], np.nanmean(values[:, seen], axis=0), "o-", label=part)
    by_t.set(xlabel="t (1 is noise)", title="loss by time")
    by_t.legend()
    save_figure(figure, path)
