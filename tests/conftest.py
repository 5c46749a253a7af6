"""What all tests share: no network, one thread, random numbers that do not depend on the test before, and a server."""
import os
import signal
from pathlib import Path

import pytest

# Before huggingface_hub and torch are imported, and for the child processes too. Small tensors on a busy machine are
# many times slower with two threads that wait for each other than with one.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# nohup and a shell's & ignore these, and children inherit that; the scripts respect it
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)


@pytest.fixture(autouse=True)
def seeded():
    import torch
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def server():
    """A process that has imported everything and computed nothing: `server.Process` is forked from it, since a start of
    Python costs more than most runs of a script."""
    pytest.importorskip("resource")                          # Windows, which has no forkserver either
    import multiprocessing
    import multiprocessing.forkserver
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.{part}_{name}" for name in ("clip", "t5")
              for part in ("modeling", "tokenization")]
    context.set_forkserver_preload(["meta_train", "personalize", "sample", "eval_rfacesim", "pytest", "facenet_pytorch",
                                    "matplotlib.pyplot", "transformers.models.clip.image_processing_clip", *models])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        multiprocessing.forkserver.ensure_running()
    return context
