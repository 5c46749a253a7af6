"""memory.py: 8-bit weights, offloading, gradient checkpointing, what is known of memory and what is tried, compilation:
pytest tests/test_memory.py

Everything runs on the CPU. Copies to a card on a second stream, and what any of it saves, cannot be seen here:
tests/test_full_size.py has a card that is simulated. With -m slow: compilation (a minute or two).
"""
import copy
import math
import mmap
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_model import Flux, FluxConfig, denoise, flow_matching_loss
from metalora import AdaptedLinear, MetaLoRA, apply_loras
from personalize import main as personalize
from sample import main as sample
from support import checkpoints, memory
from support.checkpoints import TensorFiles, find_model, load_autoencoder, load_flux, open_flux
from support.common import run_script
from support.devices import is_out_of_memory
from support.memory import (E4M3, GIB, Fp8Linear, Offload, adapter_bytes, blocks_of, check_memory, fit, fit_training, quantize,
                            recompute_blocks, update_bytes, weight_bytes)
from support.names import find_targets
from test_flux_model import DIFFUSERS, HUB, ORIGINAL, TEXT_PARTS, link, message, relative

BABY = find_model("baby")


def saved_bytes(function):
    """Bytes that autograd keeps of a call for its backward pass: every storage once, the parameters not counted."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def draws(size=16, batch=2, dtype=torch.float32):
    """latent, noise, t, txt, y for the baby."""
    g = torch.Generator().manual_seed(3)
    latent, noise = torch.randn(2, batch, 16, size, 16, generator=g)
    return (latent, noise, torch.rand(batch, generator=g), torch.randn(batch, 24, 64, generator=g).to(dtype),
            torch.randn(batch, 64, generator=g).to(dtype))


def eight_bits(linear):
    """The same Linear in 8 bits."""
    out = copy.deepcopy(linear)
    Fp8Linear.convert(out, linear.weight.dtype, "cpu")
    out.fill(*quantize(linear.weight.detach()))
    return out


def beside(flux):
    """The model, whose weights are not to be widened: its updates have products of their own."""
    for block in blocks_of(flux):
        for module in block.modules():
            module.widen = False
    return flux


def trained(flux, steps=2, size=16):
    """Losses and gradients of a few steps of two people at once."""
    adapter = MetaLoRA(flux, 2, num_identities=2, slots=2, seed=1)
    adapter.bank.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(5))
    out = []
    for _ in range(steps):
        adapter.assign(torch.tensor([0, 1]))
        loss = flow_matching_loss(flux, *draws(size, dtype=flux.img_in.weight.dtype))
        loss.sum().backward()
        out += [loss.detach(), adapter.rows.grad.clone()]
        adapter.step(1e-3)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1, 1e3, 1e6])
def test_numbers_in_8_bits(size):
    """The largest keeps its place, no number within 15 powers of two is off by more than a 16th, zeros stay."""
    x = torch.randn(6, 64) * size * torch.tensor([1, 1e-3, 1, 1, 1, 0])[:, None]
    x8, scale = quantize(x)
    assert x8.dtype == E4M3 and scale.shape == (1, 1) and scale.dtype == torch.float32
    back = x8.float() * scale
    assert back.isfinite().all() and (back[5] == 0).all()
    normal = x.abs() > x.abs().max() / 448 / 64                           # below lie e4m3's subnormal numbers
    assert ((back - x).abs() <= x.abs() / 15.9)[normal].all() and normal[:5].float().mean() > 0.95
    assert relative(back[:5], x[:5]) > 0.005                                                # 8 bits they are
    again, scale2 = quantize(back)
    assert torch.equal(again.float() * scale2, back)                      # as it is already representable


@pytest.mark.parametrize("shape", [(5, 96), (2, 7, 96)])
@pytest.mark.parametrize("way", ["8 bits", "16 bits", "a scale for each row"])
def test_linear_of_8_bits(shape, way, monkeypatch):
    """Near the Linear it was made of, in every way to multiply; its gradient is that of the weight that it stands for."""
    monkeypatch.setattr(memory, "multiplies_fp8", lambda device: way != "16 bits")
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 48, dtype=torch.bfloat16).requires_grad_(False)
    eight, x = eight_bits(linear), torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    if way == "a scale for each row":                                                            # as some files have
        scale = linear.weight.abs().amax(1, keepdim=True).float() / 448
        eight.fill((linear.weight / scale).to(E4M3), scale)
    assert eight.weight.nbytes == linear.weight.nbytes // 2
    error = relative(eight(x).detach(), linear(x).detach())
    assert (0.03 if way == "8 bits" else 0.02) < error < (0.045 if way == "8 bits" else 0.035)  # x's rounding comes on top
    dy = torch.randn_like(eight(x))
    found, = torch.autograd.grad(eight(x), x, dy)
    assert relative(found, dy.float() @ (eight.weight.float() * eight.scale)) < 5e-3


@pytest.mark.parametrize("capability, multiplies", [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_which_cards_multiply_8_bits(capability, multiplies, monkeypatch):
    """By one scale for each matrix, which every card from 8.9 on takes; one for each row fails on 12.0 with torch 2.10."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert memory.multiplies_fp8(torch.device("cuda")) == multiplies


