"""Twelve billion parameters on one card: 8-bit weights, blocks that live on the CPU, recomputation, compilation.

    flux = load_flux(folder, "cuda", torch.bfloat16, fp8=True, offload=True)
    flux.recompute = 20                # of 57 blocks; MetaLoRA.blocks_to_recompute knows how many it takes
    compile_blocks(flux)               # before an adapter is put in

Nothing here changes what is computed by more than rounding, but for fp8, whose distance tests/test_speed.py states. All
of it knows of blocks and Linears only.

Sources: "FP8 Formats for Deep Learning" (Micikevicius et al. 2022, e4m3 and its largest number), "Training Deep Nets
with Sublinear Memory Cost" (Chen et al. 2016, recomputation).
"""
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

E4M3 = torch.float8_e4m3fn
GIB = 2 ** 30

# ---------------------------------------------------------------------------------------------------------------------
# 8-bit weights


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) -> float8_e4m3 (n, d) and fp32 scales (n, 1) such that x is about their product; rows of zeros stay zeros."""
    scale = torch.linalg.vector_norm(x, math.inf, dim=1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(E4M3).max
    return (x / scale if x.dtype == torch.float32 else x.float().div_(scale)).to(E4M3), scale       # few copies: x may be large


def multiplies_fp8(device: torch.device) -> bool:
    """Whether float8 matrices with row scales can be multiplied there: recent CPUs' torch, and cards from 9.0 on."""
    return device.type == "cpu" or device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (9, 0)


class Fp8Product(torch.autograd.Function):
    """x (n, d_in) times a float8 weight (d_out, d_in) with row scales. Gradient of x only, by the weight in x's dtype.

    The gradient takes the plain way, since a transposed float8 copy of the weight would cost all that float8 saves.
    """
    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        # the kernels take multiples of 16; rows of x are quantised by themselves, as the weight's were
        if x.dtype == torch.bfloat16 and multiplies_fp8(x.device) and not any(size % 16 for size in weight.shape):
            x8, x_scale = quantize_rows(x)
            return torch._scaled_mm(x8, weight.T, scale_a=x_scale, scale_b=scale.T, bias=bias, out_dtype=x.dtype, use_fast_accum=True)
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        weight, scale = ctx.saved_tensors
        return dy @ dequantize(weight, scale, dy.dtype), None, None, None


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.float() * scale).to(dtype)


class Fp8Linear(nn.Module):
    """A frozen Linear of 8 bits a weight: `weight` float8_e4m3 (d_out, d_in), `scale` fp32 (d_out, 1), `bias` or None.

    Filled by flux_model.load_flux, or from a Linear by `Fp8Linear.of`.
    """
    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device=None):
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        frozen = lambda *shape, dtype: nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        self.weight, self.scale = frozen(out_features, in_features, dtype=E4M3), frozen(out_features, 1, dtype=torch.float32)
        self.bias = frozen(out_features, dtype=dtype) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear) -> "Fp8Linear":
        out = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype, linear.weight.device)
        out.weight.data, out.scale.data = quantize_rows(linear.weight.detach())
        if linear.bias is not None:
            out.bias.data = linear.bias.detach()
        return out

    def forward(self, x: Tensor) -> Tensor:
        return Fp8Product.apply(x.flatten(0, -2), self.weight, self.scale, self.bias).unflatten(0, x.shape[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Blocks that live on the CPU


class Offload:
    """Weights of the blocks in pinned CPU memory; of two places on the device one holds the block that runs, the other
    the next, copied meanwhile on a stream of its own.

    `run(i, *inputs)` runs block i, in any order; expected is 0, 1, .. n - 1 and, when training with every block recomputed,
    back to 0. Only what is frozen moves: adapters stay on the device.
    """
    def __init__(self, blocks: list[nn.Module], device: torch.device):
        self.blocks, self.device, self.cuda = blocks, torch.device(device), torch.device(device).type == "cuda"
        self.tensors = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        self.homes = []
        for tensors in self.tensors:                                # one flat piece for each block: one copy moves it
            home = torch.empty(sum(padded(t.nbytes) for t in tensors), dtype=torch.uint8, pin_memory=self.cuda)
            self.place(tensors, home, fill=True)
            self.homes.append(home)
        self.slots = [torch.empty(max(map(len, self.homes)), dtype=torch.uint8, device=device) for _ in range(2)]
        self.held, self.last = [None, None], None                   # which block a slot holds; which one ran last
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

    def run(self, index: int, *inputs):
        if index not in self.held:
            self.fetch(index, 0 if self.last is None else 1 - self.held.index(self.last))
        slot, last = self.held.index(index), len(self.blocks) - 1
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])
        self.place(self.tensors[index], self.slots[slot])
        back = self.last is not None and index <= self.last and torch.is_grad_enabled() and not (index == 0 and self.last == last)
        self.last = index
        # forwards the next one comes, and after the last of them the first, or, in training, the last once more
        after = index - 1 if back else index + 1 if index < last else last if torch.is_grad_enabled() else 0
        if after >= 0 and after not in self.held:
            self.fetch(after, 1 - slot)
        return self.blocks[index](*inputs)


