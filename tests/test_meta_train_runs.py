"""Stage 1 as whole runs on a small random model: hit at any moment and gone on with, in several processes, diverging.

Most runs are forked from conftest's server, some are the command itself. Every run is bit for bit compared with `reference`, whose state after each iteration is kept.
"""
import fnmatch
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flux_model
from support.checkpoints import load_flux
from support.names import find_targets
import meta_train
import metalora
from metalora import IdentityBank, MetaLoRA
from support.people import check_people
from support import runs
from support.runs import Checkpoints, WaitingRows

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "golden" / "hub"
PEOPLE = {"a": (3, 2, 2), "b": (2, 4), "c": (2, 2)}               # pictures of each person of each bucket
ITERS = 22                                                        # passes over a, b, c and a again: 0-6, 6-12, 12-18, 18-22
PASSES = [(0, 2, 6), (6, 8, 12), (12, 14, 18), (18, 20, 22)]      # first iteration, first joint one, one after the last
PORTS = itertools.count(20_000 + os.getpid() % 10_000)             # below those that the system gives to others meanwhile
pytestmark = [pytest.mark.skipif(not MODEL.is_dir(), reason="the small model of golden/hub is not here"),
              pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and forks are POSIX")]


# ----------------------------------------------------------------------------------------------------------
# Runs


def draw(folder, width):
    """buckets/<bucket>/<person>/<pictures> of the baby's faces, the first picture `width` wide; some with captions."""
    sys.path.insert(0, str(ROOT / "baby"))
    import faces
    person = 0
    for bucket, people in PEOPLE.items():
        for pictures in people:
            (folder / bucket / f"p{person}").mkdir(parents=True)
            for i in range(pictures):
                image, _ = faces.sample(faces.META[person], i, 64 if i else width, 64)
                Image.fromarray(image).save(folder / bucket / f"p{person}" / f"{i}.png")
                if i == 1:
                    (folder / bucket / f"p{person}" / f"{i}.txt").write_text(f"a drawing of {'wo' * (person % 2)}man")
            person += 1
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """People with pictures of two shapes."""
    return draw(tmp_path_factory.mktemp("data") / "buckets", 96)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """The same people with pictures of one shape, since two processes may have theirs of different ones."""
    return draw(tmp_path_factory.mktemp("squares") / "buckets", 64)


def arguments(data, *more):
    return [str(a) for a in ("--data", data, "--model", MODEL, "--device", "cpu", "--resolution", 64, "--iters", ITERS,
                             "--batch-size", 2, "--r1", 4, "--save-every", 4, "--preview-every", 0, *more)]


SHORT = """import sys
sys.path.insert(0, {root!r})
import meta_train
from functools import partial
meta_train.schedule = partial(meta_train.schedule, bucket_iters={bucket_iters})
if __name__ == "__main__":
    sys.exit(meta_train.main())
"""


def command(folder, data, *more, bucket_iters=6):
    """The command itself, but that a bucket has `bucket_iters` iterations."""
    script = folder.parent / f"{folder.name}_short.py"
    script.write_text(SHORT.format(root=str(ROOT), bucket_iters=bucket_iters))
    return [sys.executable, script, *arguments(data, *more)]


def child(folder, argv, name, env, hooks, script):
    """What a forked process does: meta_train.main(argv) in `folder`, after the hooks have been put in place."""
    os.chdir(folder)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{stream}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    meta_train.schedule = functools.partial(meta_train.schedule, bucket_iters=6)
    for hook, *args in hooks:
        hook(*args)
    sys.exit(script(argv))


def start(server, folder, argv, *hooks, name="", env={}, script=meta_train.main, plot=False):
    hooks += () if plot else ((unplotted,),)
    process = server.Process(target=child, args=(folder, argv, name, env, hooks, script))
    process.start()
    return process


def finish(process, seconds=300):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail("a run hangs")
    return process.exitcode


def said(path):
    """What is on stderr, but for the note that the small T5 knows few letters."""
    return "".join(line for line in path.read_text().splitlines(True) if "T5 has no letters" not in line)


def run(server, folder, argv, *hooks, **options):
    """-> (exit code, stdout, stderr)"""
    code = finish(start(server, folder, argv, *hooks, **options))
    return code, (folder / "stdout").read_text(), said(folder / "stderr")


def run_pair(server, folder, argv, hooks=((), ())):
    """Two processes as torchrun starts them -> (exit codes, what each wrote to stderr)"""
    port = next(PORTS)
    both = [start(server, folder, argv, *hooks[rank], name=rank,
                  env=dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none", MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=f"{port}")) for rank in range(2)]
    return [finish(process) for process in both], [said(folder / f"stderr{rank}") for rank in range(2)]


# ----------------------------------------------------------------------------------------------------------
# Hooks: what happens to a run


def unplotted():
    """Without loss.png, which takes a second."""
    meta_train.plot = lambda log, path: None


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file(pattern, when, count=1):
    """At the count-th file of that name, as it gets its name: with half of it written ("torn"), "before" or "after"."""
    replace, calls = os.replace, itertools.count(1)

    def hit(source, target):
        if not fnmatch.fnmatch(os.path.basename(target), pattern) or next(calls) < count:
            return replace(source, target)
        if when == "torn":
            os.truncate(source, os.path.getsize(source) // 2)
        if when == "after":
            replace(source, target)
        die()
    os.replace = hit


def die_in_log(count):
    """With half a line written."""
    write, calls = meta_train.Log.write, itertools.count(1)

    def hit(self, *words):
        write(self, *words)
        if next(calls) == count:
            os.truncate(self.path, os.path.getsize(self.path) - 50)
            die()
    meta_train.Log.write = hit


def die_in_step(iteration):
    """When the people's rows have been updated and LoMD has not."""
    step = IdentityBank.step

    def hit(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if watched.run.iteration == iteration:
            die()
    IdentityBank.step = hit
    watched()


def die_in_fsync(count):
    """At the count-th time that something is to be on disk."""
    fsync, calls = os.fsync, itertools.count(1)
    os.fsync = lambda file: die() if next(calls) == count else fsync(file)


def die_in_resume():
    meta_train.Run.resume = lambda self: die()


def die_in_unlink(pattern):
    """When an old file of that name is to go."""
    unlink = Path.unlink
    Path.unlink = lambda self, **options: die() if fnmatch.fnmatch(self.name, pattern) else unlink(self, **options)


def watched():
    """Makes the process's run known to other hooks, as watched.run."""
    init = meta_train.Run.__init__

    def note(self, *args, **kwargs):
        watched.run = self
        init(self, *args, **kwargs)
    meta_train.Run.__init__ = note


def in_draw(iteration, act):
    """act() in the middle of an iteration."""
    draw = meta_train.Run.draw

    def hit(self, offset):
        if self.iteration == iteration:
            act()
        return draw(self, offset)
    meta_train.Run.draw = hit


def signal_at(iteration, number):
    in_draw(iteration, lambda: signal.raise_signal(number))


def die_in_draw(iteration):
    in_draw(iteration, die)


def pause_at(iteration):
    in_draw(iteration, lambda: (Path("paused").touch(), time.sleep(60)))


def not_finite_at(iteration):
    """The loss of the second picture of an iteration is not a number."""
    loss_of = flux_model.flow_matching_loss
    watched()

    def hit(*args, **kwargs):
        losses = loss_of(*args, **kwargs)
        return losses * torch.tensor([1, torch.nan]) if watched.run.iteration == iteration else losses
    flux_model.flow_matching_loss = hit


def keep_states():
    """Copies of each checkpoint, in states/."""
    save = meta_train.Run.save
    Path("states").mkdir()

    def save_and_keep(self):
        save(self)
        shutil.copy(self.checkpoints.found()[-1], f"states/{self.iteration}.safetensors")
    meta_train.Run.save = save_and_keep


def short_previews():
    denoise = flux_model.denoise
    flux_model.denoise = lambda flux, noise, txt, y, steps, guidance: denoise(flux, noise, txt, y, 2, guidance)


def count_bytes():
    """Each collective call of this rank, in calls<rank>: [iteration, name, bytes]."""
    calls, dist = [], torch.distributed
    watched()

    def counted(name, function):
        def call(*args, **kwargs):
            size = args[0].numel() * args[0].element_size() if torch.is_tensor(args[0]) else 0
            calls.append([watched.run.iteration if hasattr(watched, "run") else None, name, size])
            Path(f"calls{os.environ['RANK']}").write_text(json.dumps(calls))
            return function(*args, **kwargs)
        return call
    for name in dir(dist):
        if re.match("all_|reduce|broadcast|gather|scatter|send|recv|isend|irecv|barrier|monitored", name):
            setattr(dist, name, counted(name, getattr(dist, name)))


def doubled(argv):
    """One adapter with the batches of two processes, on the same draws, in a loop written by hand: the end of LoMD,
    and of each process's people in a bank of theirs."""
    args = meta_train.parse(argv)
    group = meta_train.Group(args.device)
    meta_train.check_stage_1(args, group.device)
    people, _ = check_people(args.data, 16, {})
    pair = [SimpleNamespace(rank=rank, size=2, device=group.device) for rank in range(2)]
    meta_train.take_settings(args, people, pair[0])
    runs, flux = [meta_train.Run(args, people, each) for each in pair], load_flux(MODEL, "cpu", torch.float32)
    adapter = MetaLoRA(flux, args.r2, lomd=metalora.random_lomd(find_targets(flux), args.r1, args.seed),
                       num_identities=0, slots=2 * args.batch_size)
    for run in runs:
        run.adapter = SimpleNamespace(new_row=adapter.new_row, size=adapter.size)
        run.waiting = WaitingRows(Path(f"waiting{run.group.rank}"), len(run.members))
        run.waiting.folder.mkdir()
    for number, (bucket, start, joint, stop) in enumerate(runs[0].passes):
        for run in runs:
            run.open_bucket(number)
        count = len(runs[0].adapter.bank.weight)
        adapter.bank = IdentityBank(*(torch.cat([getattr(run.adapter.bank, part) for run in runs])
                                      for part in IdentityBank.PARTS))
        for iteration in range(start, min(stop, args.iters)):
            for run in runs:
                run.iteration = iteration
            (_, first), (_, second) = (run.draw(iteration - start) for run in runs)
            second[0] += count                                    # rows of the second process's people
            ids, *draws = map(torch.cat, zip(first, second))
            adapter.train_lomd = iteration >= joint
            adapter.assign(ids)
            flux_model.flow_matching_loss(flux, *draws, guidance=1.0).sum().backward()
            adapter.step(args.lr)                                 # by the adapter's own mean
        for run, rows in zip(runs, (slice(count), slice(count, None))):
            run.waiting.save(number, {part: getattr(adapter.bank, part)[rows].clone() for part in IdentityBank.PARTS})
    save_file({f"lomd.{part}": getattr(adapter.shared, part) for part in IdentityBank.PARTS}, "doubled.safetensors")


# ----------------------------------------------------------------------------------------------------------
# What a run leaves behind


def contents(path):
    """(metadata, {name: (shape, bytes)}): equal where every bit of every tensor is."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: (file.get_tensor(name).shape, file.get_tensor(name).numpy().tobytes())
                                 for name in file.keys()}


def newest(folder):
    """(iteration, path) of the last checkpoint, by its name."""
    path = sorted(folder.glob("*-*.safetensors"))[-1]
    return int(path.stem.split("-")[0]), path


def log_lines(run):
    """Without what is measured, not computed."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_gb")} for line in lines]


def stopped(iteration):
    """What Ctrl-C and SIGTERM write to stderr."""
    return f"note: at iteration {iteration} of {ITERS}; rerun the command to resume\nmeta_train.py: interrupted\n"


def assert_same_state(folder, reference, rank=0):
    """The last checkpoint is what the undisturbed run had at this iteration -> iteration"""
    iteration, path = newest(folder / "run" / f"rank{rank}")
    assert contents(path) == contents(reference / "states" / f"{iteration}.safetensors")
    return iteration


def assert_same_end(folder, reference, ranks=1, logged=True):
    for name in ("lomd.safetensors", "run/lomd.safetensors"):
        assert contents(folder / name) == contents(reference / name), name
    for rank in range(ranks):
        ends = [newest(f / "run" / f"rank{rank}") for f in (folder, reference)]
        assert ends[0][1].name == ends[1][1].name and contents(ends[0][1]) == contents(ends[1][1])
        waiting, expected = ({path.name: path.read_bytes() for path in (f / "run" / f"rank{rank}").glob("pass*")}
                             for f in (folder, reference))
        assert waiting.keys() == expected.keys() != set() and waiting == expected
    if logged:
        assert log_lines(folder / "run") == log_lines(reference / "run")


@pytest.fixture(scope="module")
def reference(server, data, tmp_path_factory):
    """An undisturbed run, with states/<iteration>.safetensors of each of its iterations."""
    folder = tmp_path_factory.mktemp("reference")
    done = run(server, folder, arguments(data, "--save-every", 1), (keep_states,), plot=True)
    assert done[0] == 0 and done[2] == "", done
    return folder


def start_with_cache(folder, other):
    (folder / "run").mkdir()
    shutil.copytree(other / "run" / "cache", folder / "run" / "cache")
    return folder


@pytest.fixture
def warm(reference, tmp_path):
    """A folder whose run finds all latents and text encoded."""
    return start_with_cache(tmp_path, reference)


# ----------------------------------------------------------------------------------------------------------


def test_an_undisturbed_run(server, data, reference):
    assert sorted(p.name for p in (reference / "run" / "rank0").iterdir()) == [
        "00000021-00000013.safetensors", "00000022-00000014.safetensors",
        *(f"pass{number:04d}.safetensors" for number in range(4))]
    assert sorted(p.name for p in (reference / "run").iterdir()) == [
        "cache", "lock0", "log.jsonl", "lomd.safetensors", "loss.png", "pictures.json", "rank0", "settings.json"]
    assert not list(reference.rglob("*.part"))
    with Image.open(reference / "run" / "loss.png") as picture:
        picture.load()
    lines = log_lines(reference / "run")
    assert [line["iteration"] for line in lines] == list(range(1, ITERS + 1))
    for start, joint, stop in PASSES:
        assert [line["phase"] for line in lines[start:stop]] == (["warm-up"] * (joint - start)
                                                                 + ["joint"] * (stop - joint))
    for line in lines:
        assert len(line["loss_by_t"]) == 10 and 1 <= sum(loss is not None for loss in line["loss_by_t"]) <= 2
        assert line["loss"] > 0 and line["gradient_rows"] > 0
        assert (line["gradient_lomd"] > 0) == (line["phase"] == "joint")


CHAIN = [  # what happens, and the exit code; the same command again after each
    ((die_at_file, "settings.json", "torn"), -9),
    ((die_at_file, "*-text-*", "before"), -9),
    ((die_at_file, "*x64-*", "torn", 2), -9),
    ((die_in_resume,), -9),
    ((signal_at, 0, signal.SIGINT), 130),
    ((die_in_log, 2), -9),
    ((die_at_file, "00000004-*", "torn"), -9),
    ((die_in_step, 4), -9),
    ((die_at_file, "00000006-*", "after"), -9),                   # a pass ends: saved, and its rows not yet put away
    ((die_at_file, "log.jsonl", "torn"), -9),
    ((die_at_file, "pass0000.safetensors", "torn"), -9),          # going on closes it again
    ((die_at_file, "pass0000.safetensors", "after"), -9),
    ((die_at_file, "lomd.safetensors", "torn"), -9),
    ((signal_at, 6, signal.SIGTERM), 143),
    ((signal_at, 9, signal.SIGINT), 130),
    ((die_at_file, "00000012-*", "before"), -9),
    ((die_in_fsync, 5), -9),
    ((die_in_unlink, "*-*.safetensors"), -9),
    ((die_at_file, "pass0002.safetensors", "before"), -9),        # nothing was saved since the pass before
    ((die_in_resume,), -9),
    ((die_at_file, "00000022-*", "torn"), -9),
    ((signal_at, 21, signal.SIGTERM), 143),                       # in the very last iteration
    ((die_at_file, "lomd.safetensors", "torn", 2), -9),
    ((die_at_file, "loss.png", "torn"), -9),                      # the last file
]


def test_a_run_hit_anywhere_goes_on_bit_for_bit(server, data, reference, tmp_path):
    argv, at = arguments(data), []
    for hook, expected in CHAIN:
        rarely = ["--save-every", "100"] if at and at[-1] >= 12 else []               # then only where a pass ends
        code, out, err = run(server, tmp_path, [*argv, *rarely], hook, plot=True)
        assert code == expected, (hook, code, err)
        saved = list((tmp_path / "run").glob("rank0/*-*.safetensors"))
        at.append(assert_same_state(tmp_path, reference) if saved else 0)
        if code > 128:
            assert at[-1] == hook[1] + 1
            assert err == stopped(at[-1])
        else:
            assert err == ""
        assert (tmp_path / "lomd.safetensors").exists() == (hook[1:2] == ("loss.png",))
    assert sorted(at) == at and len(set(at)) >= len(CHAIN) / 3   # they were hit all over the run
    code, out, err = run(server, tmp_path, argv)
    assert (code, err) == (0, "") and f"resuming from iteration {at[-1]}" in out
    assert_same_end(tmp_path, reference)
    assert len(list((tmp_path / "run" / "rank0").glob("*-*.safetensors"))) == 2


def wait_for(process, log, iteration, seconds=300):
    """Until log.jsonl has the line of an iteration."""
    for _ in range(seconds * 100):
        if log.exists() and any(f'"iteration": {i},' in log.read_text() for i in range(iteration, ITERS + 1)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pytest.fail("the run does not get there")


def test_the_command_and_ctrl_c(data, reference, tmp_path):
    (tmp_path / "run" / "cache").mkdir(parents=True)              # with the text, which takes seconds to import
    for path in (reference / "run" / "cache").glob("*-text-*"):
        shutil.copy(path, tmp_path / "run" / "cache")
    argv = command(tmp_path, data)
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(process, tmp_path / "run" / "log.jsonl", 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, stopped(assert_same_state(tmp_path, reference)))
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(p.name for p in (tmp_path / "run" / "cache").iterdir()) == sorted(
        p.name for p in (reference / "run" / "cache").iterdir())
    assert_same_end(tmp_path, reference)
    assert (tmp_path / "run" / "loss.png").exists()
    longer = [sys.executable, ROOT / "meta_train.py", *arguments(data, "--run", "bad", "--r2", "5")]
    done = subprocess.run(longer, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("meta_train.py: --r2 5") and not done.stdout


@pytest.mark.slow
def test_more_iterations_later_after_a_torn_checkpoint_and_with_previews(server, data, reference, warm):
    """A run of 9 iterations becomes one of 22, although it draws pictures and its last checkpoint is torn."""
    argv = arguments(data, "--preview-every", 5)
    assert run(server, warm, [*argv, "--iters", "9"], (short_previews,))[0] == 0
    assert assert_same_state(warm, reference) == 9
    torn = newest(warm / "run" / "rank0")[1]
    os.truncate(torn, torn.stat().st_size - 1)
    code, out, err = run(server, warm, argv, (short_previews,))
    assert code == 0 and "resuming from iteration 8" in out
    assert err.count("\n") == 1 and err.startswith(f"note: {torn.relative_to(warm)} is damaged and passed over: ")
    assert_same_end(warm, reference)
    previews = sorted((warm / "run" / "previews").iterdir())
    assert [path.name for path in previews] == [f"{i:08d}.png" for i in (5, 10, 15, 20)]
    for path in previews:                                         # a photo and a sample of two people
        with Image.open(path) as picture:
            assert picture.size == (128, 128)
            assert len({picture.crop((x, y, x + 64, y + 64)).tobytes() for x in (0, 64) for y in (0, 64)}) == 4


@pytest.mark.parametrize("end", [12, 22])
def test_rows_that_are_ahead_of_the_checkpoints(server, data, reference, warm, end):
    """The checkpoint of the end of a pass is torn, whose rows are put away: it is trained once more, from what it started
    from, be it that these people are new or the end of their first pass."""
    argv = arguments(data, "--save-every", 100)
    assert run(server, warm, [*argv, "--iters", str(end)])[0] == 0
    torn = newest(warm / "run" / "rank0")[1]
    os.truncate(torn, 1000)
    code, out, err = run(server, warm, argv)
    assert code == 0 and f"resuming from iteration {dict([(12, 6), (22, 18)])[end]}" in out and "is damaged" in err
    assert_same_end(warm, reference)


def test_two_processes_on_one_run(server, data, reference, warm):
    argv = arguments(data)
    first = start(server, warm, argv, (pause_at, 5))
    try:
        while not (warm / "paused").exists():
            assert first.is_alive()
            time.sleep(0.01)
        before = {path: path.read_bytes() for path in (warm / "run").rglob("*") if path.is_file()}
        code, out, err = run(server, warm, argv, name="2")
        assert (code, said(warm / "stderr2")) == (2, "meta_train.py: another process is at work in run\n")
        assert before == {path: path.read_bytes() for path in (warm / "run").rglob("*") if path.is_file()}
    finally:
        first.kill()
        first.join()


@pytest.mark.parametrize("person, phase", [("p1", "joint"), ("p3", "warm-up")])
def test_a_loss_that_is_not_finite(server, data, reference, warm, person, phase):
    """Latents of one picture that are not numbers: the run stops at its first use, as if it had been asked to there."""
    picture = next(data.rglob(person)) / "1.png"
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    latent, = (warm / "run" / "cache").glob(f"{digest[:32]}-*")
    good = latent.read_bytes()
    save_file({"posterior": torch.full_like(load_file(latent)["posterior"], torch.nan)}, latent)
    code, out, err = run(server, warm, arguments(data))
    found = re.fullmatch(r"meta_train.py: the loss or its gradient is not finite at iteration (\d+) "
                         r"\(bucket (\w): (.*)\); the state before it is saved in run\n", err)
    assert code == 1 and found, err
    assert found.groups()[1:] == (picture.parts[-3], f"{person}, {picture}")
    iteration = assert_same_state(warm, reference)
    assert iteration == int(found[1])
    start, joint, _ = next(each for each in PASSES if each[0] <= iteration < each[2])
    assert phase == ("joint" if iteration >= joint else "warm-up")
    waiting = sorted((warm / "run" / "rank0").glob("pass*"))
    assert len(waiting) == [each[0] for each in PASSES].index(start)                   # the open pass is not put away
    for path in waiting:
        assert path.read_bytes() == (reference / "run" / "rank0" / path.name).read_bytes()
    if phase == "joint":                                          # once the latents are good, it goes on
        latent.write_bytes(good)
        assert run(server, warm, arguments(data))[0] == 0
        assert_same_end(warm, reference)


# ----------------------------------------------------------------------------------------------------------
# Two processes


@pytest.fixture(scope="module")
def pair(server, squares, reference, tmp_path_factory):
    """An undisturbed run of two processes, with calls<rank>: what each sent."""
    folder = start_with_cache(tmp_path_factory.mktemp("pair"), reference)
    done = run_pair(server, folder, arguments(squares), [[(count_bytes,)]] * 2)
    assert done == ([0, 0], ["", ""])
    return folder


@pytest.fixture
def warm_pair(pair, tmp_path):
    return start_with_cache(tmp_path, pair)


def test_two_processes_equal_one_with_the_doubled_batch(server, squares, pair, warm_pair):
    assert run(server, warm_pair, arguments(squares), script=doubled)[::2] == (0, "")
    one = load_file(warm_pair / "doubled.safetensors")
    for rank in range(2):
        two = load_file(newest(pair / "run" / f"rank{rank}")[1])
        for part in IdentityBank.PARTS[:3]:
            assert_close(two[f"lomd.{part}"], one[f"lomd.{part}"])
        assert two["lomd.steps"] == one["lomd.steps"] == sum(stop - joint for _, joint, stop in PASSES)
    start_lomd = torch.cat([lomd.flatten() for lomd in start_of_lomd().values()])
    assert (one["lomd.weight"][0] - start_lomd).norm() > 1e-2 * start_lomd.norm()             # it has learned something
    people = [0, 0]
    for rank, number in itertools.product(range(2), (1, 2, 3)):                      # the last passes over each bucket
        name = f"pass{number:04d}.safetensors"
        found, expected = load_file(pair / "run" / f"rank{rank}" / name), load_file(warm_pair / f"waiting{rank}" / name)
        assert torch.equal(found["steps"], expected["steps"]) and found["steps"].min() > 2
        people[rank] += len(found["steps"])
        for part in IdentityBank.PARTS[:3]:
            for row, wanted in zip(found[part], expected[part]):
                assert_close(row, wanted)
    assert people == [4, 3]


def assert_close(found, expected):
    assert found.shape == expected.shape and expected.norm() > 0
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def start_of_lomd():
    """In the order in which it is trained."""
    targets = find_targets(load_flux(MODEL, "cpu", torch.float32))
    lomd = metalora.random_lomd(targets, 4, 0)
    return {t.path: lomd[t.path] for t in sorted(targets, key=lambda t: t.d_in)}


def test_two_processes_send_the_gradient_of_lomd_and_nothing_else(pair):
    size = sum(tensor.numel() for tensor in load_file(pair / "lomd.safetensors").values()) * 4
    expected = [call for _, joint, stop in PASSES for k in range(joint, stop)
                for call in ([k, "all_reduce", size], [k + 1, "all_reduce", 4])]        # and a flag: Ctrl-C or not
    for rank in range(2):
        calls = json.loads((pair / f"calls{rank}").read_text())
        first = next(i for i, call in enumerate(calls) if call[1] == "all_reduce")
        assert {(at, name) for at, name, _ in calls[:first]} == {(None, "broadcast_object_list"), (0, "all_gather_object")}           # before training
        assert calls[first:] == [*expected, [ITERS, "all_gather_object", 0]]               # they end together
    assert len(log_lines(pair / "run")) == ITERS


def start_torchrun(folder, squares):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(next(PORTS))]
    return subprocess.Popen([*torchrun, *command(folder, squares)[1:]], cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def finish_torchrun(process):
    """-> stderr"""
    try:
        return process.communicate(timeout=300)[1]
    finally:
        process.kill()


def checkpoints(folder):
    return [newest(folder / "run" / f"rank{rank}")[1].stem for rank in range(2)]


@pytest.mark.slow
def test_two_processes_hit_anywhere_go_on_bit_for_bit(server, squares, pair, warm_pair):
    argv = arguments(squares)
    # one of them is told to stop, in a joint phase: all do, at the same iteration
    codes, errors = run_pair(server, warm_pair, argv, [[], [(signal_at, 3, signal.SIGTERM)]])
    assert codes == [130, 143] and errors == [stopped(4)] * 2
    assert checkpoints(warm_pair) == ["00000004-00000002"] * 2
    code, _, err = run(server, warm_pair, argv)
    assert code == 2 and "processes was 2 and is 1" in err
    # the last pass ends in its warm-up: one is through, and the other has not saved the end of the pass before
    codes, _ = run_pair(server, warm_pair, [*argv, "--iters", "13"], [[], [(die_at_file, "00000012-*", "before")]])
    assert codes[0] != 0 and codes[1] == -9
    assert checkpoints(warm_pair) == ["00000013-00000008", "00000008-00000004"]
    # in a warm-up one is killed, and the other told to stop, as torchrun does
    codes, errors = run_pair(server, warm_pair, argv, [[(signal_at, 18, signal.SIGTERM)], [(die_in_draw, 18)]])
    assert codes == [143, -9] and errors == [stopped(19), ""]
    assert checkpoints(warm_pair) == ["00000019-00000012", "00000018-00000012"]
    process = start_torchrun(warm_pair, squares)
    err = finish_torchrun(process)
    assert process.returncode == 0, err
    assert_same_end(warm_pair, pair, ranks=2)


def test_a_loss_that_is_not_finite_in_one_of_two_processes(server, squares, pair, warm_pair):
    codes, errors = run_pair(server, warm_pair, arguments(squares), [[], [(not_finite_at, 3)]])
    assert codes == [1, 1] and all("not finite at iteration 3 (bucket a: " in error for error in errors)
    assert "in another process" in errors[0] and "p1, " in errors[1]                  # the second has one person of a
    assert checkpoints(warm_pair) == ["00000003-00000001"] * 2


def test_two_processes_do_not_go_on_with_the_run_of_one(server, data, reference):
    codes, errors = run_pair(server, reference, arguments(data))
    assert codes == [2, 2] and all("processes was 1 and is 2" in error for error in errors)


# ----------------------------------------------------------------------------------------------------------
# At random


@pytest.mark.slow
def test_thirty_kills_at_random_moments(data, tmp_path):
    """The command itself on the baby, killed all over the run: mostly while it trains and saves, some while it starts,
    and one while it ends."""
    iters, baby = 60, shutil.copytree(ROOT / "baby" / "checkpoint", tmp_path / "baby")
    argv = command(tmp_path, data, "--model", baby, "--iters", iters, "--save-every", 3, bucket_iters=10)
    undisturbed, hit = tmp_path / "undisturbed", tmp_path / "hit"
    undisturbed.mkdir()
    hit.mkdir()
    subprocess.run(argv, cwd=undisturbed, check=True)
    rng, log, killed, torn = random.Random(time.time()), hit / "run" / "log.jsonl", [], 0
    moments = [rng.uniform(0, iters - 8) for _ in range(12)]      # of the run, in iterations
    moments += [rng.choice([i for i in range(iters - 8) if i % 3 == 0 or i % 10 == 0]) for _ in range(12)]      # saves
    moments = sorted(moments) + [iters]                           # and its end
    for _ in range(5):
        moments.insert(rng.randrange(25), None)                   # while it starts
    for moment in moments:
        old = log.stat().st_ino if log.exists() else None        # a run that goes on starts its log as a new file
        process = subprocess.Popen(argv, cwd=hit, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        end, at = time.monotonic() + rng.uniform(0, 5), None
        while time.monotonic() < end or moment is not None:
            if log.exists() and log.stat().st_ino != old:
                at = log.read_text().count("\n")
                if moment is None or at >= moment:
                    break
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(0 if moment is None else rng.uniform(0, 0.02 if isinstance(moment, int) else 0.2))
        process.kill()
        out, err = process.communicate()
        assert err == ""
        killed.append(process.returncode)
        torn += any(hit.rglob("run/*/*.part"))
    print(f"{torn} kills of {len(killed)} left half a file")
    assert killed == [-signal.SIGKILL] * 30
    assert not (hit / "lomd.safetensors").exists()
    last = subprocess.run(argv, cwd=hit, capture_output=True, text=True)
    assert (last.returncode, last.stderr) == (0, "")
    assert_same_end(hit, undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the processes of torchrun are found in /proc")
def test_torchrun_is_stopped_and_loses_a_process(squares, pair, warm_pair):
    """SIGTERM to torchrun, which passes it on, in a joint phase; and kill -9 of one of its processes in a warm-up."""
    log = warm_pair / "run" / "log.jsonl"
    for hit, iteration in ((signal.SIGTERM, 9), (signal.SIGKILL, 12), (None, ITERS)):
        process = start_torchrun(warm_pair, squares)
        if hit:
            wait_for(process, log, iteration)
        if hit == signal.SIGTERM:
            process.send_signal(hit)
        elif hit:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            rank1, = [pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
            os.kill(int(rank1), hit)
        err = finish_torchrun(process)
        assert (process.returncode == 0) == (hit is None), err
        if hit == signal.SIGTERM:
            assert err.count("rerun the command to resume") == 2
        assert all(iteration <= int(name[:8]) or hit == signal.SIGKILL for name in checkpoints(warm_pair))
    assert_same_end(warm_pair, pair, ranks=2)


@pytest.mark.parametrize("name, index", [(None, 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_group_of_one_takes_the_gpu_by_its_number(name, index, monkeypatch):
    """torch.cuda.set_device refuses a device without one, and "cuda" has none."""
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    assert meta_train.Group(name).device.type == "cuda" and chosen == [index]


def test_an_error_does_not_close_the_group(tmp_path, monkeypatch, capsys):
    """With NCCL, closing waits for the other processes, and they wait for this one."""
    closed = []
    monkeypatch.setattr(meta_train.Group, "close", closed.append)
    assert meta_train.main(["--data", str(tmp_path / "none"), "--device", "cpu"]) == 2 and not closed


def checkpoint(steps, value=0.0):
    return {"lomd.steps": torch.tensor([steps]), "lomd.weight": torch.tensor([value])}


@pytest.fixture
def one_of_two(tmp_path):
    """The checkpoints of one of two processes, after iterations 1500 and 2000; `other`: which the second has."""
    group = SimpleNamespace(size=2, rank=0, other=set(), gather=lambda mine: [mine, group.other])
    found = Checkpoints(tmp_path / "rank0", group)
    found.save(1500, 3, checkpoint(900, value=1.0))
    found.save(2000, 3, checkpoint(1400, value=2.0))
    return found


def test_a_run_that_lost_a_folder_does_not_begin_again(one_of_two):
    with pytest.raises(ValueError, match="no checkpoint in common"):
        one_of_two.newest(torch.device("cpu"))


def test_a_run_that_was_killed_at_its_first_checkpoint_begins_again(tmp_path):
    found = Checkpoints(tmp_path / "rank0", SimpleNamespace(size=2, rank=0, gather=lambda mine: [mine, set()]))
    for iteration in (500, 1000):                                        # a warm-up, in which the other may be behind
        found.save(iteration, 0, checkpoint(0))
    assert found.newest(torch.device("cpu")) is None


def test_what_one_process_alone_saved_is_not_resumed_later(one_of_two):
    """From 1500 on a GPU may take another course; then the other process saves its 2000, and this one is killed before."""
    for other in ({"00000900"}, {"00000900", "00001400"}):
        one_of_two.group.other = other
        iteration, _, tensors = one_of_two.newest(torch.device("cpu"))
        assert iteration == 1500 and tensors["lomd.weight"].item() == 1.0
    assert [path.stem for path in one_of_two.found()] == ["00001500-00000900"]


def test_others_wait_while_the_first_reads_the_pictures(monkeypatch):
    """30,000 pictures of 24 megapixels take it 3 hours."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    waits = []
    store = SimpleNamespace(set_timeout=waits.append)
    monkeypatch.setattr(runs.dist, "rendezvous", lambda url, timeout: iter([(store, 1, 2)]))
    monkeypatch.setattr(runs.dist, "init_process_group", lambda backend, timeout, **others: waits.append(timeout))
    meta_train.Group("cpu")
    assert len(waits) == 2 and min(waits).total_seconds() > 10 * 3600


def test_the_first_line_says_how_many_pictures_an_iteration_takes(capsys):
    args = SimpleNamespace(people=50, iters=1000)
    run = SimpleNamespace(args=args, group=SimpleNamespace(rank=0), iteration=0, passes=[0], batch_size=32)
    runs.announce(run, {"0": {"ann": [SimpleNamespace(caption=None)]}})
    assert "1000 iterations of 32 pictures" in capsys.readouterr().out
