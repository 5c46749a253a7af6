"""speed.py: 8-bit weights, offloading, recomputation and its planning, compilation: pytest tests/test_speed.py

Everything runs on the CPU, where torch multiplies float8 matrices by the same call as on a card. Copies to a card on a
second stream, and what any of it saves, cannot be seen here. With -m slow: compilation (a minute or two).
"""
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_model import Flux, FluxConfig, denoise, flow_matching_loss
from metalora import AdaptedLinear, MetaLoRA, apply_loras
from personalize import main as personalize
from sample import main as sample
from support import checkpoints, speed
from support.checkpoints import TensorFiles, find_model, find_targets, load_flux, open_flux
from support.speed import (E4M3, Fp8Linear, Offload, blocks_of, check_memory,
                           plan_recompute, quantize, recompute_blocks, step_bytes, weight_bytes)
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
    monkeypatch.setattr(speed, "multiplies_fp8", lambda device: way != "16 bits")
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 48, dtype=torch.bfloat16).requires_grad_(False)
    eight, x = Fp8Linear.of(linear), torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
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
    assert speed.multiplies_fp8(torch.device("cuda")) == multiplies


def test_sizes_that_no_kernel_takes():
    linear = torch.nn.Linear(24, 20, dtype=torch.bfloat16)
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert relative(Fp8Linear.of(linear)(x).detach(), linear(x).detach()) < 0.04


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
    monkeypatch.setattr(Offload, "fetch", lambda self, index, slot: (copies.append(index), fetch(self, index, slot)))
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
    monkeypatch.setattr(Offload, "fetch", lambda self, index, slot: (copies.append(index), fetch(self, index, slot)))
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
    homes = flux.double_blocks[0].offload.homes
    _, noise, _, txt, y = draws()
    denoise(flux, noise, txt, y, 1, 3.5)
    within = [[home.data_ptr() <= p.data_ptr() and p.data_ptr() + p.nbytes <= home.data_ptr() + home.nbytes
               for p in block.parameters()] for block, home in zip(blocks_of(flux), homes, strict=True)]
    assert all(all(block) or not any(block) for block in within) and sum(not any(block) for block in within) <= 2
    assert all(within[3])


