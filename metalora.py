"""Meta-LoRA: a LoRA whose down-projection is shared by all people and learned beforehand.

For target t (a Linear, or the q, k, v or mlp rows of a fused one) and person i

    y = W x + U_i M_i A x          A: LoMD (r1 x d_in, shared)   M_i: LoM (r2 x r1)   U_i: LoU (d_out x r2)

Stage 1 (meta_train.py) learns A with throw-away M and U of many people; stage 2 (personalize.py) freezes A and learns M
and U of one. M A is a plain down-projection, so the result collapses to an ordinary LoRA of rank r2. Plain LoRA is the
same thing without M and with an A per person.

Source: "Meta-LoRA" (Topal et al. 2025), equation 1. How it is computed here: the product C = M A is formed first, on the
weights' side, where it is small. Then the narrower side of the Linear is widened, and the wide one is left alone:

    y = [x | x C^T] [W | U]^T                        where the output is wider, as of q, k, v and the mlp's first Linear
    [y0 | m] = x [W ; C]^T,  y = y0 + m U^T          where the input is, and backwards  dx = [dy | dm] [W ; C]

Every adapted weight is stored with a few spare columns that hold U, or rows that hold C, so that the update costs one
slightly wider GEMM; of the first kind it is even added in its fp32 accumulator, before rounding to bf16. When a batch
holds several people, each has columns of its own, and x C^T is masked so that every image meets only its person's.
"""
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.adamw import adamw

from flux_model import diffusers_flux_names          # one table of names, for loading and for adapting
from speed import Fp8Linear, blocks_to_recompute, memory_left, saved_bytes

# ---------------------------------------------------------------------------------------------------------------------
# The adapted Linear


class WideInput(torch.autograd.Function):
    """y = [x | mask * (x C^T)] wide^T + bias. Gradients of x, C and the U blocks only: the base is frozen.

    x (B, ..., d_in), wide (d_out, d_in + S) = [W | U | 0], bias (d_out) or None, C (S, d_in), mask (B, .., S) or None,
    spans: for each block U_t (rows, columns) its (first row, first column) within the spare columns.
    """
    @staticmethod
    def forward(ctx, x, wide, bias, C, mask, spans, *blocks):
        m = x @ C.T                                                                                         # (B, .., S)
        m = m if mask is None else m * mask
        ctx.save_for_backward(x, C, mask, m)
        ctx.wide, ctx.version, ctx.spans, ctx.shapes = wide, wide._version, spans, [u.shape for u in blocks]
        return F.linear(torch.cat((x, m), dim=-1), wide, bias)

    @staticmethod
    def backward(ctx, dy):
        x, C, mask, m = ctx.saved_tensors
        same_weights(ctx.wide, ctx.version)
        d_in = x.shape[-1]
        dx = dC = None
        if ctx.needs_input_grad[0]:
            g = dy @ ctx.wide                                    # one GEMM gives both dy W and dy U     (B, .., d_in + S)
            dm = g[..., d_in:]
        else:
            dm = dy @ ctx.wide[:, d_in:]
        dm = dm if mask is None else dm * mask
        if ctx.needs_input_grad[0]:
            dx = g[..., :d_in] + dm @ C
        if ctx.needs_input_grad[3]:
            dC = dm.flatten(0, -2).T @ x.flatten(0, -2)
        dy, m = dy.flatten(0, -2), m.flatten(0, -2)
        dU = [dy[:, row:row + rows].T @ m[:, column:column + columns] if needed else None
              for (row, column), (rows, columns), needed in zip(ctx.spans, ctx.shapes, ctx.needs_input_grad[6:])]
        return dx, None, None, dC, None, None, *dU


