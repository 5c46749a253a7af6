"""Ctrl-C, SIGTERM and SIGHUP at each script, at every moment: what was finished is on disk, one line, the exit code.

    pytest tests/test_interruption.py -m "slow or not slow"     # every signal at every moment

A signal is raised by the script itself, at the call that the table names, so that it comes at the same moment each time.
"""
import fnmatch
import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "golden" / "hub"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and forks are POSIX")
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SCRIPTS = "meta_train", "personalize", "sample", "eval_rfacesim"


# ----------------------------------------------------------------------------------------------------------
# While packages are imported: the command itself

AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["TEST_PACKAGE"]:
            os.kill(os.getpid(), int(os.environ["TEST_SIGNAL"]))
sys.meta_path.insert(0, Finder())
"""


def check_words(script, code, number, stderr):
    lines = [line for line in stderr.splitlines() if line.startswith(f"{script}.py: ")]
    assert code == 128 + number, stderr[-2000:]
    assert lines == [f"{script}.py: interrupted"] and "Traceback" not in stderr, stderr[-2000:]


def stop_at_import(words, number, package, folder):
    """Runs the command itself, which gets the signal as it imports the package -> (exit code, stderr)"""
    (folder / "sitecustomize.py").write_text(AT_IMPORT, "utf-8")
    environment = os.environ | {"PYTHONPATH": str(folder), "TEST_SIGNAL": str(int(number)), "TEST_PACKAGE": package}
    child = subprocess.run([sys.executable, "-B", ROOT / f"{words[0]}.py", *words[1:]], cwd=folder, env=environment,
                           capture_output=True, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    return child.returncode, child.stderr


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_while_packages_are_imported(script, number, tmp_path):
    code, stderr = stop_at_import([script, "x"], number, "torch", tmp_path)
    check_words(script, code, number, stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["sitecustomize.py"]


# ----------------------------------------------------------------------------------------------------------
# At work: forked from a server that has imported everything

SMALL = ["--model", str(MODEL), "--device", "cpu"]
SAMPLE = ["a cat", "--width", "48", "--height", "32", "--steps", "2", *SMALL]
# two passes of five iterations, the first two of each are warm-up
META_TRAIN = ["--data", "data", "--identities-per-bucket", "1", "--batch-size", "4", "--warmup", "0.4", "--iters", "9",
              "--resolution", "64", "--r1", "3", "--save-every", "4", *SMALL]
WORDS = {
    "sample": ["sample", *SAMPLE, "--num", "3", "--out", "some"],
    "compare": ["sample", *SAMPLE, "--compare", "lora.safetensors"],
    "personalize": ["personalize", "data/ann/0.png", "--box", "10", "10", "30", "30", "--method", "lora", "--iters", "5",
                    "--save-at", "2", "--resolution", "64", *SMALL],
    "meta_train": ["meta_train", *META_TRAIN, "--preview-every", "0"],
    "preview": ["meta_train", *META_TRAIN, "--preview-every", "6"],
    "eval_rfacesim": ["eval_rfacesim", "--data", "data", "--images", "made", "--model", "baby", "--prompts", "prompts.txt",
                      "--device", "cpu"],
}

T5 = "transformers.T5EncoderModel", "forward"
ENCODE = "flux_model.AutoEncoder", "posterior"
DECODE = "flux_model.AutoEncoder", "decode"
FLUX = "flux_model.Flux", "forward"
EMBED, COUNT, MATCH = [("support.judges.Judges", name) for name in ("embed", "count", "match")]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_while_packages_are_imported_at_work(script, number, tmp_path):
    """Those that a script imports when it needs them."""
    write_data(script, tmp_path)
    package = "facenet_pytorch" if script == "eval_rfacesim" else "transformers.models.t5.modeling_t5"
    code, stderr = stop_at_import(WORDS[script], number, package, tmp_path)
    check_words(script, code, number, stderr)
    assert sorted(written(tmp_path)) == (SETTINGS if script == "meta_train" else [])


def write_data(case, folder):
    """Pictures, prompts."""
    names = "data/ann/0", "data/ann/1", "data/bob/0", "data/bob/1", "made/some/ann/0_0", "made/some/bob/0_0"
    astronaut = Image.open(ROOT / "tests" / "photos" / "astronaut.png").convert("RGB")
    for i, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 300 if case == "eval_rfacesim" else 64
        astronaut.crop((100 + 5 * i, 0, 400, 300)).resize((side, side)).save(path)
    (folder / "prompts.txt").write_text("a photo\n", "utf-8")


def stop_at(number, place, count):
    """Raises the signal before the count-th call of a method, or before the count-th file of a name is put in its place."""
    calls = itertools.count(1)
    if isinstance(place, str):
        owner, name = os, "replace"
    else:
        package, _, owner = place[0].rpartition(".")
        owner, name = getattr(importlib.import_module(package), owner), place[1]
    real = getattr(owner, name)

    def hit(*args, **options):
        if name != "replace" or fnmatch.fnmatch(os.path.basename(args[1]), place):
            if next(calls) == count:
                signal.raise_signal(number)
        return real(*args, **options)
    setattr(owner, name, hit)


def child(words, folder, hook):
    """What a forked process does."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)         # a shell may have it ignored
    if hook:
        stop_at(*hook)
    sys.exit(importlib.import_module(words[0]).main(words[1:]))


