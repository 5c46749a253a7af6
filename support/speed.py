"""Twelve billion parameters on one card: 8-bit weights, blocks that live on the CPU, recomputation,
compilation, tiles.

    flux = load_flux(folder, "cuda", torch.bfloat16, fp8=True, offload=True)
    recompute_blocks(flux, 20)         # of 57; plan_recompute knows how many it takes
    compile_blocks(flux)               # before an adapter is put in

Blocks and decoder are wrapped from outside, by a `forward` of their own. Nothing here changes what is
computed by more than rounding, but for fp8, whose distance tests/test_speed.py states, and tiles
(upsample_tiled).

Sources: "FP8 Formats for Deep Learning" (Micikevicius et al. 2022, e4m3 and its largest number), "Training
Deep Nets with Sublinear Memory Cost" (Chen et al. 2016, recomputation).
"""
import logging
import math
import re
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flux_model import Decoder
from support.common import note

E4M3 = torch.float8_e4m3fn
GIB = 2 ** 30

# ------------------------------------------------------------------------------------------------------------
# 8-bit weights


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) -> float8_e4m3 (n, d) and an fp32 scale (1, 1) such that x is about their product; zeros stay
    zeros. One scale does: a float keeps its relative precision over 15 powers of two."""
    scale = torch.linalg.vector_norm(x, math.inf, dim=(0, 1), keepdim=True).float().clamp(min=1e-12)
    scale /= torch.finfo(E4M3).max
    if torch.compiler.is_compiling():
        return (x.float() / scale).to(E4M3), scale
    # divided in fp32 and written as 8 bits by one kernel
    return torch.div(x, scale, out=torch.empty_like(x, dtype=E4M3)), scale


def multiplies_fp8(device: torch.device) -> bool:
    """Whether float8 matrices of one scale each can be multiplied there: recent CPUs' torch, and cards from
    8.9 on. With a scale for each row some cards can, with some versions of torch."""
    if device.type != "cuda":
        return device.type == "cpu"
    return bool(torch.version.cuda) and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Product(torch.autograd.Function):
    """x (n, d_in) times a float8 weight (d_out, d_in) with its scale. Gradient of x only, by the weight in
    x's dtype.

    The gradient takes the plain way, since a transposed float8 copy of the weight would cost all that float8
    saves.
    """
    @staticmethod
    def forward(ctx, x, weight, scale, unit, kernel, bias):
        ctx.save_for_backward(weight, scale)
        ctx.unit = unit
        if kernel and x.dtype == torch.bfloat16:
            x8, x_scale = quantize(x)
            return torch._scaled_mm(x8, weight.T, scale_a=x_scale, scale_b=scale, bias=bias,
                                    out_dtype=x.dtype, use_fast_accum=True)
        return Fp8Product.in_16_bits(x, weight.T, scale.T, unit, bias)

    @staticmethod
    def backward(ctx, dy):
        weight, scale = ctx.saved_tensors
        return Fp8Product.in_16_bits(dy, weight, scale, ctx.unit, None), *[None] * 5

    @staticmethod
    def in_16_bits(x: Tensor, weight: Tensor, scale: Tensor, unit: float | None,
                   bias: Tensor | None) -> Tensor:
        """x times the weight, or its transpose, as a matrix of x's dtype, which holds 8 bits exactly."""
        W = weight.to(x.dtype) if scale.numel() == 1 else weight.to(x.dtype).mul_(scale)
        if unit is not None:                                 # the scale is part of the GEMM
            beta, bias = bias is not None, x.new_empty(()) if bias is None else bias
            return torch.addmm(bias, x, W, beta=beta, alpha=unit)
        y = x @ W if scale.numel() > 1 else ((x @ W).float() * scale).to(x.dtype)
        return y if bias is None else y + bias