def test_sizes_that_no_kernel_takes():
    linear = torch.nn.Linear(24, 20, dtype=torch.bfloat16)
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert relative(eight_bits(linear)(x).detach(), linear(x).detach()) < 0.04


def test_model_of_8_bits(tmp_path):
    """Only the blocks' Linears have 8 bits; the same from original and diffusers files; near the model of 16 bits."""
    one, other = (load_flux(link(tmp_path / str(i), parts), dtype=torch.bfloat16, fp8=True)
                  for i, parts in enumerate((ORIGINAL, DIFFUSERS)))
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p.float(), q.float()), name
        assert (p.dtype == E4M3) == ("_blocks." in name and name.endswith("weight")), name
    latent, noise, t, txt, y = draws(dtype=torch.bfloat16)
    outputs = [denoise(load_flux(BABY, dtype=torch.bfloat16, fp8=fp8), noise, txt, y, 8, 3.5) for fp8 in (False, True)]
    assert 0.01 < relative(outputs[1], outputs[0]) < 0.25                                         # 8 steps, all of the network


def eight_bit_file(path, names, kind):
    """A snapshot's transformer as others publish it in 8 bits -> the values that it stands for."""
    tensors, meant, metadata = load_file(HUB / "flux1-dev.safetensors"), {}, TensorFiles([HUB / "flux1-dev.safetensors"]).metadata
    out = {}
    for name, tensor in tensors.items():
        weight = "_blocks." in name and name.endswith(".weight")
        scale = torch.tensor(1.0)
        if weight and kind in ("scaled", "rows"):
            scale = tensor.abs().amax(None if kind == "scaled" else 1, keepdim=kind == "rows").float() / 448
        stored = (tensor / scale).to(torch.float8_e5m2 if kind == "e5m2" else E4M3) if weight else tensor.bfloat16()
        meant[name] = stored.float() * (scale if weight else 1)
        out[names(name)] = stored
        if weight and kind in ("scaled", "rows"):
            out[names(name).removesuffix("weight") + ("scale_weight" if kind == "scaled" else "weight_scale")] = scale
    if kind == "scaled":
        out[names("scaled_fp8")] = torch.zeros(2).to(E4M3)
    save_file(out, path, metadata)
    return meant


