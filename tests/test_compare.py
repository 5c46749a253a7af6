"""paper/compare.py: the whole comparison in small, interrupted anywhere, continued, extended; many people trained together."""
import functools
import json
import os
import shutil
from argparse import Namespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval_rfacesim as ev
import personalize
from metalora import IdentityBank, MetaLoRA, apply_loras
from baby import faces
from paper import compare
from paper.report import draw_sheet
from support import photos
from support.checkpoints import LONG_RUN, find_model, load_autoencoder, load_flux, load_text_encoders, model_defaults
from support.lora_files import load_lomd
from support.people import Person
from test_eval_rfacesim import people  # noqa: F401  a fixture

BABY = find_model("baby")


def run(*words):
    return compare.main([str(word) for word in words])


def score(*words):
    return ev.main([str(word) for word in words])


# 

BASE = ["--model", "baby", "--steps", "2", "--seeds", "1", "--resolution", "64"]


@pytest.fixture(scope="module")
def prompts_file(people):
    path = people.parent / "prompts.txt"
    path.write_text("a photo of a [man/woman] on a beach\na pencil drawing of a [man/woman]\n")
    return path


@pytest.fixture(scope="module")
def whole(people, prompts_file):
    """A run in one go: two people, two methods and the floor, two ranks, two iteration counts."""
    out, few = people.parent / "whole", people.parent / "few"
    for name in ("p0", "p1"):
        shutil.copytree(people / name, few / name)
    words = [*BASE, "--data", few, "--prompts", prompts_file, "--methods", "meta-lora", "lora", "none", "--ranks", "1", "2",
             "--iters", "2", "3", "--lr", "1e-2", "lora=5e-3"]
    assert run(*words, "--out", out) == 0
    return words, out


def test_the_whole_run_writes_everything(whole, capsys):
    words, out = whole
    scores = json.loads((out / "scores.json").read_text())
    assert [m["label"] for m in scores["methods"]] == [f"{m}_r{r}_i{i}" for m in ("meta-lora", "lora") for r in (1, 2) for i in (2, 3)] + ["none"]
    assert len(scores["pictures"]) == 9 * 2 * 2 and scores["settings"]["learning rates"]["lora"] == 5e-3
    assert scores["settings"]["guidance"] == model_defaults(BABY)["guidance"] != 3.5
    assert scores["settings"]["learning rates"]["meta-lora"] == 1e-2
    for row in scores["pictures"]:
        assert set(row) == {"method", "identity", "prompt", "number", "seed", "clip_t", "r_facesim", "facesim"}
    for name in ("scores.png", "sheet.png", "tables.md"):
        assert (out / name).stat().st_size > 1000, name
    with Image.open(out / "sheet.png") as sheet:                          # the photos and nine rows of eight pictures
        assert sheet.size == (130 + 8 * 144, 84 + 10 * 144)
    text = (out / "tables.md").read_text()
    assert "| Rank-1 Meta-LoRA, 2 iterations | checkpoint |" in text or "| Rank-1 Meta-LoRA, 2 iterations | baby |" in text
    assert text.count("no LoRA") == 2
    # its own pictures score the same when they come in as finished ones
    assert score("--data", words[words.index("--data") + 1], "--images", out / "images", "--prompts", words[words.index("--prompts") + 1],
               "--model", "baby", "--out", out.parent / "again") == 0
    again = json.loads((out.parent / "again" / "scores.json").read_text())
    key = lambda row: (row["method"], row["identity"], row["number"], row["seed"])
    assert sorted(again["pictures"], key=key) == sorted(scores["pictures"], key=key)


