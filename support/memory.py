"""Fits twelve billion parameters on one GPU: 8-bit weights, blocks offloaded to the CPU, gradient
checkpointing, compilation, and tiled decoding.

    flux = load_flux(folder, "cuda", torch.bfloat16, fp8=True, offload=True)
    compile_blocks(flux)                                       # before an adapter is put in
    fit_training(MetaLoRA(flux, 1), (128, 128), 512)           # latent pixels, text tokens

Known costs are checked before anything large is read (`check_memory`). The rest is tried: `fit`
runs a step at the largest size with everything in place, and saves more memory while it runs out.

Nothing here changes results beyond rounding, except fp8 (by how much: tests/test_memory.py) and
tiles (`upsample_tiled`).

Sources: "FP8 Formats for Deep Learning" (Micikevicius et al. 2022), "Training Deep Nets with
Sublinear Memory Cost" (Chen et al. 2016, gradient checkpointing).
"""
import math
import mmap
import re
import weakref
from argparse import Namespace
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flux_model import Decoder, Flux, flow_matching_loss, velocity
from support.devices import free, suppress_out_of_memory
from support.names import find_targets

E4M3 = torch.float8_e4m3fn
GIB = 2 ** 30

# 8-bit weights ------------------------------------------------------------------------------------


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) -> float8_e4m3 (n, d) and an fp32 scale (1, 1); their product approximates x, and
    zeros stay zero. One scale is enough: a float keeps its relative precision over 15 powers of
    two."""
    if x.device.type == "cpu":                       # a norm takes seven times as long there
        low, high = torch.aminmax(x)
        largest = torch.maximum(-low, high).view(1, 1)
    else:
        largest = torch.linalg.vector_norm(x, math.inf, dim=(0, 1), keepdim=True)
    scale = largest.float().clamp(min=1e-12) / torch.finfo(E4M3).max
    if torch.compiler.is_compiling():
        return (x.float() / scale).to(E4M3), scale
    out = torch.empty_like(x, dtype=E4M3)
    # a GPU divides and rounds in one kernel; a CPU makes an fp32 copy, of these rows only
    rows = 128 if x.device.type == "cpu" else len(x)
    for some, some_out in zip(x.split(rows), out.split(rows)):
        torch.div(some, scale, out=some_out)
    return out, scale


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device multiplies float8 matrices fast: GPUs of compute capability 8.9 or higher.
    On a CPU that is three times slower than in 16 bits, and less accurate."""
    if device.type != "cuda" or not torch.version.cuda:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Product(torch.autograd.Function):
    """x (n, d_in) times a float8 weight (d_out, d_in) and its scale. Backward gives x's gradient
    only, in x's dtype: a transposed float8 copy of the weight would use up what float8 saves."""
    @staticmethod
    def forward(ctx, x, weight, scale, unit, kernel, bias):
        ctx.save_for_backward(weight, scale)
        ctx.unit = unit
        if kernel and x.dtype == torch.bfloat16:
            x8, x_scale = quantize(x)
            return torch._scaled_mm(x8, weight.T, scale_a=x_scale, scale_b=scale, bias=bias,
                                    out_dtype=x.dtype, use_fast_accum=True)
        W = in_16_bits(weight, scale, unit, x.dtype)
        bias = x.new_zeros(()) if bias is None else bias
        return torch.addmm(bias, x, W.T, alpha=unit or 1.0)

    @staticmethod
    def backward(ctx, dy):
        W = in_16_bits(*ctx.saved_tensors, ctx.unit, dy.dtype)
        ignored = dy.new_empty(())
        dx = torch.addmm(ignored, dy, W, beta=0, alpha=ctx.unit or 1.0)
        return dx, None, None, None, None, None


def in_16_bits(weight: Tensor, scale: Tensor, unit: float | None, dtype: torch.dtype) -> Tensor:
    """The weight as a matrix of `dtype`, which holds 8 bits exactly. unit: the one scale, which is
    left to the GEMM; None: many scales, or a compiler at work."""
    W = weight.to(dtype)
    return W.mul_(scale) if unit is None else W


