"""bench/: its FLOPs against published figures, what it prints for a tiny model, and the command for a GPU on a
simulated card at full width."""
import math
import re
from unittest import mock

import pytest
import torch
from fake_card import FakeCard, _disable_current_modes, full_size_flux

from bench import stages
from flux_model import Flux, FluxConfig, flow_matching_loss
from metalora import MetaLoRA
from support.memory import Fp8Linear

CPU = torch.device("cpu")
TINY = FluxConfig(vec_in_dim=24, context_in_dim=40, hidden_size=64, num_heads=2, depth=1,
                  depth_single_blocks=1, axes_dim=(4, 14, 14))
NUMBER = r"([\d.e+-]+) \(([\d.e+-]+) to ([\d.e+-]+)\)"


@pytest.fixture
def tiny(monkeypatch):
    """The mid-size model is a tiny one."""
    monkeypatch.setattr(stages, "MID", TINY)
    monkeypatch.setitem(stages.SIZES, "mid", ([64], 7))
    return ["--model", "mid", "--seconds", "0.001", "--device", "cpu"]


def test_flops_of_flux_dev():
    """The published figures, in TFLOP, rounded as they are there; 512 text tokens. A backward pass to the
    inputs has the forward's products once more for Linears, and twice for attention."""
    with torch.device("meta"):
        flux = Flux(FluxConfig())
    small, large = (stages.random_inputs(flux, 1, px, 512) for px in (512, 1024))
    count = lambda step, inputs: stages.count_flops(FluxConfig(), step, inputs) / 1e12
    once = count(stages.sampling_step, large)
    assert once == pytest.approx(74.4, abs=0.05)
    assert count(stages.base_training_step, small) == pytest.approx(2 * 19.85 + 3 * 1.65, abs=0.1)
    four = [torch.cat([part] * 4) for part in large]
    assert count(stages.sampling_step, four) == 4 * once


def test_rows_of_a_tiny_model(tiny, capsys):
    assert stages.main(tiny) == 0
    out = capsys.readouterr().out
    found = re.findall(NUMBER, out)
    assert len(found) >= 6
    assert all(0 < float(low) <= float(middle) <= float(high) for middle, low, high in found)
    assert len(re.findall(r"([\d.]+)% of the bound", out)) == out.count(", ratio") == out.count("3 rounds")
    for row in ("stage 2, 0 blocks twice, 64 px", "stage 1, 4 people, 0 blocks twice, 64 px", "sampling, 64 px"):
        assert out.count(row) == 1, row


def test_rows_of_weights_that_are_not_plain(tiny, capsys):
    """8-bit and offloaded weights are not shared with the base alone."""
    assert stages.main([*tiny, "--switches", "fp8", "offload"]) == 0
    out = capsys.readouterr().out
    assert out.count("of the bound") == 3 and "ratio" not in out and "Error" not in out


def test_the_baby_has_its_own_weights(capsys):
    assert stages.main(["--model", "baby", "--seconds", "0.001", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("128 px") >= 3 and "Error" not in out


def test_random_weights():
    """They fill every parameter, in 8 bits too, and keep activations about as large as they are."""
    with mock.patch.object(stages, "MID", TINY):
        for switches in ("", "fp8"):
            flux = stages.load("mid", True, CPU, switches)
            assert sum(isinstance(module, Fp8Linear) for module in flux.modules()) == 13 * (switches == "fp8")
            loss = flow_matching_loss(flux, *stages.random_inputs(flux, 1, 64, 7))
            assert 0.3 < loss.item() < 100


@pytest.mark.parametrize("words", ["--resolution -4", "--device quantum", "--model nowhere", "--what"])
def test_bad_input_is_one_line(words, capsys):
    assert stages.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("bench.stages: ") and err.count("\n") == 1


def adapted():
    """A tiny Flux with an adapter that changes nothing."""
    with mock.patch.object(stages, "MID", TINY):
        flux = stages.load("mid", True, CPU, "")
    adapter = MetaLoRA(flux, 1)
    adapter.assign(torch.zeros(1, dtype=torch.long))
    return flux


def test_the_base_alone_shares_its_weights():
    """It computes the same, and holds no memory of its own."""
    flux = adapted()
    base = stages.base_alone(flux)
    inputs = stages.random_inputs(flux, 1, 64, 7)
    assert torch.allclose(stages.sampling_step(base, *inputs), stages.sampling_step(flux, *inputs), atol=1e-5)
    memory = {parameter.untyped_storage().data_ptr() for parameter in flux.parameters()}
    assert all(parameter.untyped_storage().data_ptr() in memory for parameter in base.parameters())


def test_diffusers_computes_the_same():
    """Velocities on the same weights, and its training step moves its LoRA."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    flux = adapted()
    peer = stages.Peer(flux, 1)
    inputs = stages.random_inputs(flux, 1, 64, 7)
    ours, theirs = (stages.sampling_step(model, *inputs) for model in (flux, peer))
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


def test_a_stage_that_fails_is_a_row(tiny, capsys):
    bench = stages.Bench(adapted(), "", [64], 7, 0.001, math.inf)
    bench.attempt("broken", lambda: 1 / 0)
    bench.attempt("sound", lambda: "done")
    broken, sound = capsys.readouterr().out.splitlines()
    assert "ZeroDivisionError" in broken and "done" in sound
    bench.until = 0
    bench.attempt("late", lambda: 1 / 0)
    assert "left out" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_for_a_gpu(monkeypatch, capsys):
    """Every row of the one command runs at full width, with few blocks."""
    config = FluxConfig(depth=1, depth_single_blocks=2)
    with FakeCard(80) as card:
        def load(name, random, device, switches):
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
        monkeypatch.setattr(stages, "count_flops", lambda *words: 1)       # on the meta device: no card
        monkeypatch.setattr(stages, "find_spec", lambda name: None)        # peft exchanges memory, too
        monkeypatch.setattr(stages, "load", load)
        monkeypatch.setattr(stages, "load_crops", load_crops)
        monkeypatch.setattr(stages, "compile_blocks", lambda flux: None)
        monkeypatch.setattr(stages, "FluxConfig", lambda: config)
        monkeypatch.setitem(stages.personalize.ITERATIONS, "meta-lora", 2)
        assert stages.main(["--model", "flux-dev", "--random"]) == 0
        assert not card.problems, card.problems
    out = capsys.readouterr().out
    rows = {"stage 2, ": 18, "stage 1, 4": 18, "sampling, ": 18, "photo to LoRA": 1, ", ratio": 18}
    assert "Error" not in out and "left out" not in out, out
    assert {row: out.count(row) for row in rows} == rows, out