def test_captions_beside_photos_are_used_as_personalize_uses_them(people, prompts_file, tmp_path, capsys):
    """Two photos of a person with captions of their own: the LoRA of personalize.py on these two. A caption that is written
    later is another setting."""
    shutil.copytree(people / "p0", tmp_path / "data" / "p0")
    first, second = sorted((tmp_path / "data" / "p0").glob("*.png"))[:2]
    first.with_suffix(".txt").write_text("a photo of a man in a red shirt")
    second.with_suffix(".txt").unlink()
    words = [*BASE, "--data", tmp_path / "data", "--gender", "man", "--prompts", prompts_file, "--methods", "meta-lora", "--photos", "2", "--iters",
             "2", "--lr", "1e-2", "--prompt", "a photo of a person", "--out", tmp_path / "r"]
    assert run(*words) == 0
    own = tmp_path / "r" / "loras" / "meta-lora_r1_i2" / "p0.safetensors"
    assert personalize.main([str(word) for word in (first, second, "--model", "baby", "--resolution", 64, "--iters", 2, "--lr", 1e-2, "--out", tmp_path / "p.safetensors")]) == 0
    theirs = tmp_path / "p.safetensors"
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*(load_file(f).values() for f in (own, theirs))))
    with safe_open(own, "pt") as file:
        assert file.metadata()["prompt"] == "a photo of a man in a red shirt | a photo of a person"
    first.with_suffix(".txt").unlink()                     # the same caption in a table above the people
    row = {"file_name": f"p0/{first.name}", "text": "a photo of a man in a red shirt"}
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps(row))
    assert run(*words) == 0
    second.with_suffix(".txt").write_text("a photo of a man on a beach")
    assert run(*words) == 2 and "other settings: captions was" in capsys.readouterr().err


def same_tensors(a, b):
    """To the bit. The files' own bytes differ from run to run: safetensors shuffles their metadata."""
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


def dies_at(monkeypatch, owner, name, call):
    """The `call`-th call of owner.name raises, as a kill would end the process there."""
    real, count = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            raise Killed(f"{name} {call}")
        return real(*args, **kwargs)
    monkeypatch.setattr(owner, name, wrapper)


@pytest.mark.slow
def test_interrupted_anywhere_and_continued_gives_the_same_scores(whole, monkeypatch, tmp_path):
    """Hit in training, while LoRAs are written, between the pictures of a batch, in scoring: each time the same command goes
    on, and at the end every file that counts is the same as in one go. Nothing that is there is made again."""
    words, one_go, out, made = [*whole[0], "--methods", "meta-lora", "--iters", "3"], tmp_path / "one go", tmp_path / "in pieces", {}
    assert run(*words, "--out", one_go) == 0
    for owner, name, call in ((compare, "flow_matching_loss", 3), (compare, "save_lora", 2), (compare, "save_state", 1),
                              (compare, "save_lora", 2), (compare, "save_png", 2), (compare, "save_png", 4), (compare, "sample_latents", 2),
                              (ev.Judges, "match", 3), (compare, "draw_scores", 1)):
        with monkeypatch.context() as patch:
            dies_at(patch, owner, name, call)
            with pytest.raises(Killed):
                run(*words, "--out", out)
        for path in out.rglob("*.png"):
            assert made.setdefault(path, path.read_bytes()) == path.read_bytes()
    assert run(*words, "--out", out) == 0
    assert (out / "scores.json").read_bytes() == (one_go / "scores.json").read_bytes()
    for path in set(one_go.rglob("*.*")) - set(one_go.glob("state/*")):      # which only matters for more iterations
        twin = out / path.relative_to(one_go)
        assert same_tensors(path, twin) if path.suffix == ".safetensors" else path.read_bytes() == twin.read_bytes(), path


def test_ctrl_c_saves_the_training_and_the_same_command_goes_on(whole, monkeypatch, tmp_path):
    import signal
    words, one_go = whole
    words = words[:words.index("--methods")] + ["--methods", "meta-lora", "--iters", "3", "--lr", "1e-2"]
    real, calls = compare.flow_matching_loss, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)
    monkeypatch.setattr(compare, "flow_matching_loss", counted)
    assert run(*words, "--out", tmp_path / "r") == 130
    steps = load_file(tmp_path / "r/state/meta-lora_r1.safetensors")["steps"]
    first = len(calls)
    assert 0 < steps.sum() < 6
    assert run(*words, "--out", tmp_path / "r") == 0
    for p in range(2):
        same = [folder / "loras/meta-lora_r1_i3" / f"p{p}.safetensors" for folder in (tmp_path / "r", one_go)]
        assert same_tensors(*same)
    assert 2 * 3 - steps.sum() >= len(calls) - first                      # steps that were saved are not taken again


