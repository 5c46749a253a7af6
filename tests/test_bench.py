"""bench/: its FLOPs against known figures and torch's own counter, and what it prints for a tiny model."""
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import peer, stages
from flux_model import Flux, FluxConfig, flow_matching_loss
from metalora import MetaLoRA
from support.speed import Fp8Linear

TINY = FluxConfig(vec_in_dim=24, context_in_dim=40, hidden_size=64, num_heads=2, depth=1,
                  depth_single_blocks=1, axes_dim=(4, 14, 14))


def test_flops_of_flux_dev():
    """The published figures, in TFLOP, rounded as they are there; 512 text tokens."""
    for side, total, step in ((1024, 74.4, 171), (768, 41.9, 92), (512, 21.5, 45)):
        flops = stages.count_flops(FluxConfig(), (side // 16) ** 2, 512)
        assert flops["linears"] + flops["attention"] == pytest.approx(total * 1e12, abs=0.05e12)
        assert flops["step"] == pytest.approx(step * 1e12, abs=0.6e12)
    flops = stages.count_flops(FluxConfig(), 4096, 512)
    assert flops["linears"] == pytest.approx(59.5e12, abs=0.05e12)
    assert flops["attention"] == pytest.approx(14.9e12, abs=0.05e12)


def test_flops_equal_torch_own_count():
    """Image and text tokens of different number, so that neither can stand for the other. Attention by plain matmuls: torch counts
    the CPU's flash kernel in some releases only. They keep the scores, so that the backward pass has four matmuls, not five."""
    flux, counter = Flux(TINY).requires_grad_(False), FlopCounterMode(display=False)
    latent, txt = torch.randn(1, 16, 6, 10, requires_grad=True), torch.randn(1, 7, 40, requires_grad=True)
    flops = stages.count_flops(TINY, 15, 7)
    noise, y = torch.randn(1, 16, 6, 10), torch.randn(1, 24)
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = flow_matching_loss(flux, latent, noise, torch.rand(1), txt, y)
        assert counter.get_total_flops() == flops["linears"] + flops["attention"]
        loss.sum().backward()
        assert counter.get_total_flops() == flops["step"] - flops["attention"] / 2


def test_prints_what_it_measured(monkeypatch, capsys):
    monkeypatch.setitem(stages.MODELS, "mid", (TINY, 16, 7))
    assert stages.main(["--model", "mid", "--seconds", "0.001", "--device", "cpu", "--rank", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mid, random weights: ") and f"torch {torch.__version__}, cpu," in out
    assert f"{torch.get_num_threads()} threads, float32" in out
    assert "16 image + 7 text tokens, rank 2" in out
    found = re.findall(r"([\d.e+-]+) \(([\d.e+-]+) to ([\d.e+-]+)\)", out)
    assert len(found) == 9 + 7 and all(0 < float(low) <= float(mid) <= float(high) for low, mid, high in [(f[1], f[0], f[2]) for f in found])
    assert len(re.findall(r"([\d.]+)% of the bound", out)) == 6 and out.count("3 pairs") == 3
    for row in ("sampling step, 64 px  ", "sampling step, 64 px, one LoRA", "base alone, forward and backward, 64 px",
                *(f"training step, 64 px, {n} of 2 twice" for n in (0, 1, 2)),
                "stage 1, 4 pictures of 4 people, 64 px, 0 of 2 twice"):
        assert out.count(row) == 1, row


@pytest.mark.parametrize("switches", [["--offload", "--fp8"]])
def test_every_stage_of_the_baby(switches, monkeypatch, capsys):
    """Text, autoencoder and the whole of personalize.py too, with weights that live elsewhere or have 8 bits."""
    monkeypatch.setitem(stages.personalize.ITERATIONS, "meta-lora", 2)
    assert stages.main(["--model", "baby", "--seconds", "0.001", "--device", "cpu", "--dtype", "bfloat16", *switches]) == 0
    out = capsys.readouterr().out
    assert out.startswith("baby, its own weights") and all(f", {word[2:]}" in out.splitlines()[0] for word in switches)
    for row in ("text, one prompt", "encode a picture, 128 px", "decode a picture", "stage 1", "photo to LoRA, 128 px"):
        assert out.count(row) == 1, row
    assert "over" not in out and out.count("training step") == (1 if "--offload" in switches else 3)


def test_random_weights_of_full_size_are_of_the_right_shapes(monkeypatch):
    """FLUX.1's published sizes of T5 and CLIP, in parameters, on meta; a small transformer really runs."""
    made, meta = {}, torch.device("meta")
    def random_weights(kind, config, *like):
        with meta:
            made[kind.__name__] = kind(config)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "random_weights", random_weights)
        models = stages.random_models(FluxConfig(), meta, torch.bfloat16, 512, stages.Plan())
        models.text(), models.autoencoder()
    millions = {name: round(sum(p.numel() for p in model.parameters()) / 1e6) for name, model in made.items()}
    files = stages.RandomFiles(FluxConfig(), meta, torch.bfloat16)
    assert millions == {"AutoEncoder": 84, "T5EncoderModel": 4762, "CLIPTextModel": 123}
    assert round(sum(p.numel() for p in files.file_of.values()) / 1e6) == 11901
    for fp8 in (False, True):
        model = stages.random_flux(TINY, torch.device("cpu"), torch.float32, stages.Plan(fp8=fp8))
        assert sum(isinstance(m, Fp8Linear) for m in model.modules()) == 13 * fp8
        assert 0.3 < flow_matching_loss(model, *stages.random_inputs(model, 1, 16, 7)).item() < 100


@pytest.mark.parametrize("words", ["--seconds 0", "--resolution -4", "--rank x", "--device quantum",
                                   "--model nowhere", "--what"])
def test_bad_input_is_one_line(words, capsys):
    assert stages.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("bench.stages: ") and err.count("\n") == 1


def test_against_diffusers_and_peft(monkeypatch, capsys):
    """With them: the same velocities on the same weights, and their numbers beside ours; without, one line."""
    monkeypatch.setitem(stages.MODELS, "small", (TINY, 16, 7))
    words = ["--device", "cpu", "--seconds", "0.001"]
    try:
        import diffusers, peft  # noqa: E401, F401
        assert peer.main(words) == 0
        out = capsys.readouterr().out
        assert float(re.search(r"diffusers, 64 px +(\S+) of the velocity", out)[1]) < 1e-5
        assert "training step" in out and "sampling step, 64 px, one LoRA" in out and out.count("ratio") == 2
    except ImportError:
        assert peer.main(words) == 2 and "pip install diffusers peft" in capsys.readouterr().err


def test_all_weights_have_a_name_of_diffusers():
    """Those of an adapted model too, without a copy; but for the last modulation, whose halves are exchanged there."""
    flux = stages.random_flux(TINY, torch.device("cpu"), torch.float32, stages.Plan())
    plain = {name: tensor.clone() for name, tensor in peer.shared_weights(flux).items()}
    MetaLoRA(flux, 1)
    shared, own = peer.shared_weights(flux), {p.untyped_storage().data_ptr() for p in flux.parameters()}
    assert len(plain) == len(shared) == len(set(shared)) and all(torch.equal(plain[name], shared[name]) for name in plain)
    copies = {name for name, tensor in shared.items() if tensor.untyped_storage().data_ptr() not in own}
    assert copies == {"norm_out.linear.weight", "norm_out.linear.bias"}
    assert torch.equal(shared["norm_out.linear.bias"][:64], flux.final_layer.adaLN_modulation[1].bias[64:])


def test_a_stage_that_fails_is_a_row(capsys):
    rows = stages.Rows(torch.device("cpu"), torch.float32, 0.001)
    rows("broken", lambda: 1 / 0, 1.0)
    rows("sound", lambda: None, 1.0)
    broken, sound = capsys.readouterr().out.splitlines()
    assert "ZeroDivisionError" in broken and "GB" in sound
    stages.Rows(torch.device("cpu"), torch.float32, 0.001, until=0)("late", lambda: 1 / 0, 1.0)
    assert "left out" in capsys.readouterr().out
