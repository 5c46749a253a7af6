"""meta_train.py without its interruptions: schedule, data, cache, what each phase trains, settings, its file.

    pytest tests/test_meta_train.py

One run on the small model of golden/hub, 24 iterations over two buckets, is recorded step by step, and many
tests look at the recording. Kills, torchrun and previews are in test_meta_train_runs.py.
"""
import bisect
import collections
import copy
import functools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flux_model
import meta_train
from meta_train import BucketPass, generator, schedule
from metalora import IdentityBank, MetaLoRA, plain_meta_lora, random_lomd, views
from support import checkpoints, people as people_files, photos, runs
from support.common import check_settings
from support.lora_files import load_lomd, read_lomd
from support.names import find_targets
from support.people import Cache, Captions, Photo, check_people, data_fingerprint, find_people, make_buckets
from support.runs import WaitingRows
from test_metalora import parts_of

ROOT = Path(__file__).parents[1]
MODEL = next((path for path in (ROOT / "tests" / "golden" / "hub", ROOT.parent / "shared" / "golden" / "hub")
              if path.is_dir()), None)
pytestmark = pytest.mark.skipif(MODEL is None, reason="the small model of golden/hub is not here")
PARTS = IdentityBank.PARTS
DATA = "data (pictures, captions, buckets)"


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """The text encoders are slow to load, and answer the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(people_files, "load_text_encoders", functools.cache(people_files.load_text_encoders))
        yield


def picture(path, seed, size=(64, 64), **options):
    """A small picture, another for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(path, **options)
    return path


def make_people(root, counts, size=(64, 64)):
    """{"bucket/person" or "person": how many pictures} -> files, no two the same."""
    for number, (folder, count) in enumerate(counts.items()):
        for i in range(count):
            picture(root / folder / f"{i}.png", 100 * number + i, size)
    return root


TWO_BUCKETS = {"a/ann": 2, "a/bob": 3, "a/cy": 2, "b/dan": 2, "b/eve": 2}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("--r1", 4, ...) -> (exit code, stdout, stderr), in an empty folder with the small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meta_train, "plot", lambda log, path: None)
    return lambda *args, **options: (command(*args, **options), *capsys.readouterr())


