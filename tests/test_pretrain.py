"""baby/pretrain.py: all of its stages at a tiny size, and a run that is stopped and resumed."""
import dataclasses
import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "baby"))
import faces  # noqa: E402
import pretrain  # noqa: E402
from flux_model import AutoEncoderConfig, Flux, FluxConfig  # noqa: E402
from support.checkpoints import find_model, load_autoencoder, load_flux, load_text_encoders  # noqa: E402
from support.lora_files import read_lomd  # noqa: E402

SHAPES = dict(pretrain.SHAPES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Data, autoencoder, latents and text of a world small enough for seconds -> (run, out)."""
    patch = pytest.MonkeyPatch()
    patch.setattr(pretrain, "SHAPES", {(128, 128): 24, (144, 112): 8})
    patch.setattr(pretrain, "BATCH", 4)
    patch.setattr(pretrain, "AE_STEPS", 3)
    patch.setattr(pretrain, "AE_BATCH", 4)
    patch.setattr(pretrain, "AE_CONFIG", AutoEncoderConfig(128, ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=2))
    patch.setattr(pretrain, "FLUX_CONFIG", FluxConfig(vec_in_dim=64, context_in_dim=64, hidden_size=32, num_heads=2, depth=1,
                                                      depth_single_blocks=1, axes_dim=(4, 6, 6)))
    patch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: None)        # costs more than it gives here
    folder = tmp_path_factory.mktemp("pretrain")
    run, out = folder / "run", folder / "out"
    pretrain.make_data(run)
    pretrain.train_autoencoder(run, out)
    pretrain.encode_latents(run, out)
    pretrain.make_text(run, out)
    yield run, out
    patch.undo()


def test_the_checkpoint_is_a_whole_model(tiny):
    run, out = tiny
    pretrain.train_transformer(run, out, 3)
    assert find_model(str(out)) == out
    assert load_flux(out).config.hidden_size == 32
    txt, y = load_text_encoders(out).encode(["a photo of a man", ""])
    assert txt.shape == (2, pretrain.T5_TOKENS, 64) and y.shape == (2, 64)
    latents = load_file(run / "latents" / "128x128.safetensors")["latents"]
    assert latents.shape == (24, 16, 16, 16)
    assert latents.float().std(dim=(0, 2, 3)).sub(1).abs().max() < 0.5               # each channel about unit variance


def test_normalising_latents_changes_no_picture(tiny):
    run, out = tiny
    images = pretrain.pictures(np.load(run / "data" / "128x128.npy")[:2])
    torch.manual_seed(0)
    model = pretrain.AutoEncoder(AutoEncoderConfig(128, ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=2))
    with torch.no_grad():
        before = model.decode(model.encode(images))
        pretrain.normalise_latents(model, images)
        after = model.decode(model.encode(images))
    assert (before - after).abs().max() < 1e-4
    assert torch.allclose(model.encode(images).std(dim=(0, 2, 3)), torch.ones(16), atol=1e-3)


@pytest.mark.slow
def test_the_decoder_learns_alone_and_latents_stay(tiny, monkeypatch, tmp_path):
    run, out = tiny
    monkeypatch.setattr(pretrain, "DECODER_STEPS", 24)
    monkeypatch.setattr(pretrain, "DECODER_LR", 1e-2)
    (tmp_path / "data").symlink_to(run / "data")
    (tmp_path / "ae.safetensors").write_bytes((out / "ae.safetensors").read_bytes())
    images = pretrain.pictures(np.load(run / "data" / "128x128.npy")[:8])
    before = load_autoencoder(out, dtype=torch.float32)
    pretrain.train_decoder(tmp_path, tmp_path)
    after = load_autoencoder(tmp_path, dtype=torch.float32)
    assert torch.equal(before.encode(images), after.encode(images))
    errors = [(model.decode(model.encode(images)) - images).square().mean() for model in (before, after)]
    assert errors[1] < 0.8 * errors[0]

    def above(width, height, first, count):                                # as if faces were what is above the middle
        weights = torch.zeros(count, 1, height // 8, width // 8)
        weights[:, :, :height // 16] = 2
        return weights
    (tmp_path / "ae.safetensors").write_bytes((out / "ae.safetensors").read_bytes())
    monkeypatch.setattr(pretrain, "face_weights", above)
    pretrain.train_decoder(tmp_path, tmp_path)
    other = load_autoencoder(tmp_path, dtype=torch.float32)
    halves = [(model.decode(model.encode(images)) - images).square().mean(dim=(0, 1, 3)).view(2, -1).mean(1) for model in (after, other)]
    assert halves[1][0] / halves[1][1] < 0.9 * halves[0][0] / halves[0][1]


def test_a_stopped_run_goes_on_bit_for_bit(tiny, monkeypatch, tmp_path):
    run, out = tiny
    states = []
    for stops in ((), (2, 3)):
        again = tmp_path / f"run{len(stops)}"
        again.mkdir()
        for part in ("data", "latents"):
            (again / part).symlink_to(run / part)
        for stop in stops:
            def batch(step, *rest, draw=pretrain.batch_of, stop=stop):
                if step == stop:
                    pretrain.signal.raise_signal(pretrain.signal.SIGINT)             # Ctrl-C in the middle of this step
                return draw(step, *rest)
            with monkeypatch.context() as patch:
                patch.setattr(pretrain, "batch_of", batch)
                with pytest.raises(KeyboardInterrupt):
                    pretrain.train_transformer(again, out, 6)
        pretrain.train_transformer(again, out, 6)
        states.append(load_file(again / "transformer-32.safetensors"))
    assert states[0].keys() == states[1].keys() and any(key.startswith("optimizer.0") for key in states[0])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_run_may_start_from_a_checkpoint(tiny):
    run, out = tiny
    if not (out / "flux1-dev.safetensors").exists():
        pretrain.train_transformer(run, out, 3)
    baby = pretrain.Baby(out)
    for p in baby.parameters():
        torch.nn.init.ones_(p)
    pretrain.load_checkpoint(baby, out)
    flux, encoders = load_flux(out, dtype=torch.float32), load_text_encoders(out, dtype=torch.float32)
    for found, expected in ((baby.flux, flux), (baby.t5, encoders.t5), (baby.clip, encoders.clip)):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters()))


@pytest.mark.parametrize("wide", [64, 48])
def test_a_narrower_transformer_grows(wide):
    """Twice as wide it computes the same, though no weight that is read twice is simply halved, and training parts the
    copies; half as wide again, LayerNorm counts some channels twice and moves it a little."""
    torch.manual_seed(0)
    narrow = FluxConfig(vec_in_dim=64, context_in_dim=64, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6))
    small, large = pretrain.Flux(narrow), pretrain.Flux(dataclasses.replace(narrow, hidden_size=wide, num_heads=wide // 16))
    for p in small.parameters():
        torch.nn.init.normal_(p, std=0.2)
    pretrain.grow(small, large)
    x, t, txt, y = torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 5, 64), torch.randn(2, 64)
    outputs = [pretrain.velocity(flux, x, t, txt, y, 1.0) for flux in (small, large)]
    error = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
    assert error < 1e-5 if wide == 64 else 0.001 < error < 0.5
    outputs[1].square().mean().backward()
    weight, gradient = large.single_blocks[0].linear1.weight, large.single_blocks[0].linear1.weight.grad
    assert (weight[0, :wide - 32] - weight[0, 32:]).abs().max() > 0.01
    assert (gradient[:wide - 32] - gradient[32:wide]).abs().max() > 1e-6                      # rows that are still equal part


def test_guidance_moves_the_target_and_not_the_input(tiny, monkeypatch):
    """x_t of the guided loss is that of the plain one, and the target moves by (g - 1) (v - v of the weak model)."""
    run, out = tiny
    baby, average, weak = (pretrain.Baby(out) for _ in range(3))
    for model in (average, weak):
        for p in model.flux.parameters():                                  # the zeros of adaLN-zero would hide everything
            torch.nn.init.normal_(p, std=0.1)
    captions = {shape: (run / "data" / f"{shape[0]}x{shape[1]}.txt").read_text().splitlines() for shape in pretrain.SHAPES}
    latents = {shape: load_file(run / "latents" / f"{shape[0]}x{shape[1]}.safetensors")["latents"] for shape in pretrain.SHAPES}
    chances = {shape: np.full(len(texts), 1 / len(texts)) for shape, texts in captions.items()}
    face = {shape: torch.ones(len(texts), 1, shape[1] // 8, shape[0] // 8) for shape, texts in captions.items()}
    x0, noise, t, text, guidance, weight = pretrain.batch_of(0, latents, face, captions, chances)
    at, seen = t[:, None, None, None], {}
    monkeypatch.setattr(pretrain, "flow_matching_loss", lambda flux, x0, noise, t, txt, y, g, w: (
        seen.update(x_t=(1 - at) * x0 + at * noise, target=noise - x0, flux=flux), torch.zeros(1))[1])
    pretrain.loss_of(baby, (x0.clone(), noise.clone(), t, text, guidance, weight), pretrain.away_from(weak, average))
    x_t = (1 - at) * x0 + at * noise
    assert torch.allclose(seen["x_t"], x_t, atol=1e-5) and seen["flux"] is baby.flux
    with torch.no_grad():
        good, bad = (pretrain.velocity(m.flux, x_t, t, *m.embed(text), torch.ones(len(t))) for m in (average, weak))
    wanted = noise - x0 + (guidance[:, None, None, None] - 1) * (good - bad)
    assert torch.allclose(seen["target"], wanted, atol=1e-4) and (guidance > 1).any() and (guidance == 1).any()
    pretrain.loss_of(baby, (x0.clone(), noise.clone(), t, text, guidance, weight))                                 # not guided
    assert torch.equal(seen["target"], noise - x0)
    monkeypatch.undo()                                          # weights elsewhere: the batch follows them, guided or not
    elsewhere = [model.to("meta") for model in (baby, average, weak)]
    for models in (elsewhere, elsewhere[:1]):
        move = pretrain.away_from(*models[1:]) if models[1:] else None
        pretrain.loss_of(models[0], (x0, noise, t, text, guidance, weight), move).backward()
    assert all(p.grad.device.type == "meta" for p in baby.flux.double_blocks.parameters())


def test_the_weighted_part_of_a_picture_is_its_face():
    """Recomputed from the seeds, without drawing again: skin is where the weight is, and the mean weight is 1."""
    for index in range(8):
        image, _ = pretrain.draw((index, 128, 128))
        who, scene = pretrain.person_and_scene(index)
        assert np.array_equal(faces.render(who, scene, 128, 128), image)
        weight = pretrain.face_weights(128, 128, index, 1)[0, 0].float()
        assert weight.mean().item() == pytest.approx(1, abs=1e-3) and weight.max() / weight.min() == pytest.approx(pretrain.FACE, rel=1e-3)
        centre = faces.Pose(who, scene, 128, 128).centre
        assert weight[int(centre[1] // 8), int(centre[0] // 8)] == weight.max() and weight[0, 0] == weight.min()


def test_framings_are_the_papers_crops_of_one_scene():
    """Every fourth scene is a whole picture as `draw` has it; the others are crops, each in its shape's size, with the
    caption of the scene, and the head in them has at least two sizes."""
    whole, *others = (pretrain.framed(index) for index in range(8) if index != 4)
    (shape, image, text), = whole
    assert image.shape[:2] == shape[::-1] and np.array_equal(image, pretrain.draw((0, *shape))[0])
    for crops in others:
        assert len(crops) == pretrain.CROPS and len({pretrain.short(text) for *_, text in crops}) == 1
        assert all(shape in SHAPES and image.shape == (shape[1], shape[0], 3) for shape, image, _ in crops)
        assert len({image.tobytes() for _, image, _ in crops}) == pretrain.CROPS
    assert len({shape for crops in others for shape, *_ in crops}) > 2
    named = [text == pretrain.short(text) for crops in others for *_, text in crops]
    assert 0.2 < np.mean(named) < 0.9                                          # wide crops name clothes and background, close ones do not


def test_framings_go_on_from_a_checkpoint(tiny, monkeypatch, tmp_path):
    run, out = tiny
    if not (out / "flux1-dev.safetensors").exists():
        pretrain.train_transformer(run, out, 3)
    monkeypatch.setattr(pretrain, "SHAPES", SHAPES)
    monkeypatch.setattr(pretrain, "SCENES", 16)
    pretrain.make_framings(tmp_path / "run")
    pretrain.encode_latents(tmp_path / "run", out)
    found = {path.stem: len(np.load(path)) for path in (tmp_path / "run/data").glob("*.npy")}
    assert sum(found.values()) == 4 + 12 * pretrain.CROPS and len(found) == 5
    monkeypatch.setattr(pretrain, "batch_of", lambda *rest, draw=pretrain.batch_of: (seen := draw(*rest), guided.append(seen[4]))[0])
    guided, final = [], tmp_path / "out"
    pretrain.shutil.copytree(out, final)
    pretrain.train_transformer(tmp_path / "run", final, 2, init=out, plan=pretrain.FRAMINGS)
    assert [(guidance > 1).sum() for guidance in guided] == [1, 1]                                 # one of four
    before, after = (load_flux(folder, dtype=torch.float32) for folder in (out, final))
    moved = max((a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters()))
    assert 0 < moved < 0.01                                                    # it goes on from there, at a low rate


def test_a_teacher_keeps_its_guidance(tiny):
    teacher = pretrain.Baby(tiny[1])
    for p in teacher.flux.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, guidance = torch.randn(2, 16, 16, 16), torch.tensor([0.3, 0.8]), torch.tensor([1.0, 4.0])
    with torch.no_grad():
        moved = pretrain.as_taught_by(teacher)(x, t, ["", "a photo of a man"], guidance)
        by_hand = [pretrain.velocity(teacher.flux, x[1:], t[1:], *teacher.embed(["a photo of a man"]), g) for g in (4.0, 1.0)]
    assert moved[0].abs().max() < 1e-5 and torch.allclose(moved[1:], by_hand[0] - by_hand[1], atol=1e-5) and moved[1].abs().max() > 1e-3


def test_pictures_that_are_no_photos_are_told_by_their_captions():
    for style in faces.STYLES:
        for seed in range(40):
            rng = np.random.default_rng(seed)
            who = faces.identity(seed)
            assert pretrain.is_photo(faces.caption(who, faces.scene(rng, style=style), rng)) == (style == "photo")


def test_captions_are_varied_within_the_vocabulary():
    rng, words = np.random.default_rng(0), set(faces.VOCABULARY) | {"person", ""}
    caption = "a pop art picture of a woman in a red shirt, on a beach"
    varied = {pretrain.vary(caption, rng) for _ in range(400)}
    assert "" in varied and "A pop art picture of a woman" in varied and any("person" in text for text in varied)
    assert {word.lower().strip(",") for text in varied for word in text.split(" ")} <= words


def test_every_caption_fits_the_tokenizers(tiny):
    run, out = tiny
    encoders = load_text_encoders(out)
    captions = [faces.sample(i, 0, 32, 32, style=style)[1] for i in range(20) for style in faces.STYLES]
    clip, t5 = encoders.tokenize(captions)
    assert (t5[:, -1] == 0).all() and (clip[:, -1] == clip[0, -1]).all()             # padded: nothing was cut
    assert (t5 != 2).all()                                                            # no unknown piece


@pytest.mark.slow
def test_the_recipe_from_nothing(tiny, monkeypatch, tmp_path, capfd):
    """Every stage by its own command, sizes apart as it stands; what comes out is a model with judges and a learned LoMD, and
    the second time nothing is trained again."""
    import check
    import metrics
    import meta_train
    small = {"AE_STEPS": 3, "DECODER_STEPS": 2, "DECODER_BATCH": 2, "STEPS": 3}
    sizes = dict(PEOPLE=6, HELD_OUT=2, EMBEDDER_STEPS=2, EMBEDDER_BATCH=4, SCORER_STEPS=2, SCORER_BATCH=4)
    for module, own in ((pretrain, small), (metrics, sizes)):
        for name, value in own.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(check, "verification", lambda judges: (1.0, 0))                            # 400 pictures
    mains = {"pretrain": pretrain.main, "metrics": metrics.main, "faces": faces.main, "check": check.main, "meta_train": meta_train.main}
    few, done = {"128": "16", "200": "4", "5000": "2", "6": "1"}, []

    def run(words, interruption):
        name, words = Path(words[1]).stem, [few.get(word, word) for word in words[2:]]
        done.append(name)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *words, *(["--steps", "1"] if name == "check" else [])])
            return (mains[name](None) if name == "meta_train" else mains[name]()) or 0
    monkeypatch.setattr(pretrain, "run_stage", run)
    for _ in range(2):
        pretrain.follow_recipe(tmp_path / "run", tmp_path / "out", [])
    out = tmp_path / "out"
    assert done == ["pretrain", "pretrain", "metrics", "faces", "meta_train", "check"] * 2
    assert load_flux(tmp_path / "run/narrow").config.hidden_size == 16 and load_flux(out).config.hidden_size == 32
    assert (out / "prompts.txt").read_text() and read_lomd(out, None)[1].startswith("sha256 ")                       # learned


@pytest.mark.parametrize("words, said", [
    (["--recipe"], "shipped checkpoint"), (["--recipe", "--out", "new", "--steps", "9"], "its own --steps: leave it out"), (["--framings"], "name it with --init"),
    (["--framings", "--init", str(Path(pretrain.__file__).parent / "checkpoint")], "would be written over --init"),
    ([], "shipped checkpoint"), (["--framings", "--init", "baby/run/narrow"], "shipped checkpoint")])
def test_no_checkpoint_is_written_over(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    monkeypatch.chdir(Path(pretrain.__file__).parents[1])                                          # where --out is baby/checkpoint
    with pytest.raises(SystemExit) as refused:
        pretrain.main()
    assert refused.value.code == 2 and said in capsys.readouterr().err


def test_a_recipe_ends_with_the_stage_that_fails(monkeypatch, tmp_path, capsys):
    done = []
    monkeypatch.setattr(pretrain, "run_stage", lambda words, interruption: done.append(words) or len(done) // 2)
    with pytest.raises(SystemExit) as ended:
        pretrain.follow_recipe(tmp_path / "a run", tmp_path / "out", ["--device", "cpu"])
    assert ended.value.code == 1 and len(done) == 2 and done[0][-2:] == ["--device", "cpu"] and str(tmp_path / "a run") in done[0]
    shown = capsys.readouterr().out
    assert all(what in shown and length in shown for what, length, _ in pretrain.RECIPE)


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_lets_the_stage_of_a_recipe_save(monkeypatch, tmp_path, capfd, number, code):
    """A terminal sends Ctrl-C to both, `kill` only to one; the stage goes on until it has saved."""
    number = getattr(pretrain.signal, number)
    saves = f"""import os, signal, time
def save(*args):
    time.sleep(0.5)
    print("saved", flush=True)
    os._exit(1)
signal.signal({number}, save)
os.kill({os.getpid()}, {number})
if {number} == signal.SIGINT:
    os.kill(os.getpid(), {number})
time.sleep(60)"""
    (tmp_path / "stage.py").write_text(saves)
    monkeypatch.setattr(pretrain, "RECIPE", [("a", "b", f"{tmp_path / 'stage.py'}")] * 2)
    recipe = functools.partial(pretrain.run_script, "pretrain.py", lambda argv: pretrain.follow_recipe(tmp_path / "run", tmp_path, []))
    assert recipe() == code
    out, err = capfd.readouterr()
    assert out.count("saved") == 1 and err == "pretrain.py: interrupted\n"


def test_another_runs_state_is_not_taken_for_this_ones(tmp_path, capsys):
    """What --init named was dropped, and a run that was already at its end wrote nothing."""
    (tmp_path / "run/framings").mkdir(parents=True)
    (tmp_path / f"run/framings/transformer-{pretrain.FLUX_CONFIG.hidden_size}.safetensors").touch()
    with pytest.raises(SystemExit):
        pretrain.main(["--framings", "--init", "b", "--out", str(tmp_path / "y"), "--run", str(tmp_path / "run")])
    assert "the state of another transformer: name another --run" in capsys.readouterr().err


def test_a_checkpoint_does_not_shrink():
    head = sum(pretrain.FLUX_CONFIG.axes_dim)
    wide, narrow = (Flux(dataclasses.replace(pretrain.FLUX_CONFIG, hidden_size=head * heads, num_heads=heads)) for heads in (2, 1))
    with pytest.raises(ValueError, match=f"--init is {2 * head} wide"):
        pretrain.grow(wide, narrow)
