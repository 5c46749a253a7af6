"""What the six files at the top stand on; not needed on a first reading."""
import os
import signal
import sys
from pathlib import Path

# How often a thread of GNU's OpenMP looks before it sleeps. By default two threads that wait for
# each other beside another busy program make everything tens of times slower; if they sleep at
# once, a small model is half as fast when nothing else runs. Read once, when torch loads its
# OpenMP: so every script imports this package before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "500")

# CUDA's allocator grows one segment instead of leaving holes between many; torch has that on Linux
# only. Read when CUDA starts.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

SCRIPTS = "meta_train.py", "personalize.py", "sample.py", "eval_rfacesim.py"
SIGNALS = set()
for number in signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None):    # Windows lacks it
    # nohup has one ignored, and so has a script for what it starts with `&`
    if number and signal.getsignal(number) is not signal.SIG_IGN:
        SIGNALS.add(number)


def end(number: int, frame: object):
    """A line instead of a traceback while a script is still importing: nothing to save yet."""
    try:
        os.write(2, f"{running.name}: interrupted\n".encode())
    finally:
        os._exit(128 + number)


running = Path(getattr(sys.modules["__main__"], "__file__", None) or "").absolute()
if running.name in SCRIPTS and running.parent == Path(__file__).absolute().parents[1]:
    for number in SIGNALS:
        signal.signal(number, end)
