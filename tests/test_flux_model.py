"""FLUX.1 against golden values, the direction of time, loading: python -m pytest tests/test_flux_model.py

tests/golden holds small random models and what two independent public implementations make of them in fp32: inputs and
outputs of transformer and autoencoder (their weights are those of hub/), hub/ a whole snapshot in both layouts, pipeline
the pictures it gives, and the names and shapes of the full-size checkpoints. With -m slow: loading a 2 GB checkpoint.
"""
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_model import (AutoEncoder, AutoEncoderConfig, DoubleStreamBlock, Flux, FluxConfig, SingleStreamBlock, apply_rope, denoise,
                        flow_matching_loss, get_noise, get_schedule, pack, position_ids, rotary_embedding, sample_times, unpack)
from metalora import MetaLoRA
from support import memory
from support.checkpoints import (diffusers_autoencoder_names, diffusers_flux_names, find_model, flux_files, load_autoencoder,
                                 load_flux, load_text_encoders)
from support.common import pick_device
from support.finding import model_name

GOLDEN = Path(__file__).parent / "golden"
HUB = GOLDEN / "hub"
LAYOUTS = json.loads((GOLDEN / "checkpoint_layouts.json").read_text())
TEXT_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
DEV = "models--black-forest-labs--FLUX.1-dev"
ORIGINAL, DIFFUSERS = ["flux1-dev.safetensors", "ae.safetensors", *TEXT_PARTS], ["transformer", "vae", *TEXT_PARTS]


def relative(found, expected):
    assert found.shape == expected.shape
    return ((found.float() - expected).norm() / expected.norm()).item()


def message(function, *arguments, **options):
    """The one line of the ValueError that the call must raise."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def python(code, *arguments, cwd=None, **environment):
    """Runs code in another process that finds the project."""
    return subprocess.Popen([sys.executable, "-B", "-c", code, *arguments], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": str(GOLDEN.parents[1])} | environment)


def link(folder, parts, source=HUB):
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        (folder / part).symlink_to((source / part).resolve())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same snapshot with the original files only, and with the diffusers files only."""
    base = tmp_path_factory.mktemp("hub")
    return {"original": link(base / "original", ORIGINAL), "diffusers": link(base / "diffusers", DIFFUSERS)}