def command(*args, data="data", iters=2, model=MODEL, resolution=64, bucket_iters=None):
    """Exit code of meta_train.py, with options that make it quick; `bucket_iters` is q_bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_train, "schedule", functools.partial(schedule, bucket_iters=bucket_iters))
        return meta_train.main([*map(str, args), "--data", str(data), "--model", str(model), "--resolution",
                                *str(resolution).split(), "--iters", str(iters), "--device", "cpu",
                                "--preview-every", "0"])


def refused(result, *words):
    """One line on stderr that holds these words, and exit code 2."""
    code, _, err = result
    return code == 2 and err.count("\n") == 1 and all(str(w) in err for w in words) and "Traceback" not in err


def one_line(function, *arguments):
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listing():
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}


def relative(found, expected):
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ------------------------------------------------------------------------------------------------------------
# The schedule


# Buckets of 7 and 4 pictures at batch 4: 70 / 4 -> 18 iterations with 7 of warm-up, 40 / 4 = 10 with 4.
@pytest.mark.parametrize("iters, expected", [
    (1, [(0, 0, 7, 18)]),                                                  # --iters ends the run, not the plan
    (18, [(0, 0, 7, 18)]),
    (19, [(0, 0, 7, 18), (1, 18, 22, 28)]),
    (28, [(0, 0, 7, 18), (1, 18, 22, 28)]),
    (29, [(0, 0, 7, 18), (1, 18, 22, 28), (0, 28, 35, 46)]),
    (70, [(0, 0, 7, 18), (1, 18, 22, 28), (0, 28, 35, 46), (1, 46, 50, 56), (0, 56, 63, 74)]),
    (85, [(0, 0, 7, 18), (1, 18, 22, 28), (0, 28, 35, 46), (1, 46, 50, 56), (0, 56, 63, 74), (1, 74, 78, 84),
          (0, 84, 91, 102)]),
])
def test_algorithm_1_by_hand(iters, expected):
    assert schedule([7, 4], iters, 4, 0.4) == [BucketPass(*each) for each in expected]


def test_schedule_with_a_given_q_bucket_and_other_warmups():
    assert schedule([7, 400, 4], 17, 4, 0.4, bucket_iters=5) == [
        (0, 0, 2, 5), (1, 5, 7, 10), (2, 10, 12, 15), (0, 15, 17, 20)]
    assert schedule([5, 9], 9, 8, 0) == [(0, 0, 0, 7), (1, 7, 7, 19)]                          # no warm-up
    assert schedule([3], 9, 100, 0.99) == [(0, i, i, i + 1) for i in range(9)]                # passes of 1
    for percent in range(100):                                  # 0.29 * 100 and others fall below the whole
        assert schedule([9], 100, 4, float(f"0.{percent:02d}"), 100) == [(0, 0, percent, 100)]


def test_the_papers_schedule():
    """21 buckets of 50 people with 20 pictures: 2,500 iterations a pass, 1,000 of them warm-up."""
    passes = schedule([1000] * 21, 50_000, 4, 0.4)
    assert passes == [(i, 2500 * i, 2500 * i + 1000, 2500 * (i + 1)) for i in range(20)]


def draw_order(*args):
    """[(picture, shape)] of each batch."""
    return [[(picture, shape) for picture in pictures] for shape, pictures in meta_train.draw_order(*args)]


def counts_of(batches):
    return collections.Counter(use for batch in batches for use in batch)


def test_order_shows_each_picture_10_times():
    for number, batch_size in ((20, 4), (6, 4), (7, 4), (3, 4), (5, 1)):
        (first,) = schedule([number], 10 ** 6, batch_size, 0.4)[:1]
        batches = draw_order([["x"]] * number, first.stop, batch_size, generator(0))
        assert len(batches) == first.stop and {len(batch) for batch in batches} == {batch_size}
        left_over = first.stop * batch_size - 10 * number
        assert 0 <= left_over < batch_size
        uses = counts_of(batches)
        assert sorted(uses) == [(i, "x") for i in range(number)]
        assert sorted(uses.values()) == [10] * (number - left_over) + [11] * left_over
        flat = [use for batch in batches for use in batch]            # and none again before all have been
        assert all(len(set(flat[i:i + number])) == number for i in range(0, 10 * number, number))


def test_order_depends_on_its_key_alone():
    shapes = [["x", "y"] if i % 3 else ["y"] for i in range(30)]
    first = draw_order(shapes, 60, 4, generator(0, 2, 5, 0))
    torch.manual_seed(5)
    assert draw_order(shapes, 60, 4, generator(0, 2, 5, 0)) == first
    others = [draw_order(shapes, 60, 4, generator(*key))
              for key in ((1, 2, 5, 0), (0, 2, 6, 0), (0, 2, 5, 1))]
    assert all(a != b for i, a in enumerate([first, *others]) for b in others[i:])


def test_generators_are_set_apart_by_their_keys():
    keys = [(0,), (0, 1), (1, 0), (0, 0, 1), (2 ** 63 - 1, 3, 7), (5, 3, 10 ** 9, 2)]
    draws = [torch.rand(4, generator=generator(*key)).tolist() for key in keys]
    assert draws == [torch.rand(4, generator=generator(*key)).tolist() for key in keys]
    assert len({tuple(d) for d in draws}) == len(keys)


@pytest.mark.parametrize("rare", [1, 3, 8, 33])
@pytest.mark.parametrize("batch_size", [4, 12, 16, 32])
def test_shapes_of_their_own_are_drawn_at_any_batch_size(batch_size, rare):
    """A picture fills a batch alone where ten rounds do not bring enough of it; every picture is shown."""
    shapes = [["common"]] * 200 + [[f"rare {i}"] for i in range(rare)]
    count = math.ceil(10 * len(shapes) / batch_size)
    for seed in range(5):
        batches = draw_order(shapes, count, batch_size, generator(seed))
        assert len(batches) == count and all(len(batch) == batch_size for batch in batches)
        assert {picture for picture, _ in counts_of(batches)} == set(range(len(shapes)))
        assert all(len({shape for _, shape in batch}) == 1 for batch in batches)


def test_a_rare_picture_of_several_resolutions_is_drawn_at_one_of_them():
    """Its other shapes take no batch from the others."""
    batches = draw_order([["common"]] * 60 + [["s", "m", "l"]], 20, 32, generator(0))
    rare = [batch for batch in batches if batch[0][1] != "common"]
    assert len(batches) == 20 and len(rare) == 1 and {picture for picture, _ in rare[0]} == {60}


def test_batches_have_one_shape_use_every_view_and_mix_people():
    shapes = [["s", "l"], ["s"], ["s", "l", "xl"], ["l"]] * 10                # 10 people with 4 pictures each
    batches = draw_order(shapes, 400, 4, generator(3))
    for batch in batches:
        assert len(batch) == 4 and len({shape for _, shape in batch}) == 1
    uses = counts_of(batches)
    assert set(uses) == {(i, shape) for i in range(40) for shape in shapes[i]}
    of_picture = collections.Counter(i for batch in batches for i, _ in batch)
    assert max(of_picture.values()) - min(of_picture.values()) <= 4           # but for those that still wait
    for i in range(40):
        for shape in shapes[i]:                                        # 40 uses; 5 deviations are 16 of them
            assert abs(uses[i, shape] - 40 / len(shapes[i])) <= 16
    people = [len({i // 4 for i, _ in batch}) for batch in batches]
    assert sum(n >= 3 for n in people) > 0.8 * len(people) and max(people) == 4


def test_a_rare_shape_is_neither_left_out_nor_preferred():
    shapes = [["common"]] * 38 + [["rare"]] * 2                               # fewer than fill a batch
    batches = draw_order(shapes, 100, 4, generator(0))
    assert len(batches) == 100
    assert all(len(batch) == 4 and len({shape for _, shape in batch}) == 1 for batch in batches)
    uses = counts_of(batches)
    assert len(uses) == 40 and 8 <= min(uses.values()) and max(uses.values()) <= 12
    alone = draw_order([["a"], ["b"]], 10, 4, generator(0))                    # each is in a batch of its own
    assert [len({i for i, _ in batch}) for batch in alone] == [1] * 10
    assert {alone[0][0][0], alone[1][0][0]} == {0, 1}


# ------------------------------------------------------------------------------------------------------------
# The folder of people


def read(root, smallest=16, known=None):
    return check_people(root, smallest, {} if known is None else known)


def names(people):
    """{bucket: {person: [file names]}}"""
    return {bucket: {person: [p.path.name for p in pictures] for person, pictures in members.items()}
            for bucket, members in people.items()}


def test_buckets_and_flat_folders(tmp_path):
    make_people(tmp_path / "buckets", TWO_BUCKETS)
    people, problems = read(tmp_path / "buckets")
    assert not problems and names(people) == {
        "a": {"ann": ["0.png", "1.png"], "bob": ["0.png", "1.png", "2.png"], "cy": ["0.png", "1.png"]},
        "b": {"dan": ["0.png", "1.png"], "eve": ["0.png", "1.png"]}}
    assert make_buckets(people, 1, 0) is people                                  # buckets stay as they are
    make_people(tmp_path / "flat", {"zoë": 2, "ann b": 3})
    people, problems = read(tmp_path / "flat")
    assert not problems
    assert names(people) == {"": {"ann b": ["0.png", "1.png", "2.png"], "zoë": ["0.png", "1.png"]}}


def test_what_is_no_picture_is_ignored(tmp_path):
    make_people(tmp_path, {"a/ann": 2, "a/bob": 2})
    for name in ("a/ann/._0.png", "a/.DS_Store", "a/ann/notes.md", "a/ann/other.txt", "README.txt",
                 "a/bob/.x.heic"):
        (tmp_path / name).write_bytes(b"of no interest")
    for name in (".git", "a/.thumbs", "a/ann/.thumbs"):
        picture(tmp_path / name / "0.png", 0)
    people, problems = read(tmp_path)
    assert not problems and names(people) == {"a": {"ann": ["0.png", "1.png"], "bob": ["0.png", "1.png"]}}


def test_pictures_are_measured_upright_and_named_by_their_bytes(tmp_path):
    picture(tmp_path / "ann" / "flat.jpg", 0, (80, 48))
    exif = Image.Exif()
    exif[0x0112] = 6                                                            # a phone held upright
    picture(tmp_path / "ann" / "turned.JPG", 0, (80, 48), exif=exif)
    known = {}
    (flat, turned), problems = read(tmp_path, known=known)[0][""]["ann"], read(tmp_path)[1]
    assert not problems and (flat.width, flat.height, turned.width, turned.height) == (80, 48, 48, 80)
    assert flat.digest != turned.digest and flat.path == tmp_path / "ann" / "flat.jpg"
    assert flat.caption is turned.caption is None
    picture(tmp_path / "ann" / "flat.jpg", 1, (96, 48))                  # known by its time and size
    again, _ = read(tmp_path, known=known)
    assert again[""]["ann"][0].width == 96 and again[""]["ann"][0].digest != flat.digest


def test_what_is_known_is_not_decoded_again(tmp_path, monkeypatch):
    make_people(tmp_path, {"ann": 2})
    known = {}
    first, _ = read(tmp_path, known=known)
    known = json.loads(json.dumps(known))
    monkeypatch.setattr(people_files, "read_photo", lambda path: pytest.fail("decoded"))
    assert read(tmp_path, known=known)[0] == first


def test_captions(tmp_path):
    make_people(tmp_path, {"ann": 5})
    captions = {"0": "a photo of a woman\n".encode(), "1": b"\xef\xbb\xbf  in two\r\n lines\t here \n",
                "2": "größer, 写真".encode(), "4": b"a. b"}
    for name, text in captions.items():
        (tmp_path / "ann" / f"{name}.txt").write_bytes(text)
    people, problems = read(tmp_path)
    assert not problems and [p.caption for p in people[""]["ann"]] == [
        "a photo of a woman", "in two lines here", "größer, 写真", None, "a. b"]


@pytest.mark.parametrize("name", ["0.TXT", "0.caption", "0.Caption", "0.png.txt", "0.png.TXT", "0.png.caption"])
def test_captions_where_other_trainers_look(tmp_path, name):
    make_people(tmp_path, {"ann": 2})
    (tmp_path / "ann" / name).write_text("her", "utf-8-sig")
    people, problems = read(tmp_path)
    assert not problems and [p.caption for p in people[""]["ann"]] == ["her", None]


@pytest.mark.parametrize("place, prefix", [("ann", ""), ("ann", "./"), ("", "ann/")])
def test_captions_of_the_hubs_metadata(tmp_path, place, prefix):
    make_people(tmp_path, {"ann": 3, "bob": 2})
    rows = [{"file_name": f"{prefix}0.png", "text": "größer\u2028 her"}, {"file_name": f"{prefix}2.png", "text": "other", "size": 3}]
    (tmp_path / place / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", "utf-8")
    (tmp_path / "ann" / "2.txt").write_text("nearer")
    people, problems = read(tmp_path)
    assert not problems and [p.caption for p in people[""]["ann"]] == ["größer her", None, "nearer"]
    assert [p.caption for p in people[""]["bob"]] == [None, None]


@pytest.mark.parametrize("content, words", [
    (b'{"file_name": "0.png", "text": "a"}\n{"file_name"', "line 2"), (b"[1]\n", "line 1"), (b'{"text": "a"}', "line 1"),
    (b'{"file_name": "0.png", "text": 7}', "line 1"), (b'{"file_name": "0.png", "caption": "a"}', "it has file_name, caption"), ("größer".encode("latin-1"), "UTF-8"),
    ('{"file_name": "0.png", "text": "a"}'.encode("utf-16-le"), "UTF-8")])
def test_a_damaged_metadata_file_is_named_once(run, content, words):
    make_people(Path("data"), {"ann": 2, "bob": 2})
    Path("data/metadata.jsonl").write_bytes(content)
    code, _, err = run()
    assert code == 2 and err.count("data/metadata.jsonl") == 1 and words in err.splitlines()[0]


def test_pictures_without_a_caption_are_counted_where_others_have_one(run):
    make_people(Path("data"), {"ann": 2, "bob": 2})
    assert "caption" not in run("--batch-size", 2, "--warmup", 0, iters=1)[1]
    Path("data/ann/0.caption").write_text("her")
    assert "3 of 4 pictures have no caption of their own" in run(
        "--batch-size", 2, "--warmup", 0, "--run", "other", iters=1)[1]


def test_every_file_of_a_persons_folder_is_used_or_named(run):
    make_people(Path("data"), {"ann": 2, "bob": 2})
    for seed, suffix in enumerate(("TIFF", "ppm", "tga", "jpe", "mpo", "jp2", "ico"), start=500):
        picture(Path(f"data/ann/a.{suffix}"), seed, format={"tga": "TGA", "mpo": "JPEG", "jpe": "JPEG"}.get(suffix))
    people, problems = read(Path("data"))
    assert not problems and len(people[""]["ann"]) == 9
    for name in ("film.mp4", "notes.md", "9.txt", "0.json", "0.caption"):
        Path("data/ann", name).write_text("x")
    Path("data/ann/0.txt").write_text("her")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", "Icon\r"):
        for folder in ("data", "data/ann"):
            Path(folder, name).write_text("x")
    picture(Path("data/__MACOSX/ann/0.png"), 0)
    picture(Path("data/ann/__MACOSX/0.png"), 0)
    Path("run").mkdir()
    Path("run/.DS_Store").write_text("x")
    code, out, err = run("--batch-size", 2, "--warmup", 0, iters=1)
    line, = (line for line in err.splitlines() if "not used" in line)
    assert code == 0 and "2 people, 11 pictures" in out
    assert line.endswith(": 0.caption, 0.json, 9.txt, film.mp4, notes.md")


def test_captions_of_a_table_and_what_else_lies_above_the_people(run, capsys):
    make_people(Path("data"), {"a/ann": 2, "a/bob": 2})
    Path("data/metadata.csv").write_text("\ufefffile_name,score,text\r\na/ann/0.png,3,\"her, here\"\r\n", "utf-8")
    Path("data/a/metadata.csv").write_text("text,file_name\nhim,./bob/1.png\n")
    Path("data/a/metadata.parquet").write_text("x")
    make_people(Path("data"), {"@Recycle/ann": 1})
    people, problems = read(Path("data"))
    assert not problems and {picture.path.as_posix(): picture.caption for own in people["a"].values() for picture in own} == {
        "data/a/ann/0.png": "her, here", "data/a/ann/1.png": None, "data/a/bob/0.png": None, "data/a/bob/1.png": "him"}
    capsys.readouterr()
    code, out, err = run("--batch-size", 2, "--warmup", 0, iters=1)
    assert code == 0 and "2 people, 4 pictures" in out
    assert [line for line in err.splitlines() if "not used" in line] == [
        "note: data: not used, since neither a picture nor the caption of one: @Recycle/",
        "note: data/a: not used, since neither a picture nor the caption of one: metadata.parquet"]
    Path("data/a/metadata.csv").write_text("file_name,text\nbob/1.png,a man, smiling\n")          # no quotes
    assert "metadata.csv, line 2" in one_line(read, Path("data"))
    Path("data/a/metadata.csv").write_text("name\nbob/1.png\n")
    assert "metadata.csv, line 2" in one_line(read, Path("data"))


def test_a_caption_that_t5_cannot_hold_is_cut_aloud(run, monkeypatch):
    monkeypatch.setattr(people_files, "load_text_encoders", people_files.load_text_encoders.__wrapped__)
    make_people(Path("data"), {"ann": 2, "bob": 2})
    for name in ("ann/0", "bob/1"):
        Path(f"data/{name}.txt").write_text("a photo of a man, " * 100 + "smiling")
    code, _, err = run("--batch-size", 2, "--warmup", 0, iters=1)
    assert code == 0 and err.count("T5 sees 512 tokens") == 1 and "smiling'\n" in err


def test_dead_links_are_named(run):
    make_people(Path("data"), {"a/ann": 2, "a/bob": 2})
    Path("data/a/ann/gone.jpg").symlink_to("nowhere.jpg")
    Path("data/a/ann/gone.md").symlink_to("nowhere.md")
    Path("data/a/cy").symlink_to("/nowhere/cy")
    Path("data/b").symlink_to("/nowhere/b")
    code, _, err = run()
    assert code == 2 and sorted(err.splitlines()) == [
        *(f"meta_train.py: data/{name} is a dead link" for name in ("a/ann/gone.md", "a/cy", "b")),
        "meta_train.py: no such picture: data/a/ann/gone.jpg, it is a dead link"]


@pytest.mark.parametrize("text", ['"an open quote', "word " * 40_000], ids=["quote", "long"])
def test_a_damaged_table_is_named(tmp_path, text):
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n0.png,{text}\n1.png,b\n")
    with pytest.raises(ValueError, match="metadata.csv is not CSV"):
        Captions([tmp_path])


def found_problems(tmp_path, make, smallest=16):
    """What is said of ann, who has two good pictures, after make(her folder); and names of what is left."""
    make_people(tmp_path, {"ann": 2, "bob": 2})
    make(tmp_path / "ann")
    people, problems = read(tmp_path, smallest)
    assert all("\n" not in problem for problem in problems)
    return problems, names(people)


@pytest.mark.parametrize("name, content, words", [
    ("bad.jpg", b"no picture", "not a picture"), ("empty.png", b"", "is empty"),
    ("phone.HEIC", b"\0\0\0 ftypheic", "cannot be read"), ("phone.heif", b"\0\0\0 ftypheic", "cannot be read"),
    ("0.txt", b"", "is empty"), ("0.txt", b"\xef\xbb\xbf \n", "is empty"),
    ("1.txt", "größer".encode("latin-1"), "UTF-8"), ("1.txt", "from Windows".encode("utf-16"), "UTF-8"),
    ("metadata.jsonl", b'{"file_name": "1.png", "text": "half an emoji \\ud83d"}', "UTF-8"),
])
def test_a_bad_file_is_named(tmp_path, name, content, words):
    problems, left = found_problems(tmp_path, lambda ann: (picture(ann / "2.png", 7),
                                                           (ann / name).write_bytes(content)))
    assert len(problems) == 1 and str(tmp_path / "ann" / name) in problems[0] and words in problems[0]
    out = {"0.txt": "0.png", "1.txt": "1.png", "metadata.jsonl": "1.png"}.get(name)         # a picture goes with its caption
    assert left[""]["ann"] == [n for n in ("0.png", "1.png", "2.png") if n != out]
    assert left[""]["bob"] == ["0.png", "1.png"]


def test_damaged_and_small_pictures_are_named(tmp_path):
    def make(ann):
        whole = picture(ann / "cut.png", 8, (300, 300)).read_bytes()
        (ann / "cut.png").write_bytes(whole[:len(whole) // 2])
        picture(ann / "low.png", 9, (200, 63))
        picture(ann / "tiny.png", 10, (200, 9))
        picture(ann / "wide.png", 11, (200, 64))
    problems, left = found_problems(tmp_path, make, smallest=64)
    assert len(problems) == 3 and left[""]["ann"] == ["0.png", "1.png", "wide.png"]
    for problem, (name, words) in zip(problems, (("cut.png", "damaged"), ("low.png", "200 x 63 pixels"),
                                                 ("tiny.png", "200 x 9 pixels"))):
        assert name in problem and words in problem


def test_people_with_too_few_pictures_are_named(tmp_path):
    make_people(tmp_path, {"a/ann": 2, "a/bob": 1, "b/cy": 1})
    (tmp_path / "b" / "dan").mkdir()
    people, problems = read(tmp_path)
    assert names(people) == {"a": {"ann": ["0.png", "1.png"]}}                    # no bucket without people
    assert [p.split(";")[0].replace(str(tmp_path), "") for p in problems] == [
        "/a/bob has 1 usable picture", "/b/cy has 1 usable picture", "/b/dan has 0 usable pictures"]


def test_duplicates(tmp_path):
    make_people(tmp_path, {"a/ann": 3, "a/bob": 3, "b/ann": 3})
    shutil.copy(tmp_path / "a/ann/1.png", tmp_path / "a/ann/again.png")
    shutil.copy(tmp_path / "a/ann/1.png", tmp_path / "a/ann/9.png")
    shutil.copy(tmp_path / "a/bob/2.png", tmp_path / "b/ann/bob.png")            # whose is it?
    shutil.copy(tmp_path / "a/bob/2.png", tmp_path / "b/ann/bob2.png")
    people, problems = read(tmp_path)
    assert names(people) == {"a": {"ann": ["0.png", "1.png", "2.png"], "bob": ["0.png", "1.png"]},
                             "b": {"ann": ["0.png", "1.png", "2.png"]}}
    assert sorted(p.replace(f"{tmp_path}/", "") for p in problems) == [
        "a/ann/9.png is the same picture as a/ann/1.png",
        "a/ann/again.png is the same picture as a/ann/1.png",
        "a/bob/2.png is the same picture as b/ann/bob.png",
        "b/ann/bob.png is the same picture as a/bob/2.png",
        "b/ann/bob2.png is the same picture as a/bob/2.png"]


def test_what_is_in_the_wrong_place(tmp_path):
    root = make_people(tmp_path / "loose", {"a/ann": 2, "a/bob": 2, "b/cy": 2})
    assert find_people(root) == ([("a", root / "a/ann"), ("a", root / "a/bob"), ("b", root / "b/cy")], [])
    sound = names(read(root)[0])
    picture(root / "root.png", 50)
    picture(root / "a" / "bucket.png", 51)
    picture(root / "b" / "cy" / "raw" / "inner.png", 52)
    people, problems = read(root)
    assert names(people) == sound
    assert sorted(p.replace(f"{root}/", "") for p in problems) == [
        "a holds people and also loose pictures, such as bucket.png",
        "b/cy/raw is a folder inside a person's", "root.png is in nobody's folder"]

    mixed = make_people(tmp_path / "mixed", {"a/ann": 2, "bob": 2})
    people, problems = read(mixed)
    assert names(people) == {"a": {"ann": ["0.png", "1.png"]}}
    assert len(problems) == 1 and problems[0].startswith(f"{mixed / 'bob'} is not a bucket")
    flat = make_people(tmp_path / "flat", {"ann": 2, "bob": 2})
    (flat / "bob" / "notes").mkdir()                                     # does not make a bucket of bob
    people, problems = read(flat)
    assert names(people) == {"": {"ann": ["0.png", "1.png"], "bob": ["0.png", "1.png"]}}
    assert problems == [f"{flat / 'bob' / 'notes'} is a folder inside a person's"]
    (tmp_path / "empty").mkdir()
    assert read(tmp_path / "empty") == ({}, [])
    only = picture(tmp_path / "only" / "x.png", 1).parent
    assert read(only)[0] == {} and [str(only / "x.png") in p for p in read(only)[1]] == [True]


def test_a_flat_folder_is_dealt_into_even_buckets():
    people = {"": {f"p{i:02d}": [i] for i in range(23)}}
    buckets = make_buckets(people, 5, 0)
    assert list(buckets) == ["0000", "0001", "0002", "0003", "0004"]
    assert [len(members) for members in buckets.values()] == [5, 5, 5, 4, 4]
    everyone = [(person, pictures) for members in buckets.values() for person, pictures in members.items()]
    assert dict(everyone) == people[""] and len(everyone) == 23
    assert all(list(members) == sorted(members) for members in buckets.values())
    assert list(buckets["0000"]) != sorted(people[""])[:5]                             # dealt at random
    shuffled = {"": dict(reversed(people[""].items()))}
    assert make_buckets(shuffled, 5, 0) == buckets and make_buckets(people, 5, 1) != buckets
    assert [len(m) for m in make_buckets(people, 50, 0).values()] == [23]
    assert [len(m) for m in make_buckets(people, 1, 0).values()] == [1] * 23


def test_the_fingerprint_of_the_data(tmp_path):
    make_people(tmp_path, TWO_BUCKETS)

    def fingerprint():
        people, problems = read(tmp_path)
        assert not problems
        return data_fingerprint(people)
    seen = [fingerprint()]
    shutil.move(tmp_path / "a/ann/1.png", tmp_path / "a/ann/other name.png")
    assert fingerprint() == seen[0]                                      # the name of a file is nothing to it
    for change in (lambda: picture(tmp_path / "a/ann/2.png", 99),
                   lambda: picture(tmp_path / "a/ann/2.png", 98),
                   lambda: (tmp_path / "a/ann/2.txt").write_text("her"),
                   lambda: (tmp_path / "a/ann/2.txt").write_text("she"),
                   lambda: (tmp_path / "a/ann").rename(tmp_path / "a/anna"),
                   lambda: (tmp_path / "a/cy").rename(tmp_path / "b/cy")):      # the same order
        change()
        seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_the_seed_draws_some_of_the_people(tmp_path, capsys):
    make_people(tmp_path / "data", {f"p{i}": 2 for i in range(8)})

    def drawn(number, seed):
        people, problems = check_people(tmp_path / "data", 16, {}, number, seed)
        assert not problems
        return list(people[""])
    assert len(drawn(3, 0)) == 3 and drawn(3, 0) == drawn(3, 0) == sorted(drawn(3, 0))
    assert len({tuple(drawn(3, seed)) for seed in range(4)}) > 1
    args = SimpleNamespace(run=tmp_path / "run", data=tmp_path / "data", resolution=[64], people=3, seed=2, skip_bad=False,
                           identities_per_bucket=50)
    assert list(people_files.read_buckets(args)["0000"]) == drawn(3, 2)
    assert len(drawn(9, 0)) == 8 and "--people 9: there are 8" in capsys.readouterr().err


def make_bad_data(root):
    """Buckets with one of each fault, and the words that its line must hold."""
    make_people(root, {"a/ann": 4, "a/bob": 4, "b/cy": 4, "b/few": 1})
    (root / "a/ann/bad.jpg").write_text("no picture")
    (root / "a/ann/empty.png").write_bytes(b"")
    (root / "a/ann/phone.heic").write_bytes(b"ftypheic")
    picture(root / "a/ann/small.png", 70, (64, 12))
    (root / "a/bob/0.txt").write_bytes(b"")
    (root / "a/bob/1.txt").write_bytes(b"\xff\xfe")
    shutil.copy(root / "b/cy/0.png", root / "b/cy/copy.png")
    picture(root / "loose.png", 71)
    picture(root / "b/loose.png", 72)
    (root / "b/cy/inner").mkdir()
    make_people(root, {"flat": 2})
    return ["ann/bad.jpg", "ann/empty.png", "ann/phone.heic", "ann/small.png", "bob/0.txt", "bob/1.txt",
            "cy/copy.png", "few has 1", "data/loose.png", "such as loose.png", "cy/inner",
            "flat is not a bucket"]


def test_main_names_each_fault_and_writes_nothing(run):
    words = make_bad_data(Path("data"))
    before = listing()
    code, out, err = run()
    lines = err.splitlines()
    assert code == 2 and out == "" and len(lines) == len(words) and "Traceback" not in err
    assert all(line.startswith("meta_train.py: ") for line in lines)
    for word in words:
        assert sum(word in line for line in lines) == 1, word
    kept = Path("run/pictures.json")             # what was decoded: after mending it is not decoded again
    assert {path: time for path, time in listing().items() if path != kept} == before and [*Path("run").iterdir()] == [kept]


def test_skip_bad_goes_on_and_says_so(run):
    words = make_bad_data(Path("data"))
    code, out, err = run("--skip-bad", "--batch-size", 2, "--warmup", 0)
    lines = [line for line in err.splitlines() if line.startswith("note: skipped: ")]
    assert code == 0 and len(lines) == len(words)
    assert all(sum(word in line for line in lines) == 1 for word in words)
    assert "3 people, 10 pictures, 2 buckets" in out                     # ann 4, bob 2, cy 4
    assert len(list(Path("run/cache").glob("*-64x64-*"))) == 6                   # of the bucket that was opened
    assert {p.name for p in Path().iterdir()} == {"data", "run", "lomd.safetensors"}
    with safe_open("lomd.safetensors", "pt") as file:
        assert file.metadata()["people"] == "3"


def test_data_that_holds_nobody(run):
    assert refused(run(data="nowhere"), "--data", "nowhere")
    Path("data").mkdir()
    assert refused(run(), "data holds no people")
    (Path("data") / "ann").mkdir()
    assert refused(run(), "ann has 0 usable pictures")
    code, _, err = run("--skip-bad")
    assert code == 2 and err.splitlines()[-1] == "meta_train.py: data holds no people with pictures"
    assert refused(run(data="data/ann"), "holds no people")
    Path("file").write_text("no folder")
    assert refused(run(data="file"), "--data", "file")
    assert sorted(str(p) for p in Path().rglob("*")) == ["data", "data/ann", "file"]


# ------------------------------------------------------------------------------------------------------------
# Latents and text, encoded once


def hub_copy(folder, file=None, name=None, without=()):
    """The small model, by links, `without` some files; in one file one number of one tensor differs."""
    folder.mkdir()
    for path in MODEL.iterdir():
        if path.name not in without:
            (folder / path.name).symlink_to(path, target_is_directory=path.is_dir())
    if file:
        path = folder / file
        if path.parent != folder:
            path.parent.unlink()
            shutil.copytree(MODEL / path.parent.name, path.parent)
        tensors = load_file(path)
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
        tensors[name].view(-1)[0] += 0.25                                     # more than bf16 rounds away
        path.unlink()
        save_file(tensors, path, metadata)
    return folder


def weak_copy(folder, name="double_blocks.1.img_attn.norm.key_norm.scale"):
    """With one number of the transformer changed."""
    return hub_copy(folder, "flux1-dev.safetensors", name)


def cache_of(folder, resolutions=(64,), model=MODEL, dtype=torch.float32):
    return Cache(folder, model, torch.device("cpu"), torch.device("cpu"), dtype, list(resolutions))


def test_cache_names_depend_on_picture_size_and_model_not_on_paths(tmp_path):
    make_people(tmp_path / "data", {"ann": 2, "bob": 1})
    shutil.copy(tmp_path / "data/ann/0.png", tmp_path / "data/bob/other.png")
    same, another = Photo(tmp_path / "x.png", "d" * 64, 64, 64, "hers"), None
    cache = cache_of(tmp_path / "cache")
    base = cache.latent_path(same, (64, 64))
    assert base == cache.latent_path(same._replace(path=tmp_path / "y.jpg", caption=None), (64, 64))
    assert base.parent == tmp_path / "cache"
    other_models = [
        hub_copy(tmp_path / "ae", "ae.safetensors", "encoder.conv_in.bias"),
        hub_copy(tmp_path / "clip", "text_encoder/model.safetensors", "encoder.layers.0.layer_norm1.bias"),
        hub_copy(tmp_path / "t5", "text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight")]
    caches = [cache_of(tmp_path / "cache", model=m) for m in other_models] + [
        cache_of(tmp_path / "cache", dtype=torch.bfloat16)]
    another = [cache.latent_path(same._replace(digest="e" * 64), (64, 64)), cache.latent_path(same, (64, 80))]
    assert len({base, *another, *(c.latent_path(same, (64, 64)) for c in caches)}) == 7
    texts = {cache.text_path("hers"), cache.text_path("his"), *(c.text_path("hers") for c in caches)}
    assert len(texts) == 6
    copied = hub_copy(tmp_path / "copy")
    assert cache_of(tmp_path / "cache", model=copied).latent_path(same, (64, 64)) == base
    assert not (tmp_path / "cache").exists()


def test_sizes_are_multiples_of_64_never_larger_than_the_picture():
    def sizes(width, height, *resolutions):
        return cache_of(Path("none"), resolutions).sizes(Photo(None, "", width, height, None))
    assert sizes(2048, 2048, 1024) == [(1024, 1024)]
    assert sizes(700, 700, 512, 768, 1024) == [(512, 512), (640, 640)]          # the last two give the same
    assert sizes(2000, 1000, 512, 1024) == [(768, 384), (1408, 704)]
    assert sizes(100, 90, 512) == [(64, 64)]
    rng, cache = np.random.default_rng(0), cache_of(Path("none"))
    for width, height in rng.integers(64, 3000, (300, 2)).tolist():
        every = {}
        for cache.resolutions in ([512], [768], [1024]):
            every[cache.resolutions[0]], = cache.sizes(Photo(None, "", width, height, None))
        cache.resolutions = [*every]
        assert cache.sizes(Photo(None, "", width, height, None)) == list(dict.fromkeys(every.values()))
        for resolution, (w, h) in every.items():
            assert w % 64 == h % 64 == 0 and min(w, h) >= 64 and w * h <= width * height
            if 1 / 3 < width / height < 3 and min(width, height) > 256:
                assert w * h <= 1.2 * resolution ** 2 and abs(np.log(w / h / (width / height))) < 0.3
    assert [Cache.step(r) for r in (64, 128, 256, 384, 512, 768, 1024)] == [16, 16, 32, 48, 64, 64, 64]


@pytest.fixture
def filled(tmp_path):
    """cache, pictures: two squares and a wide one at two resolutions, encoded."""
    make_people(tmp_path / "data", {"ann": 2})
    picture(tmp_path / "data/ann/2.png", 5, (160, 96))
    pictures = read(tmp_path / "data")[0][""]["ann"]
    cache = cache_of(tmp_path / "cache", (64, 96))
    cache.fill(*cache.missing(pictures, ["a man", "a woman", "a man"]))
    return cache, pictures


def test_the_cache_holds_what_the_models_give(filled):
    cache, pictures = filled
    autoencoder = checkpoints.load_autoencoder(MODEL, "cpu", torch.float32)
    expected = set()
    for p in pictures:
        assert cache.sizes(p) == ([(64, 64)] if p.width == 64 else [(80, 48), (128, 80)])
        for size, resolution in zip(cache.sizes(p), (64, 96)):
            fitted = photos.fit_to_grid(photos.read_photo(p.path), resolution, 16)
            assert fitted.size == size
            posterior = autoencoder.posterior(photos.to_tensor(fitted)[None])[0]
            stored = cache.load(cache.latent_path(p, size))["posterior"]
            assert stored.shape == (2, 16, size[1] // 8, size[0] // 8)
            assert torch.equal(stored, posterior.half())
            expected.add(cache.latent_path(p, size))
    encoders = people_files.load_text_encoders(MODEL, torch.device("cpu"), torch.float32)
    for caption in ("a man", "a woman"):
        txt, y = encoders.encode([caption])
        stored = cache.load(cache.text_path(caption))
        assert torch.equal(stored["txt"], txt[0]) and torch.equal(stored["y"], y[0])
        expected.add(cache.text_path(caption))
    assert set(cache.folder.iterdir()) == expected
    assert cache.missing(pictures, ["a man", "a boy"]) == ([], ["a boy"])


def test_text_is_encoded_on_a_device_of_its_own(tmp_path, monkeypatch):
    """With --offload, where T5 does not fit on the GPU, on the CPU."""
    load = people_files.load_text_encoders
    asked = []
    monkeypatch.setattr(people_files, "load_text_encoders", lambda model, device, dtype: asked.append(device) or load(model, "cpu", dtype))
    cache = cache_of(tmp_path)
    cache.text_device = torch.device("cuda")          # free() passes over a GPU that was never used
    cache.fill([], ["a man"])
    assert asked == [torch.device("cuda")] and cache.missing([], ["a man"]) == ([], [])


def test_nothing_is_encoded_twice(filled, monkeypatch):
    cache, pictures = filled
    lost = cache.latent_path(pictures[2], (80, 48))
    lost.unlink()
    assert cache.missing(pictures, []) == ([pictures[2]], [])
    monkeypatch.setattr(people_files, "load_text_encoders", lambda *_: pytest.fail("text was encoded again"))
    others = [p for p in cache.folder.iterdir() if pictures[2].digest[:32] not in p.name]
    before = {p: p.stat().st_mtime_ns for p in others}
    cache.fill(*cache.missing(pictures, ["a man", "a woman"]))
    assert lost.exists() and all(p.stat().st_mtime_ns == then for p, then in before.items())
    monkeypatch.setattr(people_files, "load_autoencoder", lambda *_: pytest.fail("a picture was encoded again"))
    cache.fill(*cache.missing(pictures, ["a man", "a woman"]))
    moved = [p._replace(path=Path("moved") / p.path.name) for p in pictures]       # the folder was renamed
    cache.fill(*cache.missing(moved, ["a man"]))


def test_changed_pictures_and_damaged_latents_are_refused(filled):
    cache, pictures = filled
    path = cache.latent_path(pictures[0], (64, 64))
    path.write_bytes(path.read_bytes()[:-50])
    assert str(path) in one_line(cache.load, path)
    path.unlink()
    assert str(path) in one_line(cache.load, path)
    picture(pictures[0].path, 1234)
    message = one_line(cache.fill, *cache.missing(pictures, []))
    assert str(pictures[0].path) in message and "changed" in message and not path.exists()
    assert not list(cache.folder.glob("*.part"))


# ------------------------------------------------------------------------------------------------------------
# A recorded run: 4 passes of 6 iterations, two buckets twice, the first half of each pass warm-up


def state(bank):
    return {part: getattr(bank, part).detach().clone() for part in PARTS}


def same(a, b, rows=slice(None)):
    return all(torch.equal(a[part][rows], b[part][rows]) for part in PARTS)


Step = collections.namedtuple("Step", "iteration now present lomd rows lomd_after rows_after")


class Recording:
    """What a run did: each step, and the rows as each pass found and left them."""
    def __init__(self, *args, **options):
        self.steps, self.opened, self.closed = [], [], []
        Run = meta_train.Run
        real_step, real_open, real_close = Run.step, Run.open_bucket, Run.close_bucket

        def step(run, now):
            lomd, rows, iteration = state(run.adapter.shared), state(run.adapter.bank), run.iteration
            result = real_step(run, now)
            self.steps.append(Step(iteration, now, run.adapter.present.tolist(), lomd, rows,
                                   state(run.adapter.shared), state(run.adapter.bank)))
            return result

        def open_bucket(run, number):
            real_open(run, number)
            self.run = run
            self.opened.append(state(run.adapter.bank))

        def close_bucket(run):
            real_close(run)
            self.closed.append(state(run.adapter.bank))

        with pytest.MonkeyPatch.context() as patch:
            for function in (step, open_bucket, close_bucket):
                patch.setattr(Run, function.__name__, function)
            self.code = command(*args, **options)


OPTIONS = ("--batch-size", 2, "--warmup", 0.5, "--r1", 3, "--r2", 2, "--lr", 1e-3,
           "--seed", 5)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The run, in a folder of its own; a person's picture has a caption."""
    folder = tmp_path_factory.mktemp("recorded")
    make_people(folder / "data", TWO_BUCKETS)
    (folder / "data/a/bob/1.txt").write_text("a drawing of a man")
    recording = Recording(*OPTIONS, "--run", folder / "run", "--out", folder / "out.safetensors",
                          data=folder / "data", iters=24, bucket_iters=6)
    assert recording.code == 0 and len(recording.steps) == 24 and len(recording.opened) == 4
    recording.folder = folder
    return recording


