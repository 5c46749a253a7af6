"""Devices: which one, how many threads, small tensors, freeing memory and running out of it."""
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def pick_device(name: str | None = None) -> torch.device:
    """The device by name, or the best available one. ValueError if it is not available."""
    available = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        available.append("mps:0")
    available.append("cpu:0")
    if name is None:
        name = available[0].removesuffix(":0")
    if name not in available and f"{name}:0" not in available:
        raise ValueError(f"--device {name} is not available here; available: "
                         f"{', '.join(available)}")
    device = torch.device(name)
    if device.type == "mps" and "PYTORCH_MPS_HIGH_WATERMARK_RATIO" not in os.environ:
        # by itself it swaps, up to 1.7 times its memory, before it says that it is full
        torch.mps.set_per_process_memory_fraction(1.0)
    return device


def use_threads(dtype: torch.dtype):
    """One thread for a small model on a CPU, which alone computes in fp32 (`choose_model`): on
    small tensors, threads wait more than they work."""
    if dtype == torch.float32 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a small CPU tensor to the device without waiting for the work queued there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def free(device: str | torch.device):
    """Returns the memory of models that were just dropped to the device."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """What PyTorch says on the various devices; it has a type for CUDA alone. The last two: without
    memory for their workspace, no convolution of cuDNN runs and cuBLAS does not start."""
    messages = ("out of memory", "can't allocate memory", "not enough memory",
                "unable to find an engine", "STATUS_ALLOC_FAILED")
    return any(message in str(error) for message in messages)


@contextmanager
def suppress_out_of_memory() -> Iterator[None]:
    """Ends this block when the device runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def peak_memory(device: torch.device) -> str:
    """", peak 22.7 GiB" of a GPU since the start; "" for other devices."""
    if device.type != "cuda":
        return ""
    return f", peak {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB"
