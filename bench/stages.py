"""What each stage costs, beside what it must: seconds, share of the machine's own matrix rate, peak memory.

    python -m bench.stages                                 # the baby, and a random mid-size model
    python -m bench.stages --model flux-dev --random   # full size, random weights, on a card: all switches
    python -m bench.stages --model flux-dev --random --fp8 --offload --resolution 768

First a row for each stage, in the product's order: text, autoencoder, a sampling step, a training step of
stage 2 with none, half and all of the blocks run twice, an iteration of stage 1, and personalize.py from
photo to file. Then, on a CPU, what the adapter costs: both steps beside those of the frozen base alone, timed
in turn, A B A B, so that whatever else the machine does hits both. On a card random weights without a switch
are timed with one set of switches after the other (EVERY), in less than ten minutes, and diffusers + peft
beside them where they are installed. Inputs are random, never zeros; everything is warmed up; medians, in
brackets the quartiles.

The bound is the FLOPs of the stage (of a training step: what the base alone must compute) over the rate of a
large matmul here in the same dtype, timed between the steps. Two FLOPs per multiply-add; elementwise work,
norms, RoPE, adapter and blocks run twice count as nothing, and so lower the share. With 8-bit weights the
rate is still that of the 16-bit matmul, and the share may pass 100 %.
"""
import argparse
import copy
import gc
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import support  # before torch: how its threads wait
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import personalize
from flux_model import AutoEncoder, AutoEncoderConfig, Flux, FluxConfig, denoise, flow_matching_loss
from metalora import MetaLoRA, apply_loras, random_lomd
from support.checkpoints import (
    HUB,
    fill_flux,
    find_model,
    find_targets,
    load_autoencoder,
    load_flux,
    load_text_encoders,
    model_defaults,
    pick_dtype,
)
from support.common import Parser, free, pick_device, run_script
from support.lora_files import save_lora
from support.photos import load_crops
from support.speed import (KERNELS, RESERVE, Work, adapter_bytes, blocks_of, choose_attention,
                           compile_blocks, is_offloaded, plan_recompute, quantize, recompute_blocks,
                           seconds_compiling, seconds_of_attention, step_bytes, weight_bytes)

# of random weights: config, image tokens, text tokens
MODELS = {
    "mid": (
        FluxConfig(context_in_dim=768, hidden_size=768, num_heads=6, depth=4, depth_single_blocks=8),
        1024,
        128,
    ),
    "small": (
        FluxConfig(context_in_dim=512, hidden_size=512, num_heads=4, depth=2, depth_single_blocks=4),
        256,
        64,
    ),
}
R1 = 16                                                                              # rows of the random LoMD


def count_flops(config: FluxConfig, image_tokens: int, text_tokens: int) -> dict[str, float]:
    """FLOPs of one image: a forward pass's "linears" and "attention"; a training "step" on a frozen base.

    The step adds the gradients of the inputs of all Linears that see tokens, and an attention backward of 2.5
    times its forward (five matmuls against two: scores are recomputed, never stored). The inputs of the
    modulation need no gradient.
    """
    both, linears, once = image_tokens + text_tokens, 0, 0
    with torch.device("meta"):
        flux = Flux(config)
    for name, module in flux.named_modules():
        if isinstance(module, nn.Linear):
            flops = 2 * module.in_features * module.out_features
            if "mod" in name or name.startswith(("time_in", "vector_in", "guidance_in")):
                once += flops                                                               # once per image
            elif name.startswith(("img_in", "final_layer")) or ".img_" in name:
                linears += flops * image_tokens
            else:
                linears += flops * (text_tokens if name == "txt_in" or ".txt_" in name else both)
    attention = (config.depth + config.depth_single_blocks) * 4 * both ** 2 * config.hidden_size
    return {"linears": linears + once, "attention": attention, "step": 2 * linears + once + 3.5 * attention}


