"""What is finished is on disk: modes, links, room, second places, signals and consoles, of support/common.py."""
import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import meta_train
from support import common, runs
from support.common import encodable, keep, reserved, save_figure, save_png, whole, write_whole
from support.lora_files import save_lomd, save_lora, tell_replaced
from support.people import named_photos
from support.photos import picture_fields

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")


@pytest.fixture(params=["000", "022", "077"])
def umask(request):
    before = os.umask(int(request.param, 8))
    yield int(request.param, 8)
    os.umask(before)


class Figure:
    def savefig(self, path, **options):
        Path(path).write_bytes(b"figure")


LORA = {"transformer_blocks.0.attn.to_q": (torch.ones(1, 4), torch.ones(4, 1))}
WRITERS = {
    "bytes": lambda path: write_whole(path, b"some bytes"), "text": lambda path: write_whole(path, "söme text"),
    "picture": lambda path: save_png(Image.new("RGB", (20, 20)), path, {"seed": 1}),
    "figure": lambda path: save_figure(Figure(), path), "lora": lambda path: save_lora(path, LORA),
    "lomd": lambda path: save_lomd(path, {"transformer_blocks.0.attn.to_q": torch.ones(2, 4)}, {})}


def save_tensors(path):
    with whole(path) as part:
        save_file({"a": torch.ones(3)}, part)


WRITERS["tensors"] = save_tensors


@posix
@pytest.mark.parametrize("write", WRITERS.values(), ids=[*WRITERS])
def test_modes_and_links_are_as_after_open(write, umask, tmp_path):
    """As open(path, "w") would leave them: new ones by umask, replaced ones as they were, links as links."""
    new, old, link, target = (tmp_path / name for name in ("new", "old", "link", "elsewhere/target"))
    write(new)
    assert new.stat().st_mode & 0o777 == 0o666 & ~umask
    for mode in (0o640, 0o604, 0o600):
        old.write_bytes(b"before")
        old.chmod(mode)
        write(old)
        assert old.stat().st_mode & 0o777 == mode and old.read_bytes() == new.read_bytes()
    target.parent.mkdir()
    link.symlink_to("elsewhere/target")              # to nothing yet
    for mode in (0o666 & ~umask, 0o664):
        write(link)
        assert link.is_symlink() and target.read_bytes() == new.read_bytes()
        assert target.stat().st_mode & 0o777 == mode
        target.chmod(0o664)
    assert not list(tmp_path.rglob("*.part"))


@posix
def test_the_longest_name_that_there_may_be(tmp_path):
    for name in ("n" * 255, "é" * 127, os.fsdecode(b"caf\xe9.bin")):
        write_whole(tmp_path / name, b"here")
        assert (tmp_path / name).read_bytes() == b"here"