def test_warm_up_trains_the_people_and_the_joint_phase_both(recorded):
    for step in recorded.steps:
        joint = step.iteration % 6 >= 3
        assert joint == (step.iteration >= step.now.joint) and step.now.bucket == step.iteration // 6 % 2
        assert same(step.lomd, step.lomd_after) != joint
        if joint:
            assert all(not torch.equal(step.lomd[part], step.lomd_after[part]) for part in PARTS)
        number = len(step.rows["steps"])
        assert number == (3, 2)[step.now.bucket] and 1 <= len(step.present) <= 2
        for row in range(number):
            if row in step.present:
                assert all(not torch.equal(step.rows[p][row], step.rows_after[p][row]) for p in PARTS), row
                assert step.rows_after["steps"][row] == step.rows["steps"][row] + 1
            else:
                assert same(step.rows, step.rows_after, row)
    assert any(len(step.present) == 2 for step in recorded.steps)
    assert all(before.lomd_after["weight"].equal(after.lomd["weight"])
               for before, after in zip(recorded.steps, recorded.steps[1:]))
    assert recorded.steps[-1].lomd_after["steps"].tolist() == [12]                  # half of 24


def test_the_learning_rate_is_the_runs(recorded):
    """AdamW's first step moves each weight whose gradient is large beside eps by the learning rate."""
    for step, bank in ((recorded.steps[0], "rows"), (recorded.steps[3], "lomd")):       # the first joint one
        before, after = getattr(step, bank)["weight"], getattr(step, f"{bank}_after")["weight"]
        moved = (after - before * (1 - 0.01 * 1e-3)).abs()
        assert moved.max().item() == pytest.approx(1e-3, rel=1e-2)
        assert bank == "lomd" or moved[moved > 0].median().item() == pytest.approx(1e-3, rel=0.1)