@pytest.mark.parametrize("kind, prefix", [("cast", ""), ("cast", "model.diffusion_model."), ("scaled", ""), ("rows", ""), ("e5m2", "")])
def test_common_8_bit_files(tmp_path, kind, prefix):
    """Weights cast to 8 bits, with one scale or one for each row beside them, alone or in ComfyUI's files with everything: read
    to 16 bits or more they are exactly what the file means, and what is e4m3 already stays so without another rounding."""
    link(tmp_path, TEXT_PARTS + ("ae.safetensors",))
    path = tmp_path / "flux1-dev-fp8.safetensors"
    meant = eight_bit_file(path, lambda name: prefix + name, kind)
    if prefix:
        everything = TensorFiles([path])
        save_file(load_file(path) | {"vae.decoder.conv_in.weight": torch.zeros(1)}, path, everything.metadata)
    full = load_flux(tmp_path, dtype=torch.float32)
    for name, p in full.named_parameters():
        assert torch.equal(p, meant[name]), name
    for name, module in load_flux(tmp_path, dtype=torch.bfloat16, fp8=True).named_modules():
        if isinstance(module, Fp8Linear):
            found = module.weight.float() * module.scale
            assert relative(found, meant[f"{name}.weight"]) < (0.04 if kind == "e5m2" else 1e-6)


def test_an_8_bit_file_that_lacks_a_weight(tmp_path):
    link(tmp_path, TEXT_PARTS + ("ae.safetensors",))
    path = tmp_path / "flux1-dev-fp8.safetensors"
    eight_bit_file(path, str, "scaled")
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith("linear1.weight"))
    save_file({name: t for name, t in tensors.items() if name != gone}, path, TensorFiles([path]).metadata)
    assert gone in message(load_flux, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The update beside the weight, and blocks that live elsewhere


@pytest.mark.parametrize("dtype, loss_bound, bound", [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 5e-3, 0.05)])
def test_update_beside_the_weight(dtype, loss_bound, bound):
    """addmm after the base, or a wider GEMM: the same up to rounding, for two people in a batch, with fused layers."""
    one, other = (trained(how(load_flux(BABY, dtype=dtype)), steps=1) for how in (lambda flux: flux, beside))
    for i, (a, b) in enumerate(zip(one, other)):
        assert relative(a, b) < (bound if i % 2 else loss_bound)


@pytest.mark.parametrize("fp8", [False, True])
def test_offloaded_training(fp8, monkeypatch):
    """Blocks that come and go change no bit; a step copies each block in once forwards and, but for two, once backwards."""
    copies, fetch = [], Offload.fetch
    monkeypatch.setattr(Offload, "fetch", lambda self, index: (copies.append(index), fetch(self, index)))
    here = load_flux(BABY, dtype=torch.float32, fp8=fp8)
    recompute_blocks(here, 9)
    expected = trained(beside(here))
    flux = load_flux(BABY, dtype=torch.float32, fp8=fp8, offload=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, trained(flux), strict=True))
    n = len(blocks_of(flux))
    assert copies == [*range(n), *range(n - 3, -1, -1), *range(2, n), *range(n - 3, -1, -1)]


def test_offloaded_sampling(monkeypatch):
    """The same picture bit for bit, with LoRAs applied and taken away again; every block is copied once in each step."""
    copies, fetch = [], Offload.fetch
    monkeypatch.setattr(Offload, "fetch", lambda self, index: (copies.append(index), fetch(self, index)))
    _, noise, _, txt, y = draws()
    here, flux = (load_flux(BABY, dtype=torch.float32, offload=offload) for offload in (False, True))
    assert torch.equal(denoise(flux, noise, txt, y, 3, 3.5), denoise(here, noise, txt, y, 3, 3.5))
    assert copies == [*range(9)] * 3 + [0]
    lora = {t.path: (torch.randn(2, t.d_in) / 10, torch.randn(t.rows, 2) / 10) for t in find_targets(here)[::3]}
    for model in (here, flux):
        apply_loras(model, [(lora, 0.5)])
    assert any(isinstance(m, AdaptedLinear) and m.S is None for m in flux.modules())
    changed = denoise(flux, noise, txt, y, 3, 3.5)
    assert relative(changed, denoise(here, noise, txt, y, 3, 3.5)) < 1e-5
    for model in (here, flux):
        apply_loras(model, [])
    plain = denoise(flux, noise, txt, y, 3, 3.5)
    assert torch.equal(plain, denoise(here, noise, txt, y, 3, 3.5)) and relative(changed, plain) > 0.01


