"""FLUX.1-dev at its full size on a card that is not there (fake_card.py): the product's own functions run on every path with the
right devices and dtypes, waits, launches and bytes stay within bounds, and a run that was not refused does not run out of memory.

    python tests/test_full_size.py                    # docs/SPEED.md's table of cards
"""
import argparse
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from fake_card import GIB, FakeCard, _disable_current_modes, full_size_flux

import fake_card
import flux_model
import meta_train
import personalize
import sample
from metalora import MetaLoRA, random_lomd
from support import checkpoints, memory, people, photos
from support import stage_2 as stage_2_checks
from support.names import find_targets
from support.people import Photo
from support.runs import Log, WaitingRows

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="older tensors without "
                                "numbers ask for a driver: seen with torch 2.9, not tried between")


def text_of(card):
    return [torch.zeros(1, 512, 4096, dtype=BF16, device=card.device), torch.zeros(1, 768, dtype=BF16, device=card.device)]


def autoencoder_on(card):
    with _disable_current_modes(), torch.device("meta"):
        model = flux_model.AutoEncoder(flux_model.AutoEncoderConfig())
    for name, p in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        weight = torch.nn.Parameter(torch.empty(p.shape, dtype=BF16, device=card.device), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, weight)
    model.decoder.__class__ = memory.TiledDecoder
    return model


def patcher(card):
    return lambda where, name, new: card.stack.enter_context(mock.patch.object(where, name, new))


def switches_of(fp8=False, offload=False, recompute=None):
    words = ["--no-compile", *["--fp8"] * fp8, *["--offload"] * offload]
    return words if recompute is None else [*words, "--recompute", str(recompute)]


# FLUX.1-dev with fewer blocks of the same width, for the bounds that every run of the tests checks
FEW = flux_model.FluxConfig(depth=2, depth_single_blocks=4)


def stage_2(card, px=512, rank=1, method="meta-lora", config=None, **switches):
    """personalize.py up to its training, and a step of that: all but its text encoders and what it reads of files. -> the model."""
    card.model(config)
    patch = patcher(card)
    patch(checkpoints, "find_model", lambda name, args=None: Path("flux"))
    patch(stage_2_checks, "pick_device", lambda name: card.device)
    patch(personalize, "encode_prompts", lambda folder, texts, *words, home: {text: text_of(card) for text in texts})
    patch(personalize, "load_autoencoder", lambda *words: autoencoder_on(card))
    patch(stage_2_checks, "captions_beside", lambda files, prompt: {Path(file): prompt for file in files})
    patch(personalize, "read_lomd", lambda *words: ({t.path: torch.zeros(16, t.d_in) for t in find_targets(bare(config))}, "none"))
    patch(stage_2_checks, "check_pictures", lambda args: None)
    patch(photos, "fingerprints", lambda files: {"photo_digests": ""})
    crop = photos.Crop(Image.new("RGB", (px, px)), Path("a.png"), (0, 0, px, px), Image.new("L", (px, px)))
    patch(photos, "load_crops", lambda *words, **more: [crop] * 15)
    words = ["a.png", "--model", "flux", "--resolution", str(px), "--rank", str(rank), "--method", method]
    args = personalize.parse([*words, *switches_of(**switches)])
    personalize.check_stage_2(args, personalize.ITERATIONS)
    flux, adapter, _, data, _ = personalize.prepare(args)
    card.phased(MetaLoRA, "assign", "assign")
    card.phased(MetaLoRA, "step", "step")
    card.reset()
    personalize.train(flux, adapter, *data, 1, args.lr)
    return flux


def bare(config=None):
    with _disable_current_modes(), torch.device("meta"):
        return flux_model.Flux(config or flux_model.FluxConfig())


def run_twice(flux):
    return sum(block.recompute for block in memory.blocks_of(flux))