def test_a_joint_step_follows_the_mean_of_the_batch(recorded):
    run = recorded.run
    run.open, run.iteration = None, 22                                 # the 5th of the second pass over bucket b
    run.open_bucket(3)
    _, (ids, latent, noise, t, txt, y) = run.draw(4)
    adapter = run.adapter
    adapter.train_lomd = True
    adapter.assign(ids)
    losses = flux_model.flow_matching_loss(adapter.flux, latent, noise, t, txt, y, guidance=1.0)
    losses.sum().backward()
    flat, rows = adapter.flat.grad / 2, adapter.rows.grad / adapter.counts[:, None]
    found, times, norms, lomd_norm = run.step(run.passes[3])
    assert torch.equal(found, losses) and torch.equal(times, t) and run.iteration == 23
    assert torch.allclose(norms, rows.norm(dim=1)) and lomd_norm == pytest.approx(flat.norm().item())


def test_lomd_and_rows_start_as_the_seed_says(recorded):
    adapter = recorded.run.adapter
    lomd = random_lomd(find_targets(adapter.flux), 3, seed=5)
    flat = torch.cat([lomd[t.path].flatten() for t in adapter.targets])
    before = recorded.steps[0].lomd
    assert torch.equal(before["weight"][0], flat) and not any(before[part].any() for part in PARTS[1:])
    for opened, people in ((recorded.opened[0], (0, 1, 2)), (recorded.opened[1], (3, 4))):
        for row, person in enumerate(people):                    # numbered over all buckets
            assert torch.equal(opened["weight"][row], adapter.new_row(generator(5, meta_train.ROWS, person)))
        assert not opened["steps"].any() and not opened["exp_avg"].any() and not opened["exp_avg_sq"].any()


