"""Seconds, share of the bound and peak memory of each stage.

    python -m bench.stages                              # the baby, and a random mid-size model
    python -m bench.stages --model flux-dev             # on a GPU: all switches, in ten minutes

One row each for a training step of stage 2, an iteration of stage 1 (4 pictures of 4 people) and a
sampling step with a LoRA, at each resolution; for both kinds of step against diffusers + peft if
these are installed; and, on a compiled FLUX.1-dev, for personalize.py from photo to LoRA.

"ratio" is the time divided by that of the frozen base alone (the same model with its update switched
off; in training, its backward pass goes to the inputs), or by that of diffusers + peft. The two run
in turn, A B A B, so that other work on the machine slows both. Numbers are medians after a warm-up,
with quartiles in parentheses.

The bound is the FLOPs of the base's blocks divided by the rate of a large matrix product in the same
dtype, which runs in turn with the others. The adapter, gradient checkpointing and elementwise work do
not count, which lowers the share; 8-bit weights can push it above 100 %. Peak memory includes the
0.1 GiB of that product's matrix.
"""
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles

import support  # before torch: sets how its threads wait
import torch
from torch import Tensor, nn

import personalize
from flux_model import AutoEncoder, AutoEncoderConfig, Flux, FluxConfig, denoise, flow_matching_loss
from metalora import AdaptedLinear, MetaLoRA, apply_loras, random_lomd
from support.checkpoints import fill_flux, flux_files
from support.common import Parser, run_script
from support.devices import free, peak_memory, pick_device
from support.finding import find_model
from support.memory import blank, compile_blocks, fit_training
from support.names import diffusers_flux_names, find_targets, part_sizes
from support.photos import load_crops
from support.tensors import TensorFiles

PHOTO = Path(__file__).parents[1] / "baby/example.png"
# configuration (the baby has its own files), resolutions, text tokens
MODELS = {
    "baby": (None, [128], 24),
    "mid": (FluxConfig(context_in_dim=768, hidden_size=768, num_heads=6, depth=4,
                       depth_single_blocks=8), [512], 128),
    "flux-dev": (FluxConfig(), [512, 768, 1024], 512),
}
# on a GPU, in one command; compiling comes last because it takes longest
EVERY = "", "fp8", "offload", "fp8 offload", "compile", "fp8 compile"
MINUTES = 9        # after that no further row begins


# --------------------------------------------------------------------------------------------------
# Models


class RandomFiles(TensorFiles):
    """Each tensor is drawn on the device when it is asked for, at a scale that keeps activations
    about as large as they are."""
    def __init__(self, config: FluxConfig, device: torch.device, dtype: torch.dtype):
        with torch.device("meta"):
            self.names = dict(Flux(config).named_parameters())
        self.scales = {}
        self.draw = partial(torch.randn, device=device, dtype=dtype)

    def shape(self, name: str) -> list[int]:
        return list(self.names[name].shape)

    def tensor(self, name: str) -> Tensor:
        weight = self.draw(self.shape(name))
        return weight.mul_(weight[0].numel() ** -0.5)