@pytest.mark.parametrize("number, good", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_synced(number, good, tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(descriptor)
    monkeypatch.setattr(os, "fsync", fsync)
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    if good:
        write_whole(tmp_path / "a", b"whole")
    else:
        with pytest.raises(OSError, match="a cannot be written"):
            write_whole(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_room_is_kept_until_it_is_needed(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    with reserved([first, second], 100_000):
        parts = list(tmp_path.glob("*.part"))
        assert len(parts) == 2 and all(part.stat().st_size == 100_000 for part in parts)
        monkeypatch.setattr(common, "new_part", None)                        # nothing new is made: the room is taken
        write_whole(first, b"short")
        assert first.read_bytes() == b"short" and len(list(tmp_path.glob("*.part"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_without_room_nothing_begins(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match="big cannot be written"), reserved([tmp_path / "big", tmp_path / "other"], 6000):
            raise AssertionError("began")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir()) and not common.RESERVED


def test_what_fails_at_the_end_is_kept_elsewhere_and_named(tmp_path, monkeypatch):
    away, here = tmp_path / "away", tmp_path / "here"
    here.mkdir()
    away.write_text("a file in the place of the folder")
    monkeypatch.chdir(here)
    with pytest.raises(OSError, match="cannot be written") as caught:
        keep(away / ("x" * 240 + ".bin"), lambda path: write_whole(path, b"hours of work"))
    (kept,) = here.iterdir()
    assert str(kept) in str(caught.value) and kept.read_bytes() == b"hours of work" and kept.suffix == ".bin"
    keep(here / "fine", lambda path: write_whole(path, b"1"))


def test_text_that_is_not_utf_8_becomes_escapes(tmp_path):
    name = os.fsdecode(b"gr\xfc\xdfe.png")
    assert encodable(name) == "gr\\udcfc\\udcdfe.png" and encodable("größe") == "größe"
    save_png(Image.new("RGB", (20, 20)), tmp_path / "a.png", {"model": name})
    assert Image.open(tmp_path / "a.png").text["model"] == encodable(name)
    save_lora(tmp_path / "a.safetensors", LORA, metadata={"photos": name})
    assert len(load_file(tmp_path / "a.safetensors")) == 2


TALK = """
import sys
sys.path.insert(0, {root!r})
from support.common import note, run_script
def script(argv):
    for i in range(3000):
        print("↑", i, "x" * 50, flush=i % 2)
        note("\\udce9 ↓")
    open("done", "w").close()
sys.exit(run_script("talk", script))
"""


@posix
@pytest.mark.parametrize("unbuffered", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_reader_that_goes_away_changes_nothing(unbuffered, tmp_path):
    (tmp_path / "talk.py").write_text(TALK.format(root=str(ROOT)), "utf-8")
    flag = "-u" if unbuffered else ""
    code = f"{sys.executable} {flag} talk.py 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    child = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "") and (tmp_path / "done").exists(), child


@pytest.mark.parametrize("encoding", [pytest.param("cp1252", marks=pytest.mark.slow), "ascii"])
def test_a_console_of_another_encoding_changes_nothing(encoding, tmp_path):
    (tmp_path / "talk.py").write_text(TALK.format(root=str(ROOT)), "utf-8")
    child = subprocess.run([sys.executable, "talk.py"], cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert child.returncode == 0 and (tmp_path / "done").exists(), child.stderr[-500:]
    assert child.stdout.count(b"x" * 50) == 3000


@pytest.mark.parametrize("redirection", [">&- 2>/dev/full", pytest.param("2>&- >/dev/full", marks=pytest.mark.slow)])
def test_output_that_is_closed_or_full(redirection, tmp_path):
    (tmp_path / "talk.py").write_text(TALK.format(root=str(ROOT)), "utf-8")
    child = subprocess.run(["bash", "-c", f"{sys.executable} talk.py {redirection}"], cwd=tmp_path, capture_output=True)
    assert child.returncode == 0 and (tmp_path / "done").exists(), child.stderr[-500:]


FILES = [path for folder in (".", "support", "paper", "bench", "baby") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_text_is_utf_8(path):
    """The default encoding is the computer's."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        words = [word.value for word in node.args if isinstance(word, ast.Constant)]
        named = any(word.arg == "encoding" for word in node.keywords)
        method = isinstance(node.func, ast.Attribute)
        if name == "read_text" and method:
            assert words or named, f"{path}, line {node.lineno}"
        if name == "write_text":
            assert len(node.args) > 1 or named, f"{path}, line {node.lineno}"
        if name == "open" and not method and not any("b" in str(word) for word in words[-1:]):
            assert named, f"{path}, line {node.lineno}"


def test_a_folder_or_a_pattern_of_photos(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("me/b.png", "me/a.jpg", "me/a.txt", "me/list.csv", "x1.png", "x2.png", "[odd].png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(name) if name.endswith(("png", "jpg")) else Path(name).write_text("some words", "utf-8")
    found = named_photos(["me", "x*.png", "[odd].png", "nobody*.png"])
    assert [Path(name).as_posix() for name in found] == ["me/a.jpg", "me/b.png", "x1.png", "x2.png", "[odd].png", "nobody*.png"]
    err = capsys.readouterr().err
    assert "list.csv" in err and "a.txt" not in err
    Path("none").mkdir()
    with pytest.raises(ValueError, match="none"):
        named_photos(["none"])


def test_a_lora_of_other_photos_is_not_replaced_in_silence(tmp_path, capsys):
    path = tmp_path / "out.safetensors"
    tell_replaced(path, "1 2")
    save_lora(path, LORA, metadata={"photo_digests": "1 2", "photos": "anna.jpg"})
    tell_replaced(path, "1 2")
    assert capsys.readouterr().err == ""
    tell_replaced(path, "3")
    assert "anna.jpg" in capsys.readouterr().err
    save_lora(path, LORA)
    tell_replaced(path, "3")
    assert "out.safetensors" in capsys.readouterr().err


def test_fields_of_a_picture_as_other_programs_read_them(tmp_path):
    settings = {"steps": 20, "guidance": 3.5, "true_cfg": 2.0, "negative": "blur", "width": 64, "height": 32}
    fields = picture_fields("a cat, 京", 7, settings, "my, model.safetensors", [("a/ann.safetensors", 0.8), ("b.safetensors", 1.0)])
    assert list(fields)[0] == "parameters" and not {"prompt", "workflow"} & set(fields)
    assert fields["parameters"].splitlines() == [
        "a cat, 京 <lora:ann:0.8> <lora:b:1>", "Negative prompt: blur",
        'Steps: 20, Sampler: Euler, CFG scale: 2, Distilled CFG Scale: 3.5, Seed: 7, Size: 64x32, Model: "my, model"']
    plain = picture_fields("a dog", 0, settings | {"true_cfg": 1.0}, "flux-dev", [])["parameters"]
    assert plain.splitlines()[0] == "a dog" and "Negative" not in plain and len(plain.splitlines()) == 2


@pytest.mark.skipif(runs.fcntl is None, reason="no locks")
@pytest.mark.parametrize("number, held", [(errno.ENOLCK, False), (errno.EOPNOTSUPP, False), (errno.EWOULDBLOCK, True)])
def test_a_lock_that_the_file_system_does_not_know(number, held, tmp_path, monkeypatch, capsys):
    def flock(file, flags):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(runs.fcntl, "flock", flock)
    if held:
        with pytest.raises(ValueError, match="another process"), runs.locked(tmp_path / "lock0"):
            pass
    else:
        with runs.locked(tmp_path / "lock0"):
            assert str(tmp_path) in capsys.readouterr().err


def test_a_world_size_that_is_left_over(monkeypatch, capsys):
    monkeypatch.setattr(runs, "MEETING", 0.02)
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 3"):
        runs.Group("cpu")
    assert "WORLD_SIZE is 3" in capsys.readouterr().err


@pytest.mark.parametrize("given, taken", [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")])
def test_each_process_takes_its_gpu(given, taken, monkeypatch):
    names = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runs, "pick_device", lambda name: names.append(name) or torch.device("cpu"))
    monkeypatch.setattr(runs.Group, "meet", lambda group, backend: None)
    runs.Group(given)
    assert names == [taken]


def test_torchrun_takes_none_of_our_options_for_its_own():
    from torch.distributed.run import get_args_parser
    for word in ("--run-dir", "--data", "--model", "--out", "--iters", "--r1", "--r2", "--lr", "--resolution", "--device"):
        args = get_args_parser().parse_args(["--nproc-per-node", "2", "meta_train.py", word, "x"])
        assert args.training_script_args == [word, "x"]
    assert meta_train.parse(["--data", "x", "--run-dir", "here"]).run == Path("here")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_peak_memory_is_without_mapped_files(tmp_path):
    import numpy as np
    path = tmp_path / "mapped"
    path.write_bytes(bytes(200_000_000))
    runs.peak_gb(torch.device("cpu"))
    before = runs.peak_gb(torch.device("cpu"))
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped.sum() == 0
    assert abs(runs.peak_gb(torch.device("cpu")) - before) < 0.1
    del mapped
    block = np.ones(200_000_000, np.uint8)
    del block
    assert 0.15 < runs.peak_gb(torch.device("cpu")) - before < 0.3


def test_what_is_only_looked_at_ends_nothing(capsys):
    for error in (OSError("disk full"), ValueError("photo gone"), ImportError("no matplotlib")):
        with runs.only_to_be_seen("a preview"):
            raise error
        assert str(error) in capsys.readouterr().err
    with pytest.raises(KeyError), runs.only_to_be_seen("a preview"):
        raise KeyError


NOT_YOURS = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from support.common import check_readable, not_content
path = Path("secret.safetensors")
assert "may not be read" in not_content(path)
try:
    check_readable(path)
except PermissionError as error:
    assert "secret.safetensors" in str(error)
    print("told")
"""


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root can become another user")
def test_a_file_of_another_user_is_not_damaged(tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "secret.safetensors").chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    code = f"import os; os.setuid(65534)\n{NOT_YOURS.format(root=str(ROOT))}"
    child = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    if "ModuleNotFoundError" in child.stderr or "Permission denied" in child.stderr.splitlines()[-1:]:
        pytest.skip("the other user cannot read the packages")
    assert child.stdout == "told\n", child.stderr