def seconds_of(function: Callable, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize,
            "cpu": lambda: None}[device.type]
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def interleave(functions: list, device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds of each call of each function, in turn, for `seconds` or three rounds, after a warm-up."""
    for function in functions:
        function()
    rounds, spent = [], 0.0
    with tqdm(total=seconds, bar_format="{percentage:3.0f}%|{bar}| {elapsed}", leave=False,
              disable=None) as bar:                                                 # None: only on a terminal
        while spent < seconds or len(rounds) < 3:
            rounds.append([seconds_of(function, device) for function in functions])
            spent += sum(rounds[-1])
            bar.update(min(sum(rounds[-1]), seconds - bar.n))
    return [list(times) for times in zip(*rounds)]


def spread(values: list[float], digits: int) -> str:
    """Median, and in brackets the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def report(what: str, adapted: Callable, base: Callable, flops: float, weight: torch.Tensor, seconds: float,
           beside: str = "  base alone") -> None:
    """Times adapted() and base() for `seconds` and prints; the bound is `flops` at the rate of a matmul."""
    n = 1024 if weight.device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=weight.device, dtype=weight.dtype) for _ in range(2))
    *times, matmuls = interleave([adapted, base, lambda: a @ b], weight.device, seconds)
    rate = 2 * n ** 3 / statistics.median(matmuls)
    for name, values in zip((what, beside), times):
        share = flops / rate / statistics.median(values)
        print(f"  {name:<24} {spread(values, 3):>30} s   {share:5.1%} of the bound")
    ratios = [a / b for a, b in zip(*times)]
    print(f"    {'ratio, pair by pair':<20} {spread(ratios, 4):>32}     {len(ratios)} pairs, "
          f"matmul {rate / 1e9:.3g} GFLOP/s")