def test_every_seed_pass_and_process_draws_its_own(recorded):
    """The batches of a pass; the noise of an iteration."""
    run, orders, noises = copy.copy(recorded.run), set(), set()
    run.args, run.iteration = copy.copy(run.args), 12
    for run.args.seed in (5, 6):
        for rank in (0, 1):
            run.group = SimpleNamespace(rank=rank, device=torch.device("cpu"))
            for run.open in (0, 2):                                                       # both over bucket a
                run.open_bucket(run.open)
                orders.add(str(run.order))
            _, (_, _, noise, *_) = run.draw(0)
            noises.add(tuple(noise[0, 0, 0].tolist()))
    assert len(orders) == 8 and len(noises) == 4


def waiting_files(folder):
    return sorted(path.name for path in (folder / "run/rank0").glob("pass*"))


def assert_same_waiting(folder, other):
    assert waiting_files(folder) == waiting_files(other) != []
    for name in waiting_files(folder):
        assert (folder / "run/rank0" / name).read_bytes() == (other / "run/rank0" / name).read_bytes()


def test_a_second_pass_goes_on_from_the_first(recorded):
    for first, second in ((0, 2), (1, 3)):
        assert same(recorded.closed[first], recorded.opened[second])
        assert recorded.opened[second]["steps"].all()
        assert same(recorded.closed[first], recorded.steps[6 * first + 5].rows_after)
    assert waiting_files(recorded.folder) == ["pass0001.safetensors", "pass0002.safetensors", "pass0003.safetensors"]
    for number in (1, 2, 3):
        assert same(load_file(recorded.folder / f"run/rank0/pass{number:04d}.safetensors"), recorded.closed[number])


def test_a_step_trains_on_the_posterior_and_on_the_pictures_own_caption(recorded):
    run = recorded.run
    run.open = 2                                                                 # the run is over, its rows do not matter
    run.open_bucket(2)                                                           # bucket a
    seen = collections.defaultdict(set)
    for offset in range(6):
        run.iteration = 12 + offset
        who, (ids, latent, noise, t, txt, y) = run.draw(offset)
        again = run.draw(offset)
        assert again[0] == who and all(map(torch.equal, again[1], (ids, latent, noise, t, txt, y)))
        assert [shown.path.parent.name for shown in who] == [["ann", "bob", "cy"][i] for i in ids.tolist()]
        for i, shown in enumerate(who):
            caption = shown.caption or "a photo of a person"                     # --prompt where there is none
            text = run.cache.load(run.cache.text_path(caption))
            assert torch.equal(txt[i], text["txt"]) and torch.equal(y[i], text["y"])
            mean, deviation = run.cache.load(run.cache.latent_path(shown, (64, 64)))["posterior"].float()
            assert ((latent[i] - mean) / deviation).std().sub(1).abs() < 0.15 and 0 < t[i] < 1
            assert noise[i].std().sub(1).abs() < 0.15
            seen[caption].add(tuple(noise[i, 0, 0].tolist()))
    assert set(seen) == {"a photo of a person", "a drawing of a man"}
    assert sum(map(len, seen.values())) == 12                                          # never the same noise


def test_iterations_may_be_raised_and_the_cache_shared(run, recorded):
    """12 iterations and then 24 give what 24 at once gave; the second pass is cut in its warm-up before."""
    shutil.copytree(recorded.folder / "run" / "cache", "run/cache")
    options = dict(data=recorded.folder / "data", bucket_iters=6)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_autoencoder", "load_text_encoders"):
            patch.setattr(people_files, name, lambda *_: pytest.fail("encoded again"))
        assert run(*OPTIONS, **options, iters=8)[0] == 0
        assert load_lomd("lomd.safetensors")[1]["iterations"] == "8"
        code, out, _ = run(*OPTIONS, **options, iters=24)
    assert code == 0 and "resuming from iteration 8" in out
    again, expected = load_lomd("lomd.safetensors")[0], load_lomd(recorded.folder / "out.safetensors")[0]
    assert again.keys() == expected.keys() and all(torch.equal(again[k], expected[k]) for k in again)
    assert_same_waiting(Path(), recorded.folder)


# ------------------------------------------------------------------------------------------------------------
# Rows that wait on disk


def random_rows(count, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {part: torch.randn(count, size, generator=g) for part in PARTS[:3]} | {
        "steps": torch.randint(1, 10 ** 12, (count,), generator=g)}


def test_rows_wait_in_a_file_for_each_pass(tmp_path):
    waiting = WaitingRows(tmp_path, buckets=2)
    rows = [random_rows((3, 2)[number % 2], 11, seed=number) for number in range(4)]
    for number in range(4):
        if number >= 2:                                                  # before, these people have never trained
            found = waiting.load(number, "cpu")
            assert same(found, rows[number - 2]) and found["steps"].dtype == torch.long
            found["weight"].zero_()                                      # a copy, not the file
            assert same(waiting.load(number, "cpu"), rows[number - 2])
        waiting.save(number, rows[number])
    # of the bucket of pass 2 the file before is there no more: everybody has saved what came of it
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"pass{i:04d}.safetensors" for i in (1, 2, 3)]


def test_rows_that_a_later_pass_lacks_are_refused_at_the_start(tmp_path):
    waiting = WaitingRows(tmp_path, buckets=2)
    for number in range(3):
        waiting.save(number, random_rows((3, 2)[number % 2], 11))
    waiting.check(open_pass=2, passes=4)                                 # pass 3 starts from the file of pass 1
    whole = waiting.path(1).read_bytes()
    for content in (whole[:-1], whole[:20], b""):
        waiting.path(1).write_bytes(content)
        assert str(waiting.path(1)) in one_line(waiting.check, 2, 4)
    waiting.path(1).unlink()
    assert str(waiting.path(1)) in one_line(waiting.check, 2, 4)
    waiting.check(open_pass=2, passes=3)                                 # a run that ends with pass 2 needs none
    waiting.check(open_pass=0, passes=4)                                 # and after pass 0 nobody has trained