class WideOutput(torch.autograd.Function):
    """[y0 | m] = x [W ; C]^T + [bias | 0],  y = y0 + (mask * m) U^T: the same, where the output is the narrower side.

    Backwards it is the gradient that is widened, dx = [dy | dm] [W ; C]: no pass over the wide input but the GEMMs'.
    x (B, ..., d_in), tall (d_out + S, d_in) = [W ; C], bias (d_out + S) or None, C (S, d_in), U (d_out, S), mask (B, .., S) or None.
    """
    @staticmethod
    def forward(ctx, x, tall, bias, C, U, mask):
        y, m = F.linear(x, tall, bias).split((len(U), len(C)), dim=-1)
        m = m.contiguous() if mask is None else m * mask
        ctx.save_for_backward(x, U, mask, m)
        ctx.tall, ctx.version = tall, tall._version
        return torch.addmm(y.flatten(0, -2), m.flatten(0, -2), U.T).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        x, U, mask, m = ctx.saved_tensors
        same_weights(ctx.tall, ctx.version)
        dm = dy @ U
        dm = dm if mask is None else dm * mask
        dx = torch.cat((dy, dm), dim=-1) @ ctx.tall if ctx.needs_input_grad[0] else None
        dC = dm.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[3] else None
        dU = dy.flatten(0, -2).T @ m.flatten(0, -2) if ctx.needs_input_grad[4] else None
        return dx, None, None, dC, dU, None


def same_weights(stored: Tensor, version: int):
    """Functions above keep a reference to a weight with its update, not a copy: it must be what it was."""
    if stored._version != version:
        raise RuntimeError("the adapter was given other weights between forward and backward")


def plain_update(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, M: Tensor, U: Tensor) -> Tensor:
    """The same by three more matmuls, for one target and one person: to read, and to test the fused path against."""
    return F.linear(x, weight, bias) + F.linear(F.linear(F.linear(x, A), M), U)


class AdaptedLinear(nn.Module):
    """A frozen Linear with room for an update of `columns` columns, in the base's dtype.

    The room is beside its weight, on the narrower side: spare columns for U where the input is narrower, spare rows for C
    where the output is; wide_input says otherwise, for bench.py. With beside=True there is none, and the update is added by GEMMs of its own, which suits a base of
    8 bits, one that lives on the CPU, and a compiler.
    """
    def __init__(self, linear: nn.Module, columns: int, beside: bool = False, wide_input: bool | None = None):
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.dtype = linear.dtype if isinstance(linear, Fp8Linear) else linear.weight.dtype
        self.wide_input = not beside and (self.in_features < self.out_features if wide_input is None else wide_input)
        side = self.in_features if self.wide_input else self.out_features
        self.spare = -(side + columns) % 8 + columns                                         # multiples of 8 suit tensor cores
        self.base = linear if beside else None
        if not beside:
            extra = (0, self.spare) if self.wide_input else (self.spare, 0)
            stored = linear.weight.new_zeros(self.out_features + extra[0], self.in_features + extra[1])
            stored[:self.out_features, :self.in_features] = linear.weight.detach()
            self.register_buffer("stored", stored)
            self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
            self.register_buffer("stored_bias", None if linear.bias is None else F.pad(linear.bias.detach(), (0, extra[0])))
        self.spans, self.blocks, self.C, self.U, self.mask = [], [], None, None, None

    @property
    def weight(self) -> Tensor:
        return self.base.weight if self.base else self.stored[:self.out_features, :self.in_features]

    def restored(self) -> nn.Module:
        """The Linear that it was."""
        if self.base:
            return self.base
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight.contiguous(), requires_grad=False), self.bias
        return linear

    def set_update(self, downs: list[Tensor], ups: list[Tensor], rows: list[int], mask: Tensor | None = None):
        """The update to add from now on: for each target C_t (R_t, d_in), U_t (rows_t, R_t) and its first row.

        mask (B, sum of R_t): which of the columns an image of the batch meets; None: all.
        """
        pad = self.spare - sum(len(down) for down in downs)
        self.C = F.pad(torch.cat(downs), (0, 0, 0, pad)).to(self.dtype)
        self.mask = None if mask is None else F.pad(mask, (0, pad)).to(self.dtype)
        if not self.wide_input:
            ups = [F.pad(up, (0, 0, row, self.out_features - row - len(up))) for row, up in zip(rows, ups)]
            self.U = F.pad(torch.cat(ups, dim=1), (0, pad)).to(self.dtype)
            if not self.base:
                with torch.no_grad():
                    self.stored[self.out_features:] = self.C
            return
        self.spans, self.blocks, column = [], ups, 0
        with torch.no_grad():
            self.stored[:, self.in_features:].zero_()
            for row, up in zip(rows, ups):
                start = self.in_features + column
                self.stored[row:row + len(up), start:start + up.shape[1]] = up
                self.spans.append((row, column))
                column += up.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.C is None:
            return self.base(x) if self.base else F.linear(x, self.weight, self.bias)
        mask = None if self.mask is None else self.mask.view(len(self.mask), *(1,) * (x.dim() - 2), -1)
        if self.wide_input:
            return WideInput.apply(x, self.stored, self.stored_bias, self.C, mask, self.spans, *self.blocks)
        if not self.base:
            return WideOutput.apply(x, self.stored, self.stored_bias, self.C, self.U, mask)
        m = x @ self.C.T
        m = m if mask is None else m * mask
        return torch.addmm(self.base(x).flatten(0, -2), m.flatten(0, -2), self.U.T).unflatten(0, x.shape[:-1])


