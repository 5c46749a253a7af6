"""What each stage costs, beside what it must: seconds, share of the machine's own matrix rate, peak memory.

    python -m bench.stages                                 # the baby, and a random mid-size model
    python -m bench.stages --model flux-dev --random   # full size, random weights, on a card: all switches
    python -m bench.stages --model flux-dev --fp8 --offload --resolution 768

First a row for each stage: text, autoencoder, a sampling step, a training step of stage 2 with none, half and
all of the blocks run twice, an iteration of stage 1, and personalize.py from photo to file. Then what the
adapter costs: both steps beside those of the frozen base alone, timed in turn, A B A B, so that whatever else
the machine does hits both. Inputs are random, never zeros; everything is warmed up; medians, in brackets the
quartiles.

The bound is the FLOPs of the stage (of a training step: what the base alone must compute) over the rate of a
large matmul here in the same dtype, timed between the steps. Two FLOPs per multiply-add; elementwise work,
norms, RoPE, adapter and blocks run twice count as nothing, and so lower the share. With 8-bit weights the
rate is still that of the 16-bit matmul, and the share may pass 100 %.
"""
import argparse
import copy
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
from support.speed import (KERNELS, RESERVE, Fp8Linear, Work, adapter_bytes, blocks_of, choose_attention,
                           compile_blocks, is_offloaded, offload_blocks, plan_recompute, recompute_blocks,
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
    inputs = latent.clone().requires_grad_(), txt.clone().requires_grad_()

    flux = copy.deepcopy(base)
    adapter = MetaLoRA(flux, rank, lomd=random_lomd(find_targets(flux), R1))
    adapter.bank.weight.add_(1e-2 * torch.randn_like(adapter.bank.weight))                     # no U of zeros
    identity = torch.zeros(1, dtype=torch.long)

    def personalisation_step():
        adapter.assign(identity)
        flow_matching_loss(flux, latent, noise, t, txt, y).sum().backward()
        adapter.step(1e-4)

    def base_step():
        loss = flow_matching_loss(base, inputs[0], noise, t, inputs[1], y).mean()
        torch.autograd.grad(loss, inputs)

    report("personalisation step", personalisation_step, base_step, flops["step"], weight, seconds)
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
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def count(function: Callable) -> float:
    """FLOPs of a call, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Rows:
    """Prints a row for each stage. One that fails has its error in the row, and the next one comes."""
    def __init__(self, weight: torch.Tensor, seconds: float):
        self.device, self.seconds = weight.device, seconds
        self.side = 1024 if weight.device.type == "cpu" else 8192
        self.matrices = torch.randn(2, self.side, self.side, device=self.device, dtype=weight.dtype).unbind()
        print(f"  {'stage':<46} {'seconds':>26} {'TFLOP/s':>9} {'of bound':>9}  peak, foreseen")

    def __call__(self, name: str, function: Callable, flops: float | Callable, foreseen: float = 0.0) -> None:
        """flops: of a call, or what counts them; foreseen: bytes that the plan of memory has for it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            flops = flops() if callable(flops) else flops
            times, matmuls = interleave([function, lambda: self.matrices[0] @ self.matrices[1]], self.device,
                                        self.seconds)
        except Exception as error:                            # whatever it is: it is a result
            print(f"  {name:<46} {type(error).__name__}: {' '.join(str(error).split())[:150]}", flush=True)
            return
        median, rate = statistics.median(times), 2 * self.side ** 3 / statistics.median(matmuls)
        print(
            f"  {name:<46} {spread(times, 3):>26} {flops / median / 1e12:>9.3g} "
            f"{flops / rate / median:>9.1%}  "
            f"{private_memory(self.device) / 1e3:.1f} GB" + f", {foreseen / 1e9:.1f}" * (foreseen > 0),
            flush=True,
        )


def measure_stages(models: SimpleNamespace, resolutions: list[int], text_tokens: int, rank: int,
                   seconds: float) -> None:
    """A row for each stage of the product, at each resolution: models.text (a call) and models.autoencoder
    may be None."""
    flux, rows = models.flux, Rows(models.flux.img_in.weight, seconds)
    with torch.no_grad():
        if models.text:
            rows("text, one prompt", models.text, partial(count, models.text))
        for size in resolutions if models.autoencoder else []:
            picture = torch.randn(1, 3, size, size, device=rows.device).clamp(-1, 1)
            latent = torch.randn(1, 16, size // 8, size // 8, device=rows.device)
            for name, call in (("encode", partial(models.autoencoder.encode, picture)),
                               ("decode", partial(models.autoencoder.decode, latent))):
                rows(f"{name} a picture, {size} px", call, partial(count, call))
    measure_kernels(flux, resolutions, text_tokens)
    lora = {t.path: (torch.randn(rank, t.d_in) / 100, torch.randn(t.rows, rank) / 100)
            for t in find_targets(flux)}
    for applied in (False, True):
        apply_loras(flux, [(lora, 1.0)] if applied else [])
        for size in resolutions:
            tokens = (size // 16) ** 2
            flops = count_flops(flux.config, tokens, text_tokens)
            _, noise, _, txt, y = random_inputs(flux, 1, tokens, text_tokens)
            rows(f"sampling step, {size} px{', one LoRA' if applied else ''}",
                 partial(denoise, flux, noise, txt, y, 1, 3.5), flops["linears"] + flops["attention"],
                 foreseen(flux, Work(tokens + text_tokens, rank=rank), None))
    for people in (1, 4):
        measure_training(rows, flux, people, resolutions, text_tokens, rank)
    recompute_blocks(flux, 0)
    for size in resolutions if models.autoencoder else []:
        try:
            whole(models, size, text_tokens, random_lomd(find_targets(flux), R1), rank)
        except Exception as error:
            print(f"  photo to LoRA, {size} px: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
        finally:
            apply_loras(flux, [])


def measure_training(rows: Rows, flux: Flux, people: int, resolutions: list[int], text_tokens: int,
                     rank: int) -> None:
    """A step of stage 2 with none, half and all of the blocks run twice, or of stage 1 as it is planned."""
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
        if people > 1 or is_offloaded(flux):
            try:
                counts = [plan_recompute(adapter, tokens + text_tokens)]
            except ValueError as error:
                print(f"  {people} people, {size} px: {error}")
                continue
        for twice in counts:
            what = "training step" if people == 1 else "stage 1, 4 pictures of 4 people"
            rows(f"{what}, {size} px, {twice} of {blocks} twice", partial(step, twice), flops,
                 foreseen(flux, work, twice))
    apply_loras(flux, [])


def foreseen(flux: Flux, work: Work, twice: int | None) -> float:
    """Bytes that the plan has for a step of `work` on a card, with weights and adapter; 0 elsewhere."""
    if flux.img_in.weight.device.type != "cuda":
        return 0.0
    fp8, dtype = any(isinstance(m, Fp8Linear) for m in flux.modules()), flux.img_in.weight.dtype
    weights = weight_bytes(flux, dtype, fp8, is_offloaded(flux))
    beside = adapter_bytes(find_targets(flux), work, dtype) + step_bytes(flux, work, dtype, twice)
    return weights + beside + RESERVE


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


def whole(models: SimpleNamespace, size: int, text_tokens: int, lomd: dict, rank: int) -> None:
    """personalize.py from photo to file, its 375 iterations, but for reading the weights from disk."""
    start, laps, flux = time.perf_counter(), {}, models.flux
    device = flux.img_in.weight.device

    def lap(name):
        seconds_of(lambda: None, device)                                            # waits for what is queued
        laps[name] = time.perf_counter() - start - sum(laps.values())
    crops = load_crops([Path(__file__).resolve().parents[1] / "baby" / "example.png"], [size])
    lap("crops")
    txt, y = models.text()
    lap("text")
    latents, weights = personalize.encode_crops(models.autoencoder, crops)
    lap("encoding")
    adapter = MetaLoRA(flux, rank, lomd=lomd)
    twice = plan_recompute(adapter, max(part[0, 0, 0].numel() // 4 for part in latents) + text_tokens)
    recompute_blocks(flux, twice)
    personalize.train(flux, adapter, latents, weights, txt, y, personalize.ITERATIONS["meta-lora"], 1e-4)
    lap("training")
    with tempfile.TemporaryDirectory() as folder:
        save_lora(Path(folder) / "lora.safetensors", adapter.collapse())
    lap("saving")
    print(f"  photo to LoRA, {size} px, {len(crops)} crops, {twice} of {len(blocks_of(flux))} twice: "
          f"{sum(laps.values()):.1f} s ({', '.join(f'{name} {value:.1f}' for name, value in laps.items())})")


def random_models(
    config: FluxConfig, device: torch.device, dtype: torch.dtype, text_tokens: int
) -> SimpleNamespace:
    """FLUX.1's four networks with random weights, made on the device; the text encoders at their published
    sizes."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    t5_config = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                         feed_forward_proj="gated-gelu")
    clip_config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                 num_attention_heads=12)
    flux, autoencoder, t5, clip = (
        random_weights(kind, config_, device, dtype)
        for kind, config_ in (
            (Flux, config),
            (AutoEncoder, AutoEncoderConfig()),
            (T5EncoderModel, t5_config),
            (CLIPTextModel, clip_config),
        )
    )
    words, few = (torch.randint(2, 10_000, (1, length), device=device) for length in (text_tokens, 77))
    autoencoder = autoencoder.to(memory_format=torch.channels_last) if device.type == "cuda" else autoencoder
    return SimpleNamespace(
        flux=flux,
        autoencoder=autoencoder,
        text=torch.no_grad()(lambda: (t5(words).last_hidden_state, clip(few).pooler_output)),
    )


def random_weights(kind: type, config: object, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen model on the device, each tensor drawn there at the size that keeps activations about as
    large."""
    with torch.device("meta"):
        model = kind(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(
            p, mean=float("norm" in name and p.dim() == 1), std=0.02 if p.dim() == 1 else p[0].numel() ** -0.5
        )
    for name, buffer in model.named_buffers():                           # CLIP's and T5's counts of positions
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
    return model


def choose(args: argparse.Namespace, name: str, device: torch.device) -> tuple:
    """--model -> its networks, image and text tokens, and what its weights are."""
    dtype = args.dtype and getattr(torch, args.dtype)
    if args.random and name in HUB or name in MODELS:
        dtype = dtype or (torch.float32 if device.type == "cpu" and name in MODELS else torch.bfloat16)
        config, *tokens = MODELS.get(name) or (
            FluxConfig(guidance_embed=name == "flux-dev"),
            4096,
            512 if name == "flux-dev" else 256,
        )
        if name in HUB:
            models = random_models(config, device, dtype, tokens[1])
        else:
            models = SimpleNamespace(
                flux=Flux(config).requires_grad_(False).to(device, dtype), autoencoder=None, text=None
            )
        switch(models.flux, args)
        return models, *tokens, "random weights"
    folder = find_model(name)
    dtype = dtype or pick_dtype(device, folder)
    flux = load_flux(folder, device, dtype, args.fp8, args.offload)
    encoders, autoencoder = load_text_encoders(folder, device, dtype), load_autoencoder(folder, device, dtype)
    prompt, tokens = [model_defaults(folder)["prompt"]], (model_defaults(folder)["resolution"] // 16) ** 2
    if args.compile:
        compile_blocks(flux)
    return (
        SimpleNamespace(flux=flux, autoencoder=autoencoder, text=lambda: encoders.encode(prompt)),
        tokens,
        encoders.max_length,
        "its own weights",
    )


def switch(flux: Flux, args: argparse.Namespace) -> None:
    """--fp8, --offload and --compile for a model of random weights."""
    for name, module in list(flux.named_modules()) if args.fp8 else []:
        if isinstance(module, nn.Linear) and "_blocks." in name:
            flux.set_submodule(name, Fp8Linear.of(module))
    if args.offload:
        offload_blocks(flux, flux.img_in.weight.device)
    if args.compile:
        compile_blocks(flux)


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
    add("--seconds", type=positive(float), help="time for each row (default: 10; of all of a card's rows: 1)")
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


VARIANTS = "", "compile", "fp8", "fp8 compile", "offload", "fp8 offload"        # a card's, in one command


def bench_one(args: argparse.Namespace, name: str, device: torch.device) -> None:
    """All rows of one model with the switches of args."""
    models, image_tokens, text_tokens, weights = choose(args, name, device)
    flux, text_tokens = models.flux, args.text_tokens or text_tokens
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    switches = "".join(f", {word}" for word in ("fp8", "offload", "compile") if getattr(args, word))
    print(f"{name}, {weights}: torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, "
          f"{str(flux.img_in.weight.dtype)[6:]}{switches}", flush=True)
    resolutions = args.resolution or (
        [512, 768, 1024] if image_tokens == 4096 else [16 * math.isqrt(image_tokens)]
    )
    measure_stages(models, resolutions, text_tokens, args.rank, args.seconds)
    if args.compile:
        print(f"  {seconds_compiling():.0f} s went into compiling so far")
    if not (args.fp8 or args.offload or args.compile or device.type == "cuda"):   # beside plain Linears
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
    every = args.random and device.type == "cuda" and not (args.fp8 or args.offload or args.compile)
    args.seconds = args.seconds or (1.0 if every else 10.0)
    for name in [args.model] if args.model else ["baby", "mid"]:
        for variant in VARIANTS if every else [None]:
            for word in ("fp8", "offload", "compile") if every else ():
                setattr(args, word, word in variant.split())
            try:
                bench_one(args, name, device)
            except (RuntimeError, OSError) as error:
                if not every:
                    raise
                print(
                    f"{name}, {variant}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                    flush=True,
                )
            free(device)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C; one line on stderr for each."""
    return run_script("bench.stages", bench, argv)


if __name__ == "__main__":
    sys.exit(main())
