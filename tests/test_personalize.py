"""Stage 2 on a small random model: what the command writes, repeats, refuses and leaves behind."""
import copy
import functools
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import personalize
import sample
from flux_model import Flux, flow_matching_loss, sample_times
from metalora import MetaLoRA, apply_loras, random_lomd
from support import checkpoints, photos, stage_2
from support.checkpoints import flux_files, load_autoencoder, load_flux, load_text_encoders
from support.names import find_targets
from support.lora_files import load_lomd, load_lora, read_metadata, save_lomd

ROOT = Path(__file__).parents[1]
ASTRONAUT = Path(__file__).parent / "photos" / "astronaut.png"
MODEL = next((path for path in (ROOT / "tests" / "golden" / "hub", ROOT.parent / "shared" / "golden" / "hub")
              if path.is_dir()), None)
BABY = ROOT / "baby" / "checkpoint"
pytestmark = pytest.mark.skipif(MODEL is None, reason="the small model of golden/hub is not here")
R1 = 8


@pytest.fixture(scope="module")
def targets():
    with torch.device("meta"):
        return find_targets(Flux(flux_files(MODEL)[1]))


@pytest.fixture(scope="module")
def lomd(targets, tmp_path_factory):
    """A random LoMD of the small model."""
    path = tmp_path_factory.mktemp("lomd") / "lomd.safetensors"
    save_lomd(path, random_lomd(targets, R1), {"model": "hub", "iterations": "0", "random": "true"})
    return path


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """The detector and the text encoders are slow to ask, and answer the same each time."""
    find_faces, faces = photos.find_faces, {}

    def ask_once(image, *threshold):
        key = image.size, image.tobytes(), threshold
        if key not in faces:
            faces[key] = find_faces(image, *threshold)
        return faces[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "find_faces", ask_once)
        patch.setattr(checkpoints, "load_text_encoders", functools.cache(load_text_encoders))
        yield


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A photo with the face so large that few crops fit: quick to encode."""
    path = tmp_path_factory.mktemp("photo") / "head.png"
    Image.open(ASTRONAUT).convert("RGB").crop((150, 20, 300, 190)).save(path)
    return path


@pytest.fixture
def run(lomd, tmp_path, monkeypatch, capsys):
    """run("face.jpg", "--out", ...) -> (exit code, stdout, stderr), in an empty folder with a small model."""
    monkeypatch.chdir(tmp_path)

    def run(*args, iters=3, model=MODEL, resolution=64, method="meta-lora"):
        args = [*map(str, args), "--model", str(model), "--device", "cpu"]
        args += ["--lomd", str(lomd)] if method == "meta-lora" and "--lomd" not in args else []
        args += ["--method", method, "--iters", str(iters), "--resolution", *str(resolution).split()]
        code = personalize.main(args)
        return code, *capsys.readouterr()
    return run


def same(first, second):
    """Equal to the byte, so in weights and metadata."""
    first, second = (Path(f"{name}.safetensors").read_bytes() for name in (first, second))
    return first == second


def refused(result, word):
    code, _, err = result
    return code == 2 and err.count("\n") == 1 and word in err and "Traceback" not in err


# what the command writes

@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_writes_a_lora_of_every_target(run, head, targets, lomd, method):
    code, out, err = run(head, "--rank", 2, "--seed", 7, "--prompt", "a photo of zwx", method=method)
    assert code == 0 and ("never trained" in err) == (method == "meta-lora")
    lora = load_lora("out.safetensors")
    assert set(lora) == {t.path for t in targets}
    for t in targets:
        A, B = lora[t.path]
        assert A.shape == (2, t.d_in) and B.shape == (t.rows, 2)
        assert A.any() and B.isfinite().all()
    assert sum(bool(B.any()) for _, B in lora.values()) > 0.9 * len(lora)          # it was trained
    if method == "meta-lora":                           # A' = M A stays in LoMD's rows
        trained, (shared, _) = lora[targets[0].path][0], load_lomd(lomd)
        basis = torch.linalg.qr(shared[targets[0].path].T)[0]
        assert (trained - trained @ basis @ basis.T).norm() < 2e-3 * trained.norm()
    metadata = read_metadata("out.safetensors")
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora" and metadata["ss_network_dim"] == metadata["rank"]
    assert metadata["modelspec.trigger_phrase"] == metadata["prompt"]
    expected = {"method": method, "rank": "2", "iterations": "3", "prompt": "a photo of zwx", "seed": "7",
                "resolution": "64", "learning_rate": "0.0004", "model": "hub", "photos": "head.png",
                "photo_digests": hashlib.sha256(head.read_bytes()).hexdigest()[:16]}
    assert expected.items() <= metadata.items()
    assert metadata["lomd"].startswith("random, sha256 " if method == "meta-lora" else "none")
    assert "python sample.py --model" in out and "'a photo of zwx'" in out and "out.safetensors" in out
    assert not list(Path().glob("*.part")) and [p.name for p in Path().iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_a_seed_repeats_to_the_bit(run, head, method):
    for out, seed in ("a", 1), ("b", 1), ("c", 2):
        assert run(head, "--seed", seed, "--out", f"{out}.safetensors", method=method)[0] == 0
    assert same("a", "b")
    ours, other = load_lora("a.safetensors"), load_lora("c.safetensors")
    assert not any(torch.equal(ours[path][1], other[path][1]) for path in ours if ours[path][1].any())


def test_the_seed_is_of_the_row_and_of_the_draws(run, head, lomd, monkeypatch):
    """Either alone would give another LoRA for another seed."""
    seen = []
    monkeypatch.setattr(personalize, "train", lambda flux, adapter, *rest: seen.append((adapter.bank.weight.clone(), rest[6])))
    assert run(head, "--seed", 7)[0] == 0
    (row, seed), = seen
    flux = load_flux(MODEL, "cpu", torch.float32)
    own, other = (MetaLoRA(flux, 1, load_lomd(lomd)[0], seed=s).bank.weight for s in (7, 0))
    assert seed == 7 and torch.equal(row, own) and not torch.equal(row, other)


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_save_at_equals_a_shorter_run(run, head, method):
    code, out, _ = run(head, "--save-at", 4, 2, method=method, iters=4)
    assert code == 0 and out.endswith("--compare out-000002.safetensors out-000004.safetensors\n")
    words = shlex.split(out.rpartition("which one?  python sample.py ")[2])
    args = sample.parse(words)
    assert (args.model, len(args.words), args.compare) == (str(MODEL), 1, ["out-000002.safetensors", "out-000004.safetensors"])
    assert sorted(p.name for p in Path().iterdir()) == [
        "out-000002.safetensors", "out-000004.safetensors", "out.safetensors"]
    assert same("out-000004", "out")
    for prompt, shown in (("", "a photo of a person"), (" a\nb ", "a b")):
        _, out, _ = run(head, "--save-at", 1, "--prompt", prompt, "--out", "p.safetensors", method=method, iters=2)
        assert [sample.parse(shlex.split(line)[2:]).words for line in re.findall("python sample.py .*", out)] == [[shown]] * 2
    code, out, _ = run(head, "--out", "short.safetensors", method=method, iters=2)
    assert code == 0 and "which one?" not in out
    assert same("out-000002", "short")
    assert read_metadata("out-000002.safetensors")["iterations"] == "2"


def test_formats_hold_the_same(run, head):
    loras = {}
    for name in "diffusers", "kohya", "original":
        assert run(head, "--format", name, "--rank", 2, "--out", f"{name}.safetensors", iters=2)[0] == 0
        loras[name] = load_lora(f"{name}.safetensors")
    assert loras["diffusers"].keys() == loras["kohya"].keys() == loras["original"].keys()
    for path, (A, B) in loras["diffusers"].items():
        for other in loras["kohya"], loras["original"]:
            assert torch.equal(other[path][1] @ other[path][0], B @ A), path


def test_defaults_are_the_papers_and_the_models(tmp_path):
    args = personalize.parse([str(ASTRONAUT), "--model", str(MODEL), "--out", f"{tmp_path}/o.safetensors"])
    personalize.check_stage_2(args, personalize.ITERATIONS)
    assert (args.iters, args.rank, args.lr) == (375, 1, 4e-4)
    assert (args.resolution, args.prompt) == ([1024], "a photo of a person")
    assert (args.aspects, args.scales, args.background, args.mirror) == (None, None, 1.0, True)          # all of the paper's crops
    args = personalize.parse([str(ASTRONAUT), "--model", "baby"])
    personalize.check_stage_2(args, personalize.ITERATIONS)
    assert (args.aspects, args.scales, args.background, args.mirror) == (["1:1"], [4.5], 0.1, False)     # its defaults.json
    assert (args.iters, args.lr) == (250, 2.4e-3)
    args = personalize.parse([str(ASTRONAUT), "--model", "baby", "--method", "lora", "--save-at", "251"])
    with pytest.raises(ValueError, match="--save-at 251 is beyond the last of 250"):
        personalize.check_stage_2(args, personalize.ITERATIONS)
    args = personalize.parse([str(ASTRONAUT), "--model", "baby", "--iters", "300", "--lr", "0.01", "--save-at", "251"])
    personalize.check_stage_2(args, personalize.ITERATIONS)
    assert (args.iters, args.lr) == (300, 0.01)
    args = personalize.parse([str(ASTRONAUT), "--model", str(MODEL), "--method", "lora"])
    personalize.check_stage_2(args, personalize.ITERATIONS)
    assert args.iters == 625


def test_save_at_is_checked_before_a_download(run, monkeypatch):
    """A model of the hub that is not here yet: the paper's number of iterations holds."""
    monkeypatch.setattr(stage_2, "home_of", lambda name: None)
    monkeypatch.setattr(stage_2, "take_model", lambda *words: pytest.fail("it was downloaded"))
    with pytest.raises(ValueError, match="--save-at 626 is beyond the last of 625"):
        personalize.check_stage_2(personalize.parse([str(ASTRONAUT), "--method", "lora", "--save-at", "626"]), personalize.ITERATIONS)