def random_inputs(flux: Flux, batch: int, image_tokens: int, text_tokens: int) -> tuple:
    """latent, noise, t, txt, y of flow_matching_loss, for a latent as square as the number of tokens lets it
    be."""
    config, weight = flux.config, flux.img_in.weight
    rows = next(n for n in range(math.isqrt(image_tokens), 0, -1) if image_tokens % n == 0)
    size = (batch, config.in_channels // 4, 2 * rows, 2 * image_tokens // rows)
    like = dict(device=weight.device, dtype=weight.dtype)
    return (
        torch.randn(size, device=weight.device),
        torch.randn(size, device=weight.device),
        torch.rand(batch, device=weight.device),
        torch.randn(batch, text_tokens, config.context_in_dim, **like),
        torch.randn(batch, config.vec_in_dim, **like),
    )


def measure(base: Flux, image_tokens: int, text_tokens: int, rank: int, seconds: float) -> None:
    """Times both kinds of step of a frozen model and prints them."""
    weight = base.img_in.weight
    flops = count_flops(base.config, image_tokens, text_tokens)
    forward = flops["linears"] + flops["attention"]
    parameters = sum(p.numel() for p in base.parameters())
    print(f"  {parameters / 1e6:,.1f} M parameters, {image_tokens} image + {text_tokens} text tokens, "
          f"rank {rank}, r1 {R1}; {forward:.3g} FLOP forward, {flops['step']:.3g} per training step")

    latent, noise, t, txt, y = random_inputs(base, 1, image_tokens, text_tokens)
    flux = copy.deepcopy(base)
    adapter = MetaLoRA(flux, rank, lomd=random_lomd(find_targets(flux), R1))
    adapter.bank.weight.add_(1e-2 * torch.randn_like(adapter.bank.weight))                     # no U of zeros
    identity = torch.zeros(1, dtype=torch.long)

    def personalisation_step():
        adapter.assign(identity)
        flow_matching_loss(flux, latent, noise, t, txt, y).sum().backward()
        adapter.step(1e-4)

    report("personalisation step", personalisation_step, partial(base_step, base, latent, noise, t, txt, y),
           flops["step"], weight, seconds)
    lora = adapter.collapse()
    apply_loras(flux, [(lora, 1.0)])
    report("sampling step", lambda: denoise(flux, noise, txt, y, 1, 3.5),
           lambda: denoise(base, noise, txt, y, 1, 3.5), forward, weight, seconds)


def measure_mixing(flux: Flux, image_tokens: int, text_tokens: int, rank: int, seconds: float) -> None:
    """Times a joint iteration of meta_train.py: four identities against four images of one. Leaves `flux`
    adapted."""
    inputs = random_inputs(flux, 4, image_tokens, text_tokens)
    adapter = MetaLoRA(flux, rank, lomd=random_lomd(find_targets(flux), R1), num_identities=4, slots=4)
    adapter.bank.weight.add_(1e-2 * torch.randn_like(adapter.bank.weight))
    adapter.train_lomd = True

    def step(*ids):
        adapter.assign(torch.tensor(ids))
        flow_matching_loss(flux, *inputs).sum().backward()
        adapter.step(1e-4)

    flops = 4 * count_flops(flux.config, image_tokens, text_tokens)["step"]
    report("4 identities, joint step", lambda: step(0, 1, 2, 3), lambda: step(0, 0, 0, 0), flops,
           flux.img_in.weight, seconds, beside="  4 images of one")


def private_memory(device: torch.device) -> float:
    """MB: the peak on a GPU, else what this process holds by itself (Linux), its mapped files not counted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[1]) * 1024 / 1e6


def count(function: Callable) -> float:
    """FLOPs of a call, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Rows:
    """Prints a row for each stage, each timed for `seconds`, `until` a time.perf_counter(). One that fails
    has its error in the row, and the next one comes."""
    def __init__(self, device: torch.device, dtype: torch.dtype, seconds: float, until: float = math.inf):
        self.device, self.seconds, self.until = device, seconds, until
        self.side = 1024 if device.type == "cpu" else 8192
        self.matrices = torch.randn(2, self.side, self.side, device=device, dtype=dtype).unbind()

    def tried(self, name: str, function: Callable[[], str]) -> None:
        """A row of what a call says."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            row = function() if time.perf_counter() <= self.until else "left out: the time is over"
        except Exception as error:                            # whatever it is: it is a result
            row = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        print(f"  {name:<46} {row}", flush=True)

    def __call__(self, name: str, function: Callable, flops: float | Callable, foreseen: float = 0.0) -> None:
        """flops: of a call, or what counts them; foreseen: bytes that the plan of memory has for it."""
        def measured() -> str:
            done = flops() if callable(flops) else flops
            times, matmuls = interleave([function, lambda: self.matrices[0] @ self.matrices[1]], self.device,
                                        self.seconds)
            median, rate = statistics.median(times), 2 * self.side ** 3 / statistics.median(matmuls)
            row = (f"{spread(times, 3):>26} {done / median / 1e12:>9.3g} {done / rate / median:>9.1%}  "
                   f"{private_memory(self.device) / 1e3:.1f} GB")
            return row + f", {foreseen / 1e9:.1f}" * (foreseen > 0)
        self.tried(name, measured)


class Plan(NamedTuple):
    """Which switches are on, and what is timed beside a sampling and a training step."""
    fp8: bool = False
    offload: bool = False
    compile: bool = False
    rows: str = "encoders attention base twice stage-1 photo"
    sizes: slice = slice(None)                                                     # of the resolutions


# a card's, in one command: what costs little first, compiling last
EVERY = (
    Plan(rows="encoders attention base twice stage-1 peer"),
    Plan(fp8=True, rows="twice stage-1"),
    Plan(offload=True, rows="", sizes=slice(1, 2)),
    Plan(fp8=True, offload=True, rows="", sizes=slice(1, 2)),
    Plan(compile=True, rows="base photo"),
    Plan(fp8=True, compile=True, rows=""),
)
MINUTES = 9                                                    # after which no further row of these begins


def measure_encoders(rows: Rows, models: SimpleNamespace, plan: Plan, resolutions: list[int]) -> tuple:
    """Text and autoencoder -> the autoencoder, txt, y and the seconds they took, for `photo`. As in
    personalize.py, the text encoders have gone when the transformer comes."""
    encode = models.text()
    with torch.no_grad():
        if "encoders" in plan.rows:
            rows("text, one prompt", encode, partial(count, encode))
        seconds, texts = seconds_of(encode, rows.device), encode()
        del encode
        gc.collect()                                 # transformers' models hold reference cycles
        free(rows.device)
        autoencoder = models.autoencoder()
        for size in resolutions if "encoders" in plan.rows else []:
            picture = torch.randn(1, 3, size, size, device=rows.device).clamp(-1, 1)
            latent = torch.randn(1, 16, size // 8, size // 8, device=rows.device)
            for name, call in (("encode", partial(autoencoder.encode, picture)),
                               ("decode", partial(autoencoder.decode, latent))):
                rows(f"{name} a picture, {size} px", call, partial(count, call))
    return autoencoder, *texts, seconds


def measure_stages(rows: Rows, models: SimpleNamespace, plan: Plan, resolutions: list[int], text_tokens: int,
                   rank: int) -> Flux:
    """The rows of a plan; models.text and models.autoencoder (calls, as models.flux) may be None -> the
    transformer, without an adapter."""
    print(f"  {'stage':<46} {'seconds':>26} {'TFLOP/s':>9} {'of bound':>9}  peak, foreseen")
    if models.text and ("photo" in plan.rows or "encoders" in plan.rows):
        encoded = measure_encoders(rows, models, plan, resolutions)
    flux = models.flux()
    if plan.compile:
        compile_blocks(flux)
    device, dtype = flux.img_in.weight.device, flux.img_in.weight.dtype
    weights = weight_bytes(flux, dtype, plan.fp8, plan.offload) if device.type == "cuda" else 0

    def foreseen(work: Work, twice: int | None) -> float:
        """Bytes that the plan has for a step of `work` on a card, with weights and adapter; 0 elsewhere."""
        beside = adapter_bytes(find_targets(flux), work, dtype) + step_bytes(flux, work, dtype, twice)
        return (weights + beside + RESERVE) * (device.type == "cuda")
    if "attention" in plan.rows:
        measure_kernels(flux, resolutions, text_tokens)
    lora = {t.path: (torch.randn(rank, t.d_in) / 100, torch.randn(t.rows, rank) / 100)
            for t in find_targets(flux)}
    for applied in (False, True) if "base" in plan.rows else (True,):
        apply_loras(flux, [(lora, 1.0)] if applied else [])
        for size in resolutions:
            tokens = (size // 16) ** 2
            flops = count_flops(flux.config, tokens, text_tokens)
            _, noise, _, txt, y = random_inputs(flux, 1, tokens, text_tokens)
            rows(f"sampling step, {size} px{', one LoRA' if applied else ''}",
                 partial(denoise, flux, noise, txt, y, 1, 3.5), flops["linears"] + flops["attention"],
                 foreseen(Work(tokens + text_tokens, rank=rank), None))
    apply_loras(flux, [])
    for size in resolutions if "base" in plan.rows and not plan.offload else []:
        flops = count_flops(flux.config, (size // 16) ** 2, text_tokens)["step"]
        inputs = random_inputs(flux, 1, (size // 16) ** 2, text_tokens)
        rows(f"base alone, forward and backward, {size} px", partial(base_step, flux, *inputs), flops)
    for people in (1, 4) if "stage-1" in plan.rows else (1,):
        measure_training(rows, flux, people, resolutions, text_tokens, rank, plan, foreseen)
    if models.text and "photo" in plan.rows:
        size = resolutions[len(resolutions) // 2]
        rows.tried(f"photo to LoRA, {size} px", partial(whole, flux, *encoded, size, rank))
        recompute_blocks(flux, 0)
        apply_loras(flux, [])
    return flux


def base_step(flux: Flux, latent: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, txt: torch.Tensor,
              y: torch.Tensor) -> None:
    """Forward, and backward to the inputs."""
    inputs = latent.detach().requires_grad_(), txt.detach().requires_grad_()
    loss = flow_matching_loss(flux, inputs[0], noise, t, inputs[1], y).mean()
    torch.autograd.grad(loss, inputs)


def measure_training(rows: Rows, flux: Flux, people: int, resolutions: list[int], text_tokens: int,
                     rank: int, plan: Plan, foreseen: Callable[[Work, int], float]) -> None:
    """A step of stage 2, or of stage 1 with the blocks run twice that are planned."""
    blocks = len(blocks_of(flux))
    adapter = MetaLoRA(flux, rank, lomd=random_lomd(find_targets(flux), R1), num_identities=people,
                       slots=people)
    adapter.bank.weight.add_(1e-2 * torch.randn_like(adapter.bank.weight))
    adapter.train_lomd = people > 1
    for size in resolutions:
        tokens = (size // 16) ** 2
        inputs = random_inputs(flux, people, tokens, text_tokens)
        flops = people * count_flops(flux.config, tokens, text_tokens)["step"]

        def step(twice: int) -> None:
            recompute_blocks(flux, twice)
            adapter.assign(torch.arange(people))
            flow_matching_loss(flux, *inputs).sum().backward()
            adapter.step(1e-4)
        counts, work = [0, blocks // 2, blocks], Work(tokens + text_tokens, people, rank, R1, people, True)
        if people > 1 or is_offloaded(flux) or "twice" not in plan.rows:
            try:
                counts = [plan_recompute(adapter, tokens + text_tokens)]
            except ValueError as error:
                print(f"  training, {people} people, {size} px: {error}", flush=True)
                continue
        for twice in counts:
            what = "training step" if people == 1 else "stage 1, 4 pictures of 4 people"
            rows(f"{what}, {size} px, {twice} of {blocks} twice", partial(step, twice), flops,
                 foreseen(work, twice))
    recompute_blocks(flux, 0)
    apply_loras(flux, [])


def measure_kernels(flux: Flux, resolutions: list[int], text_tokens: int) -> None:
    """Milliseconds of attention forward and backward by each kernel of a card, and the choice."""
    weight, heads = flux.img_in.weight, flux.config.num_heads
    for size in resolutions if weight.device.type == "cuda" else []:
        shape = 1, heads, (size // 16) ** 2 + text_tokens, flux.config.hidden_size // heads
        seconds = {kernel.name: seconds_of_attention(kernel, shape, weight.device, weight.dtype, True)
                   for kernel in KERNELS}
        chosen = choose_attention(shape, weight.device, weight.dtype, True)
        times = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items())
        print(f"  attention, {size} px: {times}; chosen: {chosen}")


def whole(flux: Flux, autoencoder: nn.Module, txt: torch.Tensor, y: torch.Tensor, text_seconds: float,
          size: int, rank: int) -> str:
    """personalize.py from photo to file, its 375 iterations, but for reading the weights from disk -> what
    each part took."""
    laps, device = {"text": text_seconds}, flux.img_in.weight.device
    start = time.perf_counter() - text_seconds

    def lap(name):
        seconds_of(lambda: None, device)                                            # waits for what is queued
        laps[name] = time.perf_counter() - start - sum(laps.values())
    crops = load_crops([Path(__file__).resolve().parents[1] / "baby" / "example.png"], [size])
    lap("crops")
    latents, weights = personalize.encode_crops(autoencoder, crops)
    lap("encoding")
    adapter = MetaLoRA(flux, rank, lomd=random_lomd(find_targets(flux), R1))
    twice = plan_recompute(adapter, max(part[0, 0, 0].numel() // 4 for part in latents) + txt.shape[1])
    recompute_blocks(flux, twice)
    personalize.train(flux, adapter, latents, weights, txt, y, personalize.ITERATIONS["meta-lora"], 1e-4)
    lap("training")
    with tempfile.TemporaryDirectory() as folder:
        save_lora(Path(folder) / "lora.safetensors", adapter.collapse())
    lap("saving")
    parts = ", ".join(f"{name} {value:.1f}" for name, value in laps.items())
    return f"{sum(laps.values()):.1f} s ({parts}), {len(crops)} crops, {twice} blocks twice"


class RandomFiles:
    """What checkpoints.TensorFiles is to a checkpoint, for one of random weights, each drawn on the device
    when it is asked for, at the size that keeps activations about as large."""
    metadata, path = {}, Path("random weights")

    def __init__(self, config: FluxConfig, device: torch.device, dtype: torch.dtype):
        with torch.device("meta"):
            self.file_of = dict(Flux(config).named_parameters())
        self.like = dict(device=device, dtype=dtype)

    def shape(self, name: str) -> list[int]:
        return list(self.file_of[name].shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        return draw(name, torch.empty(self.shape(name), **self.like))

    def quantized(self, names: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize(torch.cat([self[name] for name in names]))


def draw(name: str, weight: torch.Tensor) -> torch.Tensor:
    vector = weight.dim() == 1
    return weight.normal_(float("norm" in name and vector), 0.02 if vector else weight[0].numel() ** -0.5)


def random_models(config: FluxConfig, device: torch.device, dtype: torch.dtype, text_tokens: int,
                  plan: Plan) -> SimpleNamespace:
    """FLUX.1's four networks with random weights, made on the device by a call each; the text encoders at
    their published sizes."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    def text() -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        t5 = random_weights(T5EncoderModel, T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu"), device, dtype)
        clip = random_weights(CLIPTextModel, CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
            device, dtype)
        words, few = (torch.randint(2, 10_000, (1, length), device=device) for length in (text_tokens, 77))
        return lambda: (t5(words).last_hidden_state, clip(few).pooler_output)

    def autoencoder() -> AutoEncoder:
        model = random_weights(AutoEncoder, AutoEncoderConfig(), device, dtype)
        return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model
    return SimpleNamespace(flux=partial(random_flux, config, device, dtype, plan), text=text,
                           autoencoder=autoencoder)


