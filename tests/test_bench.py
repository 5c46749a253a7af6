"""bench/: its FLOPs against published figures, what it prints for a tiny model, and the command for a GPU on a
simulated card at full width."""
import math
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from fake_card import FakeCard, _disable_current_modes, full_size_flux

from bench import stages
from flux_model import Flux, FluxConfig, denoise, flow_matching_loss
from metalora import AdaptedLinear, MetaLoRA
from support.memory import Fp8Linear

CPU = torch.device("cpu")
TINY = FluxConfig(vec_in_dim=24, context_in_dim=40, hidden_size=64, num_heads=2, depth=1,
                  depth_single_blocks=1, axes_dim=(4, 14, 14))
NUMBER = r"([\d.e+-]+) \(([\d.e+-]+) to ([\d.e+-]+)\)"


@pytest.fixture
def tiny(monkeypatch):
    """The mid-size model is a tiny one."""
    monkeypatch.setitem(stages.MODELS, "mid", (TINY, [64], 7))
    return ["--model", "mid", "--seconds", "0.001", "--device", "cpu"]


def sampling_step(flux, latent, noise, t, txt, y):
    return denoise(flux, noise, txt, y, num_steps=1, guidance=3.5)


def test_flops_of_flux_dev():
    """The published figures, in TFLOP, rounded as they are there; 512 text tokens. A backward pass to the
    inputs has the forward's products once more for Linears, and twice for attention."""
    with torch.device("meta"):
        flux = Flux(FluxConfig())
    small, large = (stages.random_inputs(flux, 1, px, 512) for px in (512, 1024))
    count = lambda inputs, training: stages.count_flops(FluxConfig(), inputs, training) / 1e12
    assert count(large, False) == pytest.approx(74.4, abs=0.05)
    assert count(small, True) == pytest.approx(2 * 19.85 + 3 * 1.65, abs=0.1)
    four = [torch.cat([part] * 4) for part in large]
    assert count(four, False) == 4 * count(large, False)


@pytest.mark.parametrize("training", [False, True])
def test_flops_as_torch_counts_them(training):
    """On the meta device, attention as plain matrix products; what is around the blocks is the difference."""
    config = FluxConfig(depth=2, depth_single_blocks=3)
    with torch.device("meta"):
        flux = Flux(config).requires_grad_(False)
    inputs = stages.random_inputs(flux, 1, 512, 512)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        (stages.base_training_step if training else sampling_step)(flux, *inputs)
    assert counter.get_total_flops() == pytest.approx(stages.count_flops(config, inputs, training), rel=0.02)


def test_rows_of_a_tiny_model(tiny, capsys):
    assert stages.main(tiny) == 0
    out = capsys.readouterr().out
    found = re.findall(NUMBER, out)
    assert len(found) >= 6
    assert all(0 < float(low) <= float(middle) <= float(high) for middle, low, high in found)
    assert len(re.findall(r"([\d.]+)% of the bound", out)) == out.count(", ratio") == out.count("3 rounds")
    for row in ("stage 2, 64 px", "stage 1, 4 people, 64 px", "sampling, 64 px"):
        assert out.count(row) == 1, row
    assert out.count("0 blocks run twice") == len(re.findall("stage|training", out)) - out.count("No module") // 2


def test_rows_of_weights_that_are_not_plain(tiny, capsys):
    """One set of switches after another; 8-bit and offloaded weights are compared with the base alone, too."""
    assert stages.main([*tiny, "--switches", "fp8", "fp8 offload"]) == 0
    out = capsys.readouterr().out
    assert out.count("mid fp8\n") == out.count("mid fp8 offload\n") == 3
    assert out.count("of the bound") == out.count(", ratio") == 6 and "Error" not in out