def run(server, words, folder, hook=None):
    """-> (exit code, stderr)"""
    process = server.Process(target=child, args=(words, folder, hook))
    process.start()
    process.join(300)
    process.kill()
    return process.exitcode, (folder / "stderr").read_text()


def written(folder):
    """{name: path} of a script's files, but for the cache and the lock of stage 1."""
    others = "data/*", "made/*", "prompts.txt", "lora.safetensors", "sitecustomize.py", "stdout", "stderr", "run/cache/*", "run/lock0"
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in others):
            found[name] = path
    return found


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """undisturbed(case) -> the folder of a run that nothing stops."""
    folders = {}

    def made(case):
        if case not in folders:
            folders[case] = folder = tmp_path_factory.mktemp(case)
            write_data(case, folder)
            if case == "compare":
                shutil.copy(made("personalize") / "out.safetensors", folder / "lora.safetensors")
            every_step = ["--save-at", "1", "2", "3", "4"] if case == "personalize" else []
            code, stderr = run(server, WORDS[case] + every_step, folder)
            assert code == 0, stderr
        return folders[case]
    return made


PICTURES = ["some/0_0.png", "some/0_1.png", "some/0_2.png"]
LORA_2 = "out-000002.safetensors"
SETTINGS = ["run/pictures.json", "run/settings.json"]
LOG = [*SETTINGS, "run/log.jsonl"]
CLOSED = [*LOG, "run/rank0/00000005-00000003.safetensors", "run/rank0/pass0000.safetensors", "run/lomd.safetensors"]
ENDED = [*LOG, "run/rank0/00000008-00000004.safetensors", "run/rank0/00000009-00000005.safetensors",
         "run/rank0/pass0000.safetensors", "run/lomd.safetensors"]
OUT = [*ENDED, "run/rank0/pass0001.safetensors", "lomd.safetensors", "run/loss.png"]
PREVIEW = [*CLOSED, "run/previews/00000006.png", "run/rank0/00000007-00000003.safetensors"]
PARTS = ["report/parts/*.json"]
MOMENTS = [  # case, moment, a method or the name of a file, at which count, what is on disk in the end
    ("sample", "encoding", T5, 1, []),
    ("sample", "drawing the first", FLUX, 1, []),
    ("sample", "drawing", FLUX, 4, PICTURES[:1]),
    ("sample", "decoding", DECODE, 2, PICTURES[:2]),
    ("sample", "saving", "0_1.png", 1, PICTURES[:2]),
    ("sample", "saving the last", "0_2.png", 1, PICTURES),
    ("sample", "saving the grid", "grid.png", 1, PICTURES),
    ("compare", "drawing", FLUX, 3, ["compare/prompts.txt", "compare/no LoRA/person/0_0.png"]),
    ("compare", "saving the sheet", "compare.png", 1,
     ["compare/prompts.txt", "compare/no LoRA/person/0_0.png", "compare/lora/person/0_0.png"]),
    ("personalize", "encoding text", T5, 1, []),
    ("personalize", "encoding crops", ENCODE, 3, []),
    ("personalize", "training the first step", FLUX, 1, ["out-interrupted-000001.safetensors"]),
    ("personalize", "training", FLUX, 4, [LORA_2, "out-interrupted-000004.safetensors"]),
    ("personalize", "training the last step", FLUX, 5, [LORA_2, "out.safetensors"]),
    ("personalize", "saving at a step", LORA_2, 1, [LORA_2, "out-interrupted-000002.safetensors"]),
    ("personalize", "saving", "out.safetensors", 1, [LORA_2, "out.safetensors"]),
    ("meta_train", "reading", "pictures.json", 1, []),
    ("meta_train", "encoding text", T5, 1, SETTINGS),
    ("meta_train", "encoding pictures", ENCODE, 3, SETTINGS),
    ("meta_train", "training in a warm-up", FLUX, 1, [*LOG, "run/rank0/00000001-00000000.safetensors"]),
    ("meta_train", "training", FLUX, 3, [*LOG, "run/rank0/00000003-00000001.safetensors"]),
    ("meta_train", "saving a checkpoint", "00000004-*", 1,
     [*LOG, "run/rank0/00000004-00000002.safetensors", "run/rank0/00000005-00000003.safetensors"]),
    ("meta_train", "saving rows", "pass0000.safetensors", 1, [*CLOSED, "run/rank0/00000006-00000003.safetensors"]),
    ("meta_train", "training the last step", FLUX, 9, ENDED),
    ("meta_train", "saving LoMD", "lomd.safetensors", 3, OUT),
    ("meta_train", "saving the figure", "loss.png", 1, OUT),
    ("preview", "drawing", FLUX, 10, PREVIEW),
    ("preview", "saving", "00000006.png", 1, PREVIEW),
    ("eval_rfacesim", "counting faces", COUNT, 2, []),
    ("eval_rfacesim", "encoding faces", EMBED, 1, []),
    ("eval_rfacesim", "scoring", MATCH, 2, PARTS),
    ("eval_rfacesim", "saving a person", "????????????????.json", 2, PARTS),
    ("eval_rfacesim", "saving scores", "scores.json", 1, PARTS * 2),
    ("eval_rfacesim", "saving tables", "tables.md", 1, [*PARTS * 2, "report/scores.json"]),
]
# each of these meets one signal in every run of the tests, and all three only with -m "slow or not slow"
QUICK = ("encoding", "encoding crops", "encoding pictures", "encoding faces", "drawing", "training", "scoring", "saving",
         "saving a checkpoint", "saving a person")
