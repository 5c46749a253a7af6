"""Meta-LoRA: a LoRA whose down-projection is shared by all people and learned beforehand.

For target t (a Linear, or the q, k, v or mlp rows of a fused one) and person i

    y = W x + U_i M_i A x      A: LoMD (r1 x d_in, shared)   M_i: LoM (r2 x r1)   U_i: LoU (d_out x r2)

Stage 1 learns A with throw-away M and U of many people, stage 2 M and U of one. M A is a down-projection, so
the result is a LoRA of rank r2. Without M it is plain LoRA. Source: "Meta-LoRA" (Topal et al. 2025), eq. 1.

How it is computed is ours: C = M A, formed where it is small, rides in the GEMM of the frozen W, which lies
in S with spare columns or rows. One of the two ways is the other transposed, and so is the gradient of x:

    y = [x | m] [W | U]^T,  m = x C^T            where the input is the narrower side
    [y0 | m] = x [W ; C]^T,  y = y0 + m U^T      where the output is
"""
import math
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from support.devices import to_device
from support.names import Target, find_targets


def product(x: Tensor, S: Tensor, P: Tensor, mask: Tensor | None, bias: Tensor | None = None):
    """x (.., d_in) -> y = x W^T + m U^T + bias (.., d_out) and m = mask * (x C^T) (.., R), in one GEMM with
    S = [W | U | 0] or [W ; C ; 0]. P is the half of the update that S lacks: C (R, d_in), or U (d_out, R)."""
    if (spare := S.shape[1] - x.shape[-1]) > 0:                                           # [x | m] [W | U]^T
        m = F.linear(x, P) if mask is None else F.linear(x, P) * mask
        return F.linear(torch.cat((x, m, S[-1, -1].expand(*x.shape[:-1], spare - len(P))), -1), S, bias), m
    y, m, _ = F.linear(x, S, bias).split((*P.shape, len(S) - sum(P.shape)), dim=-1)   # [y0 | m] = x [W ; C]^T
    m = m.contiguous() if mask is None else m * mask
    return torch.addmm(y.flatten(0, -2), m.flatten(0, -2), P.T).unflatten(0, x.shape[:-1]), m


class Adapted(torch.autograd.Function):
    """`product` with gradients of x, C and U, which comes in parts: some of its rows and columns each."""
    @staticmethod
    def forward(ctx, x, S, bias, mask, parts, C, *U):
        y, m = product(x, S, P := C if S.shape[1] > x.shape[-1] else U[0], mask, bias)
        ctx.save_for_backward(x, S, P, mask, m)          # autograd checks that S has not changed meanwhile
        ctx.parts = parts
        return y

    @staticmethod
    def backward(ctx, dy):
        x, S, P, mask, m = ctx.saved_tensors
        dx, dm = product(dy, S.T, P.T, mask)
        x, m, dy, dm = (each.flatten(0, -2) for each in (x, m, dy, dm))
        return dx, *[None] * 4, dm.T @ x, *(dy[:, rows].T @ m[:, columns] for rows, columns in ctx.parts)