@pytest.fixture(scope="module", params=["original", "diffusers"])
def models(request, folders):
    folder = folders[request.param]
    return load_flux(folder, dtype=torch.float32), load_autoencoder(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def text_encoders():
    return load_text_encoders(HUB, dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline():
    with safe_open(GOLDEN / "pipeline.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors | {"prompts": json.loads(file.metadata()["prompts"])}


# ---------------------------------------------------------------------------------------------------------------------
# Golden values


@torch.no_grad()
def test_transformer_and_five_euler_steps(models):
    flux, golden = models[0], load_file(GOLDEN / "dit.safetensors")
    given = {name[3:]: tensor for name, tensor in golden.items() if name.startswith("in.")}
    out = flux(given["img"], given["img_ids"], given["txt"], given["txt_ids"], given["timesteps"], given["y"],
               given["guidance"])
    assert relative(out, golden["out"]) < 1e-5
    assert get_schedule(5, 24) == pytest.approx(given["schedule_5_steps"].tolist(), abs=1e-6)
    latent = denoise(flux, unpack(given["img"], 12, 8), given["txt"], given["y"], num_steps=5, guidance=3.5)
    assert latent.dtype == torch.float32 and latent.shape == (2, 16, 12, 8)
    assert relative(pack(latent), golden["out.denoised_5_steps"]) < 1e-5
    img_ids, txt_ids = position_ids(2, 12, 8, given["txt"].shape[1])
    assert torch.equal(img_ids, given["img_ids"]) and torch.equal(txt_ids, given["txt_ids"])


@torch.no_grad()
def test_autoencoder(models):
    autoencoder, golden = models[1], load_file(GOLDEN / "autoencoder.safetensors")
    assert relative(autoencoder.moments(golden["in.img"]), golden["out.moments"]) < 1e-5
    assert relative(autoencoder.encode(golden["in.img"]), golden["out.z_mode_shifted_scaled"]) < 1e-5
    assert relative(autoencoder.decode(golden["out.z_mode_shifted_scaled"]), golden["out.decoded"]) < 1e-5


@torch.no_grad()
def test_autoencoder_with_channels_last(models):
    plain, golden = models[1], load_file(GOLDEN / "autoencoder.safetensors")
    autoencoder = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    image, latent = golden["in.img"], golden["out.z_mode_shifted_scaled"]
    for found, expected in ((autoencoder.encode(image), plain.encode(image)),
                            (autoencoder.posterior(image), plain.posterior(image)),
                            (autoencoder.decode(latent), plain.decode(latent))):
        assert relative(found, expected) < 1e-5
    assert autoencoder.moments(image).is_contiguous() and autoencoder.posterior(image).is_contiguous()


@pytest.fixture(scope="module")
def large():
    """The baby's autoencoder and the latent (1, 16, 48, 48) of a picture: large beside the tiles of these tests."""
    autoencoder = load_autoencoder(find_model("baby"), dtype=torch.float32)
    pixels = torch.frombuffer(bytearray(Image.open(GOLDEN.parents[1] / "baby" / "example.png").tobytes()), dtype=torch.uint8)
    return autoencoder, autoencoder.encode(pixels.view(1, 384, 384, 3).permute(0, 3, 1, 2) / 127.5 - 1)


@torch.no_grad()
def test_only_large_pictures_are_decoded_in_tiles(large, monkeypatch):
    autoencoder, latent = large[0], large[1][..., :16, :24]
    config, decoder, half = autoencoder.config, autoencoder.decoder, copy.deepcopy(autoencoder).bfloat16()
    whole, tiled, calls = decoder(latent / config.scale_factor + config.shift_factor), memory.upsample_tiled, []
    monkeypatch.setattr(memory, "upsample_tiled", lambda decoder, x: calls.append(len(x)) or tiled(decoder, x))
    monkeypatch.setattr(memory, "WHOLE_PIXELS", 128 * 192)
    assert torch.equal(autoencoder.decode(latent), whole) and not calls
    monkeypatch.setattr(memory, "WHOLE_PIXELS", 128 * 192 - 1)
    # smaller than a tile: the same but for rounding, and each picture of a batch by its own statistics
    both = autoencoder.decode(torch.cat((latent, 2 * latent)))
    assert relative(both[:1], whole) < 1e-5 and calls == [1, 1]
    in_bf16 = half.decode(latent)
    assert in_bf16.dtype == torch.bfloat16 and relative(in_bf16, whole) < 2e-2
    monkeypatch.undo()
    assert relative(both[1:], autoencoder.decode(2 * latent)) < 1e-5
    assert torch.equal(autoencoder.decode(latent), whole)                              # no statistics stay behind


@torch.no_grad()
@pytest.mark.parametrize("height, width, tile, bound", [
    (48, 11, 24, 3e-3), (9, 47, 24, 3e-3),     # tall and wide, tiles in one direction; every feature's statistics
    (41, 48, 24, 3e-2)])                       # tiles in both; statistics of every second feature
def test_tiles_give_the_whole_picture(large, monkeypatch, height, width, tile, bound):
    autoencoder, latent = large[0], large[1][..., :height, :width]
    whole = autoencoder.decode(latent)

    def distance(overlap):
        monkeypatch.setattr(memory, "WHOLE_PIXELS", 0)
        monkeypatch.setattr(memory, "TILE", tile)
        monkeypatch.setattr(memory, "OVERLAP", overlap)
        return relative(autoencoder.decode(latent), whole)

    assert distance(overlap=8) < bound < distance(overlap=0)
    monkeypatch.setattr(memory, "held_statistics", lambda norm: torch.nn.GroupNorm.forward.__get__(norm))
    assert distance(overlap=8) > bound                      # with statistics of each tile's own


def test_tiles_cover_the_picture(monkeypatch):
    """Every pixel is one of its own place, away from the edges of its tile, and no tile is too large."""
    monkeypatch.setattr(memory, "TILE", 12)
    monkeypatch.setattr(memory, "OVERLAP", 4)
    sides = []

    class Decoder(torch.nn.Module):
        """Nearest neighbors, and zeros at a distance of 2 features from a tile's edges."""
        up, norm_out, conv_out = torch.nn.ModuleList([torch.nn.Identity()] * 2), None, SimpleNamespace(out_channels=1)

        def upsample(self, x):
            sides.extend(x.shape[2:])
            edges = torch.nn.functional.pad(torch.ones_like(x[..., 2:-2, 2:-2]), (2, 2, 2, 2)) if min(x.shape[2:]) > 4 else 1
            return torch.nn.functional.interpolate(torch.where(torch.as_tensor(edges) > 0, x, -x), scale_factor=2.0)

    for size in range(1, 60):
        x = 1 + torch.arange(3.0 * size).view(1, 1, 3, size)
        whole = torch.nn.functional.interpolate(x, scale_factor=2.0)
        found = memory.upsample_tiled(Decoder(), x)
        assert torch.equal(found.abs(), whole)
    sides.clear()
    x = 1 + torch.arange(35.0 * 41).view(1, 1, 35, 41)
    found = memory.upsample_tiled(Decoder(), x)
    assert torch.equal(found.abs(), torch.nn.functional.interpolate(x, scale_factor=2.0))
    assert (found[..., 4:-4, 4:-4] > 0).all() and max(sides) <= 12


@torch.no_grad()
def test_posterior_is_a_mean_and_a_standard_deviation(models):
    autoencoder, golden = models[1], load_file(GOLDEN / "autoencoder.safetensors")
    config, image = autoencoder.config, golden["in.img"]
    spread = config.scale_factor * torch.exp(0.5 * golden["out.moments"].chunk(2, dim=1)[1])
    mean, std = autoencoder.posterior(image).unbind(1)
    assert relative(mean, golden["out.z_mode_shifted_scaled"]) < 1e-5 and relative(std, spread) < 1e-5


def test_a_posterior_is_in_fp32_over_bf16_weights(folders):
    """Rounded once, in the encoder, and not again by the shift and the scale."""
    autoencoder, image = load_autoencoder(folders["original"], dtype=torch.bfloat16), torch.rand(1, 3, 32, 32) * 2 - 1
    mean, logvar = autoencoder.moments(image).double().chunk(2, dim=1)
    config, posterior = autoencoder.config, autoencoder.posterior(image)
    assert posterior.dtype == torch.float32
    assert relative(posterior[:, 0], config.scale_factor * (mean - config.shift_factor)) < 1e-6
    assert relative(posterior[:, 1], config.scale_factor * (0.5 * logvar).exp()) < 1e-6


def test_schedules():
    golden = json.loads((GOLDEN / "schedules.json").read_text())
    assert golden
    for case in golden:
        times = get_schedule(case["num_steps"], case["image_seq_len"])
        assert times == pytest.approx(case["timesteps"], abs=1e-6)
    assert get_schedule(4, 4096, shift=False) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_compiler_sees_the_same_rotation(monkeypatch):
    """It gets the complex product written out."""
    rope = rotary_embedding(torch.randint(0, 40, (2, 6, 3)), (4, 6, 6), 10_000)
    x = torch.randn(2, 3, 6, 16)
    expected = apply_rope(x, rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(apply_rope(x, rope), expected, atol=1e-6) and relative(expected, x) > 0.1


def test_packing_order_and_positions(pipeline):
    noise = pipeline["in.noise"]
    assert torch.equal(pack(noise), pipeline["in.noise_packed"])
    assert torch.equal(unpack(pipeline["in.noise_packed"], 12, 8), noise)
    latent = torch.arange(2 * 16 * 4 * 6).reshape(2, 16, 4, 6)
    assert pack(latent).shape == (2, 6, 64) and torch.equal(unpack(pack(latent), 4, 6), latent)
    assert torch.equal(pack(latent)[0, 1, :4], latent[0, 0, :2, 2:4].flatten())   # a token: channel, then 2 x 2 pixels
    img_ids, txt_ids = position_ids(3, 4, 6, 5)
    assert img_ids[2].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert txt_ids.shape == (3, 5, 3) and not txt_ids.any()


def test_full_size_names_shapes_and_counts():
    with torch.device("meta"):
        flux, autoencoder = Flux(FluxConfig()), AutoEncoder(AutoEncoderConfig())
    for model, name in ((flux, "flux1-dev.safetensors"), (autoencoder, "ae.safetensors")):
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == LAYOUTS[name]["tensors"]
        assert sum(p.numel() for p in model.parameters()) == LAYOUTS[name]["num_parameters"]


@pytest.mark.parametrize("layout", ["transformer/ (diffusers layout)", "vae/ (diffusers layout)"])
def test_full_size_diffusers_names_and_shapes(layout):
    with torch.device("meta"):
        model = Flux(FluxConfig()) if "transformer" in layout else AutoEncoder(AutoEncoderConfig())
    expected, seen = LAYOUTS[layout]["tensors"], []
    for name, parameter in model.named_parameters():
        parts = diffusers_flux_names(name) if "transformer" in layout else diffusers_autoencoder_names(name, 4)
        shapes, want = [expected[part] for part in parts], list(parameter.shape)
        assert [sum(shape[0] for shape in shapes), *shapes[0][1:]] in (want, want[:-2] if want[-2:] == [1, 1] else want)
        seen += parts
    assert sorted(seen) == sorted(expected)
    assert sum(math.prod(shape) for shape in expected.values()) == LAYOUTS[layout]["num_parameters"]


def test_text_encoders_of_the_snapshot(text_encoders, pipeline):
    clip_ids, t5_ids = text_encoders.tokenize(pipeline["prompts"])
    assert torch.equal(clip_ids, pipeline["out.clip_ids"]) and torch.equal(t5_ids, pipeline["out.t5_ids"])
    txt, y = text_encoders.encode(pipeline["prompts"])
    assert relative(txt, pipeline["out.t5"]) < 1e-5 and relative(y, pipeline["out.clip_pooled"]) < 1e-5


def test_clip_takes_77_tokens_whatever_its_tokenizer_says(text_encoders, monkeypatch):
    """Without a tokenizer_config.json, transformers takes its length for unlimited."""
    expected = text_encoders.tokenize(["a face"])[0]
    monkeypatch.setattr(text_encoders.clip_tokenizer, "model_max_length", 10 ** 30)
    assert torch.equal(text_encoders.tokenize(["a face"])[0], expected) and expected.shape == (1, 77)
    assert text_encoders.tokenize(["a face " * 100])[0].shape == (1, 77)


def test_snapshot_end_to_end(models, text_encoders, pipeline):
    flux, autoencoder = models
    txt, y = text_encoders.encode(pipeline["prompts"])
    steps = []
    latent = denoise(flux, pipeline["in.noise"], txt, y, 4, 3.5, on_step=lambda: steps.append(1))
    assert len(steps) == 4 and relative(pack(latent), pipeline["out.latent_packed"]) < 1e-5
    with torch.no_grad():
        image = ((autoencoder.decode(latent) + 1) / 2).clamp(0, 1)
    assert relative(image, pipeline["out.image_0_1"]) < 1e-5
    neg_txt, neg_y = text_encoders.encode(["black and white"] * 2)
    guided = denoise(flux, pipeline["in.noise"], txt, y, 4, 3.5, neg_txt, neg_y, true_cfg=2.5)
    assert relative(pack(guided), pipeline["out.latent_packed_true_cfg_2.5_negative_black_and_white"]) < 1e-5
    assert "negative prompt" in message(denoise, flux, pipeline["in.noise"], txt, y, 4, 3.5, true_cfg=2.5)


def test_guidance_is_asked_for():
    config = FluxConfig(hidden_size=32, num_heads=2, axes_dim=(4, 6, 6), depth=1, depth_single_blocks=1, vec_in_dim=8,
                        context_in_dim=8)
    ids = position_ids(1, 4, 4, 3)
    with pytest.raises(ValueError, match="guidance"):
        Flux(config)(torch.zeros(1, 4, 64), ids[0], torch.zeros(1, 3, 8), ids[1], torch.ones(1), torch.zeros(1, 8))
    assert "axes_dim" in message(FluxConfig, hidden_size=64)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DoubleStreamBlock, SingleStreamBlock])
def test_full_width_block_in_bf16(kind):
    config = FluxConfig()
    with torch.device("meta"):
        block = kind(config)
    block = block.to(torch.bfloat16).to_empty(device="cpu")
    for name, parameter in block.named_parameters():
        if name.endswith(".scale"):
            parameter.uniform_(0.5, 1.5)
        else:                                                         # unit variance in, unit variance out
            parameter.uniform_(-1, 1).mul_(math.sqrt(3 / (parameter.shape[-1] if parameter.dim() > 1 else 300)))
    img_ids, txt_ids = position_ids(1, 6, 8, 4)
    rope = rotary_embedding(torch.cat((txt_ids, img_ids), dim=1), config.axes_dim, config.theta)
    tokens = (12, 4) if kind is DoubleStreamBlock else (16,)
    inputs = [torch.randn(1, number, 3072).bfloat16() for number in tokens]
    vec = torch.randn(1, 3072).bfloat16()
    half = block(*inputs, vec, rope)
    full = block.float()(*(x.float() for x in inputs), vec.float(), rope)
    half, full = (out if isinstance(out, tuple) else (out,) for out in (half, full))
    for x, a, b in zip(inputs, half, full):
        assert a.dtype == torch.bfloat16 and relative(b, x.float()) > 0.3                # the block does something
        assert relative(a, b) < 2e-2


# ---------------------------------------------------------------------------------------------------------------------
# The direction of time, noise and loss


class Oracle:
    """Knows the picture: its velocity at (x, t) is (x - x_0) / t, which is eps - x_0 wherever x = (1 - t) x_0 + t eps."""
    def __init__(self, picture, error=0.0, guidance_embed=True):
        self.picture, self.error, self.times, self.guidance = picture, error, [], []
        self.config = FluxConfig(guidance_embed=guidance_embed)

    def __call__(self, img, img_ids, txt, txt_ids, timesteps, y, guidance):
        self.times.append(timesteps.tolist())
        self.guidance.append(guidance.tolist())
        return (img - pack(self.picture)) / timesteps[:, None, None] + self.error


@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("guidance_embed", [True, False])
def test_the_oracles_velocity_recovers_the_picture(steps, guidance_embed):
    picture, noise = torch.randn(2, 16, 6, 4), torch.randn(2, 16, 6, 4)
    oracle = Oracle(picture, guidance_embed=guidance_embed)
    latent = denoise(oracle, noise.bfloat16(), torch.zeros(2, 3, 8), torch.zeros(2, 8), steps, 3.5)
    assert torch.allclose(latent, picture, atol=1e-5)
    schedule = get_schedule(steps, 6, shift=guidance_embed)
    assert oracle.times == [pytest.approx([t, t]) for t in schedule[:-1]]               # each step at its own start
    assert oracle.guidance == [[3.5, 3.5]] * steps


def test_sampling_keeps_no_graph():
    """Of 30 steps, also where the model's weights are not frozen."""
    picture = torch.randn(1, 16, 4, 4, requires_grad=True)
    latent = denoise(Oracle(picture), torch.randn(1, 16, 4, 4), torch.zeros(1, 3, 8), torch.zeros(1, 8), 2, 3.5)
    assert not latent.requires_grad


def test_flow_matching_loss():
    picture, noise = torch.randn(3, 16, 6, 4), torch.randn(3, 16, 6, 4)
    text, t = (torch.zeros(3, 3, 8), torch.zeros(3, 8)), torch.tensor([0.1, 0.5, 0.999])
    oracle = Oracle(picture)
    assert flow_matching_loss(oracle, picture, noise, t, *text).shape == (3,)
    assert (flow_matching_loss(oracle, picture, noise, t, *text) < 1e-9).all()
    assert oracle.times[0] == pytest.approx(t.tolist()) and oracle.guidance[0] == [1, 1, 1]
    error = torch.tensor([0.5, -2.0, 3.0])[:, None, None]
    assert flow_matching_loss(Oracle(picture, error), picture, noise, t, *text).tolist() == \
        pytest.approx([0.25, 4.0, 9.0], rel=1e-4)
    weight = torch.zeros(3, 1, 6, 4)
    weight[:, :, 0] = 3.0                                                                # a sixth of the places, three times
    assert flow_matching_loss(Oracle(picture, error), picture, noise, t, *text, weight=weight).tolist() == \
        pytest.approx([0.125, 2.0, 4.5], rel=1e-4)
    backwards = flow_matching_loss(Oracle(noise), picture, noise, t, *text)             # x_0 and noise exchanged
    assert (backwards > 1).all()


def test_recomputed_blocks_give_the_same_gradient_and_keep_less():
    """Recomputation changes neither loss nor gradient, also through an adapter; what autograd keeps shrinks."""
    flux = load_flux(HUB, dtype=torch.float32)
    adapter = MetaLoRA(flux, rank=2)
    adapter.bank.weight.normal_(std=0.1)
    latent, noise, t = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.7])
    txt, y, results = torch.randn(2, 5, 40), torch.randn(2, 24), []
    for count in (0, 99):
        memory.recompute_blocks(flux, count)
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor
        adapter.assign(torch.tensor([0, 0]))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = flow_matching_loss(flux, latent, noise, t, txt, y).mean()
        forward = kept
        loss.backward()
        results.append((loss.item(), adapter.rows.grad.clone(), forward))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().sum() > 0 and results[1][2] < results[0][2] / 3


