"""Seconds, share of the bound and peak memory of each stage.

    python -m bench.stages                              # the baby, and a random mid-size model
    python -m bench.stages --model flux-dev --random    # on a GPU: all switches, in ten minutes

One row each for a training step of stage 2, an iteration of stage 1 (4 pictures of 4 people), a
sampling step with a LoRA, both kinds of step against diffusers + peft where these are installed, and
personalize.py from photo to file.

"ratio" is the time over that of the frozen base alone on the same weights (forward, and in training
backward to the inputs), or over that of diffusers + peft. The two run in turn, A B A B, so that other
work on the machine slows both. Numbers are medians after a warm-up, with quartiles in brackets.

The bound is the FLOPs of the base alone, as torch counts them, over the rate of a large matrix
product in the same dtype, also run in turn. The adapter, gradient checkpointing and elementwise work
do not count, which lowers the share; 8-bit weights can push it above 100 %. Peak memory includes the
0.4 GB of that product.
"""
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import support  # before torch: how its threads wait
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import personalize
from flux_model import AutoEncoder, AutoEncoderConfig, Flux, FluxConfig, denoise, flow_matching_loss
from metalora import MetaLoRA, apply_loras, random_lomd
from support.checkpoints import fill_flux, load_flux
from support.common import Parser, run_script, side
from support.devices import free, pick_device
from support.finding import find_model
from support.lora_files import save_lora
from support.names import diffusers_flux_names, find_targets, part_sizes
from support.photos import load_crops
from support.memory import compile_blocks, fit_training, quantize, recompute_blocks

PHOTO = Path(__file__).resolve().parents[1] / "baby" / "example.png"
MID = FluxConfig(context_in_dim=768, hidden_size=768, num_heads=6, depth=4, depth_single_blocks=8)
# resolutions, text tokens
SIZES = {
    "baby": ([128], 24),
    "mid": ([512], 128),
    "flux-dev": ([512, 768, 1024], 512),
}
# on a GPU, in one command; compiling comes last because it takes longest
EVERY = "", "fp8", "offload", "fp8 offload", "compile", "fp8 compile"
MINUTES = 9        # after that no further row of these begins
COUNTED = {}       # by count_flops, which takes seconds at full size


# --------------------------------------------------------------------------------------------------
# Models


