"""Blocks of FLUX.1-dev's full width from real files: what only numbers show. One double and two single blocks of random weights,
1.4 GB, from a script that stands beside the repository; skipped where it does not, or the disk has no room.

    python -m pytest -m slow tests/test_full_width.py
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import personalize
from flux_model import position_ids, rotary_embedding
from metalora import MetaLoRA, random_lomd
from sample import sample_latents
from support.checkpoints import load_flux
from support.memory import E4M3
from support.names import find_targets
from test_flux_model import relative

ROOT = Path(__file__).resolve().parents[1]
MAKE = ROOT.parent / "shared" / "tools" / "make_full.py"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MAKE.is_file(), reason="the script that writes the weights is not here")]
TEXT = {"a": (torch.randn(1, 32, 4096, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 768))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(path).free < 4e9:
        pytest.skip("the disk has no room for 1.4 GB")
    subprocess.run([sys.executable, str(MAKE), str(path), "transformer"], cwd=ROOT, env=os.environ | {"DEPTH": "1,2"}, check=True)
    yield path
    shutil.rmtree(path)


def drawn_and_trained(flux):
    """The latent after one step, and the losses of two iterations."""
    latent, = sample_latents(flux, TEXT, [("a", 0)], 128, 128, 1, 3.5)
    adapter = MetaLoRA(flux, 1, random_lomd(find_targets(flux), 16, 0))
    rows, losses = adapter.bank.weight.clone(), []
    latents = [torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(2)).abs()]
    personalize.train(flux, adapter, latents, [torch.ones(1, 1, 16, 16)], *TEXT["a"], 2, 4e-4, 0,
                      lambda iteration, loss: losses.append(loss))
    assert (adapter.bank.weight != rows).any() and adapter.bank.weight.isfinite().all()
    return latent, torch.tensor(losses)


def test_a_step_is_drawn_and_two_are_trained(folder):
    """In 16 bits and in 8, whose latent and losses are near."""
    latents, losses = zip(*(drawn_and_trained(load_flux(folder, fp8=fp8)) for fp8 in (False, True)))
    assert latents[0].isfinite().all() and losses[0].isfinite().all()
    assert 1e-4 < relative(latents[1], latents[0]) < 0.1
    assert relative(losses[1], losses[0]) < 0.05
    names = [name for name, p in load_flux(folder, fp8=True).named_parameters() if p.dtype == E4M3]
    assert len(names) == 10 + 2 * 3 and all("_blocks." in name for name in names)


def test_blocks_are_those_of_diffusers(folder):
    """In fp32, on the same weights."""
    diffusers = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    from support.names import diffusers_flux_names, part_sizes
    flux = load_flux(folder, dtype=torch.float32)
    heads = dict(num_attention_heads=24, attention_head_dim=128)
    theirs = {"double_blocks.0": diffusers.FluxTransformerBlock(3072, **heads), "single_blocks.0": diffusers.FluxSingleTransformerBlock(3072, **heads)}
    for name, block in theirs.items():
        state = {}
        for key, p in flux.get_submodule(name).named_parameters():
            others = diffusers_flux_names(f"{name}.{key}")
            width = 3072 if len(others) > 1 else len(p)
            for other, part in zip(others, p.split(part_sizes(len(others), len(p), width))):
                state[other.split(".", 2)[2]] = part
        block.load_state_dict(state)
    g = torch.Generator().manual_seed(3)
    img, txt, vec = (torch.randn(1, n, 3072, generator=g) for n in (64, 32, 1))
    vec = vec[:, 0]
    ids = torch.cat(position_ids(1, 16, 16, 32)[::-1], dim=1)
    rope = rotary_embedding(ids, flux.config.axes_dim, flux.config.theta)
    rotations = [part[0, 0].repeat_interleave(2, dim=-1) for part in (rope.real, rope.imag)]
    with torch.no_grad():
        ours = flux.double_blocks[0](img, txt, vec, rope)
        other = theirs["double_blocks.0"](hidden_states=img, encoder_hidden_states=txt, temb=vec, image_rotary_emb=rotations)
        assert relative(ours[0], other[1]) < 1e-6 and relative(ours[1], other[0]) < 1e-6
        ours = flux.single_blocks[0](torch.cat((txt, img), dim=1), vec, rope)
        other = theirs["single_blocks.0"](hidden_states=img, encoder_hidden_states=txt, temb=vec, image_rotary_emb=rotations)
        other = torch.cat(other, dim=1) if isinstance(other, tuple) else other
        assert relative(ours, other) < 1e-6
