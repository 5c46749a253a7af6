"""Folders of people, and the bank of their rows on disk."""
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PARTS = "weight", "exp_avg", "exp_avg_sq", "steps"


class DiskBank:
    """Rows of any number of identities in one memory-mapped file: step count, weights and both moments of each, in turn.

    Only the rows that are asked for are read. The file starts sparse, and a row whose step count is 0 holds no weights
    yet. ValueError where the file has another size.
    """
    @staticmethod
    def bytes(count: int, size: int) -> int:
        return count * (8 + 12 * size)

    def __init__(self, path: Path, count: int, size: int):
        layout = np.dtype([("steps", "<i8"), *((part, "<f4", (size,)) for part in PARTS[:3])])
        if not path.exists():
            part = path.with_name(path.name + ".part")
            with open(part, "wb") as file:
                file.truncate(self.bytes(count, size))
            os.replace(part, path)
        if path.stat().st_size != self.bytes(count, size):
            raise ValueError(f"{path} is {path.stat().st_size} bytes, not {count} rows of {layout.itemsize}")
        self.rows = np.memmap(path, layout, "r+", shape=(count,))

    def steps(self) -> Tensor:
        """Step counts of all identities (N,)."""
        return torch.from_numpy(np.array(self.rows["steps"]))

    def read(self, ids: list[int], device) -> list[Tensor]:
        """Copies of these rows on `device`: weights, both moments, step counts."""
        return [torch.from_numpy(self.rows[part][ids]).to(device) for part in PARTS]

    def write(self, ids: list[int], bank) -> None:
        """Puts the rows back, and waits for the disk."""
        for part in PARTS:
            self.rows[part][ids] = getattr(bank, part).cpu().numpy()
        self.rows.flush()