def test_what_the_disk_must_hold_is_all_that_is_missing(tmp_path, monkeypatch):
    """The smallest disk that is not refused, with text and latents to encode and with files that are there already."""
    people = [[(0, []), (1, [])], [(2, [])]]
    run = SimpleNamespace(args=SimpleNamespace(folder=MODEL, r1=3, r2=2, dtype=torch.float32, run=tmp_path), members=people,
                          group=SimpleNamespace(size=1, gather=lambda mine: [mine]), cache=cache_of(tmp_path), folder=tmp_path)

    files = checkpoints.flux_files(MODEL)
    targets = checkpoints.targets_of(files[1])
    for name, known in (("flux_files", files), ("targets_of", targets), ("text_length", 512)):          # slow to ask
        monkeypatch.setattr(runs, name, lambda _, known=known: known)
    disk = SimpleNamespace()
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: disk)

    def needed(photos, captions):
        def fits(free):
            disk.free = free
            try:
                runs.check_room(run, photos, captions)
            except ValueError:
                return False
            return True
        return bisect.bisect_left(range(10 ** 9), True, key=fits)
    row, lomd = 12 * 2 * sum(3 + t.rows for t in targets), 12 * 3 * sum(t.d_in for t in targets)
    rows = needed([], [])
    assert rows == (3 + 2) * row + 3 * (2 * row + lomd)              # everybody's, a file that is replaced, three checkpoints
    assert needed([], ["a", "b"]) == rows + 2 * 512 * 40 * 4
    assert needed([Photo(None, "", 128, 64, None)], []) == rows + math.prod(run.cache.sizes(Photo(None, "", 128, 64, None))[0])
    (tmp_path / "pass0000.safetensors").write_bytes(bytes(1000))
    assert needed([], []) == rows - 1000


def test_of_two_processes_each_keeps_a_checkpoint_that_the_other_has(tmp_path):
    """In a joint phase they step together: beside the last two, the last from before LoMD's latest step."""
    group = SimpleNamespace(size=2, gather=lambda mine: [mine, theirs])
    own = runs.Checkpoints(tmp_path / "rank0", group)
    for iteration, steps in ((3, 2), (4, 2), (6, 4), (8, 4), (9, 4)):
        own.save(iteration, 1, {"lomd.steps": torch.tensor([steps])})
    assert [path.stem for path in own.found()] == ["00000004-00000002", "00000008-00000004", "00000009-00000004"]
    for theirs, expected in (({"00000002", "00000004"}, 9), ({"00000002"}, 4), ({"00000003"}, None)):
        found = own.newest(torch.device("cpu"))
        assert (found and found[0]) == expected


# ------------------------------------------------------------------------------------------------------------
# One step against plain autograd


class PlainLinear(torch.nn.Module):
    """What AdaptedLinear computes, by plain_meta_lora, image after image and target after target."""
    def __init__(self, linear, targets, ids, parts, lomd):
        super().__init__()
        self.linear, self.targets, self.ids, self.parts, self.lomd = linear, targets, ids, parts, lomd

    def forward(self, x):
        images = []
        for image, identity in zip(x, self.ids):
            outputs = []
            for t in self.targets:
                own = slice(t.start, t.start + t.rows)
                M, U = (part[identity] for part in self.parts[t.path])
                update = plain_meta_lora(image, self.linear.weight[own], self.lomd[t.path], M, U)
                outputs.append(update + self.linear.bias[own])
            images.append(torch.cat(outputs, dim=-1))
        return torch.stack(images)


def tiny_adapter(**options):
    """The small model, and an adapter of 5 people with weights that are all in use."""
    flux = checkpoints.load_flux(MODEL, "cpu", torch.float32)
    adapter = MetaLoRA(flux, 2, lomd=random_lomd(find_targets(flux), 3), num_identities=5, slots=4, **options)
    adapter.bank.weight.add_(0.1 * torch.randn(adapter.bank.weight.shape))
    adapter.train_lomd = True
    return adapter


def draws(batch, seed=2):
    """latent, noise, t, txt, y for flow_matching_loss."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 16, 4, 4, generator=g), torch.randn(batch, 16, 4, 4, generator=g),
            torch.rand(batch, generator=g), torch.randn(batch, 5, 40, generator=g),
            torch.randn(batch, 24, generator=g))


def plain_gradients(adapter, ids, data):
    """Losses, and by autograd: LoMD's gradient of their mean, {person: its row's, of the mean of its own}."""
    flux = checkpoints.load_flux(MODEL, "cpu", torch.float64)
    rows = adapter.bank.weight.double().requires_grad_()
    flat = adapter.shared.weight[0].double().requires_grad_()
    lomd = dict(zip((t.path for t in adapter.targets), views(flat, [(adapter.r1, t.d_in) for t in adapter.targets])))
    parts = parts_of(adapter, rows)
    modules = collections.defaultdict(list)
    for t in adapter.targets:
        modules[t.module].append(t)
    for name, targets in modules.items():
        parent, _, attribute = name.rpartition(".")
        setattr(flux.get_submodule(parent), attribute,
                PlainLinear(flux.get_submodule(name), targets, ids, parts, lomd))
    losses = flux_model.flow_matching_loss(flux, *data)
    of_lomd, = torch.autograd.grad(losses.mean(), flat, retain_graph=True)
    ids = torch.tensor(ids)
    of_rows = {i: torch.autograd.grad(losses[ids == i].mean(), rows, retain_graph=True)[0][i]
               for i in set(ids.tolist())}
    return losses, of_lomd, of_rows


def clipped(gradient, limit=1.0):
    """By torch's own."""
    parameter = torch.zeros_like(gradient).requires_grad_()
    parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([parameter], limit)
    return parameter.grad


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradients_are_those_of_plain_autograd(clip):
    adapter, ids, data = tiny_adapter(), [3, 0, 3, 1, 3, 0], draws(6)
    losses, of_lomd, of_rows = plain_gradients(adapter, ids, data)
    adapter.assign(torch.tensor(ids))
    mine = flux_model.flow_matching_loss(adapter.flux, *data)
    assert relative(mine, losses) < 1e-5
    mine.sum().backward()
    norms, lomd_norm = adapter.step(1e-3, clip=clip)
    assert lomd_norm == pytest.approx(of_lomd.norm().item(), rel=1e-4)
    assert (lomd_norm > clip) == (clip < 1)
    # after one step from zero, exp_avg is a tenth of the gradient that AdamW was given
    assert relative(10 * adapter.shared.exp_avg[0], clipped(of_lomd, clip)) < 1e-4
    assert adapter.present.tolist() == [0, 1, 3] and adapter.bank.steps.tolist() == [1, 1, 0, 1, 0]
    for norm, person in zip(norms, (0, 1, 3)):
        assert norm.item() == pytest.approx(of_rows[person].norm().item(), rel=1e-4)
        assert relative(10 * adapter.bank.exp_avg[person], clipped(of_rows[person], clip)) < 1e-4
    assert not adapter.bank.exp_avg[[2, 4]].any()


def test_lomd_and_each_row_are_clipped_by_their_own_norms():
    adapter = tiny_adapter()
    adapter.assign(torch.tensor([1, 2, 1, 4]))
    adapter.rows.grad = torch.randn(adapter.rows.shape) * torch.tensor([[1e-4], [1e2], [1e-1]])
    adapter.flat.grad = 1e-3 * torch.randn(adapter.flat.shape)
    rows, flat = adapter.rows.grad.clone() / torch.tensor([[2], [1], [1]]), adapter.flat.grad.clone() / 4
    norms, lomd_norm = adapter.step(1e-3)
    assert torch.allclose(norms, rows.norm(dim=1)) and lomd_norm == pytest.approx(flat.norm().item())
    assert (norms[0] < 1 < norms[2] < norms[1]) and lomd_norm < 1
    assert relative(10 * adapter.shared.exp_avg[0], flat) < 1e-5
    for person, gradient in zip((1, 2, 4), rows):
        assert relative(10 * adapter.bank.exp_avg[person], clipped(gradient)) < 1e-5


def test_lomd_is_trained_by_adamw():
    adapter, lr = tiny_adapter(), 3e-3
    start = adapter.shared.weight[0].clone()
    reference = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([reference], lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    for step in range(30):
        adapter.train_lomd = step % 7 != 3                                        # as in a warm-up
        adapter.assign(torch.tensor([step % 5, (step + 1) % 5]))
        gradient = torch.randn(start.shape) * torch.logspace(-6, -1 + step % 3, len(start))
        adapter.rows.grad = torch.randn(adapter.rows.shape)
        if adapter.train_lomd:
            adapter.flat.grad = 2 * gradient                                       # the sum over a batch of 2
            reference.grad = clipped(gradient)
            optimizer.step()
        adapter.step(lr)
    assert relative(adapter.shared.weight[0] - start, reference.detach() - start) < 1e-4
    assert torch.allclose(adapter.shared.weight[0], reference, rtol=1e-6, atol=1e-6)
    for part in ("exp_avg", "exp_avg_sq"):
        assert relative(getattr(adapter.shared, part)[0], optimizer.state[reference][part]) < 1e-5
    assert adapter.shared.steps.tolist() == [26]                  # of 30 without 3, 10, 17 and 24
    flat = torch.cat([adapter.lomd[t.path].flatten() for t in adapter.targets])
    assert torch.equal(flat, adapter.shared.weight[0])                             # lomd is what is trained


def test_average_replaces_the_mean():
    adapter, given = tiny_adapter(), []
    adapter.assign(torch.tensor([0, 1]))
    adapter.rows.grad, adapter.flat.grad = torch.zeros_like(adapter.rows), torch.randn(adapter.flat.shape)

    def average(gradient):
        given.append(gradient.clone())
        return gradient / 1000
    expected = adapter.flat.grad / 1000
    adapter.step(1e-3, average=average)
    assert len(given) == 1 and relative(10 * adapter.shared.exp_avg[0], expected) < 1e-5
    adapter.train_lomd = False                                   # in a warm-up nothing is sent
    adapter.assign(torch.tensor([0, 1]))
    adapter.rows.grad = torch.zeros_like(adapter.rows)
    assert adapter.step(1e-3, average=average)[1] == 0 and len(given) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["rows", "flat"])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, where):
    adapter = tiny_adapter()
    for _ in range(2):                                                          # so that moments are not zero
        adapter.assign(torch.tensor([0, 2]))
        flux_model.flow_matching_loss(adapter.flux, *draws(2)).sum().backward()
        adapter.step(1e-3)
    before = copy.deepcopy((state(adapter.bank), state(adapter.shared)))
    adapter.assign(torch.tensor([2, 3]))
    flux_model.flow_matching_loss(adapter.flux, *draws(2)).sum().backward()
    getattr(adapter, where).grad.view(-1)[-7] = bad
    with pytest.raises(FloatingPointError):
        adapter.step(1e-3)
    assert same(state(adapter.bank), before[0]) and same(state(adapter.shared), before[1])


# ------------------------------------------------------------------------------------------------------------
# Settings: what makes a run this run