# crops

def test_crops_of_one_photo_and_of_several(tmp_path):
    one = photos.load_crops([ASTRONAUT], [128])
    assert 15 <= len(one) <= 25 and all(crop.photo == ASTRONAUT for crop in one)
    assert all(w % 16 == h % 16 == 0 for w, h in (crop.picture.size for crop in one))
    assert len({crop.box for crop in one}) == len(one)
    other = tmp_path / "flipped.png"
    Image.open(ASTRONAUT).convert("RGB").transpose(Image.FLIP_LEFT_RIGHT).save(other)
    two = photos.load_crops([ASTRONAUT, other], [128])
    assert [crop.box for crop in two[:len(one)]] == [crop.box for crop in one] and {c.photo for c in two} == {
        ASTRONAUT, other}
    whole = photos.load_crops([ASTRONAUT], [128], augment=False)
    assert [(crop.box, crop.picture.size) for crop in whole] == [((0, 0, 512, 512), (128, 128))]


def test_the_head_counts_and_the_background_less():
    photo = Image.open(ASTRONAUT).convert("RGB")
    x0, y0, x1, y1 = photos.head_box(photos.find_faces(photo)[0])
    for crop in photos.load_crops([ASTRONAUT], [128]):
        weights = photos.head_weights(crop, 0.1)
        width, height = crop.picture.size
        assert weights.shape == (1, height // 8, width // 8)
        assert weights.mean().item() == pytest.approx(1) and weights.max() / weights.min() == pytest.approx(10, rel=0.01)
        # the head of the photo painted red, cut as the photo is: where it is red the weight is high
        red = photo.copy()
        red.paste("red", (x0, y0, x1, y1))
        seen = np.asarray(photos.to_sizes(red.crop(crop.box), [128])[0]).astype(int)
        seen = ((seen[..., 0] > 200) & (seen[..., 1:].max(-1) < 50)).reshape(height // 8, 8, width // 8, 8).mean((1, 3))
        assert (weights[0].numpy()[seen == 1] > 0.95 * weights.max().item()).all()
        assert (weights[0].numpy()[seen == 0] < 0.3 * weights.max().item()).all()
        assert torch.equal(photos.head_weights(crop, 1.0), torch.ones(1, height // 8, width // 8))


def test_a_mirror_image_has_the_weights_mirrored():
    autoencoder = load_autoencoder(MODEL, "cpu", torch.float32)
    crops = photos.load_crops([ASTRONAUT], [64])[:2]
    for mirror in (True, False):
        latents, weights = personalize.encode_crops(autoencoder, crops, 0.1, mirror)
        for crop, latent, own in zip(crops, latents, weights, strict=True):
            assert len(latent) == len(own) == 1 + mirror and torch.equal(own[0], photos.head_weights(crop, 0.1))
            assert torch.equal(own[-1], own[0].flip(-1) if mirror else own[0])
    whole = photos.load_crops([ASTRONAUT], [64], augment=False)
    latents, weights = personalize.encode_crops(autoencoder, whole, 0.1, True)
    assert len(latents[0]) == 1 and torch.equal(weights[0], torch.ones(1, 1, 1, 1))              # nobody looked for a head


def test_weights_follow_their_view_and_reach_the_loss(lomd):
    constant = lambda value: torch.stack([torch.full((2, 16, 4, 4), v) for v in value]) * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1)
    latents = [constant([1.0, 2.0]), constant([3.0, 4.0])]                   # each view its own mean, and no deviation
    weights = [torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), torch.tensor([3.0, 4.0]).view(2, 1, 1, 1)]
    seen = set()
    for _, (_, latent, _, weight, _) in zip(range(20), personalize.batches(latents, weights, 0)):
        assert (latent == weight).all()
        seen.add(weight.item())
    assert seen == {1.0, 2.0, 3.0, 4.0}

    flux = load_flux(MODEL, "cpu", torch.float32)
    txt, y = torch.randn(1, 5, flux.config.context_in_dim), torch.randn(1, flux.config.vec_in_dim)

    def learned(weight):
        adapter, losses = MetaLoRA(flux, 1, lomd=load_lomd(lomd)[0]), []
        personalize.train(flux, adapter, latents, [torch.full((2, 1, 4, 4), weight)] * 2, txt, y, 3, 1e-2,
                          on_step=lambda i, loss: losses.append(loss))
        update = adapter.collapse()
        apply_loras(flux, [])
        return losses, max(b.abs().max().item() for _, b in update.values())
    (plain, moved), (twice, _), (nothing, still) = map(learned, (1.0, 2.0, 1e-30))
    assert moved > 0 and twice[0] == pytest.approx(2 * plain[0])
    assert max(nothing) < 1e-25 and still < 1e-6 * moved


@pytest.mark.parametrize("size, resolutions, expected", [
    ((1600, 1600), [1024], [(1024, 1024)]),
    ((800, 800), [1024], [(800, 800)]),                         # never enlarged beyond its own area
    ((800, 800), [512, 768, 1024], [(512, 512), (768, 768), (800, 800)]),
    ((600, 600), [1024, 2048], [(592, 592)]),                   # the same size twice is one picture
    ((200, 200), [1024], [(512, 512)]),                         # but small crops are useful to no one
    ((200, 200), [128], [(128, 128)]),
    ((60, 60), [128], [(128, 128)]),
    ((160, 90), [128], [(176, 96)]),
])
def test_sizes(size, resolutions, expected):
    assert [picture.size for picture in photos.to_sizes(Image.new("RGB", size), resolutions)] == expected


def test_several_photos_and_no_augment_train(run, head):
    Image.open(ASTRONAUT).convert("RGB").crop((100, 0, 400, 400)).save("größer photo.webp")
    code, out, _ = run(head, "größer photo.webp", "--save-crops", "seen",
                       resolution="64 80", iters=2)
    assert code == 0
    pictures = [Image.open(path).size for path in sorted(Path("seen").iterdir())]
    count = len(photos.load_crops([head, "größer photo.webp"], [64]))
    assert len(pictures) == 2 * count and f"{len(pictures)} pictures" in out
    assert all(w % 16 == h % 16 == 0 for w, h in pictures)
    assert {(64, 64), (80, 80)} < set(pictures) and {w > h for w, h in pictures} == {True, False}
    names = sorted(path.name for path in Path("seen").iterdir())
    assert names[0].startswith("00-") and names[-1].endswith("größer photo.png")
    assert f"-{pictures[0][0]}x{pictures[0][1]}-" in names[0]
    code, out, _ = run(ASTRONAUT, "--no-augment", "--save-crops", "whole")
    assert code == 0 and "1 pictures" in out
    assert [path.name for path in Path("whole").iterdir()] == ["00-64x64-astronaut.png"]


def test_the_largest_of_several_faces(run, tmp_path):
    face = Image.open(ASTRONAUT).convert("RGB")
    both = Image.new("RGB", (768, 512), "grey")
    both.paste(face.resize((256, 256)), (0, 128))
    both.paste(face, (256, 0))
    both.save("both.png")
    code, _, err = run("both.png", method="lora")
    assert code == 0 and err.count("\n") == 1 and "2 faces in both.png" in err
    (box,) = [face[:4] for face in photos.find_faces(face)][:1]
    crop = min(photos.load_crops(["both.png"], [64]), key=lambda c: c.box[2] - c.box[0])
    assert crop.box[0] < 256 + (box[0] + box[2]) / 2 < crop.box[2]          # the face on the right


# encoding and drawing

def test_encoding_keeps_the_posterior_and_the_mirror_image():
    autoencoder = load_autoencoder(MODEL, "cpu", torch.float32)
    picture = photos.fit_to_grid(photos.read_photo(ASTRONAUT), 64)
    crop = photos.Crop(picture, ASTRONAUT, (0, 0, 64, 64), Image.new("L", picture.size, 255))
    (latent,), _ = personalize.encode_crops(autoencoder, [crop])
    assert latent.shape == (2, 2, 16, 8, 8)
    pixels = photos.to_tensor(picture)[None]
    assert torch.allclose(latent[0, 0], autoencoder.encode(pixels)[0], atol=1e-5)
    assert torch.allclose(latent[1, 0], autoencoder.encode(pixels.flip(-1))[0], atol=1e-5)
    logvar = autoencoder.moments(pixels).chunk(2, 1)[1][0]
    assert torch.allclose(latent[0, 1], autoencoder.config.scale_factor * (logvar / 2).exp(), atol=1e-5)
    (alone,), _ = personalize.encode_crops(autoencoder, [crop], mirror=False)
    assert torch.allclose(alone, latent[:1], atol=1e-5)


def drawn(latents, count, seed=0):
    """The first `count` training batches of one person."""
    weights = [torch.ones(len(latent), 1, 1, 1) for latent in latents]
    return [batch for _, batch in zip(range(count), personalize.batches(latents, weights, seed))]


def test_draws_follow_coin_and_posterior():
    latent = torch.zeros(2, 2, 16, 2, 2)
    latent[0, 0], latent[1, 0], latent[:, 1] = -1, 1, 0.1
    draws = torch.cat([own for _, own, *_ in drawn([latent], 2000)])
    heads = draws.mean((1, 2, 3)) > 0
    assert 0.45 < heads.float().mean() < 0.55
    assert abs(draws[heads].mean() - 1) < 0.01 and abs(draws[heads].std() - 0.1) < 0.002


def test_an_epoch_shows_each_crop_once_in_another_order():
    latents = [torch.zeros(1, 2, 16, h, 8) for h in (8, 8, 8, 8, 8, 6, 6, 4)]
    order = [crop for crop, *_ in drawn(latents, 32)]
    epochs = [order[i:i + 8] for i in range(0, 32, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and any(epoch != epochs[0] for epoch in epochs)
    assert all(latent.shape == (1, 16, latents[crop].shape[-2], 8) for crop, latent, *_ in drawn(latents, 8))
    assert [crop for crop, *_ in drawn(latents, 8)] == epochs[0]                       # a longer run begins as a shorter one


# training

def overfit(folder, lomd, side, rank, lr, iters):
    """One crop, one view: -> the loss at fixed noise and times before and after `train`."""
    flux = load_flux(folder, "cpu", torch.float32)
    base = copy.deepcopy(flux.state_dict())
    txt, y = load_text_encoders(folder, "cpu", torch.float32).encode(["a photo of a person"])
    crop = photos.load_crops([ASTRONAUT], [side])[10]
    autoencoder = load_autoencoder(folder, "cpu", torch.float32)
    latents, weights = personalize.encode_crops(autoencoder, [crop], mirror=False)
    generator = torch.Generator().manual_seed(0)
    clean = latents[0][0, 0].expand(16, -1, -1, -1)
    noise, t = torch.randn(clean.shape, generator=generator), sample_times(16, generator)
    adapter = MetaLoRA(flux, rank, lomd=lomd)

    @torch.no_grad()
    def loss():
        adapter.assign(torch.zeros(16, dtype=torch.long))
        return flow_matching_loss(
            flux, clean, noise, t, txt.expand(16, -1, -1), y.expand(16, -1)).mean().item()
    before, seen = loss(), []
    personalize.train(flux, adapter, latents, weights, txt, y, iters, lr, on_step=lambda *step: seen.append(step))
    after = loss()
    assert [i for i, _ in seen] == list(range(1, iters + 1)) and all(math.isfinite(x) for _, x in seen)
    apply_loras(flux, [])                                              # the base is frozen
    assert all(torch.equal(value, base[name]) for name, value in flux.state_dict().items())
    return before, after


def test_the_loss_falls_even_on_random_weights(lomd):
    before, after = overfit(MODEL, load_lomd(lomd)[0], side=64, rank=4, lr=2e-2, iters=60)
    assert after < 0.85 * before, (before, after)


@pytest.mark.slow
@pytest.mark.skipif(not (BABY / "lomd.safetensors").is_file(), reason="the baby's checkpoint is not here")
def test_overfits_one_crop_on_the_baby():
    lomd = load_lomd(BABY / "lomd.safetensors")[0]
    before, after = overfit(BABY, lomd, side=128, rank=8, lr=1e-2, iters=100)
    assert after < 0.5 * before, (before, after)


def test_divergence_stops_the_run_and_keeps_the_old_file(run, head, monkeypatch):
    Path("out.safetensors").write_bytes(b"precious")
    real, calls = flow_matching_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(personalize, "flow_matching_loss", broken)
    code, out, err = run(head, iters=5, method="lora")
    noted, kept, line = err.splitlines()
    assert code == 1 and out == "" and noted.startswith("note: out.safetensors")          # no LoRA of these photos
    assert "iteration 3" in line and "head.png (" in err and len(calls) == 3
    assert kept == "note: the LoRA after 2 iterations is in out-interrupted-000002.safetensors"
    assert sorted(map(str, Path().iterdir())) == ["out-interrupted-000002.safetensors", "out.safetensors"]
    assert Path("out.safetensors").read_bytes() == b"precious"
    monkeypatch.setattr(personalize, "flow_matching_loss", real)
    assert run(head, "--out", "two.safetensors", iters=2, method="lora")[0] == 0
    assert same("out-interrupted-000002", "two")                                           # the last good state


def test_the_crop_on_which_it_diverged_is_named(run, head, monkeypatch):
    order = []
    monkeypatch.setattr(personalize, "batches", lambda *args: (order.append(batch[0]) or batch for batch in real(*args)))
    monkeypatch.setattr(personalize, "flow_matching_loss", lambda *args, **kwargs: flow_matching_loss(*args, **kwargs) * (
        math.nan if order[-1] else 1))
    code, _, err = run(head, iters=9, method="lora")
    assert code == 1 and order[-1] > 0
    assert f"on {head} {photos.load_crops([head], [64])[order[-1]].box}" in err


def test_a_full_card_saves_what_there_is(run, head, monkeypatch):
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return flow_matching_loss(*args, **kwargs)
    monkeypatch.setattr(personalize, "flow_matching_loss", full)
    code, _, err = run(head, iters=5, method="lora")
    assert code == 1 and "out-interrupted-000002.safetensors" in err and "Traceback" not in err
    assert read_metadata("out-interrupted-000002.safetensors")["iterations"] == "2"


def test_ctrl_c_saves_what_there_is(run, head, monkeypatch):
    assert run(head, "--out", "two.safetensors", iters=2, method="lora")[0] == 0
    real, calls = flow_matching_loss, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(personalize, "flow_matching_loss", interrupted)
    code, _, err = run(head, iters=5, method="lora")
    assert code == 130 and "out-interrupted-000002.safetensors" in err and "Traceback" not in err
    assert {p.name for p in Path().iterdir()} == {"out-interrupted-000002.safetensors", "two.safetensors"}
    assert same("two", "out-interrupted-000002")
    calls[:] = [1, 1]                                     # before the first step there is nothing to save
    assert run(head, "--out", "none.safetensors", iters=5, method="lora")[0] == 130
    assert not list(Path().glob("none*"))


def test_masks_among_the_photos_are_named_and_left(run, head):
    mask = Path(head).with_name("head_mask.png")
    Image.new("L", (150, 170)).save(mask)
    assert Path(head).name == "head.png"
    code, _, err = run(head, str(mask), "--no-augment")
    assert code == 0 and err.count("not used") == 1 and str(mask) in err
    assert read_metadata("out.safetensors")["photos"] == "head.png"
    mask.unlink()


def test_a_prompt_that_t5_cannot_hold_is_cut_aloud(run, head):
    code, _, err = run(head, "--prompt", "a photo of a man, " * 100 + "smiling")
    assert code == 0 and err.count("T5 sees 512 tokens") == 1 and "smiling'\n" in err


# where the subject is

def test_a_photo_is_called_what_the_caption_beside_it_says(run, head, tmp_path):
    """As in stage 1: one photo with a caption, one without, and an empty one refused."""
    shutil.copy(head, "a.png"), shutil.copy(head, "b.png")
    assert run("a.png", "b.png", "--out", "plain.safetensors")[0] == 0
    Path("a.txt").write_text("a photo of a woman in a suit\n")
    code, out, err = run("a.png", "b.png", "--prompt", "a photo of a person")
    assert code == 0 and out.count("by the caption beside it") == 1
    assert "a.png is called 'a photo of a woman in a suit', by the caption beside it" in out
    assert read_metadata(Path("out.safetensors"))["captions"] == "a photo of a woman in a suit | a photo of a person"
    assert not same("out", "plain")
    Path("a.txt").write_text("a photo of a person")                                       # as if there were none
    assert run("a.png", "b.png", "--out", "again.safetensors")[0] == 0 and same("again", "plain")
    Path("a.txt").write_text(" ")
    assert refused(run("a.png", "b.png"), "a.txt is empty")


def test_every_crop_trains_with_its_own_caption(lomd):
    """Two crops and two captions give what each crop gives with its own; one caption is everybody's."""
    flux = load_flux(MODEL, dtype=torch.float32)
    latents = [torch.randn(1, 2, 16, 8, 8).abs() for _ in range(2)]
    weights = [torch.ones(1, 1, 8, 8)] * 2
    txt, y = torch.randn(2, 5, flux.config.context_in_dim), torch.randn(2, flux.config.vec_in_dim)
    seen = []

    def record(flux, latent, noise, t, txt, y, **options):
        seen.append((latent, txt, y))
        return flow_matching_loss(flux, latent, noise, t, txt, y, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(personalize, "flow_matching_loss", record)
        order = []
        patch.setattr(personalize, "batches", lambda *args: (order.append(batch[0]) or batch for batch in real(*args)))
        adapter = MetaLoRA(flux, 1, lomd=load_lomd(lomd)[0])
        personalize.train(flux, adapter, latents, weights, txt, y, 4, 1e-3)
        personalize.train(flux, adapter, latents, weights, txt[:1], y[:1], 2, 1e-3)
    assert {*order[:4]} == {0, 1}
    for crop, (_, text, vector) in zip(order, seen[:4]):
        assert torch.equal(text[0], txt[crop]) and torch.equal(vector[0], y[crop]) and len(text) == 1
    assert all(torch.equal(text, txt[:1]) for _, text, _ in seen[4:])
    for texts, vectors in (txt.repeat(2, 1, 1), y.repeat(2, 1)), (txt, y[:1]), (txt[:0], y[:0]):
        with pytest.raises(ValueError, match="one caption"):
            personalize.train(flux, adapter, latents, weights, texts, vectors, 1, 1e-3)


real = personalize.batches


def test_a_box_is_enough_where_there_is_no_face(run):
    drawing = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(drawing).rectangle((140, 60, 200, 120), fill="red")
    drawing.save("pet.png")
    result = run("pet.png")
    assert refused(result, "no face found in pet.png") and "--box" in result[2]
    code, _, err = run("pet.png", "--box", 140, 60, 200, 120, "--save-crops", "crops", "--out", "pet.safetensors")
    assert code == 0 and err.count("\n") == 1 and "LoMD is random" in err and Path("pet.safetensors").exists()
    assert read_metadata("pet.safetensors")["box"] == "[140, 60, 200, 120]"
    crops = photos.load_crops(["pet.png"], [64], box=[140, 60, 200, 120])
    assert [c.box for c in crops] == photos.face_crops(300, 200, (140, 60, 200, 120))
    assert len(list(Path("crops").iterdir())) == len(crops)
    for crop in crops:
        red = np.asarray(crop.picture)[..., 1] < 128
        assert (red == (np.asarray(crop.head) > 128)).mean() > 0.9                     # what counts is the subject


@pytest.mark.parametrize("args, word", [
    ([ASTRONAUT, "--box", 10, 10, 10, 90], "512 x 512"), ([ASTRONAUT, "--box", 10, 10, 90, 513], "512 x 512"),
    ([ASTRONAUT, "--box", -1, 10, 90, 90], "--box"), ([ASTRONAUT, "--box", 1, 2, 3], "--box"),
    ([ASTRONAUT, "--box", 1, 2, 30, "nan"], "--box"),
    ([ASTRONAUT, ASTRONAUT, "--box", 1, 2, 30, 40], "a single photo"),
    ([ASTRONAUT, "--no-augment", "--box", 1, 2, 30, 40], "--no-augment"),
])
def test_boxes_that_do_not_fit(run, args, word):
    assert refused(run(*args), word) and not list(Path().iterdir())


def test_a_photo_without_its_last_bytes_is_noted_once(run, head):
    Image.open(head).resize((640, 640)).save("whole.jpg", quality=90)
    Path("cut.jpg").write_bytes(Path("whole.jpg").read_bytes()[:-9])
    code, _, err = run("cut.jpg")
    assert code == 0 and err.count("cut.jpg lacks its last bytes") == 1


def test_heic_without_its_package_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(photos, "can_read_heif", lambda: False)
    Path("photo.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    assert refused(run("photo.jpg"), "pip install pillow-heif")


def test_a_lying_photo_trains_as_the_upright_one(run, head):
    Image.open(head).transpose(Image.Transpose.ROTATE_90).save("lying.png")
    assert run(head, "--out", "upright.safetensors")[0] == 0
    code, _, err = run("lying.png", "--out", "lying.safetensors")
    assert code == 0 and "note: no face in lying.png as it is" in err
    lying, upright = (load_lora(f"{name}.safetensors") for name in ("lying", "upright"))
    assert lying.keys() == upright.keys() and all(torch.equal(a, b) for path in lying for a, b in zip(lying[path], upright[path]))


# what it refuses

def make_bad_photos():
    Image.new("RGB", (300, 300), "teal").save("plain.png")
    Path("text.jpg").write_text("no picture")
    Path("empty.png").write_bytes(b"")
    Path("cut.png").write_bytes(ASTRONAUT.read_bytes()[:5000])
    Path("folder.png").mkdir()
    drawing = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(drawing).rectangle((40, 40, 160, 160), fill="red")
    drawing.save("drawing.png")
    Path("photos").mkdir()
    shutil.copy(ASTRONAUT, "photos")


@pytest.mark.parametrize("args, word", [
    (["plain.png"], "no face found in plain.png"),
    ([ASTRONAUT, "drawing.png"], "no face found in drawing.png"),
    (["text.jpg"], "text.jpg"), (["empty.png"], "empty.png"), (["cut.png"], "cut.png"),
    (["folder.png"], "folder.png"), (["nowhere.jpg"], "nowhere.jpg"), ([], "photo"),
    ([ASTRONAUT, "--rank", 0], "--rank"), ([ASTRONAUT, "--rank", "two"], "--rank"),
    ([ASTRONAUT, "--lr", "nan"], "--lr"),
    ([ASTRONAUT, "--lr", 0], "--lr"), ([ASTRONAUT, "--seed", -1], "--seed"),
    ([ASTRONAUT, "--seed", 2 ** 64], "--seed"), ([ASTRONAUT, "--save-at", 9], "--save-at"),
    ([ASTRONAUT, "--out", "no/where/o.safetensors"], "no/where"), ([ASTRONAUT, "--out", "out.pt"], "out.pt"),
    ([ASTRONAUT, "--out", "folder.png"], "folder.png"), ([ASTRONAUT, "--save-crops", "text.jpg"], "text.jpg"),
    ([ASTRONAUT, "--save-crops", "no/where"], "--save-crops"),
    (["photos", "--save-crops", "photos/../photos"], "--save-crops"),
    ([ASTRONAUT, "--out", "lomd.safetensors"], "is the name of a LoMD"),
    ([ASTRONAUT, "--format", "pickle"], "--format"),
    ([ASTRONAUT, "--lomd", "nowhere.safetensors"], "nowhere.safetensors"),
    ([ASTRONAUT, "--lomd", "text.jpg"], "text.jpg"), ([ASTRONAUT, "--raank", 2], "--raank"),
])
def test_malformed_input(run, args, word):
    make_bad_photos()
    before = sorted(Path().rglob("*"))
    assert refused(run(*args), word)
    assert sorted(Path().rglob("*")) == before


def test_a_prompt_that_is_no_text(run, head):
    code, _, err = run(head, "--prompt", "a \udcff b")
    assert code == 2 and err.endswith("personalize.py: a prompt is not valid UTF-8 text\n") and not Path("out.safetensors").exists()


def test_malformed_model_resolution_and_lomd(run):
    assert refused(run(ASTRONAUT, model="nowhere"), "nowhere")
    assert refused(run(ASTRONAUT, resolution=8), "--resolution")
    assert refused(run(ASTRONAUT, resolution="64 99999"), "--resolution")
    assert refused(run(ASTRONAUT, iters=0), "--iters")
    assert refused(run(ASTRONAUT, "--lomd", "any.safetensors", method="lora"), "--lomd")
    assert not list(Path().iterdir())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ANNEX = b"/annex/objects/SHA256E-s3--aa.safetensors\n"


def broken_hub(path, content):
    """The small model by links, with `content` in the place of one of its files; None: a folder."""
    for part in MODEL.iterdir():
        if part.is_dir() and part.name == path.partition("/")[0]:
            Path("hub", part.name).mkdir(parents=True)
            for file in part.iterdir():
                Path("hub", part.name, file.name).symlink_to(file)
        else:
            Path("hub").mkdir(exist_ok=True)
            Path("hub", part.name).symlink_to(part)
    place = Path("hub", path)
    place.unlink(missing_ok=True)
    place.mkdir() if content is None else place.write_bytes(content)


@pytest.mark.parametrize("path", ["flux1-dev.safetensors", "ae.safetensors", "text_encoder/model.safetensors",
                                  "text_encoder_2/model.safetensors"])
@pytest.mark.parametrize("content, words", [
    (POINTER, "git lfs pull"), (ANNEX, "git annex get"), (b"<!DOCTYPE html><html>", "web page"), (b"", "empty"),
    (b"\xff\0\0\0\0\0\0\0{", "")])
def test_what_stands_in_the_place_of_weights_is_named(run, monkeypatch, path, content, words):
    monkeypatch.setattr(checkpoints, "load_text_encoders", load_text_encoders)
    broken_hub(path, content)
    result = run(ASTRONAUT, model="hub", method="lora")
    assert refused(result, f"hub/{path}" if words else "hub") and words in result[2]


@pytest.mark.parametrize("path", ["text_encoder/config.json", "text_encoder_2/config.json", "defaults.json",
                                  "tokenizer/vocab.json", "tokenizer_2/tokenizer_config.json", "text_encoder_2/model.safetensors.index.json"])
@pytest.mark.parametrize("content, words", [
    (POINTER, "git lfs pull"), (b'{"learning_rate": ', "torn"), (b"[1, 2]", "an object"), (b"[[1, 2]]", "an object"),
    (b"[" * 100_000, "torn"), (b"<html>", "web page"), ("ü".encode("latin-1"), "torn")])
def test_what_stands_in_the_place_of_settings_is_named(run, path, content, words):
    broken_hub(path, content)
    result = run(ASTRONAUT, model="hub", method="lora")
    assert refused(result, f"hub/{path}") and words in result[2]


@pytest.mark.parametrize("content", [b'{"model_type": "t5"}', b'{"learning_rate": "fast"}', b'{"mirror": [1]}', b'{"resolution": "1024"}',
                                     b'{"iterations": -250}', b'{"iterations": {"lora": 0}}', b'{"iterations": {"LoRA": 250}}',
                                     b'{"learning_rate": {"lora": "fast"}}', b'{"learning_rate": NaN}', b'{"resolution": 512.5}',
                                     b'{"aspects": [1.5]}', b'{"aspects": ["16x9"]}', b'{"aspects": ["1:0"]}', b'{"scales": ["4.5"]}', b'{"scales": []}'])
def test_foreign_settings_are_named(run, content):
    broken_hub("defaults.json", content)
    assert refused(run(ASTRONAUT, model="hub", method="lora"), "hub/defaults.json")


def test_settings_for_one_use_leave_the_others_as_they_are(tmp_path):
    """A use that defaults.json does not name has FLUX.1's value, which was a traceback."""
    own = {"learning_rate": {"lora": 1e-3}, "iterations": 250, "resolution": {"stage 1": 64}}
    (tmp_path / "defaults.json").write_text(json.dumps(own))
    expected = {"lora": (1e-3, 250, 1024), "meta-lora": (4e-4, 250, 1024), "stage 1": (4e-4, 250, 64)}
    for use, values in expected.items():
        defaults = checkpoints.model_defaults(tmp_path, use)
        assert tuple(defaults[name] for name in ("learning_rate", "iterations", "resolution")) == values


def test_out_of_memory_in_a_text_encoder_is_no_bad_input(run, monkeypatch):
    """A Mac has no type of error for it."""
    def full(*args):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 20 GB)")
    monkeypatch.setattr(checkpoints, "load_text_encoder", full)
    monkeypatch.setattr(checkpoints, "load_text_encoders", load_text_encoders)              # and not those kept for other tests
    code, _, err = run(ASTRONAUT)
    assert code == 1 and "MPS backend out of memory" in err.splitlines()[-1]


def test_a_lomd_that_is_none(run, lomd):
    Path("folder").mkdir()
    assert refused(run(ASTRONAUT, "--lomd", "folder"), "empty folder")
    Path("folder/lomd.safetensors").write_bytes(POINTER)
    assert refused(run(ASTRONAUT, "--lomd", "folder"), "name a file in it (lomd.safetensors")
    assert refused(run(ASTRONAUT, "--lomd", "folder/lomd.safetensors"), "git lfs pull")
    Path("gone.safetensors").symlink_to("nowhere")
    assert refused(run(ASTRONAUT, "--lomd", "gone.safetensors"), "dead link")
    Path("torn.safetensors").write_bytes(lomd.read_bytes()[:3000])
    assert refused(run(ASTRONAUT, "--lomd", "torn.safetensors"), "download it again")


def test_a_lomd_of_another_model(run, lomd, targets):
    shared, metadata = load_lomd(lomd)
    assert metadata["random"] == "true"
    wide = dict(shared) | {targets[3].path: torch.zeros(R1, targets[3].d_in + 8)}
    save_lomd("wide.safetensors", wide, metadata)
    assert refused(run(ASTRONAUT, "--lomd", "wide.safetensors"), targets[3].path)
    few = {path: a for path, a in shared.items() if path != targets[-1].path}
    save_lomd("few.safetensors", few, metadata)
    assert refused(run(ASTRONAUT, "--lomd", "few.safetensors"), targets[-1].path)
    assert refused(run(ASTRONAUT, "--lomd", "few.safetensors", "--out", "few.safetensors"), "overwrite")
    assert not Path("out.safetensors").exists()


def test_missing_lomd_names_both_ways_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert personalize.main([str(ASTRONAUT), "--model", str(MODEL), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "meta_train.py" in err and "--method lora" in err


def test_a_trained_lomd_here_is_found_and_not_called_random(tmp_path, monkeypatch, capsys, lomd, head):
    monkeypatch.chdir(tmp_path)
    shared, metadata = load_lomd(lomd)
    save_lomd("lomd.safetensors", shared, metadata | {"random": "false"})
    assert personalize.main([str(head), "--model", str(MODEL), "--device", "cpu", "--iters", "1",
                             "--resolution", "64"]) == 0
    assert capsys.readouterr().err == "" and read_metadata("out.safetensors")["lomd"].startswith("sha256 ")


def test_help_and_import_have_no_effect(tmp_path):
    help_text = subprocess.run([sys.executable, ROOT / "personalize.py", "--help"], cwd=tmp_path,
                               capture_output=True, text=True)
    assert help_text.returncode == 0 and "--save-crops" in help_text.stdout and help_text.stderr == ""
    assert not list(tmp_path.iterdir())
