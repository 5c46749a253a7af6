"""FLUX.1-dev at its full size on a card that is not there (fake_card.py): every path runs with the right devices and dtypes, waits,
launches and bytes stay within bounds, and what the plan of memory foresees is what is then held.

    python tests/test_full_size.py                    # docs/SPEED.md's table of cards
"""
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fake_card import GIB, FakeCard, _disable_current_modes, full_size_flux

import flux_model
import personalize
import sample
from metalora import MetaLoRA, apply_loras, random_lomd
from support import speed
from support.checkpoints import find_targets

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="older tensors without "
                                "numbers ask for a driver: seen with torch 2.9, not tried between")


def plan(card, work, fp8=False, offload=False):
    """What personalize.py and sample.py do before anything is read -> what the run is to take, GiB, and the blocks that stay."""
    with _disable_current_modes(), torch.device("meta"):
        flux = flux_model.Flux(flux_model.FluxConfig())
    beside = speed.adapter_bytes(find_targets(flux), work, BF16) + speed.step_bytes(flux, work, BF16)
    speed.check_memory(flux, card.device, BF16, fp8, offload, beside)
    stay = speed.blocks_on_device(flux, card.device, BF16, fp8, beside) if offload else 0
    return (speed.weight_bytes(flux, BF16, fp8, offload) + beside + speed.RESERVE) / GIB, stay