def test_more_is_added_and_other_settings_are_refused(whole, monkeypatch, tmp_path, capsys):
    words, one_go = whole
    shutil.copytree(one_go, tmp_path / "r")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*.png") if path.parent.parent.parent.name == "images"}
    more = ["--methods", "meta-lora", "none", "--ranks", "1", "--seeds", "2", "--iters", "2", "4"]             # not 2 and 3
    assert run(*words, *more, "--out", tmp_path / "r") == 0
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())
    assert len(scores["pictures"]) == 3 * 2 * 2 * 2 and {m["iterations"] for m in scores["methods"]} == {0, 2, 4}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and len(before) == 36
    capsys.readouterr()
    for option, value, said in (("--steps", "3", "steps was 2 and is 3"), ("--seed", "1", "seed"), ("--resolution", "96", "resolution")):
        assert run(*words, option, value, "--out", tmp_path / "r") == 2
        assert said in capsys.readouterr().err
    settings = json.loads((tmp_path / "r/settings.json").read_text())
    (tmp_path / "r/settings.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "layout"}))
    assert run(*words, "--out", tmp_path / "r") == 2                      # of before the order of a row's numbers changed
    assert "other settings: layout was not written down" in capsys.readouterr().err
    (tmp_path / "r/settings.json").write_text(json.dumps(settings))
    shutil.copytree(BABY, tmp_path / "model")                             # another decoder: other pictures
    weights = load_file(BABY / "ae.safetensors")
    with safe_open(BABY / "ae.safetensors", "pt") as file:
        save_file(weights | {"decoder.conv_in.bias": weights["decoder.conv_in.bias"] + 1}, tmp_path / "model/ae.safetensors", file.metadata())
    assert run(*words, "--model", tmp_path / "model", "--out", tmp_path / "r") == 2
    assert "other settings: autoencoder was" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["meta-lora", pytest.param("lora", marks=pytest.mark.slow)])
def test_people_trained_together_equal_those_trained_one_by_one(people, method, monkeypatch):
    """The same LoRAs to fp32 rounding, with crops of several shapes and of different numbers; together in fewer passes."""
    # with AdamW's own epsilon, 1e-8, an entry whose gradient is rounding and nothing else takes a full step, either way
    monkeypatch.setattr(IdentityBank, "step", functools.partialmethod(IdentityBank.step, eps=1e-4))
    lomd = load_lomd(BABY / "lomd.safetensors")[0] if method == "meta-lora" else None
    autoencoder = load_autoencoder(BABY, dtype=torch.float32)
    references = [p.reference for p in ev.read_people([people])]
    encoded = [personalize.encode_crops(autoencoder, photos.load_crops([r], [128])[:9 + 2 * i]) for i, r in enumerate(references)]
    latents, weights = zip(*encoded)
    assert len({latent.shape for latent in latents[0]}) > 2 and len({len(own) for own in latents}) > 1
    captions = [[f"a photo of a man {b}" for b in faces.BACKGROUNDS.values()][:len(latents[0])]]            # each crop its own
    captions += [[f"a photo of a {word}"] * len(own) for word, own in zip(("man", "woman", "man"), latents[1:])]
    assert len(captions[0]) == len(latents[0])
    encoders = load_text_encoders(BABY, dtype=torch.float32)
    texts = [[encoders.encode([caption]) for caption in own] for own in captions]
    flux, iters, passes = load_flux(BABY, dtype=torch.float32), 6, []

    def trained(people, slots):
        adapter = MetaLoRA(flux, 2, lomd, num_identities=0, slots=slots)
        adapter.bank = IdentityBank(adapter.new_row(torch.Generator().manual_seed(0)).repeat(len(people), 1))
        assign = adapter.assign
        adapter.assign = lambda ids: (passes.append(len(ids)), assign(ids))
        crops = [(latents[p], weights[p], texts[p]) for p in people]
        assert sum(map(len, compare.train_together(adapter, crops, iters, 5e-3, seed=0))) == iters * len(people)
        assert adapter.bank.steps.tolist() == [iters] * len(people)
        updates = [torch.cat([(B @ A).flatten() for A, B in adapter.collapse(i).values()]) for i in range(len(people))]
        apply_loras(flux, [])
        return updates
    together = trained([0, 1, 2, 3], 3)
    assert max(passes) == 3 and len(passes) < 4 * iters * 0.75 and sum(passes) == 4 * iters
    for person, update in enumerate(together):
        alone, = trained([person], 1)
        assert ((update - alone).norm() / alone.norm()).item() < 1e-5