def load(config: FluxConfig | None, device: torch.device, switches: str) -> Flux:
    """The baby, or with a configuration a transformer with random weights."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    source = flux_files(find_model("baby"))
    if config:
        source = RandomFiles(config, device, dtype), config
    flux = fill_flux(*source, device, dtype, fp8="fp8" in switches, offload="offload" in switches)
    if "compile" in switches:
        compile_blocks(flux)
    return flux


class Peer:
    """diffusers' transformer on the frozen weights of an adapted Flux, with peft's LoRA on every
    Linear of its blocks. Called like a Flux."""
    def __init__(self, flux: Flux):
        from diffusers import FluxTransformer2DModel
        from peft import LoraConfig, get_peft_model
        config = self.config = flux.config
        with torch.device("meta"):
            model = FluxTransformer2DModel(
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
        for name, weight in flux.state_dict().items():
            if name.endswith(".S"):            # the weight is a view of it
                continue
            names = diffusers_flux_names(name.replace(".base.", "."))
            if names[0].startswith("norm_out"):
                weight = weight.roll(len(weight) // 2, 0)                     # scale before shift
            sizes = part_sizes(len(names), len(weight), config.hidden_size)
            weights.update(zip(names, weight.split(sizes)))
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(False)

        linears = r".*transformer_blocks\..*(linear|to_[qkv]|to_out\.0|to_add_out|proj\w*|net\.2)"
        lora = LoraConfig(r=1, lora_alpha=1, target_modules=linears)
        self.model = get_peft_model(model, lora)                    # trained in fp32, like ours
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        img, img_ids, txt, txt_ids, t, y, guidance = inputs
        dtype = self.model.dtype
        return self.model(
            hidden_states=img.to(dtype),
            encoder_hidden_states=txt.to(dtype),
            pooled_projections=y.to(dtype),
            timestep=t,
            img_ids=img_ids[0],
            txt_ids=txt_ids[0],
            guidance=guidance,
            return_dict=False,
        )[0]

    def training_step(self, *inputs: Tensor):
        flow_matching_loss(self, *inputs).sum().backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


# --------------------------------------------------------------------------------------------------
# Steps


def random_inputs(flux: Flux, batch: int, px: int, text_tokens: int) -> tuple[Tensor, ...]:
    """Arguments of flow_matching_loss: latent, noise, t, txt, y. A GPU multiplies zeros faster."""
    zeros = blank(flux, batch, (px // 8, px // 8), text_tokens)
    latent, t, txt, y = map(torch.randn_like, zeros)
    return latent, torch.randn_like(latent), t.sigmoid(), txt, y


def training_step(flux: Flux, adapter: MetaLoRA, *inputs: Tensor):
    """Each picture is of another person."""
    adapter.assign(torch.arange(adapter.slots))
    flow_matching_loss(flux, *inputs).sum().backward()
    adapter.step(1e-4)


def base_training_step(flux: Flux, *inputs: Tensor):
    """Forward, and backward to the latent and the text."""
    inputs = [part.clone().requires_grad_(part.dim() > 2) for part in inputs]
    flow_matching_loss(flux, *inputs).sum().backward()


def base_alone(flux: Flux, step: Callable) -> Callable:
    """The step without the adapter's update: each adapted Linear runs the frozen one alone."""
    layers = [layer for layer in flux.modules() if isinstance(layer, AdaptedLinear)]

    def run():
        updates = [layer.C for layer in layers]
        for layer in layers:
            vars(layer)["C"] = None            # a module's own setattr would take a while
        step()
        for layer, C in zip(layers, updates):
            vars(layer)["C"] = C
    return run


def count_flops(config: FluxConfig, inputs: tuple[Tensor, ...], training: bool) -> int:
    """FLOPs of the base's blocks; everything else is under 0.1 % of FLUX.1-dev. A backward pass to
    the inputs computes the products of the Linears once more, and those of attention twice."""
    latent, *_, txt, _ = inputs
    tokens = latent[0, 0].numel() // 4 + txt.shape[1]
    linears = 24 * config.hidden_size ** 2 * tokens          # both kinds of block have 12 C^2 weights
    attention = 4 * config.hidden_size * tokens ** 2
    block = 2 * linears + 3 * attention if training else linears + attention
    return len(latent) * (config.depth + config.depth_single_blocks) * block


# --------------------------------------------------------------------------------------------------
# Rows


def interleave(functions: list[Callable], device: torch.device,
               seconds: float) -> list[list[float]]:
    """Seconds of each call of each function, in turn, for `seconds` and three rounds at least,
    after a warm-up."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    until = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < until:
        for function, measured in zip(functions, times):
            start = time.perf_counter()
            function()
            torch.zeros(1, device=device).item()             # waits for the device
            measured.append(time.perf_counter() - start)
    return times


def spread(values: list[float]) -> str:
    """Median, with the quartiles in parentheses."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def measure(flux: Flux, inputs: tuple[Tensor, ...], training: bool, step: Callable,
            other: Callable, seconds: float) -> str:
    """The time of `step`, its share of the bound, and its ratio to `other`."""
    weight = flux.img_in.weight
    side = 1024 if weight.device.type == "cpu" else 8192
    matrix = weight.new_empty(side, side).normal_()
    if weight.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(weight.device)
    functions = [lambda: matrix @ matrix, step, other]
    products, times, others = interleave(functions, weight.device, seconds)
    rate = 2 * side ** 3 / median(products)
    bound = count_flops(flux.config, inputs, training) / rate
    ratios = [ours / theirs for ours, theirs in zip(times, others)]
    return (f"{spread(times)} s, {bound / median(times):.1%} of the bound, ratio {spread(ratios)}, "
            f"{len(times)} rounds{peak_memory(weight.device)}")