class Fp8Linear(nn.Module):
    """A frozen Linear of 8 bits a weight: `weight` float8_e4m3 (d_out, d_in), `scale` fp32 (1, 1), or (d_out,
    1) of a file that has several, `bias` or None. `unit` is the one scale as a number, else 1; `kernel`
    whether the device multiplies 8 bits of this size.

    Filled by checkpoints.load_flux, or from a Linear by `Fp8Linear.of`.
    """
    widen = False                     # for metalora.py: nothing can be stored beside this weight

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device=None):
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        frozen = lambda dtype, *shape: nn.Parameter(torch.empty(shape, dtype=dtype, device=device), False)
        self.weight = frozen(E4M3, out_features, in_features)
        self.scale = frozen(torch.float32, 1, 1)
        self.bias = frozen(dtype, out_features) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear) -> "Fp8Linear":
        weight, bias = linear.weight.detach(), linear.bias is not None
        out = cls(linear.in_features, linear.out_features, bias, weight.dtype, weight.device)
        out.fill(*quantize(weight))
        if linear.bias is not None:
            out.bias.data = linear.bias.detach()
        return out

    def fill(self, weight: Tensor, scale: Tensor) -> None:
        """With what lies on the device where it will run, even if its own weight is kept elsewhere."""
        self.weight.data.copy_(weight)
        self.scale.data = scale.to(self.weight.device)
        self.unit = scale.item() if len(scale) == 1 else 1.0
        fits = len(scale) == 1 and not any(n % 16 for n in weight.shape)    # kernels take multiples of 16
        self.kernel = fits and multiplies_fp8(weight.device)           # here, since a compiler cannot ask

    def forward(self, x: Tensor) -> Tensor:
        # to a compiler a number is code, another for every block
        unit = None if torch.compiler.is_compiling() else self.unit
        y = Fp8Product.apply(x.flatten(0, -2), self.weight, self.scale, unit, self.kernel, self.bias)
        return y.unflatten(0, x.shape[:-1])


# ------------------------------------------------------------------------------------------------------------
# How a block is run


def blocks_of(flux: nn.Module) -> list[nn.Module]:
    return [*flux.double_blocks, *flux.single_blocks]


class Managed(nn.Module):
    """Mixed into a block's class: it runs compiled or not, wherever its weights live, once or twice. By its
    class, since a `forward` of its own would refer back to the block, and the weights would outlive their
    last use."""
    index, compiled, offload, place, recompute = 0, None, None, 0, False

    def forward(self, *inputs):
        forward = partial(self.compiled, self) if self.compiled else super().forward
        if self.offload:
            forward = partial(self.offload.run, self.place, forward)
        # the backward pass of a block that lives elsewhere needs its weights once more, as running it again
        # does
        if torch.is_grad_enabled() and (self.offload or self.recompute):
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
        return forward(*inputs)


def managed(flux: nn.Module) -> list[Managed]:
    """All blocks, made Managed where they are not yet."""
    for index, block in enumerate(blocks_of(flux)):
        if not isinstance(block, Managed):
            block.__class__ = managed_class(type(block))
            block.index = index
    return blocks_of(flux)


@cache
def managed_class(kind: type) -> type:
    """One for all blocks of a kind: to a compiler another class is other code."""
    return type(f"Managed{kind.__name__}", (Managed, kind), {})


def recompute_blocks(flux: nn.Module, count: int) -> None:
    """In training the first `count` blocks keep only their inputs, and run again in the backward pass."""
    for block in managed(flux):
        block.recompute = block.index < count


class GivenUp(logging.Handler):
    """Says aloud what dynamo only logs: that it compiles no further variant of a block."""
    def emit(self, record: logging.LogRecord) -> None:
        if "recompile_limit" in record.getMessage():
            note("torch gave up compiling further variants of the blocks; these run slower, as written")


def compile_blocks(flux: nn.Module) -> None:
    """Compiles the two classes of blocks, and nothing around them: two pieces of code for 57 blocks, and
    another number of tokens is no reason to compile again. Before an adapter is put in."""
    # each of: one person or several, with gradients or without, double or single, widths of the adapter. The
    # eight that dynamo allows by itself run out, and the rest would run uncompiled
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    logger = logging.getLogger("torch._dynamo.convert_frame")
    logger.handlers = [h for h in logger.handlers if not isinstance(h, GivenUp)] + [GivenUp()]
    for block in managed(flux):
        block.compiled = compiled(super(Managed, block).forward.__func__)