CASES = []
turns = itertools.cycle(SIGNALS)
for moment in MOMENTS:
    quick = next(turns) if moment[0] in SCRIPTS and moment[1] in QUICK else None
    for number in SIGNALS:
        marks = () if number == quick else pytest.mark.slow
        CASES.append(pytest.param(number, *moment, marks=marks, id=f"{number.name}-{moment[0]}-{moment[1]}"))


@pytest.mark.parametrize("number, case, moment, place, count, expected", CASES)
def test_at_work(server, undisturbed, number, case, moment, place, count, expected, tmp_path):
    reference = undisturbed(case)
    write_data(case, tmp_path)
    if case == "compare":
        shutil.copy(reference / "lora.safetensors", tmp_path)
    code, stderr = run(server, WORDS[case], tmp_path, (number, place, count))
    check_words(WORDS[case][0], code, number, stderr)

    # what was finished is there and nothing else, with the same bytes as in the undisturbed run
    found = written(tmp_path)
    assert sorted(fnmatch.fnmatch(name, PARTS[0]) and PARTS[0] or name for name in found) == sorted(expected)
    assert_same_files(found, reference)

    # the same command completes it
    if number == signal.SIGHUP:
        assert run(server, WORDS[case], tmp_path)[0] == 0
        completed = written(tmp_path)
        missing = written(reference).keys() - completed.keys()
        assert missing == ({f"out-00000{i}.safetensors" for i in (1, 3, 4)} if case == "personalize" else set())
        assert_same_files(completed, reference)


# these hold the time when a picture was last changed, seconds, and the LoMD of an earlier pass
UNLIKE = "run/pictures.json", "run/log.jsonl", "run/loss.png", "run/lomd.safetensors"


def assert_same_files(found, reference):
    """In all files that both runs finished."""
    finished = written(reference)
    for name, path in found.items():
        name = name.replace("interrupted-", "")
        if name in finished and name not in UNLIKE:
            assert path.read_bytes() == finished[name].read_bytes(), name


def meet_alone(number, folder):
    """Stage 1 as one of two processes, which is alone, and gets the signal as it waits for the other."""
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    threading.Timer(1, os.kill, (os.getpid(), number)).start()
    child(WORDS["meta_train"], folder, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS[::2])])
def test_while_others_are_waited_for(server, number, tmp_path):
    write_data("meta_train", tmp_path)
    process = server.Process(target=meet_alone, args=(number, tmp_path))
    process.start()
    process.join(60)
    process.kill()
    check_words("meta_train", process.exitcode, number, (tmp_path / "stderr").read_text())
    assert not written(tmp_path)
