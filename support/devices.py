"""Devices: the best one, threads, small tensors, memory that is given back or has run out."""
import os

import torch


def pick_device(name: str | None = None) -> torch.device:
    """The device by name, or the best one here. ValueError where the named one is not there."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    kind, colon, index = (available[0] if name is None else name).partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in available or colon and not (index.isdecimal() and int(index) < count):
        raise ValueError(f"--device {name} is not available here; available: {', '.join(available)}")
    return torch.device(kind + colon + index)


def use_threads(small: bool) -> None:
    """One thread for a small model on a CPU: on small tensors, two that wait for each other are slower."""
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """A small tensor of the CPU on the device, without waiting for what the device still has to do."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def free(device: str | torch.device) -> None:
    """Gives the memory of models that were just dropped back to the device."""
    if torch.device(device).type in ("cuda", "mps"):
        getattr(torch, torch.device(device).type).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a kind of error for it; mps and the CPU raise a RuntimeError with these words."""
    words = "out of memory", "can't allocate memory", "not enough memory"
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in words)