@cache
def compiled(forward: Callable) -> Callable:
    return torch.compile(forward, dynamic=True)


def offload_blocks(flux: nn.Module, device, first: int = 0) -> None:
    """The weights of the blocks from the `first` on, loaded on the CPU, stay there and come to the device one
    block after the other."""
    offload = Offload(blocks_of(flux)[first:], device)
    for index, block in enumerate(managed(flux)[first:]):
        block.offload, block.place = offload, index
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.widen = False             # for metalora.py: a copy of this weight would not move along


def is_compiled(flux: nn.Module) -> bool:
    return managed(flux)[0].compiled is not None


def is_offloaded(flux: nn.Module) -> bool:
    return any(block.offload for block in managed(flux))


# ------------------------------------------------------------------------------------------------------------
# Blocks that live on the CPU


class Offload:
    """Weights of the blocks in pinned CPU memory; of two places on the device one holds the block that runs,
    the other the next, copied meanwhile on a stream of its own.

    `run(i, forward, *inputs)` runs block i, in any order; expected is 0, 1, .. n - 1 and, when training with
    every block recomputed, back to 0. Only what is frozen moves: adapters stay on the device.
    """
    def __init__(self, blocks: list[nn.Module], device: torch.device):
        self.device, self.cuda = torch.device(device), torch.device(device).type == "cuda"
        self.tensors = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        sizes = [sum(padded(t.nbytes) for t in tensors) for tensors in self.tensors]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        self.homes = flat.split(sizes)                       # a piece for each block: one copy moves it
        for tensors, home in zip(self.tensors, self.homes):
            self.place(tensors, home, fill=True)
        if self.cuda:
            pin(flat)
        self.slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self.held, self.last = [None, None], None               # which block a slot holds; which one ran last
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.arrived = [torch.cuda.Event() if self.cuda else None for _ in range(2)]

    @staticmethod
    def place(tensors: list[Tensor], flat: Tensor, fill: bool = False):
        """Makes every tensor a view of its part of `flat`, with fill=True after copying it there."""
        start = 0
        for tensor in tensors:
            view = flat[start:start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            if fill:
                view.copy_(tensor)
            start += padded(tensor.nbytes)
            tensor.data = view

    def fetch(self, index: int, slot: int):
        """Starts to copy a block into a slot, after whatever was queued so far has read what lies there."""
        if self.held[slot] is not None:
            self.place(self.tensors[self.held[slot]], self.homes[self.held[slot]])
        home, self.held[slot] = self.homes[index], index
        if not self.cuda:
            self.slots[slot][:len(home)].copy_(home)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.slots[slot][:len(home)].copy_(home, non_blocking=True)
            self.arrived[slot].record(self.stream)

    def run(self, index: int, forward: Callable, *inputs):
        if index not in self.held:
            self.fetch(index, 0 if self.last is None else 1 - self.held.index(self.last))
        slot, last = self.held.index(index), len(self.tensors) - 1
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])
        self.place(self.tensors[index], self.slots[slot])
        back = self.last is not None and index <= self.last and torch.is_grad_enabled()
        back = back and not (index == 0 and self.last == last)                   # the next step's first block
        self.last = index
        # forwards the next one comes, and after the last of them the first, or, in training, the last once
        # more
        after = index - 1 if back else index + 1 if index < last else last if torch.is_grad_enabled() else 0
        if after >= 0 and after not in self.held:
            self.fetch(after, 1 - slot)
        return forward(*inputs)


def pin(flat: Tensor) -> None:
    """Page-locks CPU memory where it lies: torch's own allocator of pinned memory would round it up to a
    power of two. All at once, since pages that two pieces share cannot be locked twice."""
    cudart = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)):
        raise OSError(f"the system does not let --offload lock {flat.nbytes / GIB:.0f} GiB of its memory: a "
                      "higher limit (ulimit -l) or --fp8 helps")
    weakref.finalize(flat.untyped_storage(), cudart.cudaHostUnregister, flat.data_ptr())