@pytest.fixture
def begun(run, recorded):
    """A copy of the recorded run's folder, and run() with its options."""
    shutil.copytree(recorded.folder / "run", "run")
    options = dict(data=recorded.folder / "data", iters=24, bucket_iters=6)
    return lambda *args, **more: run(*OPTIONS, *args, **options | more)


def test_a_changed_setting_is_refused_with_both_values(begun, tmp_path):
    before = listing()
    for args, words in (
            (("--batch-size", 3), "batch-size was 2 and is 3"), (("--r1", 4), "r1 was 3 and is 4"),
            (("--r2", 1), "r2 was 2 and is 1"), (("--lr", 2e-3), "lr was 0.001 and is 0.002"),
            (("--warmup", 0.4), "warmup was 0.5 and is 0.4"),
            (("--seed", 6), "seed was 5 and is 6"),
            (("--prompt", "her"), "prompt was a photo of a person and is her"),
            (("--prompt", "none"), "prompt was a photo of a person and is none")):
        assert refused(begun(*args), "run was made with other settings: " + words + ";"), args
    assert refused(begun(resolution="80 64 80"), "resolution was [64] and is [64, 80];")
    assert refused(begun("--r1", 4, "--seed", 9), "r1 was 3 and is 4, seed was 5 and is 9;")
    other = weak_copy(tmp_path / "other")
    old, new = checkpoints.flux_fingerprint(MODEL), checkpoints.flux_fingerprint(other)
    assert refused(begun(model=other), f"model was {old} and is {new};")
    ae = hub_copy(tmp_path / "ae", "ae.safetensors", "encoder.conv_in.bias")
    t5 = hub_copy(tmp_path / "t5", "text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight")
    for part, model in (("autoencoder", ae), ("t5", t5)):
        old, new = (checkpoints.fingerprint(folder, part) for folder in (MODEL, model))
        assert refused(begun(model=model), f"settings: {part} was {old} and is {new};")
    assert {p: t for p, t in listing().items() if p.parts[0] not in ("other", "ae", "t5")} == before


def test_many_people_are_not_compared_each_with_each(tmp_path, monkeypatch):
    """FLUXSynID has 14,889 folders."""
    for number in range(100):
        (tmp_path / f"{number:03d}").mkdir()
    compared, equal = [], Path.__eq__
    monkeypatch.setattr(type(tmp_path), "__eq__", lambda one, other: compared.append(1) or equal(one, other), raising=False)
    check_people(tmp_path, 64, {})
    assert len(compared) < 20 * 100


def test_a_long_setting_is_shown_where_it_differs(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"prompt": "a" * 200 + "b"}))
    with pytest.raises(ValueError, match="prompt was a{40}b and is a{40}c;"):
        check_settings(path, {"prompt": "a" * 200 + "c"})


def test_changed_people_are_another_run(begun, recorded, tmp_path):
    shutil.copytree(recorded.folder / "data", tmp_path / "faces")
    assert begun(data=tmp_path / "faces")[0] == 0                                    # moved, but the same
    (tmp_path / "faces/a/bob/1.txt").write_text("another caption")
    before = json.loads(Path("run/settings.json").read_text())[DATA]
    assert refused(begun(data=tmp_path / "faces"), f"{DATA} was {before} and is ")
    assert json.loads(Path("run/settings.json").read_text())[DATA] == before


@pytest.mark.parametrize("name, value", [("dtype", torch.bfloat16), ("processes", 2)])
def test_precision_and_number_of_processes_belong_to_a_run(recorded, name, value):
    settings = json.loads((recorded.folder / "run" / "settings.json").read_text())
    args, group = copy.copy(recorded.run.args), SimpleNamespace(size=1)
    buckets = make_buckets(read(recorded.folder / "data")[0], 50, 5)
    meta_train.take_settings(args, buckets, group)
    assert args.settings == settings
    if name == "dtype":
        args.dtype = value
    else:
        group.size = value
    message = one_line(meta_train.take_settings, args, buckets, group)
    assert f"was made with other settings: {name} was {settings[name]} and is {value};" in message


def test_a_bucket_with_fewer_people_than_processes_is_refused(recorded):
    args, buckets = copy.copy(recorded.run.args), make_buckets(read(recorded.folder / "data")[0], 50, 5)
    assert "bucket b has 2 people for 3 processes" in one_line(meta_train.take_settings, args, buckets, SimpleNamespace(size=3))


def test_another_clip_is_another_run(recorded, tmp_path):
    args, buckets = copy.copy(recorded.run.args), make_buckets(read(recorded.folder / "data")[0], 50, 5)
    args.folder = hub_copy(tmp_path / "clip", "text_encoder/model.safetensors", "encoder.layers.0.layer_norm1.bias")
    assert "settings: clip was " in one_line(meta_train.take_settings, args, buckets, SimpleNamespace(size=1))


def test_foreign_and_damaged_run_folders(run, begun):
    make_people(Path("data"), {"ann": 2})
    picture(Path("holiday/beach.png"), 0)
    assert refused(run("--run", "holiday"), "--run holiday holds other files")
    assert refused(run("--run", "data"), "--run data")
    assert sorted(p.name for p in Path("holiday").iterdir()) == ["beach.png"]
    Path("new").mkdir()
    Path("new/try.0123abcd.part").touch()                  # of another process that starts at the same time
    done = begun("--run", "new")
    assert done[0] == 0, done
    for content, words in (("{", "settings.json cannot be read as JSON"), ("[1]", "JSON"), ('{"model": "x"}', "run was made with other settings: model was x and is")):
        Path("run/settings.json").write_text(content)
        assert refused(begun(), words)
        assert Path("run/settings.json").read_text() == content


def test_what_a_killed_process_left_half_written_goes(begun):
    """Every process names its half-written files after itself: nobody else would write over them."""
    left = Path("run/rank0/00000012-00000003.safetensors.4711.part")
    left.write_bytes(b"torn")
    assert begun(iters=24)[0] == 0 and not left.exists()


def test_a_run_of_an_earlier_version_is_refused_by_name(begun):
    settings = json.loads(Path("run/settings.json").read_text())
    del settings["order of a row's numbers"]
    Path("run/settings.json").write_text(json.dumps(settings | {"bucket-iters": None}))
    assert refused(begun(), "order of a row's numbers was not written down and is by width")


@pytest.mark.parametrize("iters", [24, 10])
def test_a_finished_run_is_left_as_it_is(begun, recorded, iters):
    code, out, _ = begun("--out", "again.safetensors", iters=iters)
    assert code == 0 and "resuming from iteration 24" in out
    again, expected = load_lomd("again.safetensors"), load_lomd(recorded.folder / "out.safetensors")
    assert again[1] == expected[1] and all(torch.equal(again[0][k], expected[0][k]) for k in expected[0])
    assert_same_waiting(Path(), recorded.folder)


@pytest.mark.parametrize("what", ["missing", "short"])
def test_waiting_rows_that_are_not_there(begun, what):
    path = Path("run/rank0/pass0002.safetensors")                                 # which pass 4 is to start from
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-4])
    assert refused(begun(iters=30), "run/rank0/pass0002.safetensors")
    assert not Path("lomd.safetensors").exists()


def test_rows_that_the_disk_cannot_hold(run, monkeypatch):
    """Asked before anything is encoded."""
    make_people(Path("data"), TWO_BUCKETS)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert refused(run("--warmup", 0), "no room", "people", "checkpoints", "latents and text")
    assert not list(Path("run").rglob("*.safetensors"))


@pytest.mark.slow
def test_what_a_run_needs_on_disk_is_foreseen(run, monkeypatch):
    """With what is asked for, and not less, a run ends; what is there already is not asked for again."""
    make_people(Path("data"), TWO_BUCKETS)
    free, used = [10 ** 9], []

    def disk_usage(path):
        used.append(sum(file.stat().st_size for file in Path("run").rglob("*.safetensors")))
        return SimpleNamespace(free=free[0] - used[-1])
    monkeypatch.setattr(runs.shutil, "disk_usage", disk_usage)
    assert run(iters=24)[0] == 0 and used == [0]
    left = sum(file.stat().st_size for file in Path("run").rglob("*.safetensors"))
    free[0] = left
    assert run(iters=25)[0] in (0, 2)
    shutil.rmtree("run")
    free[0] = left // 2
    assert refused(run(iters=24), "no room")
    free[0] = 2 * left                           # a checkpoint and a bucket more than stay, and text counted in full
    assert run(iters=24)[0] == 0


@pytest.mark.parametrize("left", ["nothing", "the rows"])
def test_a_run_without_its_checkpoints_begins_again(begun, recorded, left):
    for path in Path("run/rank0").glob("*-*.safetensors" if left == "the rows" else "*.safetensors"):
        path.unlink()
    assert begun()[0] == 0
    again, expected = load_lomd("lomd.safetensors")[0], load_lomd(recorded.folder / "out.safetensors")[0]
    assert all(torch.equal(again[k], expected[k]) for k in expected)
    assert_same_waiting(Path(), recorded.folder)


def test_what_breaks_while_a_run_reads_it(run, recorded, monkeypatch):
    """One line, and the state before it is there: a latent at its first use, rows at the start of a pass."""
    shutil.copytree(recorded.folder / "run" / "cache", "run/cache")
    options = dict(data=recorded.folder / "data", iters=24, bucket_iters=6)
    load, calls = Cache.load, []

    def torn(cache, path):
        calls.append(path)
        if len(calls) == 10:                                           # in the third batch of two pictures
            path.write_bytes(path.read_bytes()[:50])
        return load(cache, path)
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "load", torn)
        assert refused(run(*OPTIONS, **options), calls[-1], "is damaged", "the state before it is saved in run")
    assert [path.name for path in Path("run/rank0").iterdir()] == ["00000002-00000000.safetensors"]
    shutil.copy(recorded.folder / "run" / "cache" / calls[-1].name, calls[-1])

    def gone(waiting, number, device):
        raise OSError("the disk is gone")
    with monkeypatch.context() as patch:
        patch.setattr(WaitingRows, "load", gone)
        assert refused(run(*OPTIONS, **options), "the disk is gone; the state before it is saved in run")
    assert run(*OPTIONS, **options)[0] == 0
    assert_same_waiting(Path(), recorded.folder)


def test_the_open_buckets_rows_come_from_the_checkpoint(begun, recorded):
    """A kill may have come before they were put away."""
    save_file(random_rows(2, recorded.closed[0]["weight"].shape[1]), "run/rank0/pass0003.safetensors")
    assert begun()[0] == 0
    assert_same_waiting(Path(), recorded.folder)


# ------------------------------------------------------------------------------------------------------------
# The file it writes


