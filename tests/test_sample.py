"""sample.py on the small random snapshot: pictures, files, text fields, LoRAs, bad input, Ctrl-C."""
import itertools
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval_rfacesim
import meta_train
import personalize
import sample
from flux_model import Flux, FluxConfig, denoise, get_noise
from support import checkpoints
from support.checkpoints import (diffusers_flux_names, flux_files, load_autoencoder, load_flux, load_text_encoders,
                                 open_flux)
from support.lora_files import save_lora, split_lora
from support.text import check_prompts, commands, lost_words

ROOT = Path(__file__).resolve().parents[1]
HUBS = (ROOT / "tests" / "golden" / "hub", ROOT.parent / "shared" / "golden" / "hub")
HUB = next((folder for folder in HUBS if folder.is_dir()), None)
pytestmark = pytest.mark.skipif(HUB is None, reason="the small snapshot golden/hub is not here")

SMALL = ["--width", "48", "--height", "32", "--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_load():
    """Loading the text encoders takes most of a run: keep what they are loaded to."""
    encoders = load_text_encoders(HUB, "cpu", torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "load_text_encoders", lambda *args: encoders)
        yield encoders


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return sample.main([*SMALL, "--model", str(HUB), *map(str, words)])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def linears(flux):
    """(name, module, diffusers paths, rows of each) of every Linear."""
    for name, module in flux.named_modules():
        if isinstance(module, torch.nn.Linear):
            paths = [path.removesuffix(".weight") for path in diffusers_flux_names(f"{name}.weight")]
            width = module.in_features
            rows = [module.out_features] if len(paths) == 1 else [width] * 3 + [4 * width] * (len(paths) - 3)
            yield name, module, paths, rows


def make_lora(path, seed=0, only=None, config=None):
    """A random LoRA of rank 2 for all Linears; {path: (A, B)} as the fp16 file holds it."""
    with torch.device("meta"):
        flux = Flux(config or flux_files(HUB)[1])
    generator, lora = torch.Generator().manual_seed(seed), {}
    for _, module, paths, rows in linears(flux):
        for name, d_out in zip(paths, rows):
            lora[name] = tuple((torch.randn(shape, generator=generator) * 0.3).half().float()
                               for shape in ((2, module.in_features), (d_out, 2)))
    save_lora(path, {name: lora[name] for name in only or lora})
    return lora


def test_one_prompt_is_out_png_with_its_settings(capsys):
    assert run("a café\u2009→ 東京", "--seed", "7", "--guidance", "2.5") == 0
    assert files() == ["out.png"]
    image = Image.open("out.png")
    assert image.size == (48, 32) and image.mode == "RGB"
    assert image.text.pop("parameters").startswith("a café") and next(iter(Image.open("out.png").text)) == "parameters"
    assert image.text == {"prompt_text": "a café\u2009→ 東京", "seed": "7", "steps": "2", "guidance": "2.5", "true_cfg": "1.0",
                          "negative": "", "model": "hub", "loras": "", "width": "48", "height": "32"}
    output = capsys.readouterr()
    assert "saved out.png" in output.out
    line, = output.err.splitlines()                                     # the small T5 knows no accents either
    assert "T5 has no letters" in line and line.endswith("is 'café → 東京'")


@pytest.mark.parametrize("name, words, noted", [
    ("flux1-schnell", ["--guidance", 2], False), ("OpenFLUX", [], True), ("dev-de-distill", ["--true-cfg", 3], False)])
def test_a_model_without_guidance_that_is_not_schnell(tmp_path, capsys, name, words, noted):
    (tmp_path / "m").mkdir()
    for path in HUB.iterdir():
        (tmp_path / "m" / path.name).symlink_to(path)
    with safe_open(HUB / "flux1-dev.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"]) | {"guidance_embed": False}
    weights = {key: t for key, t in load_file(HUB / "flux1-dev.safetensors").items() if "guidance" not in key}
    path = tmp_path / "m" / f"{name}.safetensors"
    (tmp_path / "m" / "flux1-dev.safetensors").unlink()
    save_file(weights, path, {"config": json.dumps(config)})
    assert sample.main([*SMALL[:4], "--device", "cpu", "--model", str(path), "a cat", *map(str, words)]) == 0
    assert Image.open("out.png").text["steps"] == "4"
    notes = capsys.readouterr().err
    assert ("--steps 30 --true-cfg 3.5" in notes) == noted
    assert ("--guidance does nothing" in notes) == ("--guidance" in words)