def test_memory_is_locked_in_one_piece(monkeypatch):
    """Two pieces that share a page could not both be, as those of a small model do; and it is given back."""
    locked = {}
    cudart = SimpleNamespace(cudaHostRegister=lambda start, size, flags: locked.update({start: size}) or 0,
                             cudaHostUnregister=lambda start: locked.pop(start))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    flat = torch.empty(1000, dtype=torch.uint8)
    speed.pin(flat)
    assert locked == {flat.data_ptr(): 1000}
    piece = flat.split(500)[1]
    del flat
    assert len(locked) == 1                        # a block's weights still lie there
    del piece
    assert not locked
    cudart.cudaHostRegister = lambda *words: 1
    with pytest.raises(OSError, match="ulimit"):
        speed.pin(torch.empty(10, dtype=torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_as_few_blocks_are_run_twice_as_it_takes(monkeypatch):
    """No block more than the free memory asks for, and an error in one line where all of them do not do."""
    flux = load_flux(BABY, dtype=torch.bfloat16)
    adapter, work = MetaLoRA(flux, 1), speed.Work(1000, training=True)
    needed = [step_bytes(flux, work, torch.bfloat16, count) for count in range(10)]
    assert needed[:8] == sorted(needed[:8], reverse=True) and needed[0] > 2 * needed[-1]
    for count, size in enumerate(needed[:8]):
        monkeypatch.setattr(speed, "memory_left", lambda device: size + speed.RESERVE)
        assert plan_recompute(adapter, 1000) == count
    monkeypatch.setattr(speed, "memory_left", lambda device: min(needed) + speed.RESERVE - 1)
    assert "GiB" in message(plan_recompute, adapter, 1000)


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


def test_memory_is_asked_for_before_the_start(monkeypatch):
    """What does not fit is refused before anything is read, with the switch that helps: FLUX.1-dev in 24 and in 1 GiB."""
    with torch.device("meta"):
        flux = Flux(FluxConfig())
    bf16 = torch.bfloat16
    sizes = {on: weight_bytes(flux, bf16, *on) / 2 ** 30 for on in ((False, False), (True, False), (False, True), (True, True))}
    assert [round(size, 1) for size in sizes.values()] == [22.2, 11.1, 1.4, 0.8]
    beside = 1.5 * 2 ** 30                                                                  # and half of one in reserve
    for free, switches, words in ((20, (False, False), "--fp8 it takes 13.1"), (10, (True, False), "--offload it takes 2.8"),
                                  (10, (False, False), "--offload it takes 3.4"), (3, (False, False), "--fp8 --offload it takes 2.8"),
                                  (24.1, (False, False), "takes 24.2 GiB"), (0.5, (True, True), "no switch")):
        monkeypatch.setattr(speed, "memory_left", lambda device: free * 2 ** 30)
        assert words in message(check_memory, flux, "cuda", bf16, *switches, beside)
    monkeypatch.setattr(speed, "memory_left", lambda device: 24.3 * 2 ** 30)
    check_memory(flux, "cuda", bf16, False, False, beside)


def test_as_many_blocks_as_fit_stay_on_the_device(monkeypatch):
    with torch.device("meta"):
        flux = Flux(FluxConfig())
    stay = lambda free: (monkeypatch.setattr(speed, "memory_left", lambda device: free * 2 ** 30),
                         speed.blocks_on_device(flux, "cuda", torch.bfloat16, False, 1e9))[1]
    assert [stay(free) for free in (2, 3.5, 12, 80)] == [0, 1, 14, 57]


def test_the_order_of_attention_lasts(monkeypatch):
    """Until the process ends: a context that nobody keeps is left when it is collected."""
    import gc
    cudnn, flash, efficient = speed.KERNELS
    monkeypatch.setattr(speed, "seconds_of_attention", lambda kernel, *rest: {cudnn: 3.0, flash: 2.0, efficient: 1.0}[kernel])
    with speed.ExitStack() as stack:
        monkeypatch.setattr(speed, "ORDER", stack)
        before = torch._C._get_sdp_priority_order()
        speed.choose_attention((1, 2, 3, 4), torch.device("cuda"), torch.bfloat16, True)
        gc.collect()
        order = torch._C._get_sdp_priority_order()
        assert [int(kernel) for kernel in order[:3]] == [int(kernel) for kernel in (efficient, flash, cudnn)]
    assert torch._C._get_sdp_priority_order() == before


def test_the_fastest_attention_is_chosen(monkeypatch):
    """The kernels in the order of their times, and all of them allowed; on another device nothing changes."""
    cudnn, flash, efficient = speed.KERNELS
    times, orders = {cudnn: 2.0, flash: 1.0, efficient: float("inf")}, []

    class Order:
        def __init__(self, kernels, set_priority):
            orders.append(kernels)
            assert set_priority

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass
    monkeypatch.setattr(speed, "seconds_of_attention", lambda kernel, *rest: times[kernel])
    monkeypatch.setattr(speed, "sdpa_kernel", Order)
    choose = lambda device: speed.choose_attention((1, 2, 3, 4), torch.device(device), torch.bfloat16, True)
    assert choose("cpu") is None and not orders
    assert choose("cuda") == "FLASH_ATTENTION" and orders[-1] == [flash, cudnn, efficient, speed.SDPBackend.MATH]
    times[efficient] = 0.1
    assert choose("cuda") == "EFFICIENT_ATTENTION" and orders[-1][0] == efficient
    times.update(dict.fromkeys(times, float("inf")))
    assert choose("cuda") is None and len(orders) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The switches


def test_switches_of_the_scripts(tmp_path, monkeypatch, capsys):
    """personalize.py and sample.py with all of them at once: a LoRA and a picture come out."""
    monkeypatch.chdir(tmp_path)
    photo = BABY.parent / "example.png"
    assert personalize([str(photo), "--model", "baby", "--iters", "2", "--fp8", "--offload", "--recompute", "3"]) == 0
    assert sample(["--model", "baby", "--lora", "out.safetensors", "a photo of a woman", "--steps", "2", "--fp8", "--offload"]) == 0
    assert (tmp_path / "out.png").is_file() and "3 of 9 blocks are run twice" in capsys.readouterr().out
    assert personalize([str(photo), "--model", "baby", "--recompute", "-1"]) == 2
    assert "--recompute" in capsys.readouterr().err


def test_where_compilation_is_given_up_it_is_said(capsys):
    import logging
    speed.compile_blocks(load_flux(BABY, dtype=torch.float32))
    speed.compile_blocks(load_flux(BABY, dtype=torch.float32))
    assert torch._dynamo.config.recompile_limit >= 64
    logging.getLogger("torch._dynamo.convert_frame").warning("torch._dynamo hit config.%s (%s)", "recompile_limit", 64)
    assert capsys.readouterr().err.count("note: torch gave up compiling") == 1


def test_a_small_model_is_not_compiled_unless_asked(monkeypatch):
    asked = []
    monkeypatch.setattr("support.checkpoints.compile_blocks", asked.append)
    for wanted, steps, expected in ((None, 10_000, 0), (False, 10_000, 0), (True, 1, 1)):
        args = SimpleNamespace(folder=HUB, dtype=torch.float32, fp8=False, offload=False, compile=wanted)
        open_flux(args, torch.device("cpu"), steps, speed.Work(100))
        assert len(asked) == expected


@pytest.mark.parametrize("fp8, capability, pays", [(False, (8, 6), True), (True, (8, 6), False), (True, (8, 9), True)])
def test_8_bits_are_not_compiled_where_the_compiler_has_none(fp8, capability, pays, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: True)
    monkeypatch.setattr(checkpoints, "is_small", lambda folder: False)
    args = SimpleNamespace(folder=HUB, fp8=fp8)
    assert checkpoints.compiling_pays(args, torch.device("cuda"), 375) == pays
    assert not checkpoints.compiling_pays(args, torch.device("cuda"), 10)


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
    speed.compile_blocks(flux)
    compiled = [trained(flux, steps=1, size=size) for size in (16, 12, 20)]
    assert counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    for fast, slow, true in zip(compiled, plain, exact):
        assert relative(fast[0], slow[0]) < rounding
        assert relative(fast[1], true[1]) < 1.1 * relative(slow[1], true[1])