class Target(NamedTuple):
    path: str             # diffusers module path
    module: str           # the Linear of Flux that holds it
    start: int            # first of its rows there
    rows: int             # d_out
    d_in: int


def find_targets(flux: nn.Module, outside: bool = False) -> list[Target]:
    """Every Linear of the blocks, fused ones split: 14 per double and 6 per single block; outside=True adds the rest."""
    targets = []
    for name, module in flux.named_modules():
        if name.endswith(".base"):                        # of an AdaptedLinear, which speaks for it
            continue
        if isinstance(module, (nn.Linear, Fp8Linear, AdaptedLinear)) and (outside or "_blocks." in name):
            paths, start = [p.removesuffix(".weight") for p in diffusers_flux_names(name + ".weight")], 0
            for i, path in enumerate(paths):
                rows = module.out_features - start if i == len(paths) - 1 else module.in_features
                targets.append(Target(path, name, start, rows, module.in_features))
                start += rows
    return targets


def by_module(targets: list[Target]) -> dict[str, list[Target]]:
    grouped = {}
    for target in targets:
        grouped.setdefault(target.module, []).append(target)
    return grouped


def inject(flux: nn.Module, name: str, columns: int, beside: bool = False) -> AdaptedLinear:
    """Replaces a Linear of `flux`, by name, by an AdaptedLinear; one layer's weight exists twice for a moment."""
    linear = flux.get_submodule(name)
    # a copy of an offloaded weight would not move along, and plain products are what a compiler understands
    beside = beside or isinstance(linear, Fp8Linear) or flux.compiled or flux.offload is not None
    adapted = AdaptedLinear(linear, columns, beside)
    flux.set_submodule(name, adapted)
    return adapted


def remove_loras(flux: nn.Module):
    """Every AdaptedLinear back to the Linear that it was."""
    for name, module in list(flux.named_modules()):
        if isinstance(module, AdaptedLinear):
            flux.set_submodule(name, module.restored())