def padded(size: int) -> int:
    """Bytes up to a multiple of 256, where every tensor of a flat piece of memory begins."""
    return -(-size // 256) * 256


# ------------------------------------------------------------------------------------------------------------
# Memory

RESERVE = GIB // 2            # what nothing is planned into: workspace of libraries, rounding
# In inputs of a block: what a double and a single block keep for the backward pass, what a step needs beside,
# and the peak of one without gradients; and what torch's allocator makes of it. Counted by
# tests/test_full_size.py, which fails where they change.
KEPT, REPLAY, FORWARD, HOLES = (24.5, 19.5), 2.5, 21, 1.08


class Work(NamedTuple):
    """What a command asks of a device beside the frozen weights."""
    tokens: int               # of a picture and its text
    batch: int = 1
    rank: int = 1             # of the adapter
    r1: int = 0               # rows of its LoMD; 0: none
    people: int = 1           # rows of its bank
    training: bool = False


def memory_left(device) -> float:
    """Bytes that can still be had on a device: what its driver or system has left, and what torch holds
    unused."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return host_memory()


def host_memory() -> float:
    """Bytes of CPU memory that are free for use."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text("utf-8"))[1]) * 1024
    except (OSError, TypeError):
        return math.inf                                                            # not Linux: no way to know


def block_bytes(flux: nn.Module, dtype: torch.dtype, fp8: bool) -> list[int]:
    """Of each block's weights."""
    size = lambda p: p.numel() * (1 if fp8 and p.dim() == 2 else dtype.itemsize)
    return [sum(map(size, block.parameters())) for block in blocks_of(flux)]


def weight_bytes(flux: nn.Module, dtype: torch.dtype, fp8: bool, offload: bool) -> int:
    """Bytes of a transformer's weights on its device, at least; `flux` may be on meta."""
    around = sum(p.numel() for name, p in flux.named_parameters() if "_blocks." not in name)
    blocks = block_bytes(flux, dtype, fp8)
    return around * dtype.itemsize + (2 * max(blocks) if offload else sum(blocks))


def adapter_bytes(targets: list, work: Work, dtype: torch.dtype) -> int:
    """Bytes of an adapter and its AdamW, with C, U and spare places in weights. targets: of find_targets."""
    row = sum(work.rank * (t.rows + (work.r1 or t.d_in)) for t in targets)
    lomd = work.r1 * sum(t.d_in for t in targets)
    copies = 2 * work.batch * work.rank * sum(t.d_in + t.rows for t in targets)
    spare = sum((8 + 4 * work.batch * work.rank) * max(t.d_in, t.rows) for t in targets)
    state = 3 * work.people + 2 * work.batch if work.training else 0
    return 4 * (row * state + lomd * (6 if work.people > 1 else 4)) + (copies + spare) * dtype.itemsize


def step_bytes(flux: nn.Module, work: Work, dtype: torch.dtype, twice: int | None = None) -> float:
    """Bytes of a step beside weights and adapter, with so many blocks run twice (None: all)."""
    inputs = work.batch * work.tokens * flux.config.hidden_size * dtype.itemsize
    largest = max(p.numel() for p in flux.parameters()) * dtype.itemsize      # an 8-bit weight in 16 bits
    if not work.training:
        return HOLES * FORWARD * inputs + largest
    kept = [KEPT[0]] * len(flux.double_blocks) + [KEPT[1]] * len(flux.single_blocks)
    twice = len(kept) if twice is None else twice
    # a block runs again when the ones behind it have given back what they kept
    peak = max(sum(kept[twice:]), max(kept[:twice], default=0))
    return HOLES * inputs * (twice + peak + REPLAY) + largest


def check_memory(flux: nn.Module, device, dtype: torch.dtype, fp8: bool, offload: bool, beside: float) -> str:
    """One line on what a run takes of a device's memory, `beside` bytes of adapter and step included;
    ValueError where it will not fit, with the switch under which it would. `flux` may be on meta."""
    free = memory_left(device) / GIB
    gib = lambda fp8, offload: (weight_bytes(flux, dtype, fp8, offload) + beside + RESERVE) / GIB
    takes = f"this takes {gib(fp8, offload):.1f} GiB or more, of which {free:.1f} are free"
    if gib(fp8, offload) <= free or torch.device(device).type == "cpu":
        return takes
    for words, *on in (("--fp8", True, offload), ("--offload", fp8, True), ("--fp8 --offload", True, True)):
        if gib(*on) <= free:
            raise ValueError(f"{takes}; with {words} it takes {gib(*on):.1f}")
    raise ValueError(f"{takes}: no switch makes it fit, but a smaller size, --resolution or --batch-size may")


def blocks_on_device(flux: nn.Module, device, dtype: torch.dtype, fp8: bool, beside: float) -> int:
    """How many blocks, from the first on, can stay on the device when the others are offloaded."""
    left = memory_left(device) - RESERVE - beside - weight_bytes(flux, dtype, fp8, True)
    count = 0
    for size in block_bytes(flux, dtype, fp8):
        left -= size
        count += left >= 0
    return count


def plan_recompute(adapter: object, tokens: int, wanted: int | None = None) -> int:
    """The fewest blocks, counted from the first, that must run twice so that a training step of an adapted
    Flux (adapter: a MetaLoRA, with a slot for each picture), of so many tokens with their text, fits into the
    memory that is left; or as many as are `wanted`. ValueError where all of them do not do."""
    if wanted is not None:
        return wanted
    flux, work = adapter.flux, Work(tokens, adapter.slots, training=True)
    every, free = len(blocks_of(flux)), memory_left(adapter.device) - RESERVE
    for count in range(every if is_offloaded(flux) else 0, every + 1):
        needed = step_bytes(flux, work, adapter.layers[0].dtype, count)
        if needed <= free:
            return count
    raise ValueError(f"a training step needs {needed / GIB:.1f} GiB beside the weights, and "
                     f"{free / GIB:.1f} GiB are free: try --fp8, --offload, a smaller --resolution or "
                     "--batch-size")


# ------------------------------------------------------------------------------------------------------------
# Large pictures in tiles

WHOLE_PIXELS = 1_500_000              # larger pictures are decoded in tiles
TILE, OVERLAP = 96, 16         # of at most so many latent pixels a side, so many of them shared with the next


class TiledDecoder(Decoder):
    """The autoencoder's decoder, but that it makes pictures of more than WHOLE_PIXELS in tiles, see
    upsample_tiled."""
    def forward(self, z: Tensor) -> Tensor:
        if z[0, 0].numel() * 4 ** (len(self.up) - 1) <= WHOLE_PIXELS:
            return super().forward(z)
        x = self.mid(self.conv_in(z))                 # its attention is global, and it is small: not in tiles
        return torch.cat([upsample_tiled(self, each) for each in x.split(1)])


def upsample_tiled(decoder: nn.Module, x: Tensor) -> Tensor:
    """decoder.upsample of one picture, (1, C, h, w) -> (1, 3, 8 h, 8 w), with the memory of one tile.

    Not quite the same picture. All tiles share the GroupNorm statistics of one pass over a coarser grid,
    every step-th feature each way, after the "fast mode" of Tiled VAE
    (pkuliyi2015/multidiffusion-upscaler-for-automatic1111); and edges see less of their surroundings. With
    the baby's autoencoder at 1024 x 1536 that is a relative distance of 0.005 (56 dB, a third of an 8-bit
    level on average); with statistics of each tile's own it was 0.045 (37 dB).
    """
    norms = [m for m in (*decoder.up.modules(), decoder.norm_out) if isinstance(m, nn.GroupNorm)]
    scale, step = 2 ** (len(decoder.up) - 1), math.ceil(math.sqrt(x[0, 0].numel()) / TILE)
    size = [scale * n for n in x.shape[2:]]
    picture = torch.zeros(1, decoder.conv_out.out_channels, *size, device=x.device)
    weights = torch.zeros(size, device=x.device)
    try:
        for norm in norms:
            norm.forward = held_statistics(norm)
        decoder.upsample(x[..., ::step, ::step])
        for rows, columns in product(*map(tiles, x.shape[2:])):
            tile = decoder.upsample(x[..., rows, columns])
            # The distance to the nearest edge: made to sum to 1, linear over the overlap. Pixels at the edge
            # saw zeros beyond it and count for almost nothing; at the picture's own edge they are the only
            # ones.
            ramps = (torch.arange(0.5, n, device=x.device) for n in tile.shape[2:])
            ramps = (torch.minimum(r, r.flip(0)) - scale * OVERLAP / 4 for r in ramps)
            weight = torch.outer(*(r.clamp(min=1e-3) for r in ramps))
            place = ..., *(slice(scale * part.start, scale * part.stop) for part in (rows, columns))
            picture[place] += weight * tile
            weights[place] += weight
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)
    return (picture / weights).to(x.dtype)