class Fp8Linear(nn.Linear):
    """A frozen Linear with 8 bits per weight: `weight` float8_e4m3 (d_out, d_in), `scale` fp32,
    (1, 1) or, from files with one per row, (d_out, 1). `dtype`: of its inputs and outputs. `unit`:
    a single scale as a number, else None. `kernel`: whether the device multiplies float8 of this
    size. Filled by checkpoints.load_flux."""
    widen = False                     # for metalora.py: the weight cannot move into S

    @staticmethod
    def convert(layer: nn.Linear, dtype: torch.dtype, device: torch.device | str):
        """Makes a Linear an Fp8Linear in place, with room for its weight; the bias stays."""
        layer.__class__ = Fp8Linear
        layer.dtype = dtype
        weight = torch.empty(layer.weight.shape, dtype=E4M3, device=device)
        layer.weight = nn.Parameter(weight, requires_grad=False)

    def fill(self, weight: Tensor, scale: Tensor):
        """Copies values that are on the device the layer runs on, even if its weight is stored
        elsewhere."""
        self.weight.data.copy_(weight)
        self.scale = nn.Parameter(scale.to(self.weight.device), requires_grad=False)
        self.unit = scale.item() if len(scale) == 1 else None
        # kernels take one scale, and multiples of 16; asked here, since a compiler cannot ask
        fits = self.unit is not None and not any(n % 16 for n in weight.shape)
        self.kernel = fits and multiplies_fp8(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        # a compiler would take each number for new code and recompile per block
        unit = None if torch.compiler.is_compiling() else self.unit
        x2d = x.flatten(0, -2)
        y = Fp8Product.apply(x2d, self.weight, self.scale, unit, self.kernel, self.bias)
        return y.unflatten(0, x.shape[:-1])


# How a block is run -------------------------------------------------------------------------------


class Managed(nn.Module):
    """Mixed into a block's class: the block runs compiled or not, offloaded or not, and with
    gradient checkpointing or not. Done by class, since replacing the instance's `forward` would
    make a reference cycle that keeps the weights alive."""
    index = 0
    compiled = None
    offload = None
    recompute = False

    def forward(self, *inputs):
        forward = partial(self.compiled, self) if self.compiled else super().forward
        away = self.offload is not None and self.index in self.offload.homes
        if away:
            forward = partial(self.offload.run, self.index, forward)
        # an offloaded block needs its weights again in the backward pass: checkpointing runs it
        if torch.is_grad_enabled() and (away or self.recompute):
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
        return forward(*inputs)


def blocks_of(flux: nn.Module) -> list[Managed]:
    """All blocks, each made Managed if it is not yet."""
    blocks = [*flux.double_blocks, *flux.single_blocks]
    for index, block in enumerate(blocks):
        if not isinstance(block, Managed):
            block.__class__ = managed_class(type(block))
            block.index = index
    return blocks


@cache
def managed_class(kind: type) -> type:
    """One class for all blocks of a kind: a compiler takes another class for other code."""
    return type(f"Managed{kind.__name__}", (Managed, kind), {})


def recompute_blocks(flux: nn.Module, count: int):
    """Gradient checkpointing in the first `count` blocks: they keep only their inputs and run again
    in the backward pass."""
    for block in blocks_of(flux):
        block.recompute = block.index < count


def compile_blocks(flux: nn.Module):
    """Compiles the two classes of blocks and nothing around them: two pieces of code for 57 blocks,
    for any number of tokens. Call it before an adapter is put in."""
    # variants: one person or several, with gradients or without, widths of the adapter; dynamo's
    # limit is 8, and beyond it blocks run as written, with a warning from torch
    torch._dynamo.config.recompile_limit = 64
    for block in blocks_of(flux):
        block.compiled = compiled(super(Managed, block).forward.__func__)


compiled = cache(partial(torch.compile, dynamic=True))       # one piece of code for each class


# Blocks that live on the CPU ----------------------------------------------------------------------


class Offload:
    """Keeps the weights of all blocks from `stay` on in page-locked CPU memory. The device has two
    buffers: one holds the block that runs, the other the one that came after it the last time,
    copied meanwhile on its own stream.

    `run(i, forward, *inputs)` runs block i, in any order. Only frozen weights move: adapters stay
    on the device.
    """
    stream = None

    def __init__(self, flux: nn.Module, device: torch.device | str):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
        self.tensors = []
        for block in blocks_of(flux):
            block.offload = self
            self.tensors.append([p for p in block.parameters() if not p.requires_grad])
            for module in block.modules():
                module.widen = False     # for metalora.py: S would not be offloaded
        self.stay = len(self.tensors)
        self.homes = {}                          # {block: flat CPU memory: one copy moves a block}
        self.after = {}                          # {(block before, block): the block that followed}

    def __del__(self):
        if self.stream:                          # the last copy may still run
            self.stream.synchronize()

    def keep(self, stay: int):
        """Offloads all blocks from `stay` on; those that were offloaded before stay so."""
        if self.stream:
            torch.cuda.synchronize(self.device)
        for index, home in self.homes.items():
            self.place(self.tensors[index], home)
        self.buffers = None                      # free these before larger ones are allocated
        for index in range(stay, self.stay):
            tensors = self.tensors[index]
            size = sum(padded(tensor.nbytes) for tensor in tensors)
            self.homes[index] = page_locked(size, lock=self.stream is not None)
            self.place(tensors, self.homes[index], fill=True)
        self.stay = stay
        size = max(map(len, self.homes.values()), default=0)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.held = [None, None]                 # the block in each buffer
        self.current = 0                         # the buffer of the last block
        self.recent = None, None                 # the last two blocks

    @staticmethod
    def place(tensors: list[Tensor], flat: Tensor, fill: bool = False):
        """Makes each tensor a view of its part of `flat`; fill=True copies its values there
        first."""
        start = 0
        for tensor in tensors:
            view = flat[start:start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            if fill:
                view.copy_(tensor)
            start += padded(tensor.nbytes)
            tensor.data = view

    def fetch(self, index: int):
        """Starts copying a block to the buffer that is not in use, once all work queued so far has
        read from it."""
        place = 1 - self.current
        before = self.held[place]
        if before is not None:
            self.place(self.tensors[before], self.homes[before])
        self.held[place] = index
        home = self.homes[index]
        target = self.buffers[place][:len(home)]
        if not self.stream:
            target.copy_(home)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(home, non_blocking=True)

    def run(self, index: int, forward: Callable, *inputs):
        if index not in self.held:
            self.fetch(index)
        self.current = self.held.index(index)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.place(self.tensors[index], self.buffers[self.current])
        self.after[self.recent] = index
        self.recent = self.recent[1], index
        following = self.after.get(self.recent, index)
        if following not in self.held:
            self.fetch(following)
        return forward(*inputs)


def check_host(size: int):
    if size > host_memory():
        raise ValueError(f"--offload puts {size / GIB:.1f} GiB of weights into the CPU's memory, "
                         f"of which {host_memory() / GIB:.1f} are free")


def page_locked(size: int, lock: bool) -> Tensor:
    """CPU memory (size,), uint8, that shares no page with other memory: a page cannot be locked
    twice. torch's own allocator of page-locked memory rounds up to a power of two."""
    check_host(size)
    page = mmap.PAGESIZE
    flat = torch.empty(size + 2 * page, dtype=torch.uint8)
    start = -flat.data_ptr() % page
    home = flat[start:start + size]
    if lock:
        cudart = torch.cuda.cudart()
        if int(cudart.cudaHostRegister(home.data_ptr(), -(-size // page) * page, 0)):
            raise OSError(f"the system does not let --offload lock {size / GIB:.1f} GiB more "
                          "of its memory: a higher limit (ulimit -l) or --fp8 helps")
        weakref.finalize(flat.untyped_storage(), cudart.cudaHostUnregister, home.data_ptr())
    return home


def padded(size: int) -> int:
    """Bytes rounded up to a multiple of 256, where each tensor of a flat buffer begins."""
    return -(-size // 256) * 256


# What is known: bytes, before anything is read ----------------------------------------------------

RESERVE = GIB // 2            # stays free: workspace of libraries, fragmentation
# Peak memory of a block, forward and backward, in units of its input: an upper bound, counted by
# tests/test_full_size.py. On a GPU, where steps are tried, it only serves to refuse early. On a CPU
# it decides: running out of memory raises no error there, the system kills the process.
BLOCK = 25


def memory_left(device: torch.device) -> float:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free(device)
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return host_memory()


def host_memory() -> float:
    """Bytes of CPU memory available, whatever limit a container has; infinite where there is no way
    to know."""
    with suppress(OSError, TypeError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text("utf-8"))
        return 1024 * int(found[1])
    return math.inf                                          # not Linux, or one that lacks the line


def weight_bytes(flux: Flux, dtype: torch.dtype, fp8: bool) -> tuple[int, list[int]]:
    """Bytes of the weights around a transformer's blocks, and of each block; `flux` may be on
    meta."""
    sizes = Counter()
    for name, p in flux.named_parameters():
        block = re.match(r"(\w+_blocks\.\d+)?", name)[0]
        sizes[block] += p.numel() * (1 if fp8 and block and p.dim() == 2 else dtype.itemsize)
    around = sizes.pop("")
    return around, list(sizes.values())


def update_bytes(flux: Flux, columns: dict[str, int], dtype: torch.dtype) -> int:
    """Bytes of low-rank updates {diffusers path: rank}, inside the widened weights and beside
    them."""
    numbers = 0
    within = Counter()
    for target in find_targets(flux, outside=True):
        rank = columns.get(target.path, 0)
        numbers += rank * (target.d_in + target.rows)
        within[target.module] += rank
    for name, rank in within.items():
        module = flux.get_submodule(name)
        if "mod" not in name and getattr(module, "widen", True):     # as in metalora.adapt
            numbers += -(-rank // 8) * 8 * max(module.in_features, module.out_features)
    return numbers * dtype.itemsize


def adapter_bytes(flux: Flux, dtype: torch.dtype, rank: int, r1: int, slots: int, people: int,
                  joint: bool) -> int:
    """Bytes of an adapter of this rank with a LoMD of r1 rows (0: none; joint: it is trained too),
    with the rows of all people and `slots` people in a batch."""
    targets = find_targets(flux)
    row = rank * sum(target.rows + (r1 or target.d_in) for target in targets)
    lomd = r1 * sum(target.d_in for target in targets)
    # a weight and two moments for what is kept, a value and a gradient for what is in the batch
    numbers = (3 * people + 2 * slots) * row + (5 if joint else 1) * lomd
    columns = {target.path: slots * rank for target in targets}
    return 4 * numbers + update_bytes(flux, columns, dtype)


def step_bytes(flux: Flux, batch: int, size: tuple[int, int], text_tokens: int, dtype: torch.dtype,
               once: int = 1, twice: int = 0) -> int:
    """Bytes beside the weights for a step with pictures of `size` latent pixels. once: blocks that
    keep all activations at a time (1 without gradients). twice: blocks that keep only their
    inputs."""
    inputs = batch * (math.prod(size) // 4 + text_tokens) * flux.config.hidden_size
    widened = max(p.numel() for p in flux.parameters())      # an 8-bit weight in 16 bits
    return (inputs * (BLOCK * once + twice) + widened) * dtype.itemsize


def check_memory(args: Namespace, flux: Flux, beside: int = 0):
    """ValueError if a run takes more memory than is free, with `beside` bytes of adapter and step
    next to the weights of `flux`, which is on meta; it names the switch that would make it fit.
    Else, with `beside`, prints both on a GPU.

    Sets args.stay: how many blocks stay on the device, counted from the first, while --offload
    moves the others."""
    device = args.device
    if args.fp8 and device.type == "mps":
        raise ValueError("--fp8 does not work on mps, which has no 8-bit floats: try --offload")

    def needed(fp8: bool, offload: bool) -> int:
        around, blocks = weight_bytes(flux, args.dtype, fp8)
        here = 2 * max(blocks) if offload and device.type != "cpu" else sum(blocks)
        return around + here + beside + RESERVE

    needs = {
        "": needed(args.fp8, args.offload),
        "--fp8": needed(True, args.offload),
        "--offload": needed(args.fp8, True),
        "--fp8 --offload": needed(True, True),
    }
    if device.type == "mps":
        del needs["--fp8"], needs["--fp8 --offload"]
    available = memory_left(device)
    line = f"this takes {needs[''] / GIB:.1f} GiB or more; {available / GIB:.1f} are free"
    fitting = [words for words in needs if needs[words] <= available]
    if not fitting:
        raise ValueError(f"{line}: no switch makes it fit; a smaller picture or batch may, or "
                         "--model baby")
    if fitting[0]:
        raise ValueError(f"{line}; with {fitting[0]} it takes {needs[fitting[0]] / GIB:.1f}")

    around, blocks = weight_bytes(flux, args.dtype, args.fp8)
    room = available - RESERVE - beside - around
    if sum(blocks) > room:
        room -= 2 * max(blocks)                  # the buffers of --offload
    args.stay = sum(size <= room for size in accumulate(blocks))
    check_host(sum(blocks[args.stay:]))
    if beside and device.type != "cpu":
        print(line)


# The rest is tried --------------------------------------------------------------------------------

def fit(flux: Flux, device: torch.device, step: Callable[[], object], training: bool,
        recompute: int | None = None):
    """Runs `step`, the largest of the run, with everything else in memory. While that does not fit
    with RESERVE bytes left, more blocks run twice (training only; `recompute` fixes their number),
    then, if blocks are offloaded, fewer stay on the device. ValueError if nothing more can be
    saved."""
    offload = blocks_of(flux)[0].offload
    most = len(blocks_of(flux)) if training else 0
    least = most if offload and offload.homes else 0         # offloaded blocks always run twice
    if recompute is not None:
        least = most = recompute

    def fits(count: int) -> bool:
        recompute_blocks(flux, count)
        with suppress_out_of_memory():
            reserve = torch.empty(RESERVE, dtype=torch.uint8, device=device)  # held during the step
            step()
            return True
        free(device)                     # not while the error holds the step's tensors
        return False

    fitted = fits(least)
    if not fitted:
        # the fewest blocks with which a step fits; most + 1: not even with all of them
        count = bisect_left(range(most + 1), True, lo=least + 1, key=fits)
        recompute_blocks(flux, min(count, most))             # the last one tried may be another
        fitted = count <= most
    while not fitted:
        if not offload or not offload.stay:
            raise ValueError(f"a step of this size does not fit into the memory of {device}: try "
                             "--fp8, --offload, a smaller --resolution or --batch-size")
        offload.keep(offload.stay - 1)
        fitted = fits(most)


def blank(flux: Flux, batch: int, size: tuple[int, int], text_tokens: int) -> list[Tensor]:
    """A batch of zeros: latent (B, 16, *size), t (B,), txt (B, T, _), y (B, _)."""
    zeros = partial(torch.zeros, batch, device=flux.img_in.weight.device)
    config = flux.config
    text = zeros(text_tokens, config.context_in_dim)
    return [zeros(config.in_channels // 4, *size), zeros(), text, zeros(config.vec_in_dim)]


def fit_training(adapter: object, size: tuple[int, int], text_tokens: int,
                 recompute: int | None = None) -> int:
    """`fit` for a MetaLoRA with its bank, on pictures of `size` latent pixels, a different person
    in each slot -> how many blocks are set to run twice; offloaded ones do so anyway. Changes
    nothing else.

    Nothing is tried on a CPU, where the system kills a process that runs out of memory; there
    `step_bytes` decides."""
    flux = adapter.flux
    slots = adapter.slots
    every = len(blocks_of(flux))
    if adapter.device.type == "cpu":
        if recompute is None:
            dtype = adapter.layers[0].dtype
            needed = step_bytes(flux, slots, size, text_tokens, dtype, once=every)
            recompute = every if needed > host_memory() else 0
        recompute_blocks(flux, recompute)
    else:
        latent, t, txt, y = blank(flux, slots, size, text_tokens)
        adapter.bank.make_moments()
        if adapter.train_lomd:
            adapter.shared.make_moments()

        def step():
            adapter.assign(torch.arange(slots) % len(adapter.bank.weight))
            flow_matching_loss(flux, latent, latent, t, txt, y).sum().backward()
        fit(flux, adapter.device, step, training=True, recompute=recompute)
        adapter.assign(torch.arange(1))          # drops the gradients
    return sum(block.recompute for block in blocks_of(flux))


@torch.no_grad()
def fit_sampling(flux: Flux, size: tuple[int, int], text_tokens: int, batch: int):
    """`fit` for a batch of pictures of `size` latent pixels, with all LoRAs applied. Nothing is
    tried where nothing can be saved: without offloaded blocks, and on a CPU."""
    device = flux.img_in.weight.device
    if device.type != "cpu" and blocks_of(flux)[0].offload:
        latent, t, txt, y = blank(flux, batch, size, text_tokens)
        fit(flux, device, lambda: velocity(flux, latent, t, txt, y, 1.0), training=False)


# Large pictures in tiles --------------------------------------------------------------------------

WHOLE_PIXELS = 1_500_000      # larger pictures are decoded in tiles
TILE = 96                     # latent pixels a side, at most; larger ones that do not fit are, too
OVERLAP = 16                  # latent pixels shared with the next tile


class TiledDecoder(Decoder):
    """The autoencoder's decoder, which decodes large pictures in tiles, see upsample_tiled."""
    def forward(self, z: Tensor) -> Tensor:
        if 8 * 8 * z[0, 0].numel() <= WHOLE_PIXELS:
            with suppress_out_of_memory():
                return super().forward(z)
            free(z.device)
        x = self.mid(self.conv_in(z))            # small, with global attention: not in tiles
        return torch.cat([upsample_tiled(self, each) for each in x.split(1)])


def upsample_tiled(decoder: nn.Module, x: Tensor) -> Tensor:
    """decoder.upsample of one picture, (1, C, h, w) -> (1, 3, 8 h, 8 w), with the memory of one
    tile.

    Not quite the same picture. All tiles share the GroupNorm statistics of one pass over a coarser
    grid, every step-th feature each way, after the "fast mode" of Tiled VAE
    (pkuliyi2015/multidiffusion-upscaler-for-automatic1111); and edges see less of their
    surroundings. With the baby's autoencoder at 1024 x 1536 that is a relative distance of 0.005
    (56 dB, a third of an 8-bit level on average); with statistics of each tile's own it was 0.045
    (37 dB)."""
    norms = [module for module in decoder.modules() if isinstance(module, nn.GroupNorm)]
    step = math.ceil(math.sqrt(x[0, 0].numel()) / TILE)
    columns = partial(in_strips, decoder.upsample, dim=3)
    for norm in norms:
        norm.forward = held_statistics(norm)
    try:
        decoder.upsample(x[..., ::step, ::step])
        return in_strips(columns, x, dim=2)
    finally:
        for norm in norms:
            del norm.forward


def in_strips(enlarge: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
    """enlarge(x) in strips of at most TILE along a dimension; neighbors overlap, and meet in the
    middle of that."""
    size = x.shape[dim]
    strips = []
    for start in range(0, max(1, size - OVERLAP), TILE - OVERLAP):
        length = min(TILE, size - start)
        strip = enlarge(x.narrow(dim, start, length))
        scale = strip.shape[dim] // length
        first = min(start, OVERLAP // 2)
        last = length if start + length == size else length - OVERLAP // 2
        strips.append(strip.narrow(dim, scale * first, scale * (last - first)))
    return torch.cat(strips, dim)


def held_statistics(norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    """A forward for a GroupNorm that keeps using the statistics of its first call: those of a tile
    are not those of the picture."""
    kept = []

    def forward(x: Tensor) -> Tensor:
        if not kept:
            groups = rearrange(x.float(), "1 (g c) h w -> g (c h w)", g=norm.num_groups)
            var, mean = torch.var_mean(groups, 1, correction=0)
            channels = len(norm.weight) // norm.num_groups
            kept.extend(part.repeat_interleave(channels) for part in (mean, var))
        # a BatchNorm at inference does just that: given statistics, in fp32 for any x
        return F.batch_norm(x, *kept, norm.weight.float(), norm.bias.float(), eps=norm.eps)
    return forward
