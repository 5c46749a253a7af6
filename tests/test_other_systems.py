"""What Windows, macOS and containers do otherwise, acted out here."""
import shutil
import sys
import unicodedata
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import runs, stage_2
from support.common import check_writable
from support.finding import BABY, files_in, find_model
from support.judges import find_pictures
from support.people import read_people
from support.runs import Checkpoints
from support.sheets import plan_comparison

APPLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(80)
ALONE = SimpleNamespace(rank=0, size=1, gather=lambda thing: [thing])


@pytest.mark.parametrize("system, file, words", [
    ("linux", "'my out.safetensors'", "'a photo of a person'"), ("win32", '"my out.safetensors"', '"a photo of a person"')])
def test_printed_commands_suit_the_shell(monkeypatch, capsys, system, file, words):
    """cmd.exe has no single quotes: it would hand over five prompts."""
    monkeypatch.setattr(sys, "platform", system)
    stage_2.print_next_commands(Namespace(switches="", prompt="a photo of a person", out=Path("my out.safetensors"), save_at=[100], iters=200))
    once, compared = capsys.readouterr().out.splitlines()
    assert once.endswith(f"--lora {file} {words}") and compared.endswith(f"{words} --compare {file.replace('out', 'out-000100')} {file}")


def apple_double(path):
    """macOS writes ._x beside x on disks that do not know its attributes (exFAT, SMB), and into archives."""
    path.with_name(f"._{path.name}").write_bytes(APPLE)


def test_files_of_macos_are_no_part_of_a_model(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BABY, model)
    (model / "flux1-dev-Q8_0.gguf").write_bytes(b"GGUF")
    for path in [path for path in model.rglob("*") if path.is_file()]:
        apple_double(path)
    assert not [path for path in files_in(model) if path.name.startswith(".")]
    (model / "flux1-dev-Q8_0.gguf").unlink()
    assert find_model(str(model)) == model


def test_files_of_macos_are_no_checkpoints(tmp_path, monkeypatch, capsys):
    unlink = Path.unlink

    def unlink_both(path, missing_ok=False):                                            # as macOS does
        unlink(path, missing_ok)
        unlink(path.with_name(f"._{path.name}"), missing_ok=True)
    monkeypatch.setattr(Path, "unlink", unlink_both)
    checkpoints = Checkpoints(tmp_path, ALONE)
    for iteration in range(1, 9):
        checkpoints.save(iteration, 0, {"lomd.steps": torch.tensor(3)})
        apple_double(checkpoints.found()[-1])
    assert checkpoints.newest("cpu")[0] == 8 and "damaged" not in capsys.readouterr().err
    for name in ("a", "b"):                                                             # of a process that was killed
        (tmp_path / f"{name}.part").touch()
        apple_double(tmp_path / f"{name}.part")
    Checkpoints(tmp_path, ALONE)
    assert not [*tmp_path.glob("*.part")]


def test_files_of_macos_are_no_pictures_of_another_comparison(tmp_path):
    asked = tmp_path, "person", [("a.safetensors", 1.0)], ["hi"], range(1), "no LoRA"
    for path in plan_comparison(*asked):
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(path)
        apple_double(path)
    assert len(plan_comparison(*asked)) == 2


@pytest.mark.parametrize("data, drawn", [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_may_be_spelled_in_two_ways(tmp_path, data, drawn):
    """An accent is a character of its own in names that Finder makes, and none in names that are typed."""
    for i in range(2):
        path = tmp_path / "people" / unicodedata.normalize(data, "José") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (200 * i, 0, 0)).save(path)
    path = tmp_path / "results/lora" / unicodedata.normalize(drawn, "José") / "0_0.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(path)
    person, = read_people([tmp_path / "people"])
    pictures, problems = find_pictures(tmp_path / "results", {person.name: {0: "a photo"}})
    assert [picture.identity for picture in pictures] == [person.name] and not problems


def test_so_may_a_pictures_name_with_every_reference(tmp_path):
    for i, name in enumerate(("0", "Zoé")):
        path = tmp_path / "people/anna" / f"{unicodedata.normalize('NFD', name)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (200 * i, 0, 0)).save(path)
    names = [person.name for person in read_people([tmp_path / "people"], "all")]
    assert names == ["anna@0", unicodedata.normalize("NFC", "anna@Zoé")]


def test_a_drive_that_is_not_there(monkeypatch):
    """Not even the root of Z:/ exists."""
    monkeypatch.setattr(Path, "exists", lambda path, **options: False)
    with pytest.raises(ValueError, match="--out Z:/pictures: Z:/pictures is not a folder"):
        check_writable(Path("Z:/pictures"), "--out")


def test_a_kernel_that_does_not_say_how_much_memory_was_used(monkeypatch):
    """gVisor's /proc/self/status."""
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: "Name:\tpython\nVmSize:\t1 kB\nVmRSS:\t1 kB\n")
    assert runs.peak_gb(torch.device("cpu")) == 0