def stage_1(card, size=(512, 512), folks=4, r2=1, px=512, batch=4, new=False, **switches):
    """meta_train.py: its checks, loading, and a step with LoMD learning in each of two buckets of so many people, whose pictures have
    so many pixels. new: nothing is encoded yet. -> the model."""
    card.model()
    patch = patcher(card)
    patch(checkpoints, "find_model", lambda name, args=None: Path("flux"))
    patch(people, "part_fingerprints", lambda folder: {})
    there = [] if new else ["all"]

    def fill(cache, *rest, **words):
        assert card.memory.allocated < GIB                               # T5 takes ten: nothing else may be there
        there.append("all")
    patch(people.Cache, "fill", fill)
    patch(people.Cache, "missing", lambda cache, found, captions: ([], []) if there else (found, captions))
    patch(meta_train, "check_room", lambda *words: None)
    patch(meta_train, "text_length", lambda folder: 512)

    def load(cache, path):
        with _disable_current_modes():
            if "-text-" in path.name:
                return {"txt": torch.zeros(512, 4096, dtype=BF16), "y": torch.zeros(768, dtype=BF16)}
            width, height = map(int, path.name.split("-")[1].split("x"))
            return {"posterior": torch.zeros(2, 16, height // 8, width // 8).half()}
    patch(people.Cache, "load", load)
    folder = Path(card.stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "data").mkdir()
    words = ["--data", str(folder / "data"), "--run", str(folder / "run"), "--model", "flux", "--warmup", "0", "--r2", str(r2),
             "--iters", str(10 ** 6), "--batch-size", str(batch), "--resolution", str(px), *switches_of(**switches)]
    args = meta_train.parse(words)
    meta_train.check_stage_1(args, card.device)
    own = [people.Photo(folder / f"{i}.png", f"{i:032x}", *size, None) for i in range(2)]
    buckets = {str(bucket): {f"{bucket} {i}": own for i in range(folks)} for bucket in range(2)}
    group = argparse.Namespace(rank=0, size=1, device=card.device, gather=lambda thing: [thing], sum=lambda tensor: tensor)
    args.run.mkdir()
    run = meta_train.Run(args, buckets, group)
    run.check_memory()
    run.load()
    assert there
    card.phased(MetaLoRA, "assign", "assign")
    card.phased(MetaLoRA, "step", "step")
    card.reset()
    for number in range(2):
        run.passes[number] = run.passes[number]._replace(start=number, joint=number, stop=number + 1)
        run.open_bucket(number)
        run.step(run.passes[number])
    return run.adapter.flux


def waits_of_stage_1(card, folder, iterations):
    """meta_train's own iterations of 4 people, with latents and text made up -> waits of each."""
    class Encoded:
        def __init__(self, *words): pass
        def sizes(self, picture): return [(512, 512)]
        def latent_path(self, picture, size): return "latent"
        def text_path(self, caption): return "text"

        def load(self, path):
            if path == "latent":
                return {"posterior": torch.randn(2, 16, 64, 64)}
            return {"txt": torch.randn(512, 4096).bfloat16(), "y": torch.randn(768).bfloat16()}

    group = SimpleNamespace(rank=0, size=1, device=card.device, sum=lambda tensor: tensor, gather=lambda thing: [thing])
    args = Namespace(run=folder, folder=folder, text_device=card.device, dtype=BF16, resolution=[512], iters=iterations + 1, batch_size=4, warmup=0.5,
                     seed=0, lr=4e-4, r1=16, r2=1, prompt="a person", save_every=10 ** 6, preview_every=0)
    people = {f"p{i}": [Photo(folder / f"{i}{j}.png", f"{i}{j}", 512, 512, None) for j in range(2)] for i in range(4)}
    with mock.patch.object(meta_train, "Cache", Encoded), \
            mock.patch.object(meta_train, "schedule", partial(meta_train.schedule, bucket_iters=iterations + 1)):
        run = meta_train.Run(args, {"a": people}, group)
    flux = full_size_flux(card, config=flux_model.FluxConfig(depth=1, depth_single_blocks=2))      # a block waits for nothing
    run.adapter = MetaLoRA(flux, 1, random_lomd(find_targets(flux), 16), num_identities=0, slots=4)
    run.adapter.shared.make_moments()
    run.waiting = WaitingRows(folder, buckets=1)
    run.open_bucket(0)
    log, waits = Log(args, 0, group), []
    with run.interruption, log.bar:
        for _ in range(iterations):
            card.reset()
            run.iterate(run.passes[0], log)
            waits.append(sum(card.syncs.values()))
    return waits


def sampling(card, px=1024, rank=1, config=None, **switches):
    """sample.py from its check to the latents of a picture of two steps, with a LoRA."""
    card.model(config)
    patch = patcher(card)
    args = sample.parse(["a", *switches_of(**switches)])
    args.folder, args.dtype, args.device = Path("flux"), BF16, card.device
    targets = find_targets(bare(config))
    loras = [({t.path: (torch.zeros(rank, t.d_in), torch.zeros(t.rows, rank)) for t in targets}, 1.0)]
    checkpoints.check_sampling_memory(args, (px // 8, px // 8), [loras])
    card.reset()
    fit = sample.fit_sampling
    patch(sample, "fit_sampling", lambda *words, **more: (fit(*words, **more), card.reset()))
    embeddings = {"a": [torch.zeros(1, 512, 4096, dtype=BF16), torch.zeros(1, 768, dtype=BF16)]}
    pictures = []
    patch(sample, "load_autoencoder", lambda *words: None)
    patch(sample, "decode_latent", lambda autoencoder, latent: latent.shape)
    sample.draw_all(args, [loras], embeddings, [("a", 0)], lambda number, picture: pictures.append(picture),
                    width=px, height=px, steps=2, guidance=3.5)
    assert pictures == [(1, 16, px // 8, px // 8)]


def held(card):
    return card.memory.peak_allocated / GIB + card.context


def billions(card):
    """Bytes moved, GB."""
    return sum(card.bytes.values()) / 1e9


@pytest.mark.parametrize("config, launches, least, most", [
    (FEW, 920, 3.5, 4.8), pytest.param(None, 8000, 30, 35, marks=pytest.mark.slow)], ids=["a few blocks", "all blocks"])
def test_a_step_of_stage_2(config, launches, least, most):
    """bf16, 512 px, not compiled: 8,000 launches with all blocks, 2 waits; nothing is run twice where there is room."""
    with FakeCard(80) as card:
        flux = stage_2(card, config=config)
        assert not card.problems, card.problems
        assert sum(card.launches.values()) <= launches and sum(card.syncs.values()) <= 2, card.report()
        assert card.launches["assign"] < 450 and run_twice(flux) == 0 and least < held(card) < most


def test_what_the_simulated_card_tells_apart():
    """Memory that is page-locked or not, copies either way, generators of another device."""
    with FakeCard(8) as card:
        there = torch.zeros(8).pin_memory().to("cuda", non_blocking=True)
        assert not card.syncs
        torch.zeros(8).to("cuda", non_blocking=True)
        torch.zeros(8).copy_(there)
        assert [what for _, what, _ in card.syncs] == ["copy to the card (H2D, not pinned)", "copy to the CPU (D2H)"]
        there.normal_()
        assert not card.problems
        there.normal_(generator=torch.Generator())
        assert len(card.problems) == 1 and "a generator on cpu" in card.problems[0]


def test_a_dropped_model_waits_for_its_last_copy():
    """--offload: until it is done, the copy writes into memory that is already free for others."""
    with FakeCard(80) as card:
        flux = full_size_flux(card, offload=True, config=FEW)
        card.reset()
        del flux
        assert [what for _, what, _ in card.syncs] == ["stream.synchronize"]


def test_waits_of_stage_1(tmp_path):
    """Two an iteration, in the warm-up and after it: are the gradients finite, and the line for the log."""
    with FakeCard(141) as card:
        waits = waits_of_stage_1(card, tmp_path, 5)
        assert not card.problems, card.problems
        assert max(waits) <= 2, card.report()


def test_loading_in_8_bits_leaves_no_holes():
    """What a weight takes while it is quantised must not lie between those that stay."""
    with FakeCard(24, (8, 9)) as card:
        flux = full_size_flux(card, fp8=True)
        assert flux and not card.problems and card.memory.reserved - card.memory.allocated < 0.1 * GIB, card.report()


@pytest.mark.parametrize("config, moved, most", [
    (FEW, 17, 4), pytest.param(None, 175, 24, marks=pytest.mark.slow)], ids=["a few blocks", "all blocks"])
def test_a_sampling_step(config, moved, most):
    """1024 px with a LoRA, not compiled: at most 175 GB with all blocks."""
    with FakeCard(80) as card:
        sampling(card, config=config)
        assert not card.problems and billions(card) / 2 <= moved and held(card) < most, card.report()


def test_an_expandable_segment_has_no_holes():
    """Pieces that grow take the places of smaller ones before them; pages go back before memory runs out."""
    memory_of = FakeCard(4).memory
    blocks = [memory_of.malloc(100 * 2 ** 20) for _ in range(30)]
    for i, block in enumerate(blocks):
        blocks[i] = memory_of.malloc(101 * 2 ** 20)
        memory_of.drop(block)
    assert memory_of.reserved - memory_of.allocated < 250 * 2 ** 20
    for block in blocks[::2]:
        memory_of.drop(block)
    memory_of.malloc(15 * 101 * 2 ** 20 - 15 * 40 * 2 ** 20)          # more than lies together, and there as pages
    with pytest.raises(torch.OutOfMemoryError):
        memory_of.malloc(2 * GIB)


REFUSED = "refused"


@pytest.mark.slow
@pytest.mark.parametrize("gib, capability, switches, twice", [
    (80, (9, 0), dict(fp8=True), 0), (24, (8, 6), dict(fp8=True, px=768), range(10, 40)), (24, (8, 9), dict(fp8=True, px=1024), range(20, 50)),
    (80, (9, 0), dict(recompute=30), 30), (16, (8, 9), dict(offload=True), 57), (12, (8, 6), dict(fp8=True, offload=True, px=1024), 57),
    (48, (8, 6), dict(px=1024), range(5, 30)), (80, (9, 0), dict(method="lora", rank=16), 0), (24, (8, 9), {}, REFUSED)], ids=str)
def test_stage_2_on_every_path(gib, capability, switches, twice):
    """It runs, with no more blocks run twice than it takes, or is refused before anything large is read, with the way out."""
    with FakeCard(gib, capability) as card:
        if twice == REFUSED:
            with pytest.raises(ValueError, match="with --fp8 it takes"):
                stage_2(card, **switches)
            assert card.memory.peak_allocated < GIB
            return
        flux = stage_2(card, **switches)
        assert not card.problems, card.problems
        assert run_twice(flux) in (twice if isinstance(twice, range) else [twice])
        if switches.get("offload"):
            offload = flux.double_blocks[0].offload
            away = sum(p.nbytes for tensors in offload.tensors[offload.stay:] for p in tensors)
            assert 0 < offload.stay < 57 and away <= card.pinned <= 1.02 * away


@pytest.mark.slow
@pytest.mark.parametrize("gib, switches", [
    (48, dict(new=True)), (48, dict(px=1024, size=(1024, 1024))), (48, dict(px=1024, size=(768, 1472))), (24, dict(fp8=True)), (80, {}),
    (80, dict(px=1024, size=(1024, 1024))), (141, dict(px=1024, size=(768, 1472))), (48, dict(r2=4)), (48, dict(folks=200)), (80, dict(folks=200, r2=4))],
    ids=str)
def test_stage_1_on_every_card(gib, switches):
    """4 people in a batch: what is not refused does not run out of memory, in the first bucket or the second."""
    with FakeCard(gib, (8, 9) if gib < 80 else (9, 0)) as card:
        flux = stage_1(card, **switches)
        assert not card.problems, card.problems
        assert held(card) <= gib and (run_twice(flux) > 0 or held(card) > gib - 20)


@pytest.mark.parametrize("gib, switches, words", [
    (24, {}, "with --fp8 it takes"), (16, dict(fp8=True), "with --offload it takes"), (24, dict(fp8=True, folks=400), "--offload"),
    (16, dict(fp8=True, offload=True, folks=2000), "no switch")], ids=str)
def test_stage_1_is_refused_before_anything_is_read(gib, switches, words):
    with FakeCard(gib, (8, 9)) as card, pytest.raises(ValueError, match=words):
        stage_1(card, new=True, **switches)
    assert card.memory.peak_allocated < GIB


@pytest.mark.slow
@pytest.mark.parametrize("gib, capability, switches", [
    (80, (9, 0), dict(fp8=True)), (24, (8, 6), dict(fp8=True)), (12, (8, 6), dict(offload=True)), (24, (8, 9), dict(rank=64, fp8=True, offload=True)),
    (24, (8, 9), dict(rank=64, offload=True)), (24, (8, 9), dict(rank=64, fp8=True))], ids=str)
def test_sampling_on_every_path(gib, capability, switches):
    with FakeCard(gib, capability) as card:
        sampling(card, **switches)
        assert not card.problems, card.problems
        assert held(card) <= gib


@pytest.mark.parametrize("switches", [{}, dict(rank=64)], ids=str)
def test_sampling_is_refused_before_anything_is_read(switches):
    with FakeCard(24, (8, 9)) as card, pytest.raises(ValueError, match="with --fp8 it takes"):
        sampling(card, **switches)
    assert card.memory.peak_allocated < GIB


@pytest.mark.parametrize("main, words", [
    (sample.main, ["a"]), (personalize.main, ["a.png"]), (meta_train.main, ["--data", "data"])], ids=["sample", "personalize", "meta_train"])
def test_a_cpu_that_is_too_small_is_one_line(main, words, monkeypatch, tmp_path, capsys):
    """bf16 at full size where 8 GB are free: refused before T5 is read, or a photo is."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (512, 512)).save("a.png")
    Path("data").mkdir()
    with torch.device("meta"):
        files = fake_card.Shapes(flux_model.Flux(flux_model.FluxConfig()))
    monkeypatch.setattr(checkpoints, "flux_files", lambda folder: (files, flux_model.FluxConfig()))
    monkeypatch.setattr(sample, "flux_files", checkpoints.flux_files)
    monkeypatch.setattr(checkpoints, "find_model", lambda name, args=None: Path("flux"))
    monkeypatch.setattr(checkpoints, "text_length", lambda folder: 512)
    monkeypatch.setattr(memory, "host_memory", lambda: 8e9)
    monkeypatch.setattr(checkpoints, "load_text_encoders", None)
    assert main([*words, "--model", "flux", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "GiB" in said


@pytest.mark.slow
@pytest.mark.parametrize("what, gib, launches", [("encode", 12, 250), ("decode", 12, 300), ("tiles", 12, 2000)])
def test_the_autoencoder(what, gib, launches):
    """Both ways at 1024 px, and 2048 px in tiles, within 12 GB."""
    with FakeCard(gib, (8, 6)) as card, torch.no_grad():
        model = autoencoder_on(card)
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
    "scales of another shape": (lambda x: torch._scaled_mm(x.to(memory.E4M3), x.to(memory.E4M3).T, scale_a=torch.ones(3, 1, device="cuda"),
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
    rows += [(f"stage 2, {px} px", stage_2, dict(px=px)) for px in (512, 768, 1024)]
    rows += [(f"stage 2, {px} px, --fp8", stage_2, dict(px=px, fp8=True)) for px in (512, 768, 1024)]
    rows += [("stage 2, 512 px, --offload", stage_2, dict(offload=True)),
             ("stage 2, 1024 px, --fp8 --offload", stage_2, dict(px=1024, fp8=True, offload=True)),
             ("stage 1, 512 px", stage_1, dict(folks=50)), ("stage 1, 1024 px", stage_1, dict(px=1024, size=(1024, 1024), folks=50)),
             ("stage 1, 512 px, --fp8", stage_1, dict(folks=50, fp8=True))]
    cards = [float(word) for word in sys.argv[1:]] or [16, 24, 48, 80, 141]
    print("| | " + " | ".join(f"{gib:g} GB" for gib in cards) + " |\n| --- |" + " --- |" * len(cards))
    for name, run, switches in rows:
        cells = []
        for gib in cards:
            with FakeCard(gib, (8, 9) if gib < 80 else (9, 0)) as card:
                try:
                    flux = run(card, **switches)
                    cells.append(f"{held(card):.1f}" + (f", {run_twice(flux)}" if flux else ""))
                    cells[-1] += f"; {card.problems}" if card.problems else ""
                except ValueError as error:
                    cells.append("refused: " + (str(error).partition("with ")[2] or "too large"))
                except torch.OutOfMemoryError as error:
                    cells.append(f"**out of memory** {error}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
