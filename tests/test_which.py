"""eval_rfacesim.py --loras: rules, candidates of all kinds, photos that were trained on, a run in pieces."""
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import eval_rfacesim as ev
from metalora import MetaLoRA
from support import candidates
from support.candidates import iterations_of, labels_of, read_candidates, read_person
from support.checkpoints import find_model, flux_files, load_flux
from support.lora_files import save_lora
from support.photos import fingerprints

ROOT = Path(__file__).resolve().parents[1]
BABY = find_model("baby")
sys.path.insert(0, str(ROOT / "baby"))
import faces  # noqa: E402


# the rule

def row(iterations, likeness, text):
    return {"label": f"i{iterations}", "iterations": iterations, "likeness": likeness, "text": text}


ROWS = [row(150, 0.50, 0.72), row(300, 0.69, 0.71), row(450, 0.72, 0.66), row(600, 0.72, 0.60)]


@pytest.mark.parametrize("rule, number, taken", [
    ("iterations", 375, 300), ("iterations", 380, 450), ("likeness", 0, 450), ("sum", 0, 300),
    ("text", 0.95, 300), ("text", 0.94, 450), ("text", 0.5, 600), ("text", 1.1, 150), ("early", 0.95, 300), ("early", 0.97, 450),
    ("early", 0.1, 150), ("early", 1.0, 450)])
def test_what_each_rule_takes(rule, number, taken):
    """Of equals, as of 375 between 300 and 450 and of two with the same likeness, the one that was trained the least."""
    found, why = ev.choose(ROWS, {"text": 0.70}, rule, number)
    assert found["iterations"] == taken and why


def test_no_recommendation(monkeypatch):
    for rule in ("iterations", 375), ("sum", 0), ("early", 0.9):
        monkeypatch.setattr(ev, "RULE", rule)
        assert ev.recommend(ROWS, row(None, 0, 0.7))[0] == "i300"
        assert ev.recommend([row(None, 0.0, 0.9)], row(None, 0, 0.7))[0] is None                          # nothing with a face
    monkeypatch.setattr(ev, "RULE", ("iterations", 375))
    assert ev.recommend([row(None, 0.5, 0.9)], row(None, 0, 0.7))[0] is None                              # nobody says how many
    monkeypatch.setattr(ev, "RULE", None)
    taken, why = ev.recommend(ROWS, row(None, 0, 0.7))
    assert taken is None and why.startswith("No recommendation: no rule")


# candidates: another trainer's names, another rank, none with a face, broken ones; photos

@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """LoRAs of the baby, of random numbers: a weak one of rank 1, kohya's names at rank 3, and one so strong that no face is left."""
    folder, flux = tmp_path_factory.mktemp("loras"), load_flux(BABY, "cpu", torch.float32)
    for name, rank, size, format, metadata in (
            ("out-000010", 1, 1e-3, "diffusers", {"iterations": "10", "photo_digests": "0123", "prompt": "a photo of a woman"}),
            ("other", 3, 1e-3, "kohya", {"ss_steps": "30", "iterations": "no number"}), ("out-000020", 1, 8.0, "original", {"iterations": "20"})):
        adapter = MetaLoRA(flux, rank, seed=rank)
        lora = {path: (A, size * torch.randn(B.shape)) for path, (A, B) in adapter.collapse().items()}
        save_lora(folder / f"{name}.safetensors", lora, format, metadata)
    (folder / "broken.safetensors").write_bytes((folder / "other.safetensors").read_bytes()[:5000])
    pair = dict(list(load_file(folder / "out-000010.safetensors").items())[:2])
    save_file({name: tensor[..., :8, :8].clone() for name, tensor in pair.items()}, folder / "narrow.safetensors")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("person")
    for i in range(3):
        image, _ = faces.sample(faces.TEST.start + 950, i, 192, 192, style="photo", yaw=8.0 * (i - 1))
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, loras, photos):
    """run(names of LoRAs, *words) -> exit code; two prompts, four steps."""
    monkeypatch.setattr(ev, "Judges", JUDGES)
    (tmp_path / "prompts.txt").write_text("a photo of a [man/woman]\na photo of a [man/woman] in a red shirt, on a beach\n")

    def run(names, *words, data=photos / "0.png"):
        files = [loras / f"{name}.safetensors" for name in names.split()]
        return ev.main([str(word) for word in ("--model", "baby", "--device", "cpu", "--data", data, "--steps", 4, "--prompts",
                                               tmp_path / "prompts.txt", "--out", tmp_path / "r", "--loras", *files, *words)])
    return run


CLASS, JUDGES = ev.Judges, functools.cache(ev.Judges)