def apply_loras(flux: nn.Module, loras: list[tuple[dict, float]]):
    """Adds plain LoRAs {diffusers path: (A (r, d_in), B (d_out, r))}, each at a strength, exactly and unmerged.

    Replaces what was applied before. ValueError names the first module that the model lacks or that does not fit, and
    then nothing has changed.
    """
    targets = {target.path: target for target in find_targets(flux, outside=True)}
    updates = {}
    for lora, strength in loras:
        for path, (A, B) in lora.items():
            target = targets.get(path)
            if target is None:
                raise ValueError(f"the LoRA adapts {path}, which this model does not have")
            if A.shape[1] != target.d_in or B.shape[0] != target.rows:
                raise ValueError(f"the LoRA's {path} is {B.shape[0]} x {A.shape[1]}, the model's {target.rows} x {target.d_in}")
            if path == "norm_out.linear":                          # diffusers keeps scale before shift
                B = B.roll(len(B) // 2, 0)
            updates.setdefault(target.module, []).append((A, strength * B.float(), target.start))
    remove_loras(flux)
    device = next(flux.parameters()).device
    for name, parts in updates.items():
        layer = inject(flux, name, sum(len(A) for A, _, _ in parts))
        downs, ups, rows = zip(*parts)
        layer.set_update([A.to(device, torch.float32) for A in downs], [B.to(device) for B in ups], rows)


# ---------------------------------------------------------------------------------------------------------------------
# The people


class IdentityBank:
    """One flat fp32 row of weights per identity, with AdamW moments and a step count of its own.

    A step touches only the rows it names: absent identities keep weights, moments and step count.
    """
    PARTS = "weight", "exp_avg", "exp_avg_sq", "steps"

    def __init__(self, weight: Tensor, exp_avg: Tensor | None = None, exp_avg_sq: Tensor | None = None,
                 steps: Tensor | None = None):
        self.weight = weight                                                                                     # (N, P)
        self.exp_avg = torch.zeros_like(weight) if exp_avg is None else exp_avg
        self.exp_avg_sq = torch.zeros_like(weight) if exp_avg_sq is None else exp_avg_sq
        self.steps = torch.zeros(len(weight), dtype=torch.long, device=weight.device) if steps is None else steps

    @torch.no_grad()
    def step(self, ids: Tensor, grad: Tensor, lr: float, betas=(0.9, 0.999), eps: float = 1e-8,
             weight_decay: float = 0.01):
        """AdamW (Loshchilov & Hutter 2019), by torch's fused kernel, on the rows `ids` (n,), with grad (n, P)."""
        rows = ids.tolist()
        part = lambda tensor: [tensor[row] for row in rows]
        counts = list(self.steps[ids].float().unbind())                             # the kernel counts on by itself
        adamw(part(self.weight), list(grad.unbind()), part(self.exp_avg), part(self.exp_avg_sq), [], counts, fused=True,
              amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps, maximize=False)
        self.steps[ids] += 1


class DiskBank:
    """Rows of any number of identities in one memory-mapped file: step count, weights and both moments of each, in turn.

    Only the rows that are asked for are read. The file starts sparse, and a row whose step count is 0 holds no weights
    yet. ValueError where the file has another size.
    """
    @staticmethod
    def bytes(count: int, size: int) -> int:
        return count * (8 + 12 * size)

    def __init__(self, path: Path, count: int, size: int):
        layout = np.dtype([("steps", "<i8"), *((part, "<f4", (size,)) for part in IdentityBank.PARTS[:3])])
        if not path.exists():
            part = path.with_name(path.name + ".part")
            with open(part, "wb") as file:
                file.truncate(self.bytes(count, size))
            os.replace(part, path)
        if path.stat().st_size != self.bytes(count, size):
            raise ValueError(f"{path} is {path.stat().st_size} bytes, not {count} rows of {layout.itemsize}")
        self.rows = np.memmap(path, layout, "r+", shape=(count,))

    def steps(self) -> Tensor:
        """Step counts of all identities (N,)."""
        return torch.from_numpy(np.array(self.rows["steps"]))

    def read(self, ids: list[int], device) -> IdentityBank:
        """Copies of these rows on `device`."""
        return IdentityBank(*(torch.from_numpy(self.rows[part][ids]).to(device) for part in IdentityBank.PARTS))

    def write(self, ids: list[int], bank: IdentityBank):
        """Puts the rows back, and waits for the disk."""
        for part in IdentityBank.PARTS:
            self.rows[part][ids] = getattr(bank, part).cpu().numpy()
        self.rows.flush()


def kaiming(shape: tuple, generator: torch.Generator) -> Tensor:
    """torch's kaiming_uniform with a = sqrt(5), as LoRA starts its A: uniform within 1 / sqrt(fan-in)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[-1])


def random_lomd(targets: list[Target], r1: int, seed: int = 0) -> dict[str, Tensor]:
    """An untrained LoMD {path: (r1, d_in)}: where stage 1 starts, and the control of its experiments."""
    generator = torch.Generator().manual_seed(seed)
    return {target.path: kaiming((r1, target.d_in), generator) for target in targets}


class MetaLoRA:
    """The adapters of N identities on one frozen Flux: injects itself, trains, collapses, removes itself.

    method "meta-lora": a row holds M (rank x r1) and U (d_out x rank) of every target, over the shared `lomd`, which
    learns too while `train_lomd` is true (stage 1, after the warm-up).
    method "lora": a row holds A (rank x d_in) and U; no lomd. U starts at zero, so the first update is exactly zero.
    Trainables are fp32 whatever the base is. `slots`: how many identities one batch may hold at most.
    `bank` may be exchanged for another between two steps: a bucket's, in stage 1.
    """
    def __init__(self, flux: nn.Module, rank: int, method: str = "meta-lora", lomd: dict[str, Tensor] | None = None,
                 num_identities: int = 1, seed: int = 0, slots: int = 1, beside: bool = False):
        if (method == "meta-lora") != (lomd is not None) or method not in ("meta-lora", "lora"):
            raise ValueError("method must be 'meta-lora', with a LoMD, or 'lora', without one")
        self.flux, self.rank, self.method, self.slots, self.train_lomd = flux, rank, method, slots, False
        self.targets = find_targets(flux)
        self.device = next(flux.parameters()).device
        self.lomd = None
        if lomd is not None:                            # a bank of one row, so that it is trained by the same code
            check_lomd(lomd, self.targets)
            flat = torch.cat([lomd[t.path].flatten().float() for t in self.targets])
            self.shared = IdentityBank(flat[None].to(self.device))
            self.lomd_shapes = [tuple(lomd[t.path].shape) for t in self.targets]
            self.lomd = self.split_lomd(self.shared.weight[0])
        self.shapes = []                                # of M (or A) and U, target after target, as a row holds them
        for t in self.targets:
            self.shapes += [(rank, t.d_in if lomd is None else len(lomd[t.path])), (t.rows, rank)]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        generator = torch.Generator().manual_seed(seed)
        rows = [self.new_row(generator) for _ in range(num_identities)] or [torch.zeros(0, sum(self.sizes))]
        self.bank = IdentityBank(torch.stack(rows).to(self.device))
        remove_loras(flux)                                                # such as lie outside the blocks would stay
        self.layers = [(inject(flux, name, len(targets) * slots * rank, beside), targets)
                       for name, targets in by_module(self.targets).items()]

    def split_lomd(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([math.prod(shape) for shape in self.lomd_shapes])
        return {t.path: part.view(shape) for t, part, shape in zip(self.targets, parts, self.lomd_shapes)}

    def new_row(self, generator: torch.Generator) -> Tensor:
        """What an identity starts from (P,): M (or A) drawn, U zero."""
        return torch.cat([kaiming(shape, generator).flatten() if i % 2 == 0 else torch.zeros(math.prod(shape))
                          for i, shape in enumerate(self.shapes)])

    def assign(self, ids: Tensor):
        """ids (B,): whose image each of the coming batch is. Call before every forward pass."""
        present, slot, counts = torch.unique(ids.to(self.device), return_inverse=True, return_counts=True)
        self.present, self.counts, n = present, counts, len(present)
        if n > self.slots:
            raise ValueError(f"the batch holds {n} identities, the adapter has room for {self.slots}")
        self.rows = self.bank.weight[present].requires_grad_()                                                    # (n, P)
        parts = iter(part.view(n, *shape) for part, shape in zip(self.rows.split(self.sizes, dim=1), self.shapes))
        lomd, mask = self.lomd, None
        if self.train_lomd:
            self.flat = self.shared.weight[0].detach().requires_grad_()
            lomd = self.split_lomd(self.flat)
        if n > 1:
            mask = F.one_hot(slot, n).repeat_interleave(self.rank, dim=1)                                   # (B, n rank)
        for layer, targets in self.layers:
            downs, ups = [], []
            for target in targets:
                down, up = next(parts).flatten(0, 1), next(parts)            # (n rank, r1 or d_in), (n, rows, rank)
                downs.append(down if lomd is None else down @ lomd[target.path])                         # (n rank, d_in)
                ups.append(up.transpose(0, 1).flatten(1))                                                # (rows, n rank)
            layer.set_update(downs, ups, [t.start for t in targets], None if mask is None else mask.repeat(1, len(targets)))

    def step(self, lr: float, clip: float = 1.0, average=None) -> tuple[Tensor, float]:
        """One AdamW step, after backward of the batch's *summed* losses. Returns gradient norms: rows (n,), LoMD's.

        An identity's gradient is the mean over its own images, clipped to norm `clip` by itself, so that it trains the
        same alone and among others. LoMD's is the mean over the batch, or what `average` makes of the sum (P,), and is
        clipped by itself. FloatingPointError, before anything has changed, where a gradient is not finite.
        """
        rows = self.rows.grad / self.counts[:, None]
        norms, lomd_norm, flat = rows.norm(dim=1), 0.0, None
        if self.train_lomd:
            flat = average(self.flat.grad) if average else self.flat.grad / self.counts.sum()
            lomd_norm = flat.norm().item()
        if not (norms.isfinite().all() and math.isfinite(lomd_norm)):
            raise FloatingPointError("a gradient is not finite")
        self.bank.step(self.present, rows * (clip / (norms + 1e-6)).clamp(max=1.0)[:, None], lr)
        if flat is not None:
            self.shared.step(torch.zeros(1, dtype=torch.long, device=self.device),
                             flat[None] * min(1.0, clip / (lomd_norm + 1e-6)), lr)
        return norms, lomd_norm

    @torch.no_grad()
    def collapse(self, identity: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """The plain LoRA of an identity, {diffusers path: (M A (rank, d_in), U (d_out, rank))}, fp32 on the CPU."""
        parts = [part.view(shape) for part, shape in zip(self.bank.weight[identity].split(self.sizes), self.shapes)]
        lora = {}
        for target, down, up in zip(self.targets, parts[::2], parts[1::2]):
            down = down if self.lomd is None else down @ self.lomd[target.path]
            lora[target.path] = (down.cpu().clone(), up.cpu().clone())
        return lora

    def remove(self):
        remove_loras(self.flux)

    def blocks_to_recompute(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        """How many blocks must run twice for a batch of these sizes to fit into the memory that is left; errors as there.

        Counted, not guessed: what autograd keeps of one more token in two blocks of the same classes and proportions, but of
        few heads, which run on the CPU with an adapter of the same rank in place. It grows with tokens and width.
        """
        if self.flux.offload:
            return len(self.flux.blocks)
        config, (layer, _) = self.flux.config, self.layers[0]
        heads, size = min(4, config.num_heads), config.hidden_size // config.num_heads
        small = type(self.flux)(replace(config, hidden_size=heads * size, num_heads=heads, depth=1, depth_single_blocks=1))
        small.requires_grad_(False).to(layer.dtype)
        adapter = MetaLoRA(small, self.rank, "lora", slots=self.slots, beside=layer.base is not None)
        adapter.assign(torch.zeros(1, dtype=torch.long))

        def kept(block: nn.Module, streams: int, tokens: int) -> int:
            x = [torch.randn(1, tokens // streams, heads * size, dtype=layer.dtype, requires_grad=True) for _ in range(streams)]
            vec, rope = torch.randn(1, heads * size, dtype=layer.dtype), (torch.randn(1, 1, tokens, size // 2),) * 2
            return saved_bytes(lambda: block(*x, vec, rope))
        per_block = []
        for blocks, streams, count in ((small.double_blocks, 2, config.depth), (small.single_blocks, 1, config.depth_single_blocks)):
            a_token = (kept(blocks[0], streams, 192) - kept(blocks[0], streams, 64)) / 128 * config.num_heads / heads
            per_block += [a_token * batch * (image_tokens + text_tokens)] * count
        return blocks_to_recompute(per_block, memory_left(self.device))


# ---------------------------------------------------------------------------------------------------------------------
# LoMD files


def check_lomd(lomd: dict[str, Tensor], targets: list[Target]):
    """ValueError, naming the first difference, where a LoMD is of another model."""
    d_in = {target.path: target.d_in for target in targets}
    if set(lomd) != set(d_in):
        odd = sorted(set(lomd) ^ set(d_in))[0]
        raise ValueError(f"this LoMD is of another model: {odd} is {'not in the model' if odd in lomd else 'missing from it'}")
    for path, A in lomd.items():
        if A.dim() != 2 or len(A) == 0 or A.shape[1] != d_in[path]:
            raise ValueError(f"this LoMD is of another model: {path} is {list(A.shape)} instead of [r1, {d_in[path]}]")


def save_lomd(path: str | Path, lomd: dict[str, Tensor], metadata: dict[str, str]):
    """Writes {diffusers path: (r1, d_in)} as <path>.lomd, in fp32; the file is whole or absent."""
    r1 = len(next(iter(lomd.values())))
    save_file({f"{k}.lomd": v.detach().float().cpu().contiguous() for k, v in lomd.items()}, f"{path}.part",
              {"format": "pt", "r1": str(r1), "targets": str(len(lomd))} | metadata)
    os.replace(f"{path}.part", path)


def load_lomd(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """LoMD and metadata of a file that save_lomd wrote. ValueError, in one line, for any other."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from None
    odd = [key for key in tensors if not key.endswith(".lomd")]
    if odd or not tensors:
        raise ValueError(f"{path} is no LoMD file: {f'it holds {odd[0]}' if odd else 'it is empty'}")
    unsound = [key for key, value in tensors.items() if not value.isfinite().all()]
    if unsound:
        raise ValueError(f"{path}: {unsound[0]} is not finite")
    return {key.removesuffix(".lomd"): value for key, value in tensors.items()}, metadata
