"""Ctrl-C, SIGTERM and SIGHUP at each script, at every moment: what was finished is on disk, one line, the exit code.

    pytest tests/test_interruption.py -m "slow or not slow"
"""
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
MODEL = next((path for path in (ROOT / "tests" / "golden" / "hub", ROOT.parent / "shared" / "golden" / "hub")
              if path.is_dir()), None)
pytestmark = [pytest.mark.skipif(MODEL is None, reason="the small model of golden/hub is not here"),
              pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")]
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SCRIPTS = "meta_train", "personalize", "sample", "eval_rfacesim"

AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), int(os.environ["TEST_SIGNAL"]))
sys.meta_path.insert(0, Finder())
"""
AT_CALL = """
import importlib, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)         # a shell may have it ignored
sys.path.insert(0, {root!r})
import {script} as script
owner, real, calls = importlib.import_module({owner!r}), None, 0
real = getattr(owner, {name!r})
def hit(*args, **options):
    global calls
    calls += 1
    if calls == {count}:
        os.kill(os.getpid(), {number})
    return real(*args, **options)
setattr(owner, {name!r}, hit)
sys.exit(script.main({words!r}))
"""


def check(child, script, number, folder, expected):
    lines = [line for line in child.stderr.splitlines() if line.startswith(f"{script}.py: ")]
    assert child.returncode == 128 + number, child.stderr[-2000:]
    assert lines == [f"{script}.py: interrupted"] and "Traceback" not in child.stderr, child.stderr[-2000:]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in found if name.endswith(".part")]
    for name in expected:
        assert name in found, (name, sorted(found))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_while_packages_are_imported(script, number, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORT, "utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TEST_SIGNAL": str(int(number))}
    child = subprocess.run([sys.executable, "-B", ROOT / f"{script}.py", "x"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    check(child, script, number, tmp_path, ())


def words_of(script, folder):
    """A command line of each script, and its data."""
    small = ["--model", str(MODEL), "--device", "cpu"]
    if script == "sample":
        return ["a cat", "--num", "3", "--width", "48", "--height", "32", "--steps", "2", "--out", "some", *small]
    for i, name in enumerate(("data/ann/0", "data/ann/1", "data/bob/0", "data/bob/1", "made/some/ann/0_0", "made/some/bob/0_0")):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.BICUBIC).save(path)
    if script == "personalize":
        return ["data/ann/0.png", "--box", "10", "10", "30", "30", "--method", "lora", "--iters", "5", "--save-at", "2",
                "--resolution", "64", *small]
    if script == "meta_train":
        return ["--data", "data", "--resolution", "64", "--iters", "5", "--batch-size", "2", "--r1", "3", "--warmup", "0",
                "--preview-every", "2", *small]
    astronaut = Image.open(ROOT / "tests" / "photos" / "astronaut.png").convert("RGB")
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        astronaut.crop((100 + 5 * i, 0, 400, 300)).save(path)
    (folder / "prompts.txt").write_text("a photo\n", "utf-8")
    return ["--data", "data", "--images", "made", "--model", "baby", "--prompts", "prompts.txt", "--device", "cpu"]


MOMENTS = [  # script, moment, whose function, which, at which call, what is on disk then
    ("sample", "encoding", "sample", "encode_prompts", 1, ()),
    ("sample", "drawing", "sample", "denoise", 3, ("some/0_0.png", "some/0_1.png")),
    ("sample", "saving", "sample", "save_png", 2, ("some/0_0.png", "some/0_1.png")),
    ("personalize", "encoding", "personalize", "encode_crops", 1, ()),
    ("personalize", "training", "personalize", "flow_matching_loss", 3, ("out-000002.safetensors", "out-interrupted-000003.safetensors")),
    ("personalize", "saving", "support.lora_files", "tensor_bytes", 3, ("out-000002.safetensors", "out.safetensors")),
    ("meta_train", "encoding", "support.people", "load_autoencoder", 1, ("run/pictures.json",)),
    ("meta_train", "training", "flux_model", "flow_matching_loss", 3, ("run/rank0/00000003-00000003.safetensors",)),
    ("meta_train", "drawing", "support.runs", "denoise", 1, ("run/previews/00000002.png", "run/rank0/00000003-00000003.safetensors")),
    ("meta_train", "saving", "meta_train", "save_lomd", 2, ("run/lomd.safetensors", "lomd.safetensors")),
    ("eval_rfacesim", "scoring", "eval_rfacesim", "score", 2, ("report/parts",)),
]
QUICK = ("sample", "drawing", signal.SIGHUP), ("personalize", "training", signal.SIGTERM)
CASES = []
for number in SIGNALS:
    for moment in MOMENTS:
        marks = () if (*moment[:2], number) in QUICK else pytest.mark.slow
        CASES.append(pytest.param(number, *moment, marks=marks, id=f"{number.name}-{moment[0]}-{moment[1]}"))


@pytest.mark.parametrize("number, script, moment, owner, name, count, expected", CASES)
def test_at_work(number, script, moment, owner, name, count, expected, tmp_path):
    words = words_of(script, tmp_path)
    code = AT_CALL.format(root=str(ROOT), script=script, owner=owner, name=name, count=count, number=int(number), words=words)
    child = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    if expected == ("report/parts",):
        assert len(list((tmp_path / "report" / "parts").iterdir())) == 1             # the first person's
        expected = ()
    check(child, script, number, tmp_path, expected)