def train(flux: Flux, px: int, text_tokens: int, seconds: float, people: int = 1,
          peer: bool = False) -> str:
    """Stage 2, or with several people stage 1, in which the LoMD learns too. peer: plain LoRA, in
    which as in theirs each of q, k, v and mlp has an A of its own."""
    lomd = None if peer else random_lomd(find_targets(flux), 16)
    adapter = MetaLoRA(flux, 1, lomd=lomd, num_identities=people, slots=people)
    adapter.train_lomd = people > 1
    twice = fit_training(adapter, (px // 8, px // 8), text_tokens)
    inputs = random_inputs(flux, people, px, text_tokens)
    step = partial(training_step, flux, adapter, *inputs)
    if peer:
        other = partial(Peer(flux).training_step, *inputs)
    else:
        other = base_alone(flux, partial(base_training_step, flux, *inputs))
    return f"{measure(flux, inputs, True, step, other, seconds)}, {twice} blocks run twice"


def sample(flux: Flux, px: int, text_tokens: int, seconds: float, peer: bool = False) -> str:
    apply_loras(flux, [(MetaLoRA(flux, 1).collapse(), 1.0)])
    inputs = random_inputs(flux, 1, px, text_tokens)
    _, noise, _, txt, y = inputs
    one_step = noise, txt, y, 1, 3.5
    step = partial(denoise, flux, *one_step)
    other = partial(denoise, Peer(flux), *one_step) if peer else base_alone(flux, step)
    return measure(flux, inputs, False, step, other, seconds)


def photo_to_lora(flux: Flux, px: int, text_tokens: int, seconds: float) -> str:
    """personalize.py once, from the photo to the LoRA: without reading the weights, encoding the
    caption, and writing the file."""
    weight = flux.img_in.weight
    with weight.device:
        autoencoder = AutoEncoder(AutoEncoderConfig()).requires_grad_(False)
    autoencoder.to(weight.dtype, memory_format=torch.channels_last)
    *_, txt, y = random_inputs(flux, 1, px, text_tokens)
    start = time.perf_counter()
    crops = load_crops([PHOTO], [px])
    latents, weights = personalize.encode_crops(autoencoder, crops)
    adapter = MetaLoRA(flux, 1, lomd=random_lomd(find_targets(flux), 16))
    fit_training(adapter, (px // 8, px // 8), text_tokens)
    iters = personalize.ITERATIONS["meta-lora"]
    personalize.train(flux, adapter, latents, weights, txt, y, iters, 1e-4)
    adapter.collapse()
    return f"{time.perf_counter() - start:.1f} s, {len(crops)} crops, {iters} iterations"


# name, function, the switches and the resolutions that it runs with
ROWS = (
    ("stage 2", train, EVERY, slice(3)),
    ("stage 1, 4 people", partial(train, people=4), EVERY, slice(3)),
    ("sampling", sample, EVERY, slice(3)),
    ("training against diffusers", partial(train, peer=True), [""], slice(1)),
    ("sampling against diffusers", partial(sample, peer=True), [""], slice(1)),
    ("photo to LoRA", photo_to_lora, ["compile"], slice(1, 2)),
)


def options() -> Parser:
    parser = Parser(prog="bench.stages", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=MODELS, nargs="+", default=["baby", "mid"],
        help="default: baby, then mid; all but the baby have random weights")
    add("--switches", choices=EVERY, nargs="+", metavar="SET",
        help="fp8 (8-bit weights), offload (blocks kept on the CPU), compile, or two of them in "
        "quotes, as in 'fp8 offload'; several SETs are measured one after another (default: none; "
        "for flux-dev on a GPU, all useful ones)")
    add("--seconds", type=float, default=1.0, help="time for each row (default: 1)")
    add("--device", help="cuda, mps or cpu (default: the best available)")
    return parser


def bench(argv: list[str] | None):
    args = options().parse_args(argv)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    every = args.switches or (EVERY if cuda and "flux-dev" in args.model else [""])
    until = time.perf_counter() + 60 * MINUTES
    where = torch.cuda.get_device_name(device) if cuda else device.type
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    for name, switches in product(args.model, every):
        config, resolutions, text_tokens = MODELS[name]
        flux = None
        free(device)
        for title, row, with_switches, at in ROWS:
            for px in resolutions[at] if switches in with_switches else []:
                if time.perf_counter() > until:
                    return print(f"left out from here on: {MINUTES} minutes are over")
                print(f"{title}, {px} px, {name} {switches}", flush=True)
                try:
                    flux = flux or load(config, device, switches)
                    print("    " + row(flux, px, text_tokens, args.seconds), flush=True)
                except Exception as error:             # whatever it is, it is a result
                    print(f"    {type(error).__name__}: {' '.join(str(error).split())[:150]}")


# Exit code: 0 done (a row's error is its result), 2 bad input, 130 Ctrl-C.
main = partial(run_script, "bench.stages", bench)

if __name__ == "__main__":
    sys.exit(main())