def test_candidates_of_all_kinds_are_scored_and_shown(run, tmp_path, loras, capsys, monkeypatch):
    monkeypatch.setattr(ev, "RULE", ("early", 0.5))
    assert run("out-000010 other out-000020", "--out-lora", tmp_path / "best.safetensors") == 0
    out, err = capsys.readouterr()
    found = json.loads((tmp_path / "r/scores.json").read_text())
    rows = {own["label"]: own for own in (found["base"], *found["candidates"])}
    assert [(label, own["iterations"], own["rank"]) for label, own in rows.items()] == [
        ("no LoRA", None, 0), ("out-000010", 10, 1), ("out-000020", 20, 1), ("other", 30, 3)]
    lost = rows["out-000020"]
    assert lost["faces"] == 0 and lost["likeness"] == 0 and "out-000020: no face found in any of its 2 pictures; likeness 0" in err
    assert rows["other"]["faces"] == 2 and abs(rows["other"]["likeness"]) > 1e-3 and rows["other"]["text"] > lost["text"]
    assert abs(rows["out-000010"]["text"] - found["base"]["text"]) < 0.1
    assert "3 LoRAs and the model without one, 2 prompts, seed 0: 8 pictures of 128 x 128, 4 steps (a final picture" in out
    assert "likeness: FaceSim to 0.png; with other photos in --data" in out
    assert "| no LoRA | | | " in out and all(row["prompt"].startswith("a photo of a woman") for own in found["pictures"].values() for row in own)
    taken = found["recommended"]
    if taken is None:                                                          # two strangers may both be less than nothing alike
        assert "No recommendation" in out and not (tmp_path / "best.safetensors").exists()
    else:
        assert f"Recommended: {taken}, since it is the first with 50%" in out and f"| **{taken}** |" in (tmp_path / "r/which.md").read_text()
        assert (tmp_path / "best.safetensors").read_bytes() == (loras / f"{taken}.safetensors").read_bytes()
    with Image.open(tmp_path / "r/which.png") as sheet:
        assert sheet.size == (130 + 3 * 128, 84 + 4 * 128)
        cell = np.asarray(sheet.convert("RGB"))[84:84 + 128, 130 + 128:130 + 256]
    assert np.array_equal(cell, np.asarray(Image.open(next((tmp_path / "r/pictures/no LoRA").glob("0_0_*.png")))))
    assert (tmp_path / "r/curve.png").stat().st_size > 1000


def test_stopped_anywhere_and_continued_gives_the_same_numbers(run, tmp_path, monkeypatch, capsys):
    """Ctrl-C at the second picture, in scoring, and before the sheet: then the same command; nothing that is there is made again."""
    assert run("out-000010 other") == 0
    whole = (tmp_path / "r/scores.json").read_bytes()
    (tmp_path / "r").rename(tmp_path / "one go")

    def stops(call, real):
        count = [0]

        def stop(*args, **kwargs):
            count[0] += 1
            if count[0] == call:
                raise KeyboardInterrupt
            return real(*args, **kwargs)
        return stop
    made = {}
    for owner, name, call in (ev, "save_png", 2), (ev, "denoise", 3), (CLASS, "match", 2), (ev, "show", 1):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stops(call, getattr(owner, name)))
            assert run("out-000010 other") == 130
        assert not (tmp_path / "r/scores.json").exists()
        for path in (tmp_path / "r").rglob("*.png"):
            assert made.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert len(made) == 6 and run("out-000010 other") == 0
    assert (tmp_path / "r/scores.json").read_bytes() == whole and ", 0 pictures drawn" in capsys.readouterr().out.replace(";", ",")
    for name in ("which.png", "which.md"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "one go" / name).read_bytes()


@pytest.mark.parametrize("names, words, said", [
    ("out-000010 broken narrow nowhere", (), ["broken.safetensors cannot be read", "narrow.safetensors: ", "no LoRA file "]),
    ("out-000010", ("--out-lora", "best.bin"), ["--out-lora must be a file that ends in .safetensors"]),
    ("out-000010", ("--out-lora", "LORA"), ["--out-lora would overwrite the candidate"]),
    ("out-000010", ("--paper",), ["--paper does nothing with --loras"]),
    ("out-000010", ("--seed", "-1"), ["--seed is an integer from 0"]), ("out-000010", ("--size", "100"), ["100 is no multiple of 16"]),
    ("out-000010", ("--images", "results"), ["not allowed with argument"])])
def test_bad_words_and_files_are_named_before_anything_is_drawn(run, loras, tmp_path, monkeypatch, capsys, names, words, said):
    monkeypatch.setattr(ev, "Judges", None)
    monkeypatch.setattr(ev, "RULE", ("sum", 0))
    assert run(names, *(loras / "out-000010.safetensors" if word == "LORA" else word for word in words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines)) and not (tmp_path / "r").exists()