class RandomFiles:
    """Stands in for TensorFiles: each tensor is drawn on the device when it is asked for, at a scale
    that keeps activations about as large."""
    metadata, path = {}, Path("random weights")

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.names = dict(model.named_parameters())
        self.like = {"device": device, "dtype": dtype}

    def shape(self, name: str) -> list[int]:
        return list(self.names[name].shape)

    def __getitem__(self, name: str) -> Tensor:
        weight = torch.empty(self.shape(name), **self.like)
        if weight.dim() == 1:
            return weight.normal_(float("norm" in name), 0.02)
        return weight.normal_(0.0, weight[0].numel() ** -0.5)

    def quantized(self, names: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        return quantize(torch.cat([self[name] for name in names]))


def load(name: str, random: bool, device: torch.device, switches: str) -> Flux:
    """The transformer with its own or random weights. ValueError where its own are not found."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    options = {"fp8": "fp8" in switches, "offload": "offload" in switches}
    if name == "mid" or random:
        config = FluxConfig() if name == "flux-dev" else MID
        with torch.device("meta"):
            files = RandomFiles(Flux(config), device, dtype)
        flux = fill_flux(files, config, device, dtype, **options)
    else:
        flux = load_flux(find_model(name), device, dtype, **options)
    if "compile" in switches:
        compile_blocks(flux)
    return flux


def random_autoencoder(device: torch.device, dtype: torch.dtype) -> AutoEncoder:
    with torch.device("meta"):
        model = AutoEncoder(AutoEncoderConfig())
    files = RandomFiles(model, device, dtype)
    model.load_state_dict({name: files[name] for name in files.names}, assign=True)
    return model.requires_grad_(False).to(memory_format=torch.channels_last)


def frozen_weights(flux: Flux) -> dict[str, Tensor]:
    """The parameters of an adapted Flux without its adapter: views of the same memory."""
    weights = {}
    for name, parameter in flux.named_parameters():
        if not name.endswith(".S"):            # the weight is a view of it
            weights[name.replace(".base.", ".")] = parameter.detach()
    return weights


def base_alone(flux: Flux, compiled: bool = False) -> Flux:
    """An adapted Flux without its adapter, on the same weights."""
    with torch.device("meta"):
        base = Flux(flux.config)
    base.load_state_dict(frozen_weights(flux), assign=True)
    if compiled:
        compile_blocks(base)
    return base.requires_grad_(False)


class Peer(nn.Module):
    """diffusers' transformer on the frozen weights of a Flux, with peft's LoRA on every Linear of its
    blocks. Called like a Flux."""
    def __init__(self, flux: Flux, rank: int):
        from diffusers import FluxTransformer2DModel
        from peft import LoraConfig, inject_adapter_in_model
        super().__init__()
        config = self.config = flux.config
        with torch.device("meta"):
            model = FluxTransformer2DModel(
                in_channels=config.in_channels,
                num_layers=config.depth,
                num_single_layers=config.depth_single_blocks,
                attention_head_dim=config.hidden_size // config.num_heads,
                num_attention_heads=config.num_heads,
                joint_attention_dim=config.context_in_dim,
                pooled_projection_dim=config.vec_in_dim,
                guidance_embeds=config.guidance_embed,
                axes_dims_rope=config.axes_dim,
            )
        weights = {}
        for name, weight in frozen_weights(flux).items():
            names = diffusers_flux_names(name)
            sizes = part_sizes(len(names), len(weight), config.hidden_size)
            weights.update(zip(names, weight.split(sizes)))
        for name in ("norm_out.linear.weight", "norm_out.linear.bias"):
            weights[name] = weights[name].roll(len(weights[name]) // 2, 0)    # scale before shift
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(False)

        names = [name for name, layer in model.named_modules()
                 if isinstance(layer, nn.Linear) and "transformer_blocks." in name]
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        self.model = inject_adapter_in_model(lora, model)
        self.trained = [p for p in self.parameters() if p.requires_grad]
        for parameter in self.trained:         # fp32, like ours
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, t: Tensor,
                y: Tensor, guidance: Tensor) -> Tensor:
        return self.model(
            hidden_states=img.to(txt.dtype),
            encoder_hidden_states=txt,
            pooled_projections=y,
            timestep=t,
            img_ids=img_ids[0],
            txt_ids=txt_ids[0],
            guidance=guidance,
            return_dict=False,
        )[0]

    def training_step(self, *inputs: Tensor) -> None:
        flow_matching_loss(self, *inputs).sum().backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------
# Steps


def random_inputs(flux: Flux, batch: int, px: int, text_tokens: int) -> tuple[Tensor, ...]:
    """Arguments of flow_matching_loss: latent, noise, t, txt, y. A GPU multiplies zeros faster."""
    config = flux.config
    weight = flux.img_in.weight
    random = partial(torch.randn, device=weight.device)
    size = (batch, config.in_channels // 4, px // 8, px // 8)
    txt = random(batch, text_tokens, config.context_in_dim, dtype=weight.dtype)
    y = random(batch, config.vec_in_dim, dtype=weight.dtype)
    return random(size), random(size), random(batch).sigmoid(), txt, y


def training_step(flux: Flux, adapter: MetaLoRA, *inputs: Tensor) -> None:
    """Each picture is another person's."""
    adapter.assign(torch.arange(adapter.slots))
    flow_matching_loss(flux, *inputs).sum().backward()
    adapter.step(1e-4)


def base_training_step(flux: Flux, latent: Tensor, noise: Tensor, t: Tensor, txt: Tensor,
                       y: Tensor) -> None:
    """Forward, and backward to the latent and the text."""
    latent = latent.clone().requires_grad_()
    txt = txt.clone().requires_grad_()
    flow_matching_loss(flux, latent, noise, t, txt, y).sum().backward()


def sampling_step(flux: nn.Module, latent: Tensor, noise: Tensor, t: Tensor, txt: Tensor,
                  y: Tensor) -> Tensor:
    return denoise(flux, noise, txt, y, num_steps=1, guidance=3.5)


def count_flops(config: FluxConfig, step: Callable, inputs: tuple[Tensor, ...]) -> int:
    """FLOPs of step(flux, *inputs), on the meta device, attention as plain matrix products."""
    picture = [torch.empty(1, *part.shape[1:], dtype=part.dtype, device="meta") for part in inputs]
    key = f"{config} {step.__name__} {picture[0].shape} {picture[3].shape}"
    if key not in COUNTED:
        with torch.device("meta"):
            flux = Flux(config).to(picture[3].dtype).requires_grad_(False)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step(flux, *picture)
        COUNTED[key] = counter.get_total_flops()
    return len(inputs[0]) * COUNTED[key]


def photo_to_lora(flux: Flux, px: int, text_tokens: int) -> str:
    """personalize.py from photo to file, but for reading the weights and encoding the caption."""
    autoencoder = random_autoencoder(flux.img_in.weight.device, flux.img_in.weight.dtype)
    *_, txt, y = random_inputs(flux, 1, px, text_tokens)
    start = time.perf_counter()
    crops = load_crops([PHOTO], [px])
    latents, weights = personalize.encode_crops(autoencoder, crops)
    adapter = MetaLoRA(flux, 1, lomd=random_lomd(find_targets(flux), 16))
    iters = personalize.ITERATIONS["meta-lora"]
    fit_training(adapter, max((latent.shape[-2:] for latent in latents), key=math.prod), text_tokens)
    personalize.train(flux, adapter, latents, weights, txt, y, iters, 1e-4)
    with tempfile.TemporaryDirectory() as folder:
        save_lora(Path(folder) / "lora.safetensors", adapter.collapse())
    return f"{time.perf_counter() - start:.1f} s, {len(crops)} crops, {iters} iterations"


# --------------------------------------------------------------------------------------------------
# Rows


def interleave(functions: list[Callable], device: torch.device,
               seconds: float) -> list[list[float]]:
    """Seconds of each call of each function, in turn, for `seconds` or three rounds, after warm-up."""
    synchronize = getattr(torch, device.type).synchronize
    if device.type == "cuda":
        synchronize = partial(synchronize, device)
    for function in functions:
        function()
    times = [[] for _ in functions]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[0]) < 3:
        for function, measured in zip(functions, times):
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            measured.append(time.perf_counter() - start)
    return times


