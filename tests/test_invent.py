"""paper/invent.py: captions without looks, the filter by the face network, and what an interruption leaves."""
import itertools
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from fake_card import GIB, FakeCard, full_size_flux

import meta_train
import sample
from baby import faces
from paper import invent
from support.people import check_people

SMALL = ["--model", "baby", "--device", "cpu", "--people", "2", "--pictures", "3", "--steps", "1", "--size", "32"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    return invent.main([*SMALL, *map(str, words)])


def content(*folders):
    """Every file of the folders, byte for byte."""
    return {str(path): path.read_bytes() for folder in folders for path in Path(folder).rglob("*") if path.is_file()}


def noisy(people, pictures, noise, seed=0):
    """Embeddings (P, K, 64) of norm 1, of a direction for each person and noise."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(people, 1, 64, generator=generator)
    return torch.nn.functional.normalize(own + noise * torch.randn(people, pictures, 64, generator=generator), dim=2)


def test_looks_are_in_prompts_and_never_in_captions():
    everyone = invent.invent_people(44, 10, 0, baby=False)
    looks = {name: set(" ".join(words.split()).split(", ")) for name, words in invent.LOOKS.items()}
    for shots in everyone:
        descriptions = set()
        for shot in shots:
            gender = "woman" if " a woman " in shot.caption else "man"
            before, after = shot.caption.split(f" a {gender} ")
            description = shot.prompt.removeprefix(before).removesuffix(after)
            descriptions.add(description)
            assert shot.prompt == before + description + after and f"-year-old {gender} with" in description
            assert not any(words in shot.caption for name in looks.keys() - {"gender"}
                           for words in looks[name] if len(words) > 4)
        assert len(descriptions) == 1
    hair = [next(words for words in looks["hair"] if words in shots[0].prompt) for shots in everyone]
    assert {hair.count(words) for words in looks["hair"]} == {4}                         # balanced
    assert 15 <= sum(" a woman " in shots[0].caption for shots in everyone) <= 29


def test_noise_and_seed():
    """Half of a person's pictures of FLUX.1 share a start noise, all of the baby's; a seed is the people."""
    for baby, shared in ((False, 6), (True, 10)):
        everyone = invent.invent_people(3, 10, 5, baby)
        seeds = [shot.seed for shots in everyone for shot in shots]
        assert [seeds.count(shots[0].seed) for shots in everyone] == [shared] * 3
        assert len(set(seeds)) == 3 * (11 - shared)
        assert invent.invent_people(3, 10, 5, baby) == everyone
        assert not {shot.seed for shots in invent.invent_people(3, 10, 6, baby) for shot in shots} & set(seeds)
    assert all(shot.prompt == shot.caption for shots in everyone for shot in shots)


def test_separation_is_an_auc():
    people = noisy(4, 3, 1.5)
    same, other = [], []
    for (i, a), (j, b) in itertools.combinations([(i, own) for i, person in enumerate(people) for own in person], 2):
        (same if i == j else other).append((a @ b).item())
    wanted = sum(x > y for x in same for y in other) / len(same) / len(other)
    assert 0.7 < wanted < 1 and abs(invent.separation(people) - wanted) < 1e-6


def test_the_odd_picture_goes():
    person, stranger = noisy(2, 6, 0.5)
    pictures = torch.cat([person[:3], stranger[:2], person[3:]])
    assert invent.nearest(pictures, 6) == [0, 1, 2, 5, 6, 7]


def test_who_stays():
    """A double and somebody whose pictures do not agree go; of many the ones that agree best stay."""
    people = noisy(5, 6, 0.4)
    double = torch.nn.functional.normalize(people[1] + 0.2 * noisy(1, 6, 9.0)[0], dim=1)
    drifting = noisy(6, 1, 0.0, seed=1)[:, 0]
    everybody = torch.stack([*people, double, drifting])
    staying = invent.choose_people(everybody, 7)
    assert len(staying) == 5 and len({1, 5} & set(staying)) == 1 and 6 not in staying
    steadier = torch.stack([*noisy(4, 6, 0.8), *noisy(2, 6, 0.1, seed=2)])
    assert invent.choose_people(steadier, 2) == [4, 5]


def network(monkeypatch, vectors):
    """A face network that gives picture `number` of person `name` the row vectors(name, number), None: no face."""
    monkeypatch.setattr(invent, "face_network", lambda args: lambda path: vectors(int(path.parent.name), int(path.stem)))


def test_a_folder_of_people(monkeypatch, capsys):
    """More are drawn; a picture without a face and one of somebody else are not taken; the captions lie beside."""
    own, others = noisy(3, 5, 0.3), noisy(3, 5, 0.3, seed=3)
    network(monkeypatch, lambda i, k: None if (i, k) == (0, 0) else others[i, k] if (i, k) == (1, 2) else own[i, k])
    assert run("--seed", 4) == 0
    found = sorted(Path("faces").iterdir())
    assert len(found) == 2
    for person in found:
        pictures, captions = sorted(person.glob("*.png")), sorted(person.glob("*.txt"))
        assert [path.stem for path in pictures] == [path.stem for path in captions] and len(pictures) == 3
        assert {Image.open(path).size for path in pictures} == {(32, 32)}
        for path in captions:
            number = int(path.stem)
            assert (int(person.name), number) not in {(0, 0), (1, 2)}
            assert path.read_text() == invent.invent_people(3, 5, 4, True)[int(person.name)][number].caption
    assert len([*Path("faces-drawn").rglob("0*/*.png")]) == 15 and Path("faces-drawn/sheet.png").is_file()
    out = capsys.readouterr().out
    assert "AUC" in out

    before = content("faces", "faces-drawn")
    assert run("--seed", 4) == 0 and content("faces", "faces-drawn") == before
    assert run("--seed", 5) == 2 and "seed was 4 and is 5" in capsys.readouterr().err
    assert run("--seed", 4, "--face-weights", "others.pt") == 2 and "filter was on and is" in capsys.readouterr().err
    assert content("faces", "faces-drawn") == before
    assert run("--seed", 5, "--out", "others") == 0
    assert not set(content("others").values()) & set(content("faces").values())


def test_nobody_in_particular_is_refused(monkeypatch, capsys):
    vectors = noisy(15, 1, 0.0).view(3, 5, 64)
    network(monkeypatch, lambda i, k: vectors[i, k])
    assert run() == 2
    error = capsys.readouterr().err
    assert "0.8" in error and len(error.strip().splitlines()) == 1
    assert not Path("faces").exists()


def test_memory_is_tried_with_a_whole_batch(monkeypatch):
    tried = []
    monkeypatch.setattr(sample, "fit_sampling", lambda flux, size, text_tokens, batch: tried.append(batch))
    assert run("--no-filter") == 0 and tried == [invent.BATCH]


def test_a_single_person_is_no_folder(monkeypatch, capsys):
    monkeypatch.setattr(invent, "choose_people", lambda people, count: [1])
    own = noisy(3, 5, 0.3)
    network(monkeypatch, lambda i, k: own[i, k])
    assert run() == 2 and "no two of the people" in capsys.readouterr().err and not Path("faces").exists()


def test_without_a_face_network(monkeypatch, capsys):
    """A named file that is missing is an error. Without the usual one a note says what is skipped, as with --no-filter; no more
    is drawn then than was asked for."""
    assert run("--face-weights", "none.pt") == 2 and "none.pt" in capsys.readouterr().err

    def gone(*words):
        raise ValueError("InceptionResnetV1 is not here")
    monkeypatch.setattr(invent, "FaceNetwork", gone)
    assert content(".") == {}
    assert run() == 0
    assert "no filter" in capsys.readouterr().err
    before = content("faces")
    assert run("--no-filter", "--out", "again") == 0
    printed = capsys.readouterr()
    assert not printed.err.count("note") and "AUC" not in printed.out
    assert [*content("again").values()] == [*before.values()]
    assert len(content("faces")) == 2 * 2 * 3 and len([*Path("faces-drawn").rglob("0*/*.png")]) == 6


@pytest.mark.parametrize("words", [("--people", "1"), ("--pictures", "1"), ("--size", "40"), ("--steps", "0"),
                                   ("--no-filter", "--face-weights", "a.pt"), ("--out", "nowhere/faces"), ("--out", "mine")])
def test_bad_input(words, capsys):
    Path("mine").mkdir()
    Path("mine/photo.png").touch()
    assert run("--no-filter", *words) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and content("mine") == {"mine/photo.png": b""}


MOMENTS = [("save_png", 2), ("save_png", 6), ("write_whole", 4)]         # drawing, its last picture, the folder itself


@pytest.mark.parametrize("name, call", MOMENTS)
def test_ctrl_c_loses_nothing(name, call, monkeypatch):
    assert run("--no-filter") == 0
    wanted = content("faces", "faces-drawn")
    Path("faces").rename("whole"), Path("faces-drawn").rename("whole-drawn")
    calls, real = itertools.count(1), getattr(invent, name)

    def stop(*words, **named):
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*words, **named)
    with monkeypatch.context() as patch:
        patch.setattr(invent, name, stop)
        assert run("--no-filter") == 130
    assert run("--no-filter") == 0 and content("faces", "faces-drawn") == wanted


KILLED = """
import itertools, os, signal, sys
sys.path.insert(0, {root!r})
from paper import invent
calls, real = itertools.count(1), invent.{name}
def stop(*words, **named):
    if next(calls) == {call}:
        if "{name}" == "save_png":
            words[1].parent.mkdir(parents=True, exist_ok=True)
            words[1].with_suffix(".4711.part").write_bytes(b"half")          # a file that was being written
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*words, **named)
invent.{name} = stop
invent.main({words!r})
"""


def test_a_name_of_the_hub(monkeypatch):
    def stop(args):
        raise ValueError(args.model)
    monkeypatch.setattr(invent, "choose_model", stop)
    with pytest.raises(ValueError, match="^flux-dev$"):
        invent.parse(["--model", "black-forest-labs/FLUX.1-dev", "--device", "cpu", "--out", "folks"])


@pytest.mark.parametrize("name, call", [MOMENTS[0], *(pytest.param(*moment, marks=pytest.mark.slow) for moment in MOMENTS[1:])])
def test_kill_9_leaves_the_same_folder(name, call):
    words = [*SMALL, "--no-filter"]
    code = KILLED.format(root=str(ROOT), name=name, call=call, words=words)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert run("--no-filter") == 0
    found = content("faces", "faces-drawn")
    assert run("--no-filter", "--out", "whole") == 0
    whole = content("whole", "whole-drawn")
    assert {path.replace("faces", "whole"): data for path, data in found.items()} == whole


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="as in test_full_size.py")
@pytest.mark.slow
@pytest.mark.parametrize("gib, capability, fp8", [(24, (8, 9), True), (80, (9, 0), False)])
def test_full_size_on_a_card_that_is_not_there(gib, capability, fp8, tmp_path, monkeypatch):
    """Two pictures of 512 px: nothing is asked of the card that it has not, and its memory does."""
    shots = invent.invent_people(2, 2, 0, baby=False)[0]
    text = torch.zeros(1, 512, 4096).bfloat16(), torch.zeros(1, 768).bfloat16()
    saved = []
    monkeypatch.setattr(invent, "encode_prompts", lambda folder, prompts, *words: dict.fromkeys(prompts, text))
    monkeypatch.setattr(invent, "save_png", lambda picture, path, fields: saved.append((picture, path)))
    monkeypatch.setattr(sample, "load_autoencoder", lambda *words: None)
    monkeypatch.setattr(sample, "decode_latent", lambda autoencoder, latent: tuple(latent.shape))
    with FakeCard(gib, capability) as card:
        flux = full_size_flux(card, fp8)
        monkeypatch.setattr(sample, "open_flux", lambda *words: flux)
        args = Namespace(folder=None, device=card.device, dtype=torch.bfloat16, steps=2, size=512, guidance=3.5, offload=False, text_device=card.device,
                         compile=False)
        invent.draw_pictures(args, shots, tmp_path)
        assert saved == [((1, 16, 64, 64), tmp_path / shot.path) for shot in shots]
        assert not card.problems, card.problems
        assert card.memory.peak_allocated / GIB + card.context < gib - 1


# FLUXSynID -----------------------------------------------------------------------------------------------------------


def fluxsynid(root, people=4):
    """A folder of FLUXSynID's layout, with faces that baby/faces.py draws: sizes mix, JSON files lie beside the pictures."""
    kinds = {"doc.png": 128, "live_0_e_d1.jpg": 128, "live_0_p_d1.jpg": 128, "live_0_a_d1.jpg": 64}
    for i in range(people):
        name, sex = f"{i:02d}c0ffee{i:04d}", ("f", "m", "nb")[i % 3]
        (root / name).mkdir(parents=True)
        (root / name / f"{name}_{sex}.json").write_text('{"prompt": "a portrait of a man with a scar"}')
        for k, (kind, side) in enumerate(kinds.items()):
            pixels, _ = faces.sample(900 + i, k, side, side)
            Image.fromarray(pixels).save(root / name / f"{name}_{sex}_{kind}")
    (root / "attributes").mkdir()
    (root / "attributes" / "hair.txt").write_text("red")
    return root