def training(card, px=512, fp8=False, offload=False, twice=None, people=1, check=True):
    """Two steps of stage 2, or of stage 1 with 4 people -> GiB foreseen, and blocks run twice; all else is the card's."""
    batch, tokens = (4 if people > 1 else 1), (px // 16) ** 2 + 512
    work = speed.Work(tokens, batch, 1, 16, people, training=True)
    _, stay = plan(card, work, fp8, offload) if check else (0, 0)
    flux = full_size_flux(card, fp8, offload, stay)
    adapter = MetaLoRA(flux, 1, lomd=random_lomd(find_targets(flux), 16), num_identities=people, slots=batch)
    adapter.train_lomd = people > 1
    if twice is None:
        twice = speed.plan_recompute(adapter, tokens)
    speed.recompute_blocks(flux, twice)
    foreseen = (card.memory.allocated + speed.step_bytes(flux, work, BF16, twice) + speed.RESERVE) / GIB
    card.phased(MetaLoRA, "assign", "assign")
    card.phased(MetaLoRA, "step", "step")
    size = (16, px // 8, px // 8)
    if people == 1:
        latents = [torch.randn(2, 2, *size, device="cuda") for _ in range(15)]
        weights, text = [torch.ones(2, 1, *size[1:]) for _ in latents], (torch.randn(1, 512, 4096, dtype=BF16, device="cuda"),
                                                                        torch.randn(1, 768, dtype=BF16, device="cuda"))
        personalize.train(flux, adapter, latents, weights, *text, 2, 1e-4, 0, lambda i, loss: i < 2 and card.reset())
    else:
        for _ in range(2):
            card.reset()
            latent, noise = torch.randn(2, batch, *size, device="cuda")
            texts = torch.randn(batch, 512, 4096, dtype=BF16, device="cuda"), torch.randn(batch, 768, dtype=BF16, device="cuda")
            adapter.assign(torch.arange(batch))
            flux_model.flow_matching_loss(flux, latent, noise, torch.rand(batch, device="cuda"), *texts, 1.0).sum().backward()
            adapter.step(1e-4)
    return foreseen, twice, flux


def sampling(card, px=1024, fp8=False, offload=False):
    """Two steps of a picture with a LoRA -> GiB foreseen."""
    foreseen, stay = plan(card, speed.Work((px // 16) ** 2 + 512), fp8, offload)
    flux = full_size_flux(card, fp8, offload, stay)
    apply_loras(flux, [({t.path: (torch.randn(1, t.d_in), torch.randn(t.rows, 1)) for t in find_targets(flux)}, 1.0)])
    card.reset()
    texts = {"a": (torch.zeros(1, 512, 4096).bfloat16(), torch.zeros(1, 768).bfloat16())}
    with torch.no_grad(), mock.patch.object(flux_model, "get_schedule", lambda *a, **k: [1.0, 0.5, 0.0]):
        list(sample.sample_latents(flux, texts, [("a", 0)], px, px, 2, 3.5))
    return foreseen


def held(card):
    return card.memory.peak_allocated / GIB + card.context


def billions(card):
    """Bytes moved, GB."""
    return sum(card.bytes.values()) / 1e9


def test_a_step_of_stage_2():
    """bf16, 512 px, not compiled: 8,500 launches, 2 waits, and what is foreseen is held."""
    with FakeCard(80) as card:
        foreseen, twice, _ = training(card, 512)
        assert not card.problems, card.problems
        assert sum(card.launches.values()) <= 8500 and sum(card.syncs.values()) <= 2, card.report()
        assert card.launches["assign"] < 300 and twice == 0
        assert held(card) <= foreseen <= 1.1 * held(card)


def test_loading_in_8_bits_leaves_no_holes():
    """What a weight takes while it is quantised must not lie between those that stay."""
    with FakeCard(24, (8, 9)) as card:
        flux = full_size_flux(card, fp8=True)
        assert flux and not card.problems and card.memory.reserved - card.memory.allocated < 0.6 * GIB, card.report()


@pytest.mark.slow
@pytest.mark.parametrize("gib, capability, switches", [
    (80, (9, 0), dict(fp8=True)), (24, (8, 6), dict(fp8=True, px=768)), (24, (8, 9), dict(fp8=True, px=1024)), (80, (9, 0), dict(twice=30)), (80, (9, 0), dict(twice=57, px=1024)),
    (16, (8, 9), dict(offload=True)), (16, (8, 6), dict(fp8=True, offload=True, px=1024)), (141, (9, 0), dict(people=50))], ids=str)
def test_training_on_every_path(gib, capability, switches):
    with FakeCard(gib, capability) as card:
        foreseen, _, flux = training(card, **switches)
        assert not card.problems, card.problems
        assert held(card) <= foreseen <= 1.1 * held(card), (held(card), foreseen)
        if switches.get("offload"):
            blocks = [block.offload for block in speed.blocks_of(flux) if block.offload]
            assert 0 < card.pinned <= 1.02 * sum(p.nbytes for tensors in blocks[0].tensors for p in tensors)


def test_a_sampling_step():
    """1024 px with a LoRA, not compiled: at most 175 GB."""
    with FakeCard(80) as card:
        foreseen = sampling(card)
        assert not card.problems and billions(card) / 2 <= 175, card.report()
        assert held(card) <= foreseen <= 1.1 * held(card)


@pytest.mark.slow
@pytest.mark.parametrize("gib, capability, switches", [(80, (9, 0), dict(fp8=True)), (24, (8, 6), dict(fp8=True)),
                                                       (12, (8, 6), dict(offload=True)), (24, (8, 9), {})], ids=str)
def test_sampling_on_every_path(gib, capability, switches):
    with FakeCard(gib, capability) as card:
        try:
            foreseen = sampling(card, **switches)
        except ValueError as error:                              # 24 GB in bf16: refused before anything is read, with the way out
            assert gib == 24 and not switches and "with --fp8 it takes" in str(error) and not card.memory.allocated > GIB
            return
        assert not card.problems, card.problems
        assert held(card) <= foreseen <= 1.1 * held(card) or switches.get("offload") and held(card) <= gib


@pytest.mark.slow
@pytest.mark.parametrize("what, gib, launches", [("encode", 12, 250), ("decode", 12, 300), ("tiles", 12, 2000)])
def test_the_autoencoder(what, gib, launches):
    """Both ways at 1024 px, and 2048 px in tiles, within 12 GB."""
    with FakeCard(gib, (8, 6)) as card, torch.no_grad():
        with _disable_current_modes(), torch.device("meta"):
            model = flux_model.AutoEncoder(flux_model.AutoEncoderConfig())
        for name, p in list(model.named_parameters()):
            weight = torch.empty(p.shape, dtype=BF16, device="cuda")
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(weight, requires_grad=False))
        model.decoder.__class__ = speed.TiledDecoder
        card.reset()
        if what == "encode":
            out = model.posterior(torch.randn(2, 3, 1024, 1024, device="cuda"))
            assert out.shape == (2, 2, 16, 128, 128)
        else:
            side = 128 if what == "decode" else 256
            assert model.decode(torch.randn(1, 16, side, side, device="cuda")).shape == (1, 3, 8 * side, 8 * side)
        assert not card.problems and sum(card.launches.values()) < launches, card.report()


@pytest.mark.slow
def test_text_encoders():
    """CLIP and T5 of the true shapes: 10 GB of weights, and one prompt."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    with _disable_current_modes(), torch.device("meta"):
        t5 = T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                     feed_forward_proj="gated-gelu"))
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    with FakeCard(16, (8, 6)) as card, torch.no_grad():
        for model in (t5, clip):
            for name, p in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
                owner, _, attribute = name.rpartition(".")
                if p.is_floating_point():
                    weight = torch.nn.Parameter(torch.empty(p.shape, dtype=BF16, device="cuda"), requires_grad=False)
                else:
                    weight = torch.zeros(p.shape, dtype=p.dtype, device="cuda")
                setattr(model.get_submodule(owner), attribute, weight)
        ids = torch.zeros(1, 512, dtype=torch.long, device="cuda")
        encoders = flux_model.TextEncoders(clip, None, t5, None, 512)
        with mock.patch.object(flux_model.TextEncoders, "tokenize", lambda self, prompts: (ids[:, :77], ids)):
            txt, y = encoders.encode(["a"])
        assert txt.shape == (1, 512, 4096) and y.shape == (1, 768) and not card.problems, card.report()
        assert 8.5 < card.memory.peak_allocated / GIB < 11


FAULTS = {
    "a mask of the CPU": (lambda x: x * torch.ones(4, 4), "device"),
    "16 bits by 32": (lambda x: x.bfloat16() @ x, "dtype"),
    "a generator of the CPU": (lambda x: torch.randn(3, generator=torch.Generator(), device="cuda"), "generator"),
    "scales of another shape": (lambda x: torch._scaled_mm(x.to(speed.E4M3), x.to(speed.E4M3).T, scale_a=torch.ones(3, 1, device="cuda"),
                                                          scale_b=torch.ones(1, 4, device="cuda"), out_dtype=BF16), ""),
    "a wait": (lambda x: x.sum().item(), "item"),
    "a copy that waits": (lambda x: torch.zeros(4).to("cuda"), "copy to the card"),
    "more than there is": (lambda x: torch.zeros(5 * 2 ** 28, device="cuda"), "simulated")}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_were_planted_are_found(fault):
    function, word = FAULTS[fault]
    with FakeCard(4) as card:
        x, found = torch.zeros(4, 4, device="cuda"), ""
        try:
            function(x)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        found = " ".join([found, *card.problems, *(what for _, what, _ in card.syncs)])
    assert found.strip() and word in found


if __name__ == "__main__":
    rows = [("sample 1024 px", sampling, {}), ("sample 1024 px, --fp8", sampling, dict(fp8=True)),
            ("sample 1024 px, --offload", sampling, dict(offload=True))]
    rows += [(f"stage 2, {px} px", training, dict(px=px)) for px in (512, 768, 1024)]
    rows += [(f"stage 2, {px} px, --fp8", training, dict(px=px, fp8=True)) for px in (512, 768, 1024)]
    rows += [("stage 2, 512 px, --offload", training, dict(offload=True)), ("stage 2, 1024 px, --fp8 --offload", training, dict(px=1024, fp8=True, offload=True)),
             ("stage 1, 512 px, batch 4", training, dict(people=50)), ("stage 1, 1024 px, batch 4", training, dict(px=1024, people=50)),
             ("stage 1, 512 px, batch 4, --fp8", training, dict(people=50, fp8=True))]
    cards = [float(word) for word in sys.argv[1:]] or [16, 24, 48, 80, 141]
    print("| | " + " | ".join(f"{gib:g} GB" for gib in cards) + " |\n| --- |" + " --- |" * len(cards))
    for name, run, switches in rows:
        cells = []
        for gib in cards:
            with FakeCard(gib, (8, 9) if gib < 80 else (9, 0)) as card:
                try:
                    result = run(card, **switches)
                    foreseen, twice, _ = result if isinstance(result, tuple) else (result, None, None)
                    cell = f"{foreseen:.1f}{'+' * (twice is None and 'offload' in switches)} / {held(card):.1f}" + ("" if twice is None else f", {twice}")
                    cells.append(cell + (f"; {card.problems}" if card.problems else ""))
                except ValueError as error:
                    cells.append("refused: " + (str(error).partition("with ")[2] or "too large"))
                except torch.OutOfMemoryError as error:
                    cells.append(f"**out of memory** {error}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