def spread(values: list[float]) -> str:
    """Median, and in brackets the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


class Bench:
    """The rows of one Flux with one set of switches."""
    def __init__(self, flux: Flux, switches: str, resolutions: list[int], text_tokens: int,
                 seconds: float, until: float):
        self.flux = flux
        self.switches = switches
        self.resolutions = resolutions
        self.text_tokens = text_tokens
        self.seconds = seconds
        self.device = flux.img_in.weight.device
        self.until = until
        side = 1024 if self.device.type == "cpu" else 8192
        self.matrix = torch.randn(side, side, device=self.device, dtype=flux.img_in.weight.dtype)

    def attempt(self, name: str, measure: Callable[[], str | None]) -> None:
        """Prints a row with what `measure` returns, or its error; the next row comes either way."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            text = measure() if time.perf_counter() < self.until else "left out: the time is over"
        except Exception as error:             # whatever it is, it is a result
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if text:
            print(f"  {name:<43} {text}", flush=True)

    def row(self, name: str, inputs: tuple[Tensor, ...], base_step: Callable,
            *steps: Callable) -> None:
        """The time of the first step and its ratio to the second, if there is one. The bound is that
        of base_step(flux, *inputs)."""
        def measure() -> str:
            product = lambda: self.matrix @ self.matrix
            products, times, *others = interleave([product, *steps], self.device, self.seconds)
            rate = 2 * len(self.matrix) ** 3 / statistics.median(products)
            bound = count_flops(self.flux.config, base_step, inputs) / rate
            text = f"{spread(times)} s, {bound / statistics.median(times):.1%} of the bound"
            if self.device.type == "cuda":
                text += f", peak {torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB"
            for other in others:
                ratios = [ours / theirs for ours, theirs in zip(times, other)]
                text += f", ratio {spread(ratios)}"
            return f"{text}, {len(times)} rounds"
        self.attempt(f"{name}, {8 * inputs[0].shape[-1]} px", measure)

    def base(self, base_step: Callable, inputs: tuple[Tensor, ...], twice: int = 0) -> list[Callable]:
        """The step of the base alone, as many of its blocks run twice. It cannot share 8-bit and
        offloaded weights: none."""
        if "fp8" in self.switches or "offload" in self.switches:
            return []
        base = base_alone(self.flux, "compile" in self.switches)
        recompute_blocks(base, twice)
        return [partial(base_step, base, *inputs)]

    def training(self, people: int) -> None:
        """Stage 2, or with several people stage 1, in which the LoMD learns too."""
        lomd = random_lomd(find_targets(self.flux), 16)
        adapter = MetaLoRA(self.flux, 1, lomd=lomd, num_identities=people, slots=people)
        adapter.bank.weight.add_(1e-2 * torch.randn_like(adapter.bank.weight))    # U starts at zero
        adapter.train_lomd = people > 1
        name = "stage 2" if people == 1 else f"stage 1, {people} people"
        for px in self.resolutions:
            inputs = random_inputs(self.flux, people, px, self.text_tokens)
            twice = fit_training(adapter, (px // 8, px // 8), self.text_tokens)
            step = partial(training_step, self.flux, adapter, *inputs)
            base = self.base(base_training_step, inputs, twice)
            self.row(f"{name}, {twice} blocks twice", inputs, base_training_step, step, *base)
        recompute_blocks(self.flux, 0)

    def sampling(self) -> None:
        apply_loras(self.flux, [(MetaLoRA(self.flux, 1).collapse(), 1.0)])
        for px in self.resolutions:
            inputs = random_inputs(self.flux, 1, px, self.text_tokens)
            step = partial(sampling_step, self.flux, *inputs)
            self.row("sampling", inputs, sampling_step, step, *self.base(sampling_step, inputs))

    def peer(self) -> None:
        """Ours is plain LoRA here: as in theirs, each of q, k, v and mlp has an A of its own."""
        adapter = MetaLoRA(self.flux, 1)
        peer = Peer(self.flux, 1)
        inputs = random_inputs(self.flux, 1, self.resolutions[0], self.text_tokens)
        ours = partial(training_step, self.flux, adapter, *inputs)
        theirs = partial(peer.training_step, *inputs)
        self.row("training against diffusers", inputs, base_training_step, ours, theirs)
        ours = partial(sampling_step, self.flux, *inputs)
        theirs = partial(sampling_step, peer, *inputs)
        self.row("sampling against diffusers", inputs, sampling_step, ours, theirs)

    def run(self) -> None:
        self.attempt("stage 2", partial(self.training, 1))
        self.attempt("stage 1", partial(self.training, 4))
        self.attempt("sampling", self.sampling)
        if self.switches == "" and find_spec("diffusers") and find_spec("peft"):
            self.attempt("diffusers + peft", self.peer)
        if self.switches == "compile" and self.flux.config == FluxConfig():
            px = self.resolutions[len(self.resolutions) // 2]
            measure = partial(photo_to_lora, self.flux, px, self.text_tokens)
            self.attempt(f"photo to LoRA, {px} px", measure)


def options() -> Parser:
    parser = Parser(prog="bench.stages", allow_abbrev=False, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=tuple(SIZES), help="default: baby, then mid, which has random weights")
    add("--random", action="store_true", help="random weights for flux-dev, made on the device")
    add("--switches", nargs="+", choices=("fp8", "offload", "compile"),
        help="8-bit weights, blocks kept on the CPU, compiled blocks (default: none; with --random "
        "on a GPU, all useful combinations)")
    add("--resolution", type=side, nargs="+", metavar="PIXELS",
        help="default: 128 for baby, 512 for mid, 512 768 1024 for flux-dev")
    add("--seconds", type=float, help="time for each row (default: 10; 0.5 for all switches)")
    add("--device", help="cuda, mps or cpu (default: the best available)")
    return parser


def bench(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    if args.random and args.model != "flux-dev":
        raise ValueError("--random needs --model flux-dev")
    device = pick_device(args.device)
    every = args.random and device.type == "cuda" and not args.switches
    seconds = (0.5 if every else 10.0) if args.seconds is None else args.seconds
    until = time.perf_counter() + 60 * MINUTES if every else math.inf
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    for name in [args.model] if args.model else ["baby", "mid"]:
        resolutions, text_tokens = SIZES[name]
        for switches in EVERY if every else [" ".join(args.switches or [])]:
            print(f"{name} {switches}", flush=True)
            try:
                flux = load(name, args.random, device, switches)
                sizes = args.resolution or resolutions
                Bench(flux, switches, sizes, text_tokens, seconds, until).run()
            except (ValueError, torch.OutOfMemoryError) as error:
                if not every:
                    raise
                print(f"  {' '.join(str(error).split())[:150]}")     # a GPU may be too small for some
            flux = None
            free(device)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C."""
    return run_script("bench.stages", bench, argv)


if __name__ == "__main__":
    sys.exit(main())