def test_fluxsynid_as_it_comes(capsys):
    """Nothing but --data (and what is quick): every file is used, or named once."""
    fluxsynid(Path("FLUXSynID"))
    words = ["--data", "FLUXSynID", "--model", "baby", "--iters", "2", "--preview-every", "0", "--device", "cpu"]
    assert meta_train.main(words) == 0
    out, err = capsys.readouterr()
    assert "4 people, 16 pictures" in out
    notes = [line for line in err.splitlines() if line.startswith("note:")]
    assert len(notes) == 2 and "attributes" in err and "4 .json" in err


def test_fluxsynid_captions_and_some_of_its_people():
    root = fluxsynid(Path("FLUXSynID"), 6)
    kept = next(root.glob("00*"))
    (kept / f"{kept.name}_f_doc.txt").write_text("a photo of a woman on a white background")
    found, problems = check_people(root, 16, {})
    assert not problems and len(found[""]) == 6
    captions = {photo.path.name.split("_")[1]: photo.caption for own in found[""].values() for photo in own[1:]}
    assert captions == {"f": "a photo of a woman", "m": "a photo of a man", "nb": "a photo of a person"}
    assert found[""][kept.name][0].caption == "a photo of a woman on a white background"

    some = [[*check_people(root, 16, {}, 2, seed)[0][""]] for seed in (0, 0, *range(1, 6))]
    assert some[0] == some[1] and {len(names) for names in some} == {2} and len({*map(tuple, some)}) > 2
    assert {*check_people(root, 16, {}, 99, 0)[0][""]} == {*found[""]}


def test_an_empty_folder_is_still_a_problem():
    """Left are folders that hold something else; of a person whose pictures are gone it must be said."""
    root = fluxsynid(Path("FLUXSynID"), 2)
    (root / "anna").mkdir()
    _, problems = check_people(root, 16, {})
    assert len(problems) == 1 and "anna" in problems[0]