def test_words_of_one_half_are_no_words_of_the_other(tmp_path, monkeypatch, capsys):
    for words, said in ([], "one of the arguments --images --loras is required"), (["--images", tmp_path, "--steps", 9], "--steps does nothing"), (
            ["--images", tmp_path, "--t5", "x"], "--t5 does nothing with --images"), (
            ["--images", tmp_path, "--model-clip", "x"], "--model-clip does nothing"):
        assert ev.main([str(word) for word in ("--data", tmp_path, *words)]) == 2 and said in capsys.readouterr().err
    monkeypatch.setattr(ev, "RULE", None)
    with pytest.raises(ValueError, match="--out-lora needs a recommendation"):
        ev.parse(["--data", "x", "--loras", "a", "--out-lora", str(tmp_path / "b.safetensors")])
    with pytest.raises(SystemExit):
        ev.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--loras FILE [FILE ...] LoRAs of one person, to choose from; --data is then photos of the person, or a folder",
                  "--out-lora FILE copy the recommended one here", "--model-clip FILE the model's CLIP", "with --loras:"):
        assert words in text, words


def test_photos_that_were_trained_on_are_left_out(photos, tmp_path, capsys):
    """By their content, whatever they are called; where a LoRA does not say, or there is nothing else, it is said."""
    seen = tuple(fingerprints([photos / "1.png"])["photo_digests"].split())
    own = [candidates.Candidate("no LoRA"), candidates.Candidate("a", Path("a"), trained_on=seen)]
    person, likeness = read_person([photos], own)
    assert person.reference == photos / "1.png" and person.tests == (photos / "0.png", photos / "2.png")
    assert likeness == "R-FaceSim on 2 photos, without 1.png, trained on" and capsys.readouterr().err == ""
    person, likeness = read_person([photos / "1.png"], own)
    assert person.tests == (photos / "1.png",) and likeness.startswith("FaceSim to 1.png; with other photos in --data")
    person, likeness = read_person([photos / "2.png", photos], [*own, candidates.Candidate("b", Path("b"))])
    assert person.tests == (photos / "2.png", photos / "0.png") and "b: it is not known on which photos" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no picture"):
        read_person([tmp_path], own)
    (tmp_path / "copy.png").write_bytes((photos / "0.png").read_bytes())
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match="copy.png is the same picture as 0.png"):
        read_person([photos, tmp_path], own)
    assert "film.mp4" in capsys.readouterr().err


def test_iterations_labels_runs_and_copies(loras, tmp_path, capsys):
    for path, metadata, expected in (("a-000125", {"iterations": "7"}, 7), ("a", {"ss_steps": "800"}, 800), ("a_000001500", {}, 1500), (
            "a", {"training_info": '{"step": 2000, "epoch": 3}'}, 2000), ("r16", {}, None), ("face_2", {}, None), ("checkpoint-500/pytorch_lora_weights", {}, 500)):
        assert iterations_of(Path(f"{path}.safetensors"), metadata) == expected, path
    assert labels_of([Path(path) for path in ("x/a/1.safetensors", "x/b/1.safetensors", "c.v2.safetensors")]) == ["a/1", "b/1", "c.v2"]
    runs = [candidates.Candidate(label, iterations=i).run for label, i in (("out-000125", 125), ("out", 625), ("m_i150/7", 150), ("k-000002", 40))]
    assert runs == ["out", "out", "m/7", "k"]
    (tmp_path / "same.safetensors").write_bytes((loras / "other.safetensors").read_bytes())
    found = read_candidates([loras / "other.safetensors", tmp_path / "same.safetensors", loras / "out-000010.safetensors"], flux_files(BABY)[1])
    assert [own.label for own in found] == ["no LoRA", "out-000010", "other"] and "is the same as" in capsys.readouterr().err


def test_prompts(tmp_path, capsys):
    args = ev.parse(["--data", "x", "--loras", "a", "--model", "baby"])
    words = lambda caption: candidates.read_words(args, [candidates.Candidate("a", Path("a"), caption=caption)])
    own = words("a photo of a man")
    assert len(own) == 6 and all(" a man " in text for text in own) and sum(text.startswith("a photo of") for text in own) == 4
    assert all(" a person " in text for text in words("a photo of a person")) and capsys.readouterr().err == ""
    words("a photo of zwx")
    assert "no prompt has the words 'zwx'" in capsys.readouterr().err
    args.model, args.gender = "flux-dev", "woman"
    assert len(own := words("a photo of a person")) == 6 and all("woman" in text and "[" not in text for text in own)