def test_training_times_are_logit_normal():
    t = sample_times(50_000, torch.Generator().manual_seed(3))
    assert torch.equal(t, sample_times(50_000, torch.Generator().manual_seed(3)))
    assert t.shape == (50_000,) and t.min() > 0 and t.max() < 1
    z = torch.logit(t.double()).sort().values
    expected = torch.distributions.Normal(0, 1).cdf(z)
    assert (expected - torch.linspace(0, 1, 50_000)).abs().max() < 0.01      # Kolmogorov: 0.0087 at p = 0.001


def test_start_noise_is_the_references_bf16_stream():
    noise = get_noise(96, 64, seed=7)
    assert noise.shape == (1, 16, 12, 8) and noise.dtype == torch.bfloat16
    torch.randn(5)                                                            # the global generator has no part in it
    assert torch.equal(noise, get_noise(96, 64, seed=7)) and not torch.equal(noise, get_noise(96, 64, seed=8))
    shape, generator = (1, 16, 12, 8), torch.Generator().manual_seed(7)
    assert torch.equal(noise, torch.randn(shape, generator=generator, dtype=torch.bfloat16))
    assert get_noise(100, 65, seed=0).shape == (1, 16, 14, 10)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_models_are_whole_frozen_and_as_asked(folders, layout, dtype):
    flux, autoencoder = load_flux(folders[layout], "cpu", dtype), load_autoencoder(folders[layout], "cpu", dtype)
    for model, file in ((flux, "flux1-dev.safetensors"), (autoencoder, "ae.safetensors")):
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
        assert {t.dtype for t in model.parameters()} == {dtype}
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        expected, found = load_file(HUB / file), model.state_dict()
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loading_to_a_cuda_device(folders):
    flux = load_flux(folders["diffusers"], "cuda", torch.bfloat16)
    assert {t.device.type for t in flux.parameters()} == {"cuda"}
    autoencoder = load_autoencoder(folders["diffusers"], "cuda", torch.bfloat16)
    assert autoencoder.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def changed_flux(folder, change, name="flux1-dev.safetensors", metadata=None):
    """A folder with the small transformer, its dict of tensors changed; name may be that of a diffusers file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with safe_open(HUB / name, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata() if metadata is None else metadata
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata=metadata)
    if (HUB / name).parent != HUB:
        shutil.copy((HUB / name).parent / "config.json", (folder / name).parent)
    return folder


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    def change(tensors):
        del tensors["double_blocks.1.img_attn.proj.bias"], tensors["txt_in.bias"]
        tensors["single_blocks.7.linear1.bias"] = torch.zeros(3)
        tensors["img_in.bias"] = torch.zeros(65)
        tensors["time_in.in_layer.bias"] = torch.zeros(())
    text = message(load_flux, changed_flux(tmp_path, change))
    assert "2 missing" in text and ("txt_in.bias" in text or "double_blocks.1.img_attn.proj.bias" in text)
    assert "1 unexpected (single_blocks.7.linear1.bias)" in text
    assert "2 misshapen" in text and ("img_in.bias [65]" in text or "time_in.in_layer.bias []" in text)
    assert "flux1-dev.safetensors" in text


@pytest.mark.parametrize("change, problem", [
    (lambda t: t.pop("txt_in.bias"), "1 missing (txt_in.bias)"),
    (lambda t: t.update(stray=torch.zeros(2)), "1 unexpected (stray)"),
    (lambda t: t.update({"img_in.weight": torch.zeros(64, 63)}), "1 misshapen (img_in.weight [64, 63]")])
def test_each_alone_is_enough_to_refuse(tmp_path, change, problem):
    assert problem in message(load_flux, changed_flux(tmp_path, change))


def resize(tensors, **shapes):
    for name, shape in shapes.items():
        tensors[f"transformer_blocks.0.attn.{name}.weight"] = torch.zeros(shape)


@pytest.mark.parametrize("shapes", [dict(to_q=(32, 64), to_k=(96, 64)), dict(to_k=(64, 1)), dict(to_v=(64, 32))])
def test_parts_of_a_fused_layer_must_each_fit(tmp_path, shapes):
    """Rows that only add up, or one column that would be broadcast, would load as another model."""
    name = "transformer/diffusion_pytorch_model.safetensors"
    text = message(load_flux, changed_flux(tmp_path, lambda tensors: resize(tensors, **shapes), name))
    assert f"{len(shapes)} misshapen (transformer_blocks.0.attn.{min(shapes)}.weight" in text


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name, load", [("flux1-dev.safetensors", load_flux), ("ae.safetensors", load_autoencoder)])
def test_torn_files(tmp_path, share, name, load):
    whole = (HUB / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:int(len(whole) * share)])
    assert name in message(load, tmp_path)


def shards(folder):
    """The small diffusers transformer, cut in two files with an index."""
    source, folder = HUB / "transformer", folder / "transformer"
    folder.mkdir()
    tensors, index = load_file(source / "diffusion_pytorch_model.safetensors"), {}
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        part = dict(list(tensors.items())[number - 1::2])
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    shutil.copy(source / "config.json", folder)
    return folder


def test_sharded_diffusers_folder(tmp_path):
    folder = shards(tmp_path)
    expected, found = load_file(HUB / "flux1-dev.safetensors"), load_flux(tmp_path).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "diffusion_pytorch_model-00002-of-00002.safetensors" in message(load_flux, tmp_path)
    for torn in ("{", '{"weight_map": 5}', "{}"):
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(torn)
        assert "index.json" in message(load_flux, tmp_path)


def test_schnell(tmp_path):
    """Told by its missing guidance tensors; 256 text tokens, no shift of the schedule, no guidance input."""
    def strip(tensors):
        for name in [name for name in tensors if "guidance" in name]:
            del tensors[name]
    with safe_open(HUB / "flux1-dev.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"]) | {"guidance_embed": False}
    changed_flux(tmp_path, strip, metadata={})
    (tmp_path / "flux1-dev.safetensors").rename(tmp_path / "flux1-schnell.safetensors")
    # no metadata: the published width, which this small file does not have, and its own number of blocks
    assert flux_files(tmp_path)[1] == FluxConfig(guidance_embed=False, depth=2, depth_single_blocks=3)
    assert "misshapen" in message(load_flux, tmp_path)
    changed_flux(tmp_path, strip, metadata={"config": json.dumps(config)})
    (tmp_path / "flux1-dev.safetensors").rename(tmp_path / "flux1-schnell.safetensors")
    flux = load_flux(tmp_path, dtype=torch.float32)
    assert not hasattr(flux, "guidance_in")
    link(tmp_path, [*TEXT_PARTS, "ae.safetensors"])
    assert find_model(str(tmp_path)) == tmp_path
    encoders = load_text_encoders(tmp_path, dtype=torch.float32)
    txt, y = encoders.encode(["a face"])
    assert txt.shape == (1, 256, 40)
    noise = torch.randn(1, 16, 4, 4)
    assert torch.equal(denoise(flux, noise, txt, y, 2, 3.5), denoise(flux, noise, txt, y, 2, 1.0))


def test_dev_without_metadata_has_the_published_width(tmp_path):
    changed_flux(tmp_path, lambda tensors: None, metadata={})
    assert flux_files(tmp_path)[1] == FluxConfig(depth=2, depth_single_blocks=3)


def test_original_files_come_first_where_both_are_there():
    files, config = flux_files(HUB)
    assert "x_embedder.weight" not in files.names and files.path == HUB / "flux1-dev.safetensors" and config.hidden_size == 64


@pytest.mark.parametrize("config, problem", [
    ('{"depth": 2, "rotary": 1}', "'rotary'"), ("{", "FluxConfig"), ("[3]", "FluxConfig"), ('{"axes_dim": 5}', "FluxConfig"),
    ('{"hidden_size": 65}', "axes_dim")])
def test_configurations_in_metadata_that_cannot_be_used(tmp_path, config, problem):
    text = message(load_flux, changed_flux(tmp_path, lambda tensors: None, metadata={"config": config}))
    assert problem in text and "flux1-dev.safetensors" in text


def test_unknown_autoencoder_field(tmp_path):
    save_file(load_file(HUB / "ae.safetensors"), tmp_path / "ae.safetensors", metadata={"config": '{"quant": 1}'})
    assert "'quant'" in message(load_autoencoder, tmp_path)


@pytest.mark.parametrize("part, load", [("transformer", load_flux), ("vae", load_autoencoder)])
def test_diffusers_configurations_that_cannot_be_used(tmp_path, part, load):
    shutil.copytree(HUB / part, tmp_path / part)
    config = tmp_path / part / "config.json"
    for text in ("{}", "{", "3"):
        config.write_text(text)
        assert f"{part}/config.json" in message(load, tmp_path)
    shutil.copy(HUB / part / "config.json", config)
    (tmp_path / part / "diffusion_pytorch_model.safetensors").unlink()
    assert "lacks diffusion_pytorch_model.safetensors" in message(load, tmp_path)


def test_folders_without_the_part(tmp_path):
    assert "no transformer" in message(load_flux, tmp_path)
    assert "no autoencoder" in message(load_autoencoder, tmp_path)
    assert "tokenizer" in message(load_text_encoders, tmp_path)
    assert "no transformer" in message(load_flux, tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def write_random_checkpoint(folder, config, diffusers):
    """A checkpoint of random bf16 bits, never in memory as a whole; returns the bytes of its tensors."""
    with torch.device("meta"):
        model = Flux(config)
    shapes = {}
    for name, parameter in model.named_parameters():
        parts, (rows, *rest) = diffusers_flux_names(name) if diffusers else [name], parameter.shape
        first = config.hidden_size if len(parts) > 1 else rows
        shapes |= dict.fromkeys(parts, (first, *rest))
        shapes[parts[-1]] = (rows - first * (len(parts) - 1), *rest)
    header, end = {"__metadata__": {"config": json.dumps(vars(config))}}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    path = folder / "flux1-dev.safetensors"
    if diffusers:
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        path.parent.mkdir()
        (path.parent / "config.json").write_text(json.dumps(dict(
            attention_head_dim=128, axes_dims_rope=config.axes_dim, guidance_embeds=True, in_channels=64,
            joint_attention_dim=config.context_in_dim, num_attention_heads=config.num_heads, num_layers=config.depth,
            num_single_layers=config.depth_single_blocks, out_channels=None, pooled_projection_dim=config.vec_in_dim)))
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        block = os.urandom(2 ** 22)
        for start in range(0, end, len(block)):
            file.write(block[:end - start])
    return end


MEASURE = """
import re, sys, threading, torch
from flux_model import Flux, FluxConfig
from support.checkpoints import flux_files, load_flux