class AdaptedLinear(nn.Module):
    """A frozen Linear and its update: C (R, d_in), and U in parts, (rows, columns) slices of one target each.
    The weight moves into S, unless it must stay as it is (`widen` False: 8 bits, offloaded)."""
    def __init__(self, base: nn.Module, parts: list[tuple[slice, slice]]):
        super().__init__()
        self.base, self.weight, self.parts, self.columns = base, base.weight, parts, parts[-1][1].stop
        self.S, self.C, self.wide_input = None, None, base.in_features < base.out_features
        self.dtype = getattr(base, "dtype", base.weight.dtype)
        if getattr(base, "widen", True):
            spare = -(-self.columns // 8) * 8                               # multiples of 8 suit tensor cores
            pad = (0, spare, 0, 0) if self.wide_input else (0, 0, 0, spare)
            self.S = nn.Parameter(F.pad(base.weight.detach(), pad), requires_grad=False)
            self.bias = None if base.bias is None else F.pad(base.bias.detach(), (0, pad[-1]))
            base.weight.data = self.S[:base.out_features, :base.in_features]

    def forward(self, x: Tensor) -> Tensor:
        if self.C is None:
            return self.base(x)
        mask = self.mask if self.mask is None or x.dim() == 2 else self.mask[:, None]
        if self.S is not None and x.dim() == 3:
            return Adapted.apply(x, self.S, self.bias, mask, self.parts, self.C, *self.U)
        y, m = self.base(x), F.linear(x, self.C) if mask is None else F.linear(x, self.C) * mask
        U = self.U[0]
        if len(U) < y.shape[-1]:                         # parts of a fused layer: block by block
            U = y.new_zeros(y.shape[-1], self.columns)
            for part, own in zip(self.parts, self.U):
                U[part] = own
        return torch.addmm(y.flatten(0, -2), m.flatten(0, -2), U.T).unflatten(0, x.shape[:-1])


def adapt(flux: nn.Module, targets: list[Target], columns: list[int]) -> list[AdaptedLinear]:
    """Puts an AdaptedLinear in the place of every Linear that holds a target, with so many columns for each;
    every other one is again the Linear that it was."""
    for name, layer in list(flux.named_modules()):
        if isinstance(layer, AdaptedLinear):
            layer.base.weight.data = layer.base.weight.contiguous()
            flux.set_submodule(name, layer.base)
    parts = {}
    for t, count in zip(targets, columns):
        own = parts.setdefault(t.module, [])
        first = own[-1][1].stop if own else 0
        own.append((slice(t.start, t.start + t.rows), slice(first, first + count)))
    for name, own in parts.items():
        flux.set_submodule(name, AdaptedLinear(flux.get_submodule(name), own))
    return [flux.get_submodule(name) for name in parts]


@torch.no_grad()
def update(layers: list[AdaptedLinear], Cs: list[Tensor], Us: list[Tensor], mask: Tensor | None = None):
    """Gives each layer its C and parts of U; one call copies them into the spare places of all weights."""
    Us, places, halves = iter(Us), [], []
    for layer, layer.C in zip(layers, Cs):
        layer.U = [next(Us) for _ in layer.parts]
        layer.mask = mask if mask is None else mask[:, :layer.columns]
        if layer.S is not None and layer.wide_input:
            places += [layer.S[:, layer.base.in_features:][part] for part in layer.parts]
        elif layer.S is not None:
            places += [layer.S[layer.base.out_features:][:layer.columns]]
        halves += [] if layer.S is None else layer.U if layer.wide_input else [layer.C]
    if places:
        torch._foreach_copy_(places, halves)


@torch.no_grad()
def apply_loras(flux: nn.Module, loras: list[tuple[dict[str, tuple[Tensor, Tensor]], float]]) -> None:
    """Plain LoRAs {diffusers path: (A (r, d_in), B (d_out, r))}, each at a strength, unmerged, in place of
    all before: an empty list removes them. ValueError, before anything changes, where one does not fit."""
    targets, pairs = {target.path: target for target in find_targets(flux, outside=True)}, {}
    for lora, strength in loras:
        for path, (A, B) in lora.items():
            if path not in targets or (len(B), A.shape[1]) != targets[path][3:]:
                raise ValueError(f"the LoRA adapts a {path} of {len(B)} x {A.shape[1]}: not in this model")
            B = B.roll(len(B) // 2, 0) if path == "norm_out.linear" else B  # diffusers has scale before shift
            pairs.setdefault(path, []).append((A, strength * B.float()))
    found, like = [target for path, target in targets.items() if path in pairs], flux.img_in.weight
    As, Bs = ([torch.cat([pair[i] for pair in pairs[t.path]], dim=i).to(like) for t in found] for i in (0, 1))
    layers, As_left = adapt(flux, found, [len(A) for A in As]), iter(As)
    update(layers, [torch.cat([next(As_left) for _ in layer.parts]) for layer in layers], Bs)


class IdentityBank:
    """One flat fp32 row of weights per identity (N, P), with AdamW moments and a step count of its own."""
    PARTS = "weight", "exp_avg", "exp_avg_sq", "steps"

    def __init__(self, weight: Tensor, exp_avg: Tensor | None = None, exp_avg_sq: Tensor | None = None,
                 steps: Tensor | None = None):
        self.weight = weight
        self.exp_avg = exp_avg
        self.exp_avg_sq = exp_avg_sq
        # on the CPU: to read a count never waits for the card
        self.steps = torch.zeros(len(weight), dtype=torch.long) if steps is None else steps.cpu()

    def make_moments(self) -> None:
        """AdamW's moments, where there are none yet: a LoMD that does not learn never gets any."""
        if self.exp_avg is None:
            self.exp_avg = torch.zeros_like(self.weight)
            self.exp_avg_sq = torch.zeros_like(self.weight)

    @torch.no_grad()
    def step(self, ids: Tensor, grad: Tensor, lr: float, eps: float = 1e-6, weight_decay: float = 0.01):
        """AdamW on the rows `ids` (n,) with grad (n, P). eps is that of the paper's trainer, ai-toolkit."""
        self.make_moments()
        parts = [[part[row] for row in ids.tolist()] for part in (self.weight, self.exp_avg, self.exp_avg_sq)]
        counts = list(to_device(self.steps[ids].float(), grad.device).unbind())      # the kernel counts on
        adamw(parts[0], list(grad.unbind()), *parts[1:], [], counts, fused=True, amsgrad=False, beta1=0.9,
              beta2=0.999, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False)
        self.steps[ids] += 1


def views(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """(.., P) -> its parts one after the other, (.., *shape) each."""
    return [part.unflatten(-1, s) for part, s in zip(flat.split([*map(math.prod, shapes)], dim=-1), shapes)]


def initial_M(rank: int, r1: int, generator: torch.Generator) -> Tensor:
    """M's initialisation (rank, r1), as the paper's trainer draws the A of a plain LoRA. U starts at zero."""
    return nn.init.kaiming_uniform_(torch.empty(rank, r1), a=5 ** 0.5, generator=generator)


def random_lomd(targets: list[Target], r1: int, seed: int = 0) -> dict[str, Tensor]:
    """An untrained LoMD {path: (r1, d_in)}: where stage 1 starts, and the control of its experiments."""
    generator = torch.Generator().manual_seed(seed)
    return {target.path: initial_M(r1, target.d_in, generator) for target in targets}


class MetaLoRA:
    """The adapters of N identities on one frozen Flux: puts itself in, trains in fp32, collapses.

    A row of the bank holds M (rank x r1) and U (d_out x rank) of each target over `lomd` {path: (r1, d_in)},
    which learns too while `train_lomd`; without one A (rank x d_in) and U. U, so the update, starts at zero.
    A batch holds up to `slots` identities. `bank` may be exchanged for another between two steps."""
    def __init__(self, flux: nn.Module, rank: int, lomd: dict[str, Tensor] | None = None,
                 num_identities: int = 1, seed: int = 0, slots: int = 1):
        self.flux, self.rank, self.slots, self.train_lomd = flux, rank, slots, False
        self.found, self.device = find_targets(flux), next(flux.parameters()).device
        self.targets = sorted(self.found, key=lambda t: t.d_in)     # C of one width is one batched product
        self.layers = adapt(flux, self.targets, [slots * rank] * len(self.targets))
        self.widths = Counter(t.d_in for t in self.targets)
        self.r1 = len(next(iter(lomd.values()))) if lomd else None
        # a row of the bank: M (or A) of all targets, width by width, then U of all
        self.shapes = [*((count, rank, self.r1 or d_in) for d_in, count in self.widths.items()),
                       (sum(t.rows for t in self.targets), rank)]
        self.size = sum(map(math.prod, self.shapes))
        if lomd:                                         # a bank of one row, trained by the same code
            flat = torch.cat([lomd[t.path].flatten().float() for t in self.targets])
            self.shared = IdentityBank(flat[None].to(self.device))
        draws = torch.Generator().manual_seed(seed)
        rows = [self.new_row(draws) for _ in range(num_identities)] or [torch.zeros(0, self.size)]
        self.bank = IdentityBank(torch.stack(rows).to(self.device))

    def new_row(self, generator: torch.Generator) -> Tensor:
        """What an identity starts from (P,): M (or A) drawn, U zero."""
        drawn = {t.path: initial_M(self.rank, self.r1 or t.d_in, generator) for t in self.found}
        downs = torch.cat([drawn[t.path].flatten() for t in self.targets])
        return F.pad(downs, (0, self.size - len(downs)))

    def assign(self, ids: Tensor) -> None:
        """ids (B,): whose image each of the coming batch is. Call before every forward pass."""
        self.present, slot, self.counts = torch.unique(ids.cpu(), return_inverse=True, return_counts=True)
        n, dtype, lomd, Cs = len(self.present), self.layers[0].dtype, [None] * len(self.widths), []
        if n > self.slots:
            raise ValueError(f"the batch holds {n} identities, the adapter has room for {self.slots}")
        self.rows = torch.stack([self.bank.weight[i] for i in self.present.tolist()]).requires_grad_()
        *downs, ups = views(F.pad(self.rows, (0, 0, 0, self.slots - n)), self.shapes)
        if self.r1:
            self.flat = self.shared.weight[0].detach().requires_grad_(self.train_lomd)
            lomd = views(self.flat, [(count, self.r1, d_in) for d_in, count in self.widths.items()])
        for d_in, A, down in zip(self.widths, lomd, downs):
            C = down.transpose(0, 1).flatten(1, 2)                         # (targets, slots rank, r1 or d_in)
            C = (C if A is None else C @ A).flatten(0, 1).to(dtype)               # (targets slots rank, d_in)
            Cs += C.split([layer.columns for layer in self.layers if layer.base.in_features == d_in])
        Us = ups.transpose(0, 1).flatten(1).to(dtype).split([t.rows for t in self.targets])
        # every image meets its own person's columns (B, slots rank), once for each part of a fused layer
        mask = F.one_hot(slot, self.slots).repeat_interleave(self.rank, dim=1).repeat(1, 4).to(dtype)
        update(self.layers, Cs, Us, to_device(mask, self.device) if n > 1 else None)

    def step(self, lr: float, clip: float = 1.0, average: Callable[[Tensor], Tensor] | None = None):
        """One AdamW step, after backward of the batch's *summed* losses -> gradient norms: rows (n,), LoMD's.

        An identity's gradient is the mean over its own images, LoMD's over the batch (or what `average` makes
        of the sum), each clipped to `clip` alone. FloatingPointError, unchanged, where one is not finite."""
        rows = self.rows.grad / to_device(self.counts[:, None], self.device)
        norms, lomd_norm = rows.norm(dim=1), rows.new_zeros(())
        if self.train_lomd:
            flat = average(self.flat.grad) if average else self.flat.grad / self.counts.sum().item()
            lomd_norm = flat.norm()
        if not (norms.isfinite().all() & lomd_norm.isfinite()):                # the one wait for the card
            raise FloatingPointError("a gradient is not finite")
        self.bank.step(self.present, rows * (clip / (norms + 1e-6)).clamp(max=1.0)[:, None], lr)
        if self.train_lomd:
            self.shared.step(torch.tensor([0]), flat[None] * (clip / (lomd_norm + 1e-6)).clamp(max=1.0), lr)
        return norms, lomd_norm

    @property
    def lomd(self) -> dict[str, Tensor] | None:
        """{path: (r1, d_in)}, views of what is trained."""
        parts = views(self.shared.weight[0], [(self.r1, t.d_in) for t in self.targets]) if self.r1 else []
        return {t.path: A for t, A in zip(self.targets, parts)} or None

    @torch.no_grad()
    def collapse(self, identity: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """The plain LoRA of an identity, {path: (M A (rank, d_in), U (d_out, rank))}, in fp32 on the CPU."""
        lomd, downs = self.lomd, [(self.rank, self.r1 or t.d_in) for t in self.targets]
        parts = views(self.bank.weight[identity], downs + [(t.rows, self.rank) for t in self.targets])
        return {t.path: ((M @ lomd[t.path] if lomd else M).cpu().clone(), U.cpu().clone())
                for t, M, U in zip(self.targets, parts, parts[len(downs):])}
