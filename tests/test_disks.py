"""A disk that takes no more, at every file that each script writes: one line, and the same command goes on.

    pytest tests/test_disks.py

A limit on the size of files stands for the full disk: what is longer fails as it is written.
"""
import functools
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import eval_rfacesim
import meta_train
import personalize
import sample
from flux_model import denoise
from support import checkpoints, people as people_files, runs
from support.checkpoints import load_text_encoders

resource = pytest.importorskip("resource")                                              # not on Windows
ROOT = Path(__file__).parents[1]
MODEL = next((path for path in (ROOT / "tests" / "golden" / "hub", ROOT.parent / "shared" / "golden" / "hub")
              if path.is_dir()), None)
pytestmark = pytest.mark.skipif(MODEL is None, reason="the small model of golden/hub is not here")
SMALL = ["--model", str(MODEL), "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """The text encoders are slow to load, and answer the same each time."""
    load = functools.cache(load_text_encoders)
    with pytest.MonkeyPatch.context() as patch:
        for module in (people_files, checkpoints):
            patch.setattr(module, "load_text_encoders", load)
        patch.setattr(meta_train, "plot", lambda log, path: None)
        patch.setattr(runs, "denoise", lambda flux, noise, txt, y, steps, guidance: denoise(flux, noise, txt, y, 2, guidance))
        yield


@contextmanager
def no_file_beyond(size):
    """Python ignores SIGXFSZ by itself, so that a write beyond is an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    """{file: what is in it}, as far as a command repeats it: tensors, the pixels of pictures, other bytes."""
    def read(path):
        if path.suffix == ".safetensors":
            return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
        return Image.open(path).tobytes() if path.suffix == ".png" else path.read_bytes()
    own = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): read(path) for path in own
            if path.name not in ("log.jsonl", "pictures.json", "scores.json")}


def fill_disks(command, tmp_path, monkeypatch, capsys):
    """command() at every limit that some file meets -> how often it failed. Then it goes on without a limit."""
    (tmp_path / "free").mkdir()
    monkeypatch.chdir(tmp_path / "free")
    assert command() == 0
    expected = contents(tmp_path / "free")
    sizes = sorted({path.stat().st_size for path in Path().rglob("*") if path.is_file() and path.stat().st_size})
    for size in sizes:
        (tmp_path / f"{size}").mkdir()
        monkeypatch.chdir(tmp_path / f"{size}")
        capsys.readouterr()
        with no_file_beyond(size - 1):
            code = command()
        err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
        assert code in (1, 2) and len(err) == 1 and "cannot be written: " in err[0], (size, err)
        named = Path(err[0].split(": ", 1)[1].split(" cannot be written")[0])
        assert named.parent.is_dir() and not list(Path().rglob("*.part")), err
        assert command() == 0, capsys.readouterr().err
        assert contents(Path().resolve()) == expected
    return len(sizes)


def test_sample(tmp_path, monkeypatch, capsys):
    words = ["a cat", "--num", "2", "--width", "48", "--height", "32", "--steps", "2", "--out", "some", *SMALL]
    assert fill_disks(lambda: sample.main(words), tmp_path, monkeypatch, capsys) == 3


def test_personalize(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    words = [str(tmp_path / "red.png"), "--box", "10", "10", "30", "30", "--method", "lora", "--iters", "2", "--save-at", "1",
             "--resolution", "64", "--save-crops", "crops", *SMALL]
    assert fill_disks(lambda: personalize.main(words), tmp_path, monkeypatch, capsys) > 2


@pytest.mark.slow
def test_meta_train(tmp_path, monkeypatch, capsys):
    for i, name in enumerate(("ann/0", "ann/1", "bob/0", "bob/1")):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.BICUBIC).save(path)
    words = ["--data", str(tmp_path / "data"), "--resolution", "64", "--iters", "4", "--batch-size", "2", "--r1", "3",
             "--warmup", "0", "--save-every", "1", "--preview-every", "2", *SMALL]
    assert fill_disks(lambda: meta_train.main(words), tmp_path, monkeypatch, capsys) > 7


def test_eval(tmp_path, monkeypatch, capsys):
    astronaut = Image.open(ROOT / "tests" / "photos" / "astronaut.png").convert("RGB")
    for i in range(2):
        for path in (tmp_path / "data" / "ann" / f"{i}.png", tmp_path / "made" / "Other" / "ann" / f"{i}_0.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            astronaut.crop((100 + 5 * i, 0, 400, 300)).save(path)
    (tmp_path / "prompts.txt").write_text("a photo\na drawing\n")
    words = ["--data", str(tmp_path / "data"), "--images", str(tmp_path / "made"), "--model", "baby", "--prompts",
             str(tmp_path / "prompts.txt"), "--out", "report", "--device", "cpu"]
    assert fill_disks(lambda: eval_rfacesim.main(words), tmp_path, monkeypatch, capsys) > 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="to root no folder is read-only")
def test_folders_that_are_read_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("locked").mkdir(mode=0o500)
    assert sample.main(["a cat", "--out", "locked/a.png", *SMALL]) == 2
    assert "locked" in capsys.readouterr().err