def test_the_baby_has_its_own_weights(capsys):
    assert stages.main(["--model", "baby", "--seconds", "0.001", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("128 px") >= 3 and out.count("Error") == out.count("No module named")


def test_random_weights():
    """They fill every parameter, in 8 bits too, and keep activations about as large as they are."""
    for switches in ("", "fp8"):
        flux = stages.load(TINY, CPU, switches)
        assert sum(isinstance(module, Fp8Linear) for module in flux.modules()) == 13 * (switches == "fp8")
        loss = flow_matching_loss(flux, *stages.random_inputs(flux, 1, 64, 7))
        assert 0.3 < loss.item() < 100


@pytest.mark.parametrize("words", ["--seconds soon", "--device quantum", "--model nowhere", "--what"])
def test_bad_input_is_one_line(words, capsys):
    assert stages.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("bench.stages: ") and err.count("\n") == 1


def adapted():
    """A tiny Flux with an adapter that changes nothing."""
    flux = stages.load(TINY, CPU, "")
    adapter = MetaLoRA(flux, 1)
    adapter.assign(torch.zeros(1, dtype=torch.long))
    return flux


def test_the_base_alone():
    """It computes what the model did before it was adapted, and leaves the update in place."""
    flux = stages.load(TINY, CPU, "")
    inputs = stages.random_inputs(flux, 1, 64, 7)
    before = sampling_step(flux, *inputs)
    adapter = MetaLoRA(flux, 1)
    adapter.bank.weight.normal_()
    adapter.assign(torch.zeros(1, dtype=torch.long))
    adapted, found = sampling_step(flux, *inputs), []
    stages.base_alone(flux, lambda: found.append(sampling_step(flux, *inputs)))()
    assert torch.allclose(found[0], before, atol=1e-5) and (adapted - before).norm() > 0.01 * before.norm()
    assert torch.equal(sampling_step(flux, *inputs), adapted)
    assert any(isinstance(module, AdaptedLinear) for module in flux.modules())


def test_diffusers_computes_the_same():
    """Velocities on the same weights, and its training step moves its LoRA."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    flux = adapted()
    peer = stages.Peer(flux)
    inputs = stages.random_inputs(flux, 1, 64, 7)
    ours, theirs = (sampling_step(model, *inputs) for model in (flux, peer))
    assert (ours - theirs).norm() < 1e-5 * (theirs - inputs[1]).norm()
    before = [parameter.clone() for parameter in peer.trained]
    peer.training_step(*inputs)
    assert len(before) == 2 * 20 and any(not torch.equal(a, b) for a, b in zip(before, peer.trained))


def test_rows_of_diffusers(tiny, capsys):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    assert stages.main(tiny) == 0
    out = capsys.readouterr().out
    assert out.count("against diffusers") == 2 and out.count("ratio") == 5 and "Error" not in out


def test_a_stage_that_fails_is_a_row(tiny, monkeypatch, capsys):
    rows = [("broken", lambda *words: 1 / 0, [""], slice(1)), ("sound", lambda *words: "done", [""], slice(1))]
    monkeypatch.setattr(stages, "ROWS", rows)
    assert stages.main(tiny) == 0
    _, broken, error, sound, done = capsys.readouterr().out.splitlines()
    assert "broken, 64 px" in broken and "ZeroDivisionError" in error and "sound, 64 px" in sound and "done" in done
    monkeypatch.setattr(stages, "MINUTES", 0)
    assert stages.main(tiny) == 0
    out = capsys.readouterr().out
    assert "left out" in out and "broken" not in out


@pytest.mark.slow
def test_the_command_for_a_gpu(monkeypatch, capsys):
    """Every row of the one command runs at full width, with few blocks."""
    config = FluxConfig(depth=1, depth_single_blocks=2)
    with FakeCard(80) as card:
        def load(config_of_dev, device, switches):
            return full_size_flux(card, "fp8" in switches, "offload" in switches, config=config)

        def once(functions, device, seconds):
            for function in functions:
                function()
            return [[1.0, 1.0] for _ in functions]

        def load_crops(*words, real=stages.load_crops):
            with _disable_current_modes():                       # the face detector has numbers
                return real(*words)
        # a fake parameter cannot exchange its memory
        monkeypatch.setattr(torch.nn.Module, "to", lambda module, *words, real=torch.nn.Module.to, **named:
                            module if "memory_format" in named else real(module, *words, **named))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
        monkeypatch.setattr(stages, "pick_device", lambda name: card.device)
        monkeypatch.setattr(stages, "MINUTES", math.inf)         # a dry run is slower than a GPU
        monkeypatch.setattr(stages, "interleave", once)
        rows = [row for row in stages.ROWS if "diffusers" not in row[0]]   # peft exchanges memory, too
        monkeypatch.setattr(stages, "ROWS", rows)
        monkeypatch.setattr(stages, "load", load)
        monkeypatch.setattr(stages, "load_crops", load_crops)
        monkeypatch.setattr(stages, "compile_blocks", lambda flux: None)
        monkeypatch.setitem(stages.personalize.ITERATIONS, "meta-lora", 2)
        assert stages.main(["--model", "flux-dev"]) == 0
        assert not card.problems, card.problems
    out = capsys.readouterr().out
    rows = {"stage 2, ": 18, "stage 1, 4": 18, "sampling, ": 18, "photo to LoRA": 1, ", ratio": 54}
    assert "Error" not in out and "left out" not in out, out
    assert {row: out.count(row) for row in rows} == rows, out