def test_a_caption_for_the_other_gender_ends_in_one_line(people, tmp_path, capsys):
    words = [*BASE, "--gender", "woman", "--prompt", "man: a photo", "--methods", "lora", "--iters", "1", "--out", tmp_path / "r"]
    shutil.copytree(people / "p0", tmp_path / "data" / "p0")
    for caption in (tmp_path / "data").rglob("*.txt"):
        caption.unlink()
    assert run(*words, "--data", tmp_path / "data") == 2
    assert "'man: a photo' is no caption for p0" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_each_problem_is_a_line_that_names_this_program(people, tmp_path, capsys):
    for name in ("p0", "p1"):
        (tmp_path / "data" / name).mkdir(parents=True)
        picture = next((people / name).glob("*.png"))
        shutil.copy(picture, tmp_path / "data" / name)
    assert run(*BASE, "--gender", "woman", "--data", tmp_path / "data", "--out", tmp_path / "r") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" has ")[0] for line in lines] == [f"paper.compare: {tmp_path}/data/{name}" for name in ("p0", "p1")]


def test_a_person_without_a_prompt_is_not_on_the_sheet(tmp_path):
    people = []
    for name, gender in (("anna", "woman"), ("bert", "man")):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
        people.append(Person(name, name, gender, tmp_path / f"{name}.png", ()))
    draw_sheet(tmp_path / "sheet.png", people, {"anna": {}, "bert": {0: "a man"}}, {"none": tmp_path})
    assert Image.open(tmp_path / "sheet.png").size == (130 + 8 * 144, 84 + 2 * 144)


def test_a_comparison_is_a_long_run_even_without_iters(monkeypatch):
    """Whether a large model is compiled follows from the number of steps that open_flux is told."""
    told = []
    for name in ("encode_prompts", "load_autoencoder"):
        monkeypatch.setattr(compare, name, lambda *words: None)
    monkeypatch.setattr(compare, "open_flux", lambda args, steps: told.append(steps))
    compare.Run(Namespace(prompts={}, captions={}, folder=BABY, device="cpu", text_device="cpu", dtype=None, iters=None, steps=10), None)
    assert told[0] >= LONG_RUN


@pytest.mark.parametrize("words, said", [
    (["--lr", "lora2=1"], "no method 'lora2'"), (["--lr", "x"], "argument --lr: invalid rate value: 'x'"), (["--lr", "-1"], "positive"), (["--size", "100"], "a multiple of 16"),
    (["--methods", "dreambooth"], "invalid choice"), (["--prompts", "nowhere"], "No such file"),
    (["--methods", "lora", "none", "--lomd", BABY / "lomd.safetensors"], "--lomd is for meta-lora and random-lomd")])
def test_bad_words_end_in_one_line(people, tmp_path, capsys, words, said):
    assert run("--data", people, "--model", "baby", "--out", tmp_path / "r", *words) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "\n" not in err and not (tmp_path / "r").exists()