def held_statistics(norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    """A forward for a GroupNorm that keeps the statistics of its first call for all others: a tile's are not
    its picture's."""
    kept = []

    def forward(x: Tensor) -> Tensor:
        if not kept:
            groups = rearrange(x.float(), "1 (g c) h w -> g (c h w)", g=norm.num_groups)
            var, mean = torch.var_mean(groups, 1, correction=0)
            kept.extend(each.repeat_interleave(len(norm.weight) // norm.num_groups) for each in (mean, var))
        # a BatchNorm at inference is just that: given statistics, in fp32 whatever x is
        return F.batch_norm(x, *kept, norm.weight.float(), norm.bias.float(), eps=norm.eps)
    return forward


def tiles(size: int) -> list[slice]:
    """The fewest slices of one length, at most TILE, that cover `size` and overlap by OVERLAP or by one
    more."""
    count = max(1, math.ceil((size - OVERLAP) / (TILE - OVERLAP)))
    length = math.ceil((size + (count - 1) * OVERLAP) / count)
    starts = [i * (size - length) // max(1, count - 1) for i in range(count)]
    return [slice(start, start + length) for start in starts]


# ------------------------------------------------------------------------------------------------------------
# Attention and compilation

ORDER = ExitStack()                                         # of the kernels of attention, once it was chosen
KERNELS = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


def seconds_of_attention(kernel: SDPBackend, shape: tuple, device: torch.device, dtype: torch.dtype,
                         backward: bool) -> float:
    """Seconds of a call of one kernel, after warming up; infinite where the card or torch lacks it."""
    q, k, v = torch.randn(3, *shape, device=device, dtype=dtype, requires_grad=backward).unbind()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        with sdpa_kernel(kernel), torch.cuda.device(device):
            for i in range(8):
                if i == 3:
                    start.record()
                out = F.scaled_dot_product_attention(q, k, v)
                if backward:
                    torch.autograd.grad(out.sum(), (q, k, v))
            end.record()
        end.synchronize()
    except RuntimeError:
        return math.inf
    return start.elapsed_time(end) / 5e3


def choose_attention(shape: tuple, device: torch.device, dtype: torch.dtype, backward: bool) -> str | None:
    """On CUDA: times every kernel there is for (B, H, L, D) and puts the fastest one first, for this process.
    -> its name, or None where nothing was chosen."""
    if torch.device(device).type != "cuda":
        return None
    seconds = {kernel: seconds_of_attention(kernel, shape, device, dtype, backward) for kernel in KERNELS}
    order = sorted(KERNELS, key=seconds.get)
    if seconds[order[0]] == math.inf:
        return None
    # for good: never left, and kept, since a context that is collected is left. All stay allowed: only one
    # takes the autoencoder's wide head
    ORDER.enter_context(sdpa_kernel([*order, SDPBackend.MATH], set_priority=True))
    return order[0].name


def seconds_compiling() -> float:
    """Time that this process has spent compiling so far, by dynamo's own count, the backward passes
    included."""
    from torch._dynamo.utils import calculate_time_spent
    return calculate_time_spent()["total_wall_time"]