def padded(size: int) -> int:
    """Bytes up to a multiple of 256, where every tensor of a flat piece of memory begins."""
    return -(-size // 256) * 256


# ---------------------------------------------------------------------------------------------------------------------
# Memory of training


def saved_bytes(function) -> int:
    """Bytes that autograd keeps of a call for its backward pass: every storage once, the parameters not counted."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    del out
    return sum(kept.values())


def memory_left(device) -> float:
    """Bytes that can still be had on a device: what its driver or system has left, and what torch holds unused."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return math.inf                                                                      # not Linux: no way to know


def weight_bytes(flux: nn.Module, dtype: torch.dtype, fp8: bool, offload: bool) -> int:
    """Bytes of a transformer's weights on its device; `flux` may be on meta."""
    size = lambda modules: sum(p.numel() * (1 if fp8 and p.dim() == 2 else dtype.itemsize) for m in modules for p in m.parameters())
    around = sum(p.numel() for p in flux.parameters()) - sum(p.numel() for block in flux.blocks for p in block.parameters())
    return around * dtype.itemsize + (2 * max(size([block]) for block in flux.blocks) if offload else size(flux.blocks))


def check_memory(flux: nn.Module, device, dtype: torch.dtype, fp8: bool, offload: bool) -> str:
    """One line on what the weights take of a device's memory; ValueError where they will not fit, with the switch under which
    they would. `flux` may be on meta."""
    free, gib = memory_left(device) / GIB, lambda fp8, offload: weight_bytes(flux, dtype, fp8, offload) / GIB
    takes = f"the transformer takes {gib(fp8, offload):.1f} GiB of which {free:.1f} are free"
    if gib(fp8, offload) < free or torch.device(device).type == "cpu":
        return takes
    for words, on in (("--fp8", (True, offload)), ("--offload", (fp8, True)), ("--fp8 --offload", (True, True))):
        if gib(*on) < free:
            raise ValueError(f"{takes}; with {words} it takes {gib(*on):.1f}")
    raise ValueError(f"{takes}: no switch makes it fit")


def blocks_to_recompute(per_block: list[float], free: float) -> int:
    """The fewest blocks, counted from the first, that must run twice so that the rest's activations fit into `free` bytes.

    per_block: what autograd keeps of each block. A recomputed one keeps its inputs, about a fifteenth, and while its
    backward pass runs all of itself, so that there must be room for twice the largest. ValueError where even running all
    of them twice is not enough.
    """
    kept, workspace = sum(per_block), 2 * max(per_block)
    for count in range(len(per_block) + 1):
        if kept + workspace <= free:
            return count
        if count < len(per_block):
            kept -= per_block[count] * 14 / 15
    raise ValueError(f"a training step needs {(kept + workspace) / GIB:.1f} GiB beside the weights, and {free / GIB:.1f} GiB are "
                     "free: try --fp8, --offload, or a smaller --resolution or --batch-size")


# ---------------------------------------------------------------------------------------------------------------------
# Attention and compilation

KERNELS = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


def seconds_of_attention(kernel: SDPBackend, shape: tuple, device: torch.device, dtype: torch.dtype, backward: bool) -> float:
    """Seconds of a call of one kernel, after warming up; infinite where the card or torch does not have it."""
    q, k, v = torch.randn(3, *shape, device=device, dtype=dtype, requires_grad=backward).unbind()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        with sdpa_kernel(kernel):
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


def choose_attention(shape: tuple, device: torch.device, dtype: torch.dtype, backward: bool):
    """On CUDA: times every kernel there is for (B, H, L, D) and leaves the fastest one to scaled_dot_product_attention.
    -> its name, or None where nothing was chosen."""
    if torch.device(device).type != "cuda":
        return None
    seconds = {kernel: seconds_of_attention(kernel, shape, device, dtype, backward) for kernel in KERNELS}
    fastest = min(seconds, key=seconds.get)
    if seconds[fastest] == math.inf:
        return None
    # cuDNN's and flash go before the memory-efficient one, which must stay: no other takes the autoencoder's wide head
    torch.backends.cuda.enable_cudnn_sdp(fastest == SDPBackend.CUDNN_ATTENTION)
    torch.backends.cuda.enable_flash_sdp(fastest == SDPBackend.FLASH_ATTENTION)
    return fastest.name


def compile_blocks(flux: nn.Module) -> None:
    """Compiles the two classes of blocks, and nothing around them: two pieces of code for 57 blocks, and another
    number of tokens is no reason to compile again."""
    for block in flux.blocks:
        block.compile(dynamic=True)
    flux.compiled = True


def seconds_compiling() -> float:
    """Time that this process has spent compiling so far, by dynamo's own count, the backward passes included."""
    from torch._dynamo.utils import calculate_time_spent
    return calculate_time_spent()["total_wall_time"]