def test_what_the_lomd_file_says(recorded):
    lomd, metadata = load_lomd(recorded.folder / "out.safetensors")
    assert metadata == {
        "format": "pt", "r1": "3", "targets": str(len(recorded.run.adapter.targets)), "model": "hub",
        "model_fingerprint": checkpoints.flux_fingerprint(MODEL), "iterations": "24", "people": "5", "r2": "2",
        "data_fingerprint": data_fingerprint(read(recorded.folder / "data")[0]),
        "learning_rate": "0.001", "batch_size": "2", "warmup": "0.5", "seed": "5",
        "prompt": "a photo of a person", "made_by": "meta_train.py"}
    flat = torch.cat([lomd[t.path].flatten() for t in recorded.run.adapter.targets])
    assert torch.equal(flat, recorded.steps[-1].lomd_after["weight"][0])
    assert all(A.shape == (3, t.d_in) for t in recorded.run.adapter.targets for A in [lomd[t.path]])
    assert {p.name for p in recorded.folder.iterdir()} == {"data", "run", "out.safetensors"}
    assert {p.name for p in (recorded.folder / "run").iterdir()} == {
        "rank0", "cache", "log.jsonl", "loss.png", "lomd.safetensors", "lock0", "pictures.json",
        "settings.json"}
    assert load_lomd(recorded.folder / "run" / "lomd.safetensors")[1] == metadata


def test_the_log_names_phase_and_bucket(recorded):
    lines = [json.loads(line) for line in (recorded.folder / "run" / "log.jsonl").read_text().splitlines()]
    phases = ["warm-up"] * 3 + ["joint"] * 3
    assert [(line["iteration"], line["phase"], line["bucket"]) for line in lines] == [
        (i + 1, phases[i % 6], "ab"[i // 6 % 2]) for i in range(24)]
    for line in lines:
        assert min(line["loss"], line["gradient_rows"], line["seconds"]) > 0
        assert (line["gradient_lomd"] > 0) == (line["phase"] == "joint") and len(line["loss_by_t"]) == 10
        assert any(value is not None for value in line["loss_by_t"])


def test_the_log_sorts_losses_by_their_time(tmp_path):
    log = runs.Log(SimpleNamespace(run=tmp_path, iters=1), 0, SimpleNamespace(rank=0, device=torch.device("cpu")))
    log.write({"iteration": 1, "phase": "joint"}, losses=torch.tensor([1.0, 4.0, 10.0]), t=torch.tensor([0.05, 0.91, 0.99]),
              norms=torch.tensor([2.0, 4.0]), lomd_norm=torch.tensor(6.0))
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["loss_by_t"] == [1.0, *[None] * 8, 7.0]
    assert (line["loss"], line["gradient_rows"], line["gradient_lomd"]) == (5.0, 3.0, 6.0)


def test_a_preview_has_each_persons_photo_beside_a_sample_with_their_row(recorded, monkeypatch):
    run, drawn, sheets = recorded.run, [], []
    run.open = None
    run.open_bucket(3)                                                                    # dan and eve

    def denoise(flux, noise, txt, y, steps, guidance):
        drawn.append((run.adapter.present.tolist(), noise))
        return noise.float()
    monkeypatch.setattr(runs, "denoise", denoise)
    monkeypatch.setattr(runs, "save_png", lambda sheet, path: sheets.append((np.asarray(sheet), path)))
    runs.draw_preview(run)
    assert [rows for rows, _ in drawn] == [[0], [1]]
    assert all(torch.equal(noise, flux_model.get_noise(64, 64, row)) for row, (_, noise) in enumerate(drawn))
    (sheet, path), = sheets
    assert sheet.shape == (128, 128, 3) and path == run.args.run / "previews" / f"{run.iteration:08d}.png"
    for row, (_, own) in enumerate(run.members[1]):
        assert np.array_equal(sheet[64 * row:64 * row + 64, :64], np.asarray(photos.read_photo(own[0].path)))


def test_previews_come_when_they_are_due(run, monkeypatch):
    make_people(Path("data"), {"ann": 2, "bob": 2})
    drawn = []
    monkeypatch.setattr(meta_train, "draw_preview", lambda run: drawn.append(run.iteration))
    assert meta_train.main(["--data", "data", "--model", str(MODEL), "--device", "cpu", "--resolution", "64", "--iters", "3",
                            "--warmup", "0", "--batch-size", "2", "--preview-every", "2"]) == 0
    assert drawn == [2]


def test_stage_2_takes_it_for_its_model_alone(recorded, tmp_path):
    path = recorded.folder / "out.safetensors"
    lomd, name = read_lomd(MODEL, path)
    assert name.startswith("sha256 ") and lomd.keys() == load_lomd(path)[0].keys()
    other = weak_copy(tmp_path / "other")
    message = one_line(read_lomd, other, path)
    assert str(path) in message and "hub" in message
    assert checkpoints.flux_fingerprint(MODEL) in message and checkpoints.flux_fingerprint(other) in message
    diffusers = hub_copy(tmp_path / "diffusers", without=["flux1-dev.safetensors", "ae.safetensors"])
    assert read_lomd(diffusers, path)[1] == name


def test_the_fingerprint_of_a_model(tmp_path):
    mine = checkpoints.flux_fingerprint(MODEL)
    diffusers = hub_copy(tmp_path / "diffusers", without=["flux1-dev.safetensors"])
    layouts = ["x_embedder.weight" in checkpoints.flux_files(folder)[0].names for folder in (diffusers, MODEL)]
    assert layouts == [True, False]
    assert checkpoints.flux_fingerprint(diffusers) == mine and len(mine) == 16
    found = set()
    for dtype in (torch.float32, torch.bfloat16):                                # an original in fp32, and its copy
        copy = hub_copy(tmp_path / str(dtype), without=["flux1-dev.safetensors"])
        with safe_open(MODEL / "flux1-dev.safetensors", "pt") as file:
            weights = {key: file.get_tensor(key).float() for key in file.keys()}
            noise = {key: 0.01 * torch.randn(weight.shape, generator=generator(len(key))) for key, weight in weights.items()}
            save_file({key: (weights[key] + noise[key]).to(dtype) for key in weights}, copy / "flux1-dev.safetensors", file.metadata())
        found.add(checkpoints.flux_fingerprint(copy))
    assert len(found) == 1 and mine not in found
    changed = {mine}
    for i, name in enumerate(("img_in.bias", "double_blocks.0.txt_attn.norm.query_norm.scale",
                              "single_blocks.2.norm.key_norm.scale")):
        changed.add(checkpoints.flux_fingerprint(weak_copy(tmp_path / str(i), name)))
        other = hub_copy(tmp_path / f"{i}d", "transformer/diffusion_pytorch_model.safetensors",
                         checkpoints.diffusers_flux_names(name)[0], without=["flux1-dev.safetensors"])
        assert checkpoints.flux_fingerprint(other) in changed             # and the same in this layout
    assert len(changed) == 4


# ------------------------------------------------------------------------------------------------------------
# What it refuses


@pytest.mark.parametrize("args, words", [
    *((([option, value]), option) for option in (
        "--iters", "--batch-size", "--r1", "--r2", "--identities-per-bucket", "--save-every",
        "--resolution") for value in ("0", "-3", "many", "1.5")),
    *((([option, value]), option) for option, values in {
        "--lr": ("0", "-1", "nan", "inf", "fast"), "--warmup": ("-0.1", "1", "nan", "long"),
        "--seed": ("-1", str(2 ** 63), "x"), "--preview-every": ("-1", "x"),
        "--resolution": ("63", "8192", "72", "64 x"), "--device": ("tpu", "cpux", ""),
    }.items() for value in values),
    (["--r2", "17"], "--r2"), (["--model", "nowhere"], "nowhere"), (["--model", "data"], "data holds no transformer"),
    (["--out", "lomd.pt"], "lomd.pt"), (["--out", "no/where.safetensors"], "--out"),
    (["--out", "file/x.safetensors"], "--out"), (["--out", "dir.safetensors"], "dir.safetensors"),
    (["--run", "file"], "--run"), (["--run", "file/run"], "--run"), (["--run", "data/run"], "--run"),
    *(([option, "3"], option) for option in ("--cache", "--bucket-iters", "--log-every", "--no-ahead")),
    (["--warm", "0.1"], "--warm"), (["--fast"], "--fast"),
    (["--prompt"], "--prompt"), (["positional"], "positional"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_malformed_options(run, capsys, args, words):
    make_people(Path("data"), {"ann": 2})
    Path("file").write_text("no folder")
    Path("dir.safetensors").mkdir()
    before = sorted(Path().rglob("*"))
    given = [*" ".join(args).split()] if args[0] == "--resolution" else args
    base = ["--data", "data", "--model", str(MODEL), "--iters", "1", "--device", "cpu", "--resolution", "64"]
    code = meta_train.main(base + given)
    assert refused((code, *capsys.readouterr()), words)
    assert sorted(Path().rglob("*")) == before


def test_a_run_in_which_lomd_learns_nothing(run):
    """Four people with 5 pictures, batch 2: a bucket has 100 iterations, its warm-up is the first 40."""
    make_people(Path("data"), {name: 5 for name in ("ann", "bob", "cy", "dot")})
    options = "--batch-size", 2, "--warmup", 0.4
    assert refused(run(*options, iters=40), "--iters 40 is all warm-up", "--warmup 0")
    assert [path.name for path in Path("run").iterdir()] == ["pictures.json"]
    assert run(*options, iters=41)[0] == 0


def test_defaults_are_the_papers_and_the_models(run):
    make_people(Path("data"), {"ann": 2})
    for model, own in ((MODEL, (4e-4, 0.4, [1024])), ("baby", (4e-3, 0, [128]))):
        args = meta_train.parse(["--data", "data", "--model", str(model)])
        runs.check_stage_1(args, torch.device("cpu"))
        assert (args.iters, args.batch_size, args.r1, args.r2, args.identities_per_bucket) == (50_000, 4, 16, 1, 50)
        assert (args.lr, args.warmup, args.resolution) == own and args.prompt == "a photo of a person"
        assert (args.people, args.seed, args.save_every, args.preview_every, args.deterministic) == (None, 0, 500, 1000, False)


def test_deterministic_is_asked_of_torch(run, monkeypatch):
    make_people(Path("data"), {"ann": 2, "bob": 2})
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)

    def load(run):
        asked.append("load")
        raise ValueError("far enough")
    monkeypatch.setattr(meta_train.Run, "load", load)
    for words, expected in (((), ["load"]), (("--deterministic",), [True, "load"])):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
        asked.clear()
        assert refused(run("--warmup", 0, *words), "enough") and asked == expected
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (":4096:8" if words else "")


def test_data_must_be_given(run, capsys):
    assert meta_train.main(["--model", str(MODEL)]) == 2
    assert refused((2, *capsys.readouterr()), "--data") and not list(Path().iterdir())