def random_flux(config: FluxConfig, device: torch.device, dtype: torch.dtype, plan: Plan) -> Flux:
    return fill_flux(RandomFiles(config, device, dtype), config, False, device, dtype, plan.fp8, plan.offload)


def random_weights(kind: type, config: object, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen model, made on the device."""
    with torch.device("meta"):
        model = kind(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        draw(name, p)
    for name, buffer in model.named_buffers():                           # CLIP's and T5's counts of positions
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
    return model


def choose(args: argparse.Namespace, name: str, device: torch.device, plan: Plan) -> tuple:
    """--model -> its networks, a call each, image and text tokens, dtype, and what its weights are."""
    dtype = args.dtype and getattr(torch, args.dtype)
    if args.random and name in HUB or name in MODELS:
        dtype = dtype or (torch.float32 if device.type == "cpu" and name in MODELS else torch.bfloat16)
        config, *tokens = MODELS.get(name) or (
            FluxConfig(guidance_embed=name == "flux-dev"),
            4096,
            512 if name == "flux-dev" else 256,
        )
        if name in HUB:
            models = random_models(config, device, dtype, tokens[1], plan)
        else:
            models = SimpleNamespace(flux=partial(random_flux, config, device, dtype, plan), autoencoder=None,
                                     text=None)
        return models, *tokens, dtype, "random weights"
    folder = find_model(name)
    dtype, defaults = dtype or pick_dtype(device, folder), model_defaults(folder)
    encoders = [load_text_encoders(folder, device, dtype)]
    models = SimpleNamespace(
        flux=partial(load_flux, folder, device, dtype, plan.fp8, plan.offload),
        autoencoder=partial(load_autoencoder, folder, device, dtype),
        text=lambda: partial(encoders.pop().encode, [defaults["prompt"]]),                 # nobody keeps them
    )
    return models, (defaults["resolution"] // 16) ** 2, encoders[0].max_length, dtype, "its own weights"


def positive(kind: type) -> Callable[[str], float]:
    def convert(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value
    convert.__name__ = f"positive {kind.__name__}"                                    # for argparse's message
    return convert


def options(prog: str, description: str) -> Parser:
    parser = Parser(prog=prog, allow_abbrev=False, description=description)
    add = parser.add_argument
    add("--model", help="baby, mid (random weights), flux-dev, flux-schnell, a folder (default: baby, mid)")
    add(
        "--random",
        action="store_true",
        help="flux-dev or flux-schnell with random weights, made on the device",
    )
    add("--seconds", type=positive(float), help="time for each row (default: 10; for all of a card: 0.5)")
    add(
        "--resolution",
        type=positive(int),
        nargs="+",
        metavar="PIXELS",
        help="sides of pictures (default: the model's; flux: 512 768 1024)",
    )
    add("--text-tokens", type=positive(int), help="text tokens (default: the model's usual)")
    add("--rank", type=positive(int), default=1, help="rank of the adapter (default: 1)")
    add("--fp8", action="store_true", help="weights of the blocks in 8 bits")
    add("--offload", action="store_true", help="weights of the blocks on the CPU")
    add("--compile", action="store_true", help="compile the blocks")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen base (default: by the device)")
    add("--threads", type=positive(int), help="CPU threads (default: torch's choice)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    return parser


def bench_one(args: argparse.Namespace, name: str, device: torch.device, plan: Plan, until: float) -> None:
    """The rows of one model and plan."""
    models, image_tokens, text_tokens, dtype, weights = choose(args, name, device, plan)
    text_tokens = args.text_tokens or text_tokens
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    switches = "".join(f", {word}" for word in ("fp8", "offload", "compile") if getattr(plan, word))
    print(f"{name}, {weights}: torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, "
          f"{str(dtype)[6:]}{switches}", flush=True)
    resolutions = args.resolution or (
        [512, 768, 1024] if image_tokens == 4096 else [16 * math.isqrt(image_tokens)]
    )
    rows = Rows(device, dtype, args.seconds, until)
    flux = measure_stages(rows, models, plan, resolutions[plan.sizes] or resolutions, text_tokens, args.rank)
    if plan.compile:
        print(f"  {seconds_compiling():.0f} s went into compiling so far")
    if "peer" in plan.rows:
        from bench.peer import measure_peer                           # which takes this file's measures
        measure_peer(flux, rows, resolutions[0], text_tokens, args.rank)
    if not (plan.fp8 or plan.offload or plan.compile or device.type == "cuda"):   # beside plain Linears
        tokens = (resolutions[-1] // 16) ** 2, text_tokens
        measure(flux, *tokens, args.rank, args.seconds)
        measure_mixing(flux, *tokens, args.rank, args.seconds)


def bench(argv: list[str] | None = None) -> None:
    args = options("bench.stages", "Time every stage against what it must compute, and training and sampling "
                   "steps against the frozen base alone.").parse_args(argv)
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    own = Plan(args.fp8, args.offload, args.compile)
    every = args.random and device.type == "cuda" and own == Plan()
    args.seconds = args.seconds or (0.5 if every else 10.0)
    until = time.perf_counter() + 60 * MINUTES if every else math.inf
    for name in [args.model] if args.model else ["baby", "mid"]:
        for plan in EVERY if every else [own]:
            try:
                bench_one(args, name, device, plan, until)
            except Exception as error:
                if not every:
                    raise
                print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            free(device)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C; one line on stderr for each."""
    return run_script("bench.stages", bench, argv)


if __name__ == "__main__":
    sys.exit(main())