def test_only_two_blocks_are_elsewhere():
    """All weights of a block are views of one piece of memory, and only what runs, and what comes next, is on the device."""
    flux = load_flux(BABY, dtype=torch.float32, offload=True)
    homes = flux.double_blocks[0].offload.homes.values()
    _, noise, _, txt, y = draws()
    denoise(flux, noise, txt, y, 1, 3.5)
    within = [[home.data_ptr() <= p.data_ptr() and p.data_ptr() + p.nbytes <= home.data_ptr() + home.nbytes
               for p in block.parameters()] for block, home in zip(blocks_of(flux), homes, strict=True)]
    assert all(all(block) or not any(block) for block in within) and sum(not any(block) for block in within) <= 2
    assert all(within[3])


def test_memory_is_locked_page_by_page(monkeypatch):
    """Whole pages that no other memory shares, since one page cannot be locked twice; given back with the last view of them."""
    locked = {}
    cudart = SimpleNamespace(cudaHostRegister=lambda start, size, flags: locked.update({start: size}) or 0,
                             cudaHostUnregister=lambda start: locked.pop(start))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    homes = [memory.page_locked(1000, True) for _ in range(2)]
    assert [locked[home.data_ptr()] for home in homes] == [mmap.PAGESIZE] * 2
    assert all(start % mmap.PAGESIZE == 0 for start in locked)
    piece = homes.pop()[500:]
    del homes[:]
    assert len(locked) == 1                        # a block's weights still lie there
    del piece
    assert not locked
    cudart.cudaHostRegister = lambda *words: 1
    with pytest.raises(OSError, match="ulimit"):
        memory.page_locked(10, True)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_recomputing_some_blocks_changes_nothing():
    flux, results, kept = load_flux(BABY, dtype=torch.bfloat16), [], []
    adapter = MetaLoRA(flux, 1)
    adapter.bank.weight.normal_(std=0.02)
    for count in (0, 4, 99):
        recompute_blocks(flux, count)
        adapter.assign(torch.tensor([0, 0]))
        losses = []
        kept.append(saved_bytes(lambda: losses.append(flow_matching_loss(flux, *draws(dtype=torch.bfloat16)).sum())))
        losses[0].backward()
        results.append(adapter.rows.grad.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]) and results[0].abs().sum() > 0
    assert kept[0] > 1.4 * kept[1] > 2 * kept[2]


def check(flux, device, fp8, offload, beside):
    """check_memory in bf16 -> how many blocks stay on the device."""
    args = SimpleNamespace(dtype=torch.bfloat16, device=torch.device(device), fp8=fp8, offload=offload)
    check_memory(args, flux, beside)
    return args.stay


def test_memory_is_asked_for_before_the_start(monkeypatch):
    """What does not fit is refused before anything is read, with the switch that helps: FLUX.1-dev in 24 and in 1 GiB."""
    with torch.device("meta"):
        flux = Flux(FluxConfig())
    bf16 = torch.bfloat16
    for fp8, size in ((False, 22.2), (True, 11.1)):
        around, blocks = weight_bytes(flux, bf16, fp8)
        assert round((around + sum(blocks)) / GIB, 1) == size
    beside = 1.5 * GIB                                                                      # and half of one in reserve
    for free, switches, words in ((20, (False, False), "--fp8 it takes 13.1"), (10, (True, False), "--offload it takes 2.8"),
                                  (10, (False, False), "--offload it takes 3.4"), (3, (False, False), "--fp8 --offload it takes 2.8"),
                                  (24.1, (False, False), "takes 24.2 GiB"), (0.5, (True, True), "no switch")):
        monkeypatch.setattr(memory, "memory_left", lambda device: free * GIB)
        assert words in message(check, flux, "cuda", *switches, beside)
    monkeypatch.setattr(memory, "memory_left", lambda device: 24.3 * GIB)
    check(flux, "cuda", False, False, beside)
    monkeypatch.setattr(memory, "memory_left", lambda device: 20 * GIB)              # a Mac has no 8-bit floats
    said = message(check, flux, "mps", False, False, beside)
    assert "--offload it takes 3.4" in said and "--fp8" not in said