def test_guidance_is_the_models(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in HUB.iterdir():
        (folder / path.name).symlink_to(path)
    for own, words, expected in (("{}", [], "3.5"), ('{"guidance": 0}', [], "0"), ('{"guidance": 2}', ["--guidance", "1.5"], "1.5")):
        (folder / "defaults.json").write_text(own)
        assert sample.main([*SMALL, "--model", str(folder), "a cat", *words]) == 0
        assert Image.open("out.png").text["guidance"] == expected


def test_picture_is_what_the_model_gives(one_load):
    """The file against the model's own functions, with a negative prompt: v_neg + scale (v - v_neg)."""
    assert run("a cat", "--seed", "5", "--negative", "a dog", "--true-cfg", "2.5") == 0
    flux = load_flux(HUB, "cpu", torch.float32)
    autoencoder = load_autoencoder(HUB, "cpu", torch.float32)
    (txt, y), (neg_txt, neg_y) = one_load.encode(["a cat"]), one_load.encode(["a dog"])
    latent = denoise(flux, get_noise(32, 48, 5), txt, y, 2, 3.5, neg_txt, neg_y, 2.5)
    with torch.no_grad():
        wanted = (autoencoder.decode(latent)[0].clamp(-1, 1) + 1) * 127.5
    assert np.abs(pixels("out.png") - wanted.permute(1, 2, 0).round().numpy()).max() <= 1
    assert Image.open("out.png").text["negative"] == "a dog"

    assert run("a cat", "--seed", "5", "--out", "plain.png") == 0
    assert run("a cat", "--seed", "5", "--true-cfg", "2.5", "--out", "empty.png") == 0       # empty negative prompt
    assert np.any(pixels("plain.png") != pixels("out.png"))
    assert np.any(pixels("empty.png") != pixels("out.png")) and np.any(pixels("empty.png") != pixels("plain.png"))


def test_prompts_by_seeds_and_their_grid():
    assert run("a cat", "a dog", "--seed", "3", "--num", "2") == 0
    names = [f"samples/{name}_{seed}.png" for name in (0, 1) for seed in (3, 4)]
    assert files() == sorted(names + ["samples/grid.png"])
    pictures = [pixels(name) for name in names]
    assert np.array_equal(pixels("samples/grid.png"), np.concatenate(
        [np.concatenate(pictures[:2], axis=1), np.concatenate(pictures[2:], axis=1)]))
    assert all(np.any(a != b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert Image.open("samples/grid.png").text["seed"] == "3 4"

    assert run("a dog", "--seed", "4", "--out", "alone.png") == 0              # alone or among others: the same
    assert np.array_equal(pixels("alone.png"), pictures[3])


def test_ways_to_name_prompts_and_seeds():
    Path("prompts.txt").write_text("\ufeff# two of them\n\n  a cat \r\na dog\na cat\n", encoding="utf-8")
    assert run("--seed", "2", "--num", "2", "a cow", "--prompts", "prompts.txt", "--out", "many") == 0
    assert files() == ["many/" + name for name in (
        "0_2.png", "0_3.png", "1_2.png", "1_3.png", "2_2.png", "2_3.png", "grid.png")] + ["prompts.txt"]
    assert [Image.open(f"many/{i}_2.png").text["prompt_text"] for i in range(3)] == ["a cow", "a cat", "a dog"]
    assert run("--seed", "1", "a cow", "--out", "many") == 0                   # a folder takes a single picture too
    assert Path("many/0_1.png").exists()


def test_file_names():
    def plan(prompts, out=None):
        return [str(path) for path in sample.plan_files(out and Path(out), prompts, range(1))]
    assert plan(2) == ["samples/0_0.png", "samples/1_0.png"] and plan(1) == ["out.png"]
    assert plan(1, "A.PNG") == ["A.PNG"] and plan(1, "v1.2") == ["v1.2/0_0.png"]
    assert plan(1, "new/deep/a.png") == ["new/deep/a.png"]


def test_existing_picture_is_replaced():
    Path("out.png").write_text("old")
    assert run("a cat") == 0
    assert pixels("out.png").shape == (32, 48, 3) and files() == ["out.png"]


def test_loras_and_strengths():
    make_lora("a:0.5.safetensors", 0)
    make_lora("b.safetensors", 1)
    for out, loras in {"none": [], "zero": ["a:0.5.safetensors:0"], "a": ["a:0.5.safetensors"], "b": ["b.safetensors:1"],
                       "minus": ["b.safetensors:-0.5"], "both": ["a:0.5.safetensors:0.5", "b.safetensors:-0.5"]}.items():
        assert run("a cat", "--out", f"{out}.png", *(word for lora in loras for word in ("--lora", lora))) == 0
    assert np.array_equal(pixels("none.png"), pixels("zero.png"))
    different = [pixels(f"{name}.png") for name in ("none", "a", "b", "minus", "both")]
    assert all(np.any(a != b) for i, a in enumerate(different) for b in different[:i])
    assert Image.open("both.png").text["loras"] == "a:0.5.safetensors:0.5, b.safetensors:-0.5"
    assert Image.open("a.png").text["loras"] == "a:0.5.safetensors:1"


def test_lora_as_another_program_writes_it(capsys):
    """Other endings, one key with a prefix of its own, embeddings beside: the same picture, and a note."""
    make_lora("a.safetensors")
    tensors = {key.removeprefix("transformer.").replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
               for key, tensor in load_file("a.safetensors").items()}
    key = next(iter(tensors))
    tensors[f"model.diffusion_model.{key}"] = tensors.pop(key)
    save_file(tensors | {"bundle_emb.me.t5": torch.ones(2, 4)}, "b.safetensors")
    for name in "ab":
        assert run("a cat", "--lora", f"{name}.safetensors", "--out", f"{name}.png") == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert "note: b.safetensors: 1 tensors of embeddings are not used: 'bundle_emb.me.t5'\n" in capsys.readouterr().err
    for key, kind in (("lora_unet_img_in.lokr_w1", "LoKr"), ("transformer.x_embedder.lora_magnitude_vector", "DoRA"),
                      ("transformer.transformer_blocks.0.ff.linear_in.lora_A.weight", "FLUX.2")):
        save_file({key: torch.ones(2, 2)}, "c.safetensors")
        assert run("a cat", "--lora", "c.safetensors") == 2
        error = capsys.readouterr().err
        assert "c.safetensors is a" in error and kind in error and error.count("\n") == 1, error


def test_lora_names_with_colons():
    for name in ("a", "a:0.5", "c:d"):
        Path(name).touch()
    assert [split_lora(text) for text in ("a", "a:2", "a:-.5", "a:0.5", "a:0.5:2", "c:d", "c:d:1e-1")] == [
        ("a", 1), ("a", 2), ("a", -0.5), ("a:0.5", 1), ("a:0.5", 2), ("c:d", 1), ("c:d", 0.1)]


def test_lora_is_its_update():
    """Against the same model with W + strength B A, added in fp64."""
    lora = make_lora("a.safetensors", 0)
    assert run("a cat", "--lora", "a.safetensors:0.7") == 0
    flux = load_flux(HUB, "cpu", torch.float32)
    for _, module, paths, _ in linears(flux):
        update = torch.cat([lora[path][1].double() @ lora[path][0].double() for path in paths])
        if paths == ["norm_out.linear"]:               # diffusers keeps scale before shift
            update = update.roll(len(update) // 2, 0)
        module.weight.data = (module.weight.double() + 0.7 * update).float()
    autoencoder = load_autoencoder(HUB, "cpu", torch.float32)
    embeddings = sample.encode_prompts(HUB, ["a cat"], "cpu", torch.float32)
    latent, = sample.sample_latents(flux, embeddings, [("a cat", 0)], 48, 32, 2, 3.5)
    difference = pixels("out.png") - np.asarray(sample.decode_latent(autoencoder, latent)).astype(int)
    assert np.abs(difference).max() <= 1


def test_a_batch_gives_what_each_picture_gives_alone():
    """In the order of the jobs, with a rest that fills no batch; the negative prompt goes along."""
    flux = load_flux(HUB, "cpu", torch.float32)
    jobs = [("a cat", 0), ("a dog", 0), ("a cat", 3)]
    embeddings = sample.encode_prompts(HUB, ["a cat", "a dog", ""], "cpu", torch.float32)
    rest = (flux, embeddings, jobs, 48, 32, 2, 3.5, "", 2.0)
    alone, together = list(sample.sample_latents(*rest)), list(sample.sample_latents(*rest, batch_size=2))
    assert len(together) == 3 and all(a.shape == b.shape == (1, 16, 4, 6) for a, b in zip(alone, together))
    assert all((a - b).norm() < 1e-5 * a.norm() for a, b in zip(alone, together))
    assert (alone[0] - alone[1]).norm() > 1e-4 * alone[0].norm()


BAD = {
    "no prompt": [],
    "empty prompt": ["a cat", " "],
    "prompt that is no text": ["a \udcff cat"],
    "no prompts file": ["--prompts", "absent.txt"],
    "empty prompts file": ["--prompts", "empty.txt"],
    "prompts file that is no text": ["--prompts", "binary.txt"],
    "unknown option": ["a", "--sed", "1"],
    "width": ["a", "--width", "1000"],
    "height": ["a", "--height", "8"],
    "no width": ["a", "--width", "0"],
    "negative height": ["a", "--height", "-16"],
    "no steps": ["a", "--steps", "0"],
    "half a step": ["a", "--steps", "1.5"],
    "guidance": ["a", "--guidance", "nan"],
    "true cfg": ["a", "--true-cfg", "much"],
    "seed": ["a", "--seed", "x"],
    "negative seed": ["a", "--seed", "-1"],
    "large seed": ["a", "--seed", str(2 ** 64)],
    "no seeds": ["a", "--num", "0"],
    "one file for two": ["a", "b", "--out", "x.png"],
    "not PNG": ["a", "--out", "x.jpg"],
    "folder is a file": ["a", "b", "--out", "empty.txt"],
    "parent is a file": ["a", "--out", "empty.txt/x.png"],
    "no LoRA": ["a", "--lora", "absent.safetensors"],
    "no LoRA, strength": ["a", "--lora", "absent.safetensors:0.5"],
    "LoRA is a folder": ["a", "--lora", "."],
    "no LoRA name": ["a", "--lora", ""],
    "LoRA among the prompts": ["a", "--lora", "good.safetensors", "good.safetensors:0.5"],
    "strength": ["a", "--lora", "good.safetensors:strong"],
    "no strength": ["a", "--lora", "good.safetensors:"],
    "infinite strength": ["a", "--lora", "good.safetensors:inf"],
    "LoRA that is none": ["a", "--lora", "binary.txt"],
    "cut LoRA": ["a", "--lora", "cut.safetensors"],
    "model": ["a", "--model", "absent"],
    "folder without a model": ["a", "--model", "."],
    "device": ["a", "--device", "abacus"],
}


@pytest.mark.parametrize("words", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(words, capsys):
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(bytes(range(128, 256)))
    make_lora("good.safetensors")
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:-9])
    before = files()
    assert run(*words) == 2
    output = capsys.readouterr()
    assert output.err.startswith("sample.py: ") and output.err.count("\n") == 1 and not output.out
    assert "Traceback" not in output.err and files() == before


def test_message_names_what_is_wrong(capsys):
    config = flux_files(HUB)[1]
    deep = FluxConfig(**{**vars(config), "depth_single_blocks": 9})
    wide = FluxConfig(**{**vars(config), "hidden_size": 128, "axes_dim": (4, 30, 30)})
    make_lora("deep.safetensors", config=deep, only=["single_transformer_blocks.8.proj_out"])
    make_lora("wide.safetensors", config=wide, only=["transformer_blocks.1.attn.to_add_out"])
    for words, parts in ((["--width", "1000"], ["--width", "1000", "992", "1008"]),
                         (["--lora", "x.safetensors:2"], ["x.safetensors"]),
                         (["--lora", "deep.safetensors"], ["deep.safetensors", "single_transformer_blocks.8.proj_out"]),
                         (["--lora", "wide.safetensors"], ["wide.safetensors", "transformer_blocks.1.attn.to_add_out"])):
        assert run("a cat", *words) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in parts) and error.count("\n") == 1, error


def test_command_line():
    """As a user runs it: a fresh interpreter, an error without a traceback, and --help."""
    bad = subprocess.run([sys.executable, ROOT / "sample.py", "--model", HUB, "--width", "40", "a cat"],
                         capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("sample.py: argument --width: 40") and bad.stderr.count("\n") == 1
    assert sample.parse(["a"]).words == ["a"]
    with pytest.raises(SystemExit) as exit:
        sample.main(["--help"])
    assert exit.value.code == 0


def test_notes(capsys):
    assert run("a cat", "--negative", "a dog") == 0
    assert "note: --negative" in capsys.readouterr().err


def stop_at_second(monkeypatch, stop):
    calls = []

    def stopped(*args):
        calls.append(1)
        return denoise(*args) if len(calls) == 1 else stop()
    monkeypatch.setattr(sample, "denoise", stopped)


def interrupt():
    raise KeyboardInterrupt


def test_a_lora_that_is_a_folder_or_a_pointer(capsys):
    Path("loras").mkdir()
    Path("loras/a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for name, words in (("loras", "name a file in it (a.safetensors"), ("loras/a.safetensors", "git lfs pull")):
        assert run("a cat", "--lora", name) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and name in err and words in err


def test_words_that_t5_cannot_hold_are_named_once_for_each_prompt(capsys, one_load):
    long = " ".join(f"w{i}" for i in range(300))
    assert run(long, "a cat", "--num", "2", "--out", "some") == 0
    line, = (line for line in capsys.readouterr().err.splitlines() if "T5 sees" in line)
    seen, lost = one_load.t5_tokenizer, line.split(" is ")[-1].strip("'").split()
    kept = long[:long.index(lost[0])].strip()
    assert long == f"{kept} {' '.join(lost)}" and "T5 sees 512 tokens" in line
    assert len(seen(kept).input_ids) <= 512 < len(seen(f"{kept} {lost[0]}").input_ids)
    assert all(torch.equal(a, b) for a, b in zip(one_load.encode([kept + " " + lost[0]])[0], one_load.encode([long])[0]))
    fits = load_text_encoders(HUB, "cpu", torch.float32)
    fits.max_length = 256
    capsys.readouterr()
    check_prompts(fits, [kept, kept, "a cat"])                                           # schnell's
    assert capsys.readouterr().err.count("T5 sees 256 tokens") == 1


def test_the_words_that_are_lost_are_those_whose_tokens_are_cut_off(one_load):
    """At any length, also where half a word has more tokens than the whole."""
    tokenizer = one_load.t5_tokenizer
    words = "beach woman a photo of a man on a beach with a woman in oil".split()
    tokens = [tokenizer(" ".join(words[:n])).input_ids[:-1] for n in range(len(words) + 1)]
    for length in range(len(tokens[1]) + 1, len(tokens[-1]) + 1):
        kept = max(n for n, whole in enumerate(tokens) if len(whole) < length)      # the end token takes a place
        found = lost_words("\n".join(words), SimpleNamespace(t5_tokenizer=tokenizer, max_length=length))
        assert found == " ".join(words[kept:])


def notes(err):
    return [line for line in err.splitlines() if line.startswith("note: ")]


def test_words_that_t5_does_not_know_are_named(capsys, one_load):
    assert run("a cat", "a cat, море", "海", "a cat, 山 and 川", "--out", "some", "--steps", "1") == 0
    line, = (line for line in notes(capsys.readouterr().err) if "unknown" in line)
    assert "'a cat, море'" in line and "is 'море'" in line and "first of 3" in line
    same, other = one_load.encode(["море", "海"])[0]
    assert torch.equal(same, other)                                     # hence the note


@pytest.mark.parametrize("text, words", [
    ("a photo of [subject] on a beach", "[subject]"), ("<lyco:style:1> a cat", "<lyco:style:1>"), ("a (red:1.3) cat", "(red:1.3)"),
    ("a cat BREAK a beach", "BREAK"), ("a cat --w 768 --h 512 --d 3", "--w 768 --h 512 --d 3"), ("a {cat|dog}", "{cat|dog}"),
    ("a __colour__ cat", "__colour__"), ("embedding:style, a cat", "embedding:style,"), ("a ((big)) cat", "((big))"),
    ("a cat (and a dog), 3:4 -- breaking", ""), ("well-made, a man's cat; 50 mm <3", "")])
def test_commands_of_other_programs(text, words):
    assert commands(text, None) == words


def test_commands_of_other_programs_in_a_file_of_prompts_are_named_once(tmp_path, capsys):
    Path("prompts.txt").write_text("a cat --n low quality --w 512\na cat\na (photo:1.1) --g 3.5\n")
    assert run("--prompts", "prompts.txt", "--out", "some") == 0
    line, = (line for line in notes(capsys.readouterr().err) if "commands" in line)
    assert "--w 512" in line and "first of 2" in line


def test_ctrl_c_saves_what_is_finished(monkeypatch, capsys):
    stop_at_second(monkeypatch, interrupt)
    assert run("a cat", "--num", "3") == 130
    assert files() == ["samples/0_0.png"] and pixels("samples/0_0.png").shape == (32, 48, 3)
    assert "1 of 3" in capsys.readouterr().err


def test_second_ctrl_c_ends_at_once(monkeypatch):
    stop_at_second(monkeypatch, interrupt)

    def save(image, path, **kwargs):
        path.write_bytes(b"half a picture")
        interrupt()
    monkeypatch.setattr(Image.Image, "save", save)
    assert run("a cat", "--num", "3") == 130
    assert files() == []


@pytest.mark.parametrize("stopped", (False, True))
@pytest.mark.parametrize("few", (8, 1))
def test_models_come_and_go_in_turn(monkeypatch, stopped, few):
    """Nothing of one model is left when the next one is loaded, even after Ctrl-C; every `few` pictures are saved."""
    make_lora("a.safetensors")
    assert run("a cat", "--num", "2", "--lora", "a.safetensors", "--out", "whole") == 0
    loaded = []
    monkeypatch.setattr(sample, "FEW", few)

    def watch(load):
        def watched(*args, **options):
            assert not any(ref() is not None for ref in loaded), load.__name__
            model = load(*args, **options)
            for module in (model.t5, model.clip) if hasattr(model, "t5") else (model,):
                loaded.extend(weakref.ref(x) for x in (*module.modules(), *module.parameters()))
            return model
        return watched
    for load in (load_text_encoders, open_flux, load_autoencoder):
        monkeypatch.setattr(checkpoints if load is load_text_encoders else sample, load.__name__, watch(load))
    monkeypatch.setattr(sample, "memory_left", lambda device: 0)
    if stopped:
        stop_at_second(monkeypatch, interrupt)
    assert run("a cat", "--num", "2", "--lora", "a.safetensors") == (130 if stopped else 0)
    made = sorted(path.name for path in Path("samples").iterdir())
    assert made == (["0_0.png"] if stopped else ["0_0.png", "0_1.png", "grid.png"])
    assert all((Path("samples") / name).read_bytes() == (Path("whole") / name).read_bytes() for name in made)


def test_pictures_that_wait_for_the_autoencoder_are_saved_a_few_at_a_time(monkeypatch):
    """With three rows of two prompts, five pictures are sampled when the run is killed: the first four are there."""
    make_lora("a.safetensors"), make_lora("b.safetensors", seed=1)
    words = "--compare", "a.safetensors", "b.safetensors"
    assert compare(*words, "--out", "whole") == 0
    monkeypatch.setattr(sample, "FEW", 2)
    monkeypatch.setattr(sample, "memory_left", lambda device: 0)
    calls = itertools.count(1)

    class Killed(BaseException):
        pass

    def killed(*args):
        if next(calls) == 6:
            raise Killed
        return denoise(*args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sample, "denoise", killed)
        compare(*words, "--out", "some")
    found = sorted(Path("some").rglob("[01]_0.png"))
    assert [str(path) for path in found] == [f"some/{row}/person/{i}_0.png" for row in ("a", "no LoRA") for i in (0, 1)]
    assert compare(*words, "--out", "some") == 0
    for path in sorted(Path("whole").rglob("*.png")):
        assert path.read_bytes() == Path("some", *path.parts[1:]).read_bytes()


def full_at_the_first_decoding(monkeypatch):
    """No memory is left when the first picture is decoded -> a list that grows with each decoding."""
    decode, calls = sample.decode_latent, []

    def full_at_first(autoencoder, latent):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(autoencoder, latent)
    monkeypatch.setattr(sample, "decode_latent", full_at_first)
    return calls


def test_a_waiting_picture_that_cannot_be_decoded_is_not_counted_as_saved(monkeypatch, capsys):
    """The others are saved."""
    monkeypatch.setattr(sample, "memory_left", lambda device: 0)
    full_at_the_first_decoding(monkeypatch)
    assert run("a cat", "--num", "2") == 1
    assert "stopped: 1 of 2 pictures are saved" in capsys.readouterr().err and [*Path("samples").iterdir()] == [Path("samples/0_1.png")]


@pytest.mark.parametrize("memory", [0, 1e12])
def test_a_picture_that_is_not_finite_after_decoding_is_no_bad_input(monkeypatch, capsys, memory):
    """The pictures before it, and those that wait for the autoencoder, are saved."""
    monkeypatch.setattr(sample, "memory_left", lambda device: memory)
    decode, calls = sample.decode_latent, itertools.count()
    monkeypatch.setattr(sample, "decode_latent", lambda autoencoder, latent: decode(
        autoencoder, latent * (torch.nan if next(calls) == 1 else 1)))
    assert run("a cat", "--num", "3") == 1
    error = capsys.readouterr().err
    saved = [0, 2] if memory == 0 else [0]
    assert files() == [f"samples/0_{seed}.png" for seed in saved]
    assert f"stopped: {len(saved)} of 3 pictures are saved" in error and "not finite" in error and "Traceback" not in error


def test_a_picture_that_cannot_be_decoded_beside_the_transformer_waits(monkeypatch):
    """It comes after the others, and is the same."""
    assert run("a cat", "--num", "2", "--out", "whole") == 0
    calls = full_at_the_first_decoding(monkeypatch)
    assert run("a cat", "--num", "2", "--out", "some") == 0 and len(calls) == 3
    for name in ("0_0.png", "0_1.png"):
        assert Path("some", name).read_bytes() == Path("whole", name).read_bytes()


def test_ctrl_c_at_the_first_picture_leaves_nothing(monkeypatch):
    monkeypatch.setattr(sample, "denoise", lambda *args: interrupt())
    assert run("a cat", "--num", "3") == 130
    assert files() == []


def test_not_finite_is_named(monkeypatch, capsys):
    stop_at_second(monkeypatch, lambda: torch.full((1, 16, 4, 6), torch.nan))
    assert run("a cat", "--num", "3", "--seed", "4") == 1
    assert files() == ["samples/0_4.png"]
    error = capsys.readouterr().err
    assert "sample.py: seed 5 of 'a cat'" in error and "Traceback" not in error


# LoRAs side by side


def compare(*words):
    return run("a cat", "a dog in the snow", *words)


def test_compared_loras_have_a_row_each(tmp_path, capsys):
    """Rows, files and pictures: those of the model alone, and of each LoRA as it draws by itself."""
    Path("a").mkdir(), Path("b").mkdir()
    make_lora("a/out.safetensors"), make_lora("b/out.safetensors", seed=1)
    assert compare("--num", 2, "--compare", "a/out.safetensors", "b/out.safetensors", "b/out.safetensors:0.5") == 0
    assert "saved compare/compare.png" in capsys.readouterr().out
    drawn = [f"{i}_{seed}.png" for i in range(2) for seed in range(2)]
    rows = {"no LoRA": [], "a_out": ["--lora", "a/out.safetensors"], "b_out": ["--lora", "b/out.safetensors"],
            "b_out@0.5": ["--lora", "b/out.safetensors:0.5"]}
    assert files() == sorted(["a/out.safetensors", "b/out.safetensors", "compare/compare.png", "compare/prompts.txt",
                              *(f"compare/{row}/person/{name}" for row in rows for name in drawn)])
    for row, words in rows.items():
        assert compare("--num", 2, "--out", tmp_path / row, *words) == 0
        for name in drawn:
            assert np.array_equal(pixels(f"compare/{row}/person/{name}"), pixels(tmp_path / row / name)), (row, name)
    with Image.open("compare/b_out@0.5/person/1_0.png") as picture:
        assert picture.text["loras"] == "out.safetensors:0.5"
    assert Path("compare/prompts.txt").read_text().splitlines() == ["a cat", "a dog in the snow"]
    with Image.open("compare/compare.png") as sheet:
        assert sheet.size == (130 + 4 * 48, 84 + 4 * 48)
        cell = np.asarray(sheet.convert("RGB"))[84 + 48 + 8:84 + 48 + 40, 130 + 48:130 + 96].astype(int)
    assert np.array_equal(cell, pixels("compare/a_out/person/0_1.png"))


def test_a_comparison_is_added_to_what_lora_names_and_made_again():
    make_lora("style.safetensors"), make_lora("who.safetensors", seed=1)
    words = "--lora", "style.safetensors", "--compare", "who.safetensors", "--person", "anna", "--out", "sheet"
    assert compare(*words) == 0
    first = {path: path.read_bytes() for path in Path("sheet").rglob("*.png")}
    assert compare("--lora", "style.safetensors", "--out", "style") == 0
    assert compare("--lora", "style.safetensors", "--lora", "who.safetensors", "--out", "both") == 0
    for row, alone in (("none of these", "style"), ("who", "both")):
        assert np.array_equal(pixels(f"sheet/{row}/anna/1_0.png"), pixels(f"{alone}/1_0.png"))
    assert compare(*words) == 0 and {path: path.read_bytes() for path in Path("sheet").rglob("*.png")} == first


@pytest.mark.parametrize("prompts, words, said", [
    ([], ["--compare", "a cat"], "no such file for --compare"), ([], ["--person", "../x"], "--person ../x"),
    ([], ["--person", ""], "--person : it must be"), ([], ["--person", ".."], "--person ..: it must be"),
    ([], ["--out", "x.png"], "writes a folder"), ([], ["--compare", "who.safetensors", "./who.safetensors"], "twice"),
    (["#1 cat"], [], "without # in front"), (["a [man/woman]"], [], "without [man/woman]"),
    ([], ["--seed", "1"], "another comparison, such as compare/no LoRA/person/0_0.png"),
    (["more"], [], "another comparison, such as compare/prompts.txt")])
def test_what_cannot_be_compared_is_said_in_one_line(prompts, words, said, capsys):
    make_lora("who.safetensors")
    Path("compare/no LoRA/person").mkdir(parents=True)
    Image.new("RGB", (48, 32)).save("compare/no LoRA/person/0_0.png")
    Path("compare/prompts.txt").write_text("a cat\na dog in the snow\n")
    assert compare(*prompts, *([] if "--compare" in words else ["--compare", "who.safetensors"]), *words) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "\n" not in err


def test_a_list_given_twice_is_one_list():
    assert sample.parse(["a", "--compare", "a", "b", "--compare", "c"]).compare == ["a", "b", "c"]
    assert personalize.parse(["a.png", "--save-at", "1", "--save-at", "2"]).save_at == [1, 2]
    assert personalize.parse(["a.png", "--resolution", "64", "--resolution", "128"]).resolution == [64, 128]
    assert meta_train.parse(["--data", "d", "--resolution", "64", "--resolution", "128"]).resolution == [64, 128]
    assert eval_rfacesim.parse(["--images", "i", "--data", "a", "--data", "b"]).data == [Path("a"), Path("b")]


def test_a_blank_behind_a_prompt_does_not_keep_it_from_a_comparison():
    make_lora("who.safetensors")
    assert run("a cat ", "--compare", "who.safetensors") == 0 and Path("compare/prompts.txt").read_text() == "a cat\n"


def test_a_person_without_a_comparison_is_refused():
    with pytest.raises(ValueError, match="--person anna does nothing without --compare"):
        sample.parse(["a cat", "--person", "anna"])


def test_a_stopped_comparison_keeps_what_is_finished(monkeypatch, capsys):
    make_lora("who.safetensors")
    stop_at_second(monkeypatch, interrupt)
    assert compare("--compare", "who.safetensors") == 130
    assert files() == ["compare/no LoRA/person/0_0.png", "compare/prompts.txt", "who.safetensors"]
    assert "1 of 4" in capsys.readouterr().err