with torch.device("meta"):               # for its first use torch imports what takes as much as a sixth of the model
    Flux(FluxConfig(hidden_size=48, num_heads=1, axes_dim=(16, 16, 16)))

def private_memory():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def measure(load):
    before, samples, done = private_memory(), [], threading.Event()
    def watch():
        while not done.wait(0.002):
            samples.append(private_memory())
    thread = threading.Thread(target=watch)
    thread.start()
    flux = load()
    samples.append(private_memory())
    done.set()
    thread.join()
    print(before, max(samples), sum(p.nbytes for p in flux.parameters()))

def load():
    return load_flux(sys.argv[1], "cpu", torch.bfloat16, fp8=len(sys.argv) > 2)

def load_twice():
    files = flux_files(sys.argv[1])[0]
    copies = [files[name].clone() for name in files.names]
    return load()

measure(load)
measure(load_twice)
"""


def peaks_of_loading(folder, *fp8):
    """RssAnon of a process that loads this folder, then again beside a deliberate second copy.

    Twice: bytes before, at the peak, and of the model. glibc may keep freed pieces for later, by chance as much as the model
    itself; with a fixed threshold it gives back all that is larger, so what is measured is what is held.
    """
    child = python(MEASURE, str(folder), *fp8, MALLOC_MMAP_THRESHOLD_="65536")
    output, errors = child.communicate()
    assert child.returncode == 0, errors
    return [tuple(map(int, line.split())) for line in output.splitlines()]


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")


def check_peaks(size, peaks):
    """What Python and torch themselves take (0.3 GB with CUDA's libraries) is no part of the loading."""
    (before, peak, loaded), (before_copy, peak_copy, _) = peaks
    assert loaded == size and 0.98 * size < peak - before < 1.05 * size
    assert peak_copy - before_copy > 1.9 * size                               # the scale itself is tested


@linux
def test_loading_makes_no_second_copy(tmp_path):
    config = FluxConfig(hidden_size=512, num_heads=4, depth=4, depth_single_blocks=16, context_in_dim=512)
    size = write_random_checkpoint(tmp_path, config, diffusers=True)
    assert size > 190e6
    check_peaks(size, peaks_of_loading(tmp_path))


@linux
def test_8_bits_are_made_while_loading(tmp_path):
    """Half of the file and a tensor or two on the way, never all of it."""
    config = FluxConfig(hidden_size=512, num_heads=4, depth=4, depth_single_blocks=16, context_in_dim=512)
    size = write_random_checkpoint(tmp_path, config, diffusers=False)
    before, peak, loaded = peaks_of_loading(tmp_path, "fp8")[0]
    assert 0.5 * size < loaded < 0.53 * size and peak - before < 0.6 * size


@linux
@pytest.mark.slow
@pytest.mark.parametrize("diffusers", [False, True])
def test_loading_two_gigabytes(tmp_path, diffusers):
    config = FluxConfig(hidden_size=1536, num_heads=12, depth=5, depth_single_blocks=18)
    size = write_random_checkpoint(tmp_path, config, diffusers)
    peaks = peaks_of_loading(tmp_path)
    shutil.rmtree(tmp_path)
    before, peak, _ = peaks[0]
    print(f"\n{size / 2**30:.3f} GiB; private memory {before / 2**30:.3f} GiB before, {peak / 2**30:.3f} at the peak: "
          f"{peak / size:.3f} of the file, the growth {(peak - before) / size:.3f}")
    assert size > 2 * 2**30
    check_peaks(size, peaks)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_prompts_of_every_kind(text_encoders):
    prompts = ["", "a very long story " * 500, "中文 👩‍🦰 \u202eabc\x00\n é", "a face"]
    clip_ids, t5_ids = text_encoders.tokenize(prompts)
    assert clip_ids.shape == (4, 77) and t5_ids.shape == (4, 512)
    start, end = text_encoders.clip_tokenizer.bos_token_id, text_encoders.clip_tokenizer.eos_token_id
    assert clip_ids[0].tolist() == [start] + [end] * 76 and t5_ids[0].tolist() == [1] + [0] * 511
    assert clip_ids[1, -1] == end and end not in clip_ids[1, :-1] and t5_ids[1, -1] == 1 and (t5_ids[1] > 0).all()
    txt, y = text_encoders.encode(prompts)
    assert txt.shape == (4, 512, 40) and y.shape == (4, 24) and txt.isfinite().all() and y.isfinite().all()
    alone = text_encoders.encode(prompts[3:])
    assert relative(txt[3:], alone[0]) < 1e-5 and relative(y[3:], alone[1]) < 1e-5


def changed_text(folder, part, change_config=None, change_tensors=None):
    """The small snapshot with one text encoder changed."""
    link(folder, [name for name in DIFFUSERS if name != part])
    shutil.copytree(HUB / part, folder / part)
    if change_config:
        config = json.loads((folder / part / "config.json").read_text())
        change_config(config)
        (folder / part / "config.json").write_text(json.dumps(config))
    if change_tensors:
        tensors = change_tensors(load_file(folder / part / "model.safetensors"))
        save_file(tensors, folder / part / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_text_encoders_as_published_give_the_same(tmp_path, text_encoders):
    """The hub's files are older: CLIP's names have a prefix and its config another end token, T5's says it is untied."""
    def clip_config(config):
        config.update(bos_token_id=0, eos_token_id=2, pad_token_id=1)

    def t5_config(config):
        config.update(tie_word_embeddings=False)
        del config["scale_decoder_outputs"]
    changed_text(tmp_path / "clip", "text_encoder", clip_config,
                 lambda tensors: {f"text_model.{name}": tensor for name, tensor in tensors.items()})
    changed_text(tmp_path / "both", "text_encoder_2", t5_config)
    (tmp_path / "both" / "text_encoder").unlink()
    (tmp_path / "both" / "text_encoder").symlink_to(tmp_path / "clip" / "text_encoder")
    older = load_text_encoders(tmp_path / "both", dtype=torch.float32)
    for found, expected in zip(older.encode(["a face", ""]), text_encoders.encode(["a face", ""])):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("part, name", [("text_encoder", "encoder.layers.0.mlp.fc1.weight"),
                                        ("text_encoder_2", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")])
def test_text_encoders_that_do_not_fit_are_refused(tmp_path, capfd, part, name):
    """transformers would go on with random weights in place of what is missing."""
    def lack(tensors):
        return {key: tensor for key, tensor in tensors.items() if key != name}
    text = message(load_text_encoders, changed_text(tmp_path / "a", part, None, lack))
    assert "1 missing" in text and name in text
    text = message(load_text_encoders, changed_text(tmp_path / "b", part, None, lambda t: t | {name: torch.zeros(3, 3)}))
    assert "1 mismatched" in text and name in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", TEXT_PARTS)
def test_text_files_that_are_not_there(tmp_path, part):
    """An absent vocabulary would be replaced by an empty one in silence."""
    link(tmp_path, [name for name in DIFFUSERS if name != part])
    assert part in message(load_text_encoders, tmp_path)
    (tmp_path / part).mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        if (HUB / part / name).exists():
            shutil.copy(HUB / part / name, tmp_path / part)
    assert part in message(load_text_encoders, tmp_path)
    assert part in message(find_model, str(tmp_path))


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json", "text_encoder/config.json",
                                  "tokenizer_2/tokenizer_config.json", "text_encoder_2/model.safetensors"])
def test_torn_text_files(tmp_path, file):
    folder = changed_text(tmp_path, file.partition("/")[0])
    (folder / file).write_bytes((HUB / file).read_bytes()[:50])
    assert str(folder) in message(load_text_encoders, folder)


def test_loading_text_encoders_is_silent_and_leaves_transformers_as_it_was(capfd):
    from transformers.utils import logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_text_encoders(HUB)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# ---------------------------------------------------------------------------------------------------------------------
# Finding a model


def test_folders_that_are_no_model(tmp_path):
    assert find_model(str(HUB)) == HUB
    text = message(find_model, str(tmp_path / "nowhere"))
    assert "nowhere" in text and "flux-dev" in text and "baby" in text
    assert str(tmp_path) in message(find_model, str(tmp_path))
    folder = link(tmp_path / "part", ["flux1-dev.safetensors", *TEXT_PARTS])
    assert "autoencoder" in message(find_model, str(folder))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_diffusers_or_original_folder_is_found(folders, layout):
    assert find_model(str(folders[layout])) == folders[layout]


def cache(home, parts, revision="0123456789abcdef0123456789abcdef01234567"):
    """The hub's own cache, laid out by hand."""
    (home / "hub" / DEV / "refs").mkdir(parents=True)
    (home / "hub" / DEV / "refs" / "main").write_text(revision)
    return link(home / "hub" / DEV / "snapshots" / revision, parts)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache in tmp_path, in this process."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return huggingface_hub


def test_local_cache_without_network(tmp_path):
    """As a user meets it, in its own process: flux-dev is in the cache, flux-schnell is not."""
    snapshot = cache(tmp_path, ORIGINAL)
    code = ("from support.checkpoints import find_model\nprint(find_model('flux-dev'))\n"
            "try: find_model('flux-schnell')\nexcept ValueError as error: print(error)")
    child = python(code, HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    output, errors = child.communicate()
    assert (child.returncode, errors) == (0, "")
    found, refused = output.splitlines()
    assert found == str(snapshot)
    for word in ("black-forest-labs/FLUX.1-schnell", "HF_HUB_OFFLINE=0' as environment variable", "--model baby"):
        assert word in refused
    assert "license" not in refused                                     # that of a file that nobody asked for yet


@pytest.mark.parametrize("parts, whole", [
    (ORIGINAL, True), (DIFFUSERS, True),
    (["transformer", *TEXT_PARTS], False), (["flux1-dev.safetensors", "ae.safetensors", *TEXT_PARTS[:3]], False)])
def test_cached_snapshots_of_either_layout(tmp_path, hub, parts, whole):
    snapshot = cache(tmp_path, parts)
    if whole:
        assert find_model("flux-dev") == snapshot
    else:
        text = message(find_model, "flux-dev")
        assert "connect to the network" in text and "--model baby" in text


def test_half_a_download_of_the_text_encoder_is_completed(tmp_path, hub, monkeypatch):
    """T5 is two files of 5 GB: with one of them there the snapshot is not whole, and the rest is fetched."""
    snapshot = cache(tmp_path, ["flux1-dev.safetensors", "ae.safetensors", *TEXT_PARTS[:3]])
    (snapshot / "text_encoder_2").mkdir()
    shutil.copy(HUB / "text_encoder_2" / "config.json", snapshot / "text_encoder_2")
    missing = "model-00002-of-00002.safetensors"
    index = {"weight_map": {"shared.weight": missing}}
    (snapshot / "text_encoder_2" / "model.safetensors.index.json").write_text(json.dumps(index))
    real, asked = hub.snapshot_download, []

    def download(repo, allow_patterns=None, **options):
        if options.get("local_files_only"):
            return real(repo, **options)
        asked.append((repo, allow_patterns))
        shutil.copy(HUB / "text_encoder_2" / "model.safetensors", snapshot / "text_encoder_2" / missing)
        return str(snapshot)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert find_model("flux-dev") == snapshot
    [(repo, patterns)] = asked
    assert repo == "black-forest-labs/FLUX.1-dev" and "text_encoder*/*" in patterns
    assert "flux1-dev.safetensors" in patterns and not any("transformer" in pattern for pattern in patterns)


def test_a_broken_connection_is_one_line(tmp_path, hub, monkeypatch):
    from huggingface_hub.errors import HTTPError

    def download(repo, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise hub.errors.LocalEntryNotFoundError("not here")
        raise HTTPError("connection reset\nby peer")
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert "connection reset" in message(find_model, "flux-dev")


@pytest.mark.parametrize("status, gated", [(401, True), (403, True), (503, False)])
def test_a_licence_is_asked_for_where_it_is_what_is_missing(hub, monkeypatch, status, gated):
    from huggingface_hub.errors import HfHubHTTPError

    def download(repo, **options):
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        error.args, error.response = ("word " * 100,), SimpleNamespace(status_code=status)
        raise error
    monkeypatch.setattr(hub, "snapshot_download", download)
    text = message(find_model, "flux-dev")
    assert ("Non-Commercial" in text and "hf auth login" in text) == gated
    assert "word ...)" in text and text.count("word") < 100             # cut, but between words


def test_a_listing_that_has_more_than_is_taken(tmp_path, hub):
    """The hub's library keeps a listing, and calls a snapshot incomplete that lacks any file of it."""
    snapshot = cache(tmp_path, ORIGINAL)
    listing = tmp_path / "hub" / DEV / "trees" / f"{snapshot.name}.json"
    listing.parent.mkdir()
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in ("flux1-dev.safetensors", "transformer/config.json")}
    listing.write_text(json.dumps({"format_version": 1, "files": files}))
    with pytest.raises(hub.errors.LocalEntryNotFoundError, match="incomplete"):
        hub.snapshot_download("black-forest-labs/FLUX.1-dev", local_files_only=True)
    assert find_model("flux-dev") == snapshot
    (tmp_path / "mine").mkdir()
    shutil.copy(HUB / "flux1-dev.safetensors", tmp_path / "mine" / "merge.safetensors")
    assert find_model(str(tmp_path / "mine" / "merge.safetensors")).autoencoder == snapshot / "ae.safetensors"


def test_names_of_the_hub(tmp_path, monkeypatch):
    assert {name: model_name(name) for name in ("flux-dev", "Baby", "ostris/Flex.1-alpha", "FLUX.1-dev")} == {
        name: name for name in ("flux-dev", "Baby", "ostris/Flex.1-alpha", "FLUX.1-dev")}
    for name in ("Black-Forest-Labs/flux.1-schnell", "https://huggingface.co/black-forest-labs/FLUX.1-schnell/"):
        assert model_name(name) == "flux-schnell"
    (tmp_path / "black-forest-labs" / "FLUX.1-dev").mkdir(parents=True)
    assert model_name("black-forest-labs/FLUX.1-dev") == "flux-dev"
    monkeypatch.chdir(tmp_path)
    assert model_name("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"


def test_importing_does_nothing(tmp_path):
    code = ("import sys, torch, flux_model\nassert not torch.cuda.is_initialized()\n"
            "assert not {'transformers', 'huggingface_hub'} & set(sys.modules)")
    child = python(code, cwd=tmp_path, HOME=str(tmp_path), HF_HOME=str(tmp_path / "hf"))
    assert (*child.communicate(), child.returncode) == ("", "", 0) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["quantum", "cpu:x", "cpu:1", "cpu:", "cpu:00", "cuda:99", "mps:1", ":0", ""])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="--device .* is not available here; available: .*cpu"):
        pick_device(name)


@pytest.mark.parametrize("own", [None, "1.4"])
def test_the_gpu_of_a_mac_says_when_it_is_full(own, monkeypatch):
    """By itself it swaps instead, and a step that does not fit is never taken for one. The variable is the user's own limit."""
    limits = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", limits.append)
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    if own:
        monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", own)
    assert pick_device("mps").type == "mps" and limits == ([] if own else [1.0])


def test_a_device_that_is_there():
    assert pick_device("cpu") == torch.device("cpu") and pick_device("cpu:0").type == "cpu"