def test_the_memory_of_the_cpu_is_asked_for_too(monkeypatch):
    """Nothing is gained there by --offload; and a card's offloaded blocks must fit there."""
    with torch.device("meta"):
        flux = Flux(FluxConfig())
    monkeypatch.setattr(memory, "host_memory", lambda: 8 * GIB)
    assert "no switch" in message(check, flux, "cpu", False, True, GIB)
    monkeypatch.setattr(memory, "host_memory", lambda: 13 * GIB)
    assert "--fp8 it takes 12.6" in message(check, flux, "cpu", False, False, GIB)
    monkeypatch.setattr(memory, "memory_left", lambda device: 8 * GIB)
    assert "--offload puts 17.0" in message(check, flux, "cuda", False, True, GIB)
    monkeypatch.setattr(memory, "host_memory", lambda: 17.1 * GIB)
    check(flux, "cuda", False, True, GIB)


@pytest.mark.parametrize("text, expected", [("MemTotal: 9 kB\nMemAvailable:    5 kB\n", 5120), ("MemTotal: 9 kB\n", math.inf)])
def test_a_system_that_does_not_tell_its_memory_refuses_nothing(text, expected, monkeypatch):
    monkeypatch.setattr(memory.Path, "read_text", lambda *words: text)
    assert memory.host_memory() == expected


