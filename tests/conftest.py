"""What all tests share: no network, one thread, and random numbers that do not depend on the test before."""
import os

import pytest

# Before huggingface_hub and torch are imported, and for the child processes too. Small tensors on a busy machine are
# many times slower with two threads that wait for each other than with one.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seeded():
    import torch
    torch.manual_seed(0)