def test_a_cpu_keeps_its_blocks():
    """There, --offload could only copy them from one place to another."""
    with torch.device("meta"):
        flux = Flux(FluxConfig(depth=1, depth_single_blocks=2, hidden_size=96, num_heads=2, axes_dim=(16, 16, 16)))
    assert check(flux, "cpu", False, True, GIB // 8) == 3


def test_as_many_blocks_as_fit_stay_on_the_device(monkeypatch):
    with torch.device("meta"):
        flux = Flux(FluxConfig())
    monkeypatch.setattr(memory, "host_memory", lambda: 64 * GIB)

    def stay(free):
        monkeypatch.setattr(memory, "memory_left", lambda device: free * GIB)
        return check(flux, "cuda", False, True, 1e9)
    assert [stay(free) for free in (3, 3.5, 12, 80)] == [0, 1, 14, 57]


@pytest.mark.parametrize("rank, r1, slots", [(1, 16, 1), (3, 0, 1), (2, 16, 4)])
@pytest.mark.parametrize("fp8", [False, True])
def test_bytes_of_an_adapter(rank, r1, slots, fp8):
    """What is foreseen of rows, moments, LoMD, gradients and updates is what is then there."""
    flux, people, dtype = load_flux(BABY, dtype=torch.bfloat16, fp8=fp8), 5, torch.bfloat16
    targets = find_targets(flux)
    foreseen = adapter_bytes(flux, dtype, rank, r1, slots, people, slots > 1)
    updates = update_bytes(flux, {target.path: slots * rank for target in targets}, dtype)
    lomd = {target.path: torch.zeros(r1, target.d_in) for target in targets} if r1 else None
    adapter = MetaLoRA(flux, rank, lomd, people, slots=slots)
    adapter.train_lomd = slots > 1
    adapter.bank.make_moments()
    adapter.assign(torch.arange(slots))
    numbers = 0
    for layer in adapter.layers:
        numbers += layer.C.numel() + sum(U.numel() for U in layer.U)
        numbers += 0 if layer.S is None else layer.S.numel() - layer.base.weight.numel()
    assert updates == 2 * numbers
    kept = 3 * adapter.bank.weight.nbytes + 2 * adapter.rows.nbytes
    if r1:
        kept += (5 if slots > 1 else 1) * adapter.flat.nbytes
    assert foreseen == kept + updates


def test_bytes_of_loras():
    """Of their true ranks, also where they adapt but some of the layers, and some parts of a fused one."""
    flux = load_flux(BABY, dtype=torch.bfloat16)
    lora = {t.path: (torch.zeros(rank, t.d_in), torch.zeros(t.rows, rank))
            for rank, t in enumerate(find_targets(flux, outside=True)) if rank % 3}
    foreseen = update_bytes(flux, {path: len(A) for path, (A, B) in lora.items()}, torch.bfloat16)
    apply_loras(flux, [(lora, 1.0)])
    numbers = 0
    for layer in flux.modules():
        if isinstance(layer, AdaptedLinear):
            numbers += layer.C.numel() + sum(U.numel() for U in layer.U)
            numbers += 0 if layer.S is None else layer.S.numel() - layer.base.weight.numel()
    assert foreseen == 2 * numbers


def run_out(enough):
    """A step that runs out of memory until enough() is true -> it, and its calls."""
    calls = []

    def step():
        calls.append(1)
        if not enough():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return step, calls


def run_twice(flux):
    return sum(block.recompute for block in blocks_of(flux))


CPU = torch.device("cpu")


@pytest.mark.parametrize("needed", range(10))
def test_more_blocks_are_run_twice_until_a_step_fits(needed):
    """As few as it takes, by no more than five steps of nine blocks."""
    flux = load_flux(BABY, dtype=torch.bfloat16)
    step, calls = run_out(lambda: run_twice(flux) >= needed)
    fit(flux, CPU, step, training=True)
    assert run_twice(flux) == needed and len(calls) <= (5 if needed else 1)


def test_a_step_fits_only_beside_the_reserve(monkeypatch):
    """What libraries and fragmentation take later is held while the step is tried, and given back."""
    held, empty = [], torch.empty
    monkeypatch.setattr(memory, "RESERVE", 12_345)

    def watched(*size, **options):
        made = empty(*size, **options)
        if size == (12_345,):
            assert made.dtype == torch.uint8
            held.append(weakref.ref(made))
        return made
    monkeypatch.setattr(torch, "empty", watched)
    there = []
    fit(load_flux(BABY, dtype=torch.bfloat16), CPU, lambda: there.append([ref() is not None for ref in held]), training=True)
    assert there == [[True]] and held[0]() is None


def test_what_never_fits_is_one_line():
    flux = load_flux(BABY, dtype=torch.bfloat16)
    step, calls = run_out(lambda: False)
    said = message(fit, flux, CPU, step, True)
    assert "--fp8" in said and "\n" not in said and len(calls) <= 5 and run_twice(flux) == 9
    calls.clear()
    assert "--fp8" in message(fit, flux, CPU, step, True, 3)                   # --recompute 3: so many and no others
    assert len(calls) == 1 and run_twice(flux) == 3
    with pytest.raises(RuntimeError, match="shapes"):                          # another fault is not mended by memory
        fit(flux, CPU, lambda: torch.ones(2, 3) @ torch.ones(2, 3), True)


@pytest.mark.parametrize("training", [False, True])
def test_offloaded_blocks_leave_the_device_until_a_step_fits(training):
    """What is computed stays the same."""
    flux, here = (load_flux(BABY, dtype=torch.float32) for _ in range(2))
    offload = Offload(flux, "cpu")
    offload.keep(9)
    step, _ = run_out(lambda: offload.stay <= 3)
    fit(flux, CPU, step, training)
    assert offload.stay == 3 and sorted(offload.homes) == [*range(3, 9)]
    assert run_twice(flux) == 9 * training
    _, noise, _, txt, y = draws()
    assert torch.equal(denoise(flux, noise, txt, y, 2, 3.5), denoise(here, noise, txt, y, 2, 3.5))
    assert all(torch.equal(a, b) for a, b in zip(trained(beside(here)), trained(flux), strict=True))


def test_a_trial_leaves_no_trace(monkeypatch):
    """Weights, LoMD, rows, moments, gradients and random numbers are what they were, although a step was made."""
    flux = load_flux(BABY, dtype=torch.float32)
    adapter = MetaLoRA(flux, 2, {t.path: torch.randn(4, t.d_in) for t in find_targets(flux)}, num_identities=3, slots=2)
    adapter.bank.weight.normal_(std=0.02)
    adapter.train_lomd = True
    for bank in (adapter.bank, adapter.shared):
        bank.make_moments()

    def state():
        banks = [getattr(bank, part) for bank in (adapter.bank, adapter.shared) for part in bank.PARTS]
        return [*flux.parameters(), *banks, torch.get_rng_state()]
    adapter.assign(torch.arange(1))                          # what lies in the spare places of the weights
    before, losses = [tensor.clone() for tensor in state()], []
    loss = memory.flow_matching_loss
    monkeypatch.setattr(memory, "flow_matching_loss", lambda *batch: losses.append(loss(*batch)) or losses[-1])
    # a device that is tried, for which the CPU stands
    monkeypatch.setattr(adapter, "device", SimpleNamespace(type="simulated"))
    monkeypatch.setattr(memory, "fit", lambda flux, device, *rest, **words: fit(flux, CPU, *rest, **words))
    monkeypatch.setattr(adapter, "assign", lambda ids, assign=adapter.assign, there=CPU: (
        setattr(adapter, "device", there), assign(ids)))
    assert fit_training(adapter, (16, 12), 24) == 0
    assert losses[0].shape == (2,) and losses[0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert adapter.rows.grad is None and adapter.flat.grad is None


def test_a_cpu_is_not_tried(monkeypatch):
    """Where the estimate does not fit, all blocks run twice; --recompute decides for itself."""
    adapter = MetaLoRA(load_flux(BABY, dtype=torch.bfloat16), 1)
    monkeypatch.setattr(memory, "fit", None)
    assert fit_training(adapter, (64, 64), 24) == 0
    monkeypatch.setattr(memory, "host_memory", lambda: 2 ** 24)
    assert fit_training(adapter, (64, 64), 24) == 9 and fit_training(adapter, (64, 64), 24, 2) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_holds(dtype):
    """For its backward pass no more than is foreseen of it, in inputs of its own."""
    flux = load_flux(BABY, dtype=dtype)
    adapter = MetaLoRA(flux, 1)
    adapter.assign(torch.tensor([0]))
    kept = saved_bytes(lambda: flow_matching_loss(flux, *draws(size=128, batch=1, dtype=dtype)))
    inputs = (128 * 16 // 4 + 24) * flux.config.hidden_size * dtype.itemsize
    assert 0.6 < kept / inputs / len(blocks_of(flux)) / memory.BLOCK < 1


def test_a_cpu_that_is_full_is_one_line(capsys):
    """Its allocator has no error of its own."""
    assert run_script("x.py", lambda argv: torch.empty(2 ** 60, dtype=torch.uint8)) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(RuntimeError):                        # all else is a fault of ours, and has its traceback
        run_script("x.py", lambda argv: torch.ones(2, 3) @ torch.ones(2, 3))


def test_a_decoder_that_runs_out_of_memory_goes_on_in_tiles(monkeypatch):
    autoencoder = load_autoencoder(BABY, dtype=torch.float32)
    latent, tiled = torch.randn(1, 16, 16, 16), []
    whole = autoencoder.decode(latent)
    upsample, in_tiles = type(autoencoder.decoder).upsample, memory.upsample_tiled

    def full(decoder, x):
        if not tiled:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return upsample(decoder, x)
    monkeypatch.setattr(memory, "upsample_tiled", lambda decoder, x: tiled.append(1) or in_tiles(decoder, x))
    monkeypatch.setattr(type(autoencoder.decoder), "upsample", full)
    assert relative(autoencoder.decode(latent), whole) < 1e-5 and tiled == [1]         # one tile is the whole


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch has no such segments")
@pytest.mark.parametrize("own, expected", [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "x"}, "x"),
                                           ({"PYTORCH_CUDA_ALLOC_CONF": "y"}, "None")])
def test_the_allocator_may_grow_its_segments(own, expected):
    """Unless its user says otherwise, under the newer name or the older; set before torch is there."""
    code = "import support, os, sys; assert 'torch' not in sys.modules; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | own
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected


# ---------------------------------------------------------------------------------------------------------------------
# The switches


def test_switches_of_the_scripts(tmp_path, monkeypatch, capsys):
    """personalize.py and sample.py with all of them at once: a LoRA and a picture come out."""
    monkeypatch.chdir(tmp_path)
    photo = BABY.parent / "example.png"
    assert personalize([str(photo), "--model", "baby", "--iters", "2", "--fp8", "--offload", "--recompute", "3"]) == 0
    assert sample(["--model", "baby", "--lora", "out.safetensors", "a photo of a woman", "--steps", "2", "--fp8", "--offload"]) == 0
    assert (tmp_path / "out.png").is_file() and "gradient checkpointing in 3 of 9 blocks" in capsys.readouterr().out
    assert personalize([str(photo), "--model", "baby", "--recompute", "-1"]) == 2
    assert "--recompute" in capsys.readouterr().err


def test_blocks_may_be_compiled_in_many_variants():
    """Beyond the limit blocks run as they are written, and torch warns."""
    memory.compile_blocks(load_flux(BABY, dtype=torch.float32))
    assert torch._dynamo.config.recompile_limit >= 64


def test_a_small_model_is_not_compiled_unless_asked(monkeypatch):
    asked = []
    monkeypatch.setattr("support.checkpoints.compile_blocks", asked.append)
    for wanted, steps, expected in ((None, 10_000, 0), (False, 10_000, 0), (True, 1, 1)):
        args = SimpleNamespace(folder=HUB, dtype=torch.float32, fp8=False, offload=False, stay=0, compile=wanted, device=torch.device("cpu"))
        open_flux(args, steps)
        assert len(asked) == expected


@pytest.mark.parametrize("offload, left, expected", [(True, 10, "cpu"), (True, 12, "cuda"), (False, 10, "cuda")])
def test_text_is_encoded_on_the_cpu_where_t5_does_not_fit(offload, left, expected, monkeypatch):
    monkeypatch.setattr(checkpoints, "memory_left", lambda device: left * GIB)
    args = SimpleNamespace(model=str(HUB), offload=offload, device=torch.device("cuda"))
    checkpoints.choose_model(args)
    assert str(args.text_device) == expected and args.dtype == torch.bfloat16


@pytest.mark.parametrize("fp8, capability, pays", [(False, (8, 6), True), (True, (8, 6), False), (True, (8, 9), True)])
def test_8_bits_are_not_compiled_where_the_compiler_has_none(fp8, capability, pays, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: True)
    monkeypatch.setattr(checkpoints, "is_small", lambda folder: False)
    args = SimpleNamespace(folder=HUB, fp8=fp8, device=torch.device("cuda"))
    assert checkpoints.compiling_pays(args, 375) == pays
    assert not checkpoints.compiling_pays(args, 10)


@pytest.mark.slow
@pytest.mark.parametrize("fp8, rounding", [(False, 1e-3), (True, 2 ** -6)])
def test_compiled_blocks(fp8, rounding):
    """Two pieces of code for all blocks, no new ones for other aspect ratios, losses but for rounding, and gradients at most
    as far from fp32's as those of the blocks as they are written."""
    torch._dynamo.reset()
    from torch._dynamo.utils import counters
    counters.clear()
    exact, plain = ([trained(load_flux(BABY, dtype=dtype, fp8=fp8), steps=1, size=size) for size in (16, 12, 20)]
                    for dtype in (torch.float32, torch.bfloat16))
    flux = load_flux(BABY, dtype=torch.bfloat16, fp8=fp8)
    memory.compile_blocks(flux)
    compiled = [trained(flux, steps=1, size=size) for size in (16, 12, 20)]
    assert counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    for fast, slow, true in zip(compiled, plain, exact):
        assert relative(fast[0], slow[0]) < rounding
        assert relative(fast[1], true[1]) < 1.2 * relative(slow[1], true[1])


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                                  "GET was unable to find an engine to execute this computation"])
def test_what_torch_says_without_memory(text):
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(RuntimeError("shapes do not fit"))
