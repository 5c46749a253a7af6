"""Meta-LoRA: a LoRA whose down-projection is shared by all people and learned beforehand.

Equation 1 of the paper, for one Linear W and person i:

    y = W x + U_i M_i A x     A    LoMD, L_meta-down  r1 x d_in   shared, frozen in stage 2
                              M_i  LoM,  L_mid        r2 x r1     one person's
                              U_i  LoU,  L_up         d_out x r2  one person's, zero at the start

A fused Linear holds several targets, each with its own matrices: q, k, v, and in single blocks the
MLP. M A is itself a down-projection (r2 x d_in), so the result collapses to a plain LoRA of rank
r2. Without M, this file is plain LoRA.

One row of the identity bank holds all numbers of one person. Targets of the same d_in lie together:

    [ M of the narrowest targets | M of the next width | M of the widest | U of all targets ]

How y is computed is ours. C = M A is formed first, since it is small. C and U then ride in the
matrix product of the frozen weight, which moves into a slightly larger matrix S. With
m = mask * C x, where the mask keeps the people of a batch apart:

    d_in < d_out:   S = [ W | U | 0 ]      y = S [ x ; m ; 0 ]         extra input columns
    d_in >= d_out:  S = [ W ; C ; 0 ]      [ y0 ; m ; _ ] = S x        extra output rows
                                           y = y0 + U m

The transpose of either kind is a matrix of the other kind, so the gradient of x needs no code of
its own.

Source: "Meta-LoRA" (Topal et al. 2025), equation 1 and Algorithms 1 and 2.
"""
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.optim.adamw import adamw

from support.devices import to_device
from support.names import Target, find_targets

Pair = tuple[Tensor, Tensor]
LoRA = dict[str, Pair]                                               # {diffusers path: (A, B)}


# --------------------------------------------------------------------------------------------------
# One adapted Linear


def plain_meta_lora(x: Tensor, W: Tensor, A: Tensor, M: Tensor, U: Tensor,
                    mask: Tensor | None = None) -> Tensor:
    """Equation 1 with its three matrices one after the other: the reference for everything below.

    x (.., d_in), W (d_out, d_in), A (r1, d_in), M (R, r1), U (d_out, R), mask (.., R) ->
    y (.., d_out)."""
    m = F.linear(F.linear(x, A), M)
    if mask is not None:
        m = m * mask
    return F.linear(x, W) + F.linear(m, U)


def widen_input(x: Tensor, S: Tensor, C: Tensor, mask: Tensor | None,
                bias: Tensor | None = None) -> Pair:
    """x (.., d_in), S = [W | U | 0], C (R, d_in) -> y (.., d_out) and m (.., R)."""
    m = F.linear(x, C)
    if mask is not None:
        m = m * mask
    padding = S.shape[1] - x.shape[-1] - len(C)
    # S ends in zeros wherever there is padding; expand copies nothing
    zeros = S[-1, -1].expand(*x.shape[:-1], padding)
    wide = torch.cat((x, m, zeros), dim=-1)
    return F.linear(wide, S, bias), m


def widen_output(x: Tensor, S: Tensor, U: Tensor, mask: Tensor | None,
                 bias: Tensor | None = None) -> Pair:
    """x (.., d_in), S = [W ; C ; 0], U (d_out, R) -> y (.., d_out) and m (.., R)."""
    d_out, R = U.shape
    padding = len(S) - d_out - R
    wide = F.linear(x, S, bias)
    y0, m, _ = wide.split((d_out, R, padding), dim=-1)
    m = m.contiguous() if mask is None else m * mask
    y = torch.addmm(y0.flatten(0, -2), m.flatten(0, -2), U.T)        # y0 + U m
    return y.view_as(y0), m


class FusedUpdate(torch.autograd.Function):
    """y = W x + U (mask * C x), with gradients of x, C, and U. W is frozen.

    U comes in parts, one for each target: part i fills S at parts[i], its rows and columns of U."""
    @staticmethod
    def forward(ctx, x, S, bias, mask, parts, C, *U):
        ctx.widens_input = S.shape[1] > x.shape[-1]
        # S holds the other one; a layer with d_in >= d_out has one target
        outside = C if ctx.widens_input else U[0]
        widen = widen_input if ctx.widens_input else widen_output
        y, m = widen(x, S, outside, mask, bias)
        ctx.save_for_backward(x, S, outside, mask, m)        # autograd checks that S is unchanged
        ctx.parts = parts
        return y

    @staticmethod
    def backward(ctx, dy):
        x, S, outside, mask, m = ctx.saved_tensors
        # dx = W^T dy + C^T (mask * U^T dy): the same product with everything transposed
        widen = widen_output if ctx.widens_input else widen_input
        dx, dm = widen(dy, S.T, outside.T, mask)
        dy = dy.flatten(0, -2)
        m = m.flatten(0, -2)
        dC = dm.flatten(0, -2).T @ x.flatten(0, -2)
        dU = []
        for rows, columns in ctx.parts:
            dU.append(dy[:, rows].T @ m[:, columns])
        return dx, None, None, None, None, dC, *dU


class AdaptedLinear(nn.Module):
    """A frozen Linear and its update: C (R, d_in), and U in parts, one for each target.

    parts: for each target its rows of the output and its columns of m, as slices.
    widen: whether the weight moves into S. A base may refuse by its own attribute `widen`, as 8-bit
    and offloaded weights do; the update is then added beside the weight."""
    def __init__(self, base: nn.Module, parts: list[tuple[slice, slice]], widen: bool = True):
        super().__init__()
        self.base = base
        self.weight = base.weight                # whose dtype and device others read
        # the dtype of activations; an 8-bit weight has another
        self.dtype = getattr(base, "dtype", base.weight.dtype)
        self.parts = parts
        self.R = parts[-1][1].stop
        self.widens_input = base.in_features < base.out_features
        self.C = None                                                # until `set_update`: no update
        self.S = None
        if widen and getattr(base, "widen", True):
            self.move_weight_into_S()

    def move_weight_into_S(self):
        spare = math.ceil(self.R / 8) * 8        # multiples of 8 suit tensor cores
        weight = self.base.weight.detach()
        bias = self.base.bias
        if self.widens_input:
            S = F.pad(weight, (0, spare))                                                 # [W | 0]
            self.bias = None if bias is None else bias.detach()
        else:
            S = F.pad(weight, (0, 0, 0, spare))                                           # [W ; 0]
            self.bias = None if bias is None else F.pad(bias.detach(), (0, spare))
        self.S = nn.Parameter(S, requires_grad=False)
        d_out, d_in = weight.shape
        self.base.weight.data = self.S[:d_out, :d_in]

    def forward(self, x: Tensor) -> Tensor:
        if self.C is None:
            return self.base(x)
        mask = self.mask
        if mask is not None and x.dim() == 3:
            mask = mask[:, None]                 # (B, 1, R)
        if self.S is not None:
            return FusedUpdate.apply(x, self.S, self.bias, mask, self.parts, self.C, *self.U)

        m = F.linear(x, self.C)
        if mask is not None:
            m = m * mask
        y0 = self.base(x)
        U = self.U[0]
        if len(U) < y0.shape[-1]:                # one of several targets of a fused layer
            U = y0.new_zeros(y0.shape[-1], self.R)
            for part, values in zip(self.parts, self.U):
                U[part] = values
        y = torch.addmm(y0.flatten(0, -2), m.flatten(0, -2), U.T)
        return y.view_as(y0)


def adapt(flux: nn.Module, targets: list[Target], ranks: list[int]) -> list[AdaptedLinear]:
    """Puts an AdaptedLinear in the place of every Linear that holds a target, `ranks` columns of m
    for each target. Restores every other Linear."""
    for name, layer in list(flux.named_modules()):
        if isinstance(layer, AdaptedLinear):
            layer.base.weight.data = layer.base.weight.contiguous()
            flux.set_submodule(name, layer.base)

    parts = {}                                                       # {module: [(rows, columns)]}
    for target, rank in zip(targets, ranks):
        of_module = parts.setdefault(target.module, [])
        first = of_module[-1][1].stop if of_module else 0
        rows = slice(target.start, target.start + target.rows)
        of_module.append((rows, slice(first, first + rank)))

    layers = []
    for name, of_module in parts.items():
        # a modulation layer sees one vector per image: a wide copy of its weight would gain nothing
        layer = AdaptedLinear(flux.get_submodule(name), of_module, widen="mod" not in name)
        flux.set_submodule(name, layer)
        layers.append(layer)
    return layers


@torch.no_grad()
def set_update(layers: list[AdaptedLinear], Cs: list[Tensor], Us: list[Tensor],
               mask: Tensor | None = None):
    """Gives each layer its C and its parts of U, and copies one of the two into each S.

    Cs: one (R, d_in) for each layer; Us: one (rows, rank) for each target, layer by layer. mask (B,
    R) has room for the layer with the most parts."""
    first = 0                                                        # index of the layer's first U
    for layer, C in zip(layers, Cs):
        layer.C = C
        layer.U = Us[first:first + len(layer.parts)]
        first += len(layer.parts)
        layer.mask = None if mask is None else mask[:, :layer.R]
        if layer.S is None:
            continue
        if layer.widens_input:                                       # S = [W | U | 0]
            spare = layer.S[:, layer.base.in_features:]
            for part, U in zip(layer.parts, layer.U):
                spare[part] = U
        else:                                                        # S = [W ; C ; 0]
            spare = layer.S[layer.base.out_features:]
            spare[:layer.R] = C


@torch.no_grad()
def apply_loras(flux: nn.Module, loras: list[tuple[LoRA, float]]):
    """Replaces all LoRAs in the model by these, unmerged; an empty list removes them.

    loras: pairs of a LoRA, {diffusers path: (A (r, d_in), B (d_out, r))}, and its strength.
    ValueError, before anything changes, where one does not fit the model."""
    targets = {target.path: target for target in find_targets(flux, outside=True)}
    As, Bs = {}, {}                                                  # {path: those of all LoRAs}
    for lora, strength in loras:
        for path, (A, B) in lora.items():
            target = targets.get(path)
            d_out, d_in = len(B), A.shape[1]
            if target is None or (d_out, d_in) != (target.rows, target.d_in):
                raise ValueError(f"this model has no {path} of {d_out} x {d_in}, which the LoRA "
                                 "adapts")
            if path == "norm_out.linear":        # diffusers has scale before shift
                B = B.roll(len(B) // 2, dims=0)
            As.setdefault(path, []).append(A)
            Bs.setdefault(path, []).append(strength * B.float())

    # several LoRAs of one target are one LoRA of a higher rank: A below A, B beside B
    found = [target for path, target in targets.items() if path in As]
    like = flux.img_in.weight
    As = [torch.cat(As[target.path], dim=0).to(like) for target in found]
    Bs = [torch.cat(Bs[target.path], dim=1).to(like) for target in found]
    layers = adapt(flux, found, ranks=[len(A) for A in As])
    Cs = []
    first = 0                                                        # index of the layer's first A
    for layer in layers:
        Cs.append(torch.cat(As[first:first + len(layer.parts)]))
        first += len(layer.parts)
    set_update(layers, Cs, Bs)


# --------------------------------------------------------------------------------------------------
# Many people


@dataclass
class IdentityBank:
    """A row of fp32 weights for each identity (N, P), with its own AdamW moments and step count."""
    PARTS = "weight", "exp_avg", "exp_avg_sq", "steps"
    weight: Tensor
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    steps: Tensor | None = None

    def __post_init__(self):
        if self.steps is None:
            self.steps = torch.zeros(len(self.weight), dtype=torch.long)
        # on the CPU, so that reading a count never waits for the GPU
        self.steps = self.steps.cpu()

    def make_moments(self):
        """Creates AdamW's moments if there are none: a LoMD that is never trained needs none."""
        if self.exp_avg is None:
            self.exp_avg = torch.zeros_like(self.weight)
            self.exp_avg_sq = torch.zeros_like(self.weight)

    @torch.no_grad()
    def step(self, ids: Tensor, grad: Tensor, lr: float, eps: float = 1e-6,
             weight_decay: float = 0.01):
        """AdamW on the rows `ids` (n,) with grad (n, P); eps as in ai-toolkit."""
        self.make_moments()
        rows = ids.tolist()
        # a copy, which the kernel increments
        steps = to_device(self.steps[ids].float(), grad.device)
        adamw(
            params=[self.weight[row] for row in rows],
            grads=list(grad.unbind()),
            exp_avgs=[self.exp_avg[row] for row in rows],
            exp_avg_sqs=[self.exp_avg_sq[row] for row in rows],
            max_exp_avg_sqs=[],
            state_steps=list(steps.unbind()),
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
        )
        self.steps[ids] += 1


def views(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Cuts flat (.., P) into consecutive pieces, (.., *shape) each."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces = flat.split(sizes, dim=-1)
    return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes)]


def initial_down(rank: int, width: int, generator: torch.Generator) -> Tensor:
    """M or A at the start (rank, width), drawn as ai-toolkit draws a plain LoRA's A. U starts at
    zero."""
    down = torch.empty(rank, width)
    return nn.init.kaiming_uniform_(down, a=5 ** 0.5, generator=generator)


def random_lomd(targets: list[Target], r1: int, seed: int = 0) -> dict[str, Tensor]:
    """An untrained LoMD {path: (r1, d_in)}, from which stage 1 starts."""
    generator = torch.Generator().manual_seed(seed)
    lomd = {}
    for target in targets:
        lomd[target.path] = initial_down(r1, target.d_in, generator)
    return lomd


class MetaLoRA:
    """The adapters of N identities on one frozen Flux: puts itself in, trains in fp32, collapses.

    lomd: {path: A (r1, d_in)}, which learns too while `train_lomd` is set. None makes this plain
    LoRA: a row then holds A (rank, d_in) where it would hold M (rank, r1).
    slots: how many identities a batch may hold. `bank` may be exchanged for another between two
    steps."""
    def __init__(self, flux: nn.Module, rank: int, lomd: dict[str, Tensor] | None = None,
                 num_identities: int = 1, seed: int = 0, slots: int = 1):
        self.flux = flux
        self.rank = rank
        self.slots = slots
        self.train_lomd = False
        self.device = next(flux.parameters()).device
        self.found = find_targets(flux)                              # in the order of the network
        # sorted, so that C of all targets of one width is one batched product
        self.targets = sorted(self.found, key=lambda target: target.d_in)
        self.widths = Counter(target.d_in for target in self.targets)  # {d_in: number of targets}
        ranks = [slots * rank] * len(self.targets)
        self.layers = adapt(flux, self.targets, ranks)
        self.r1 = len(next(iter(lomd.values()))) if lomd else None

        # the shape of a row: M of each width, then U of all targets
        self.shapes = [(count, rank, self.r1 or d_in) for d_in, count in self.widths.items()]
        all_rows = sum(target.rows for target in self.targets)
        self.shapes.append((all_rows, rank))
        self.size = sum(math.prod(shape) for shape in self.shapes)

        if lomd:                                                     # one row, with the same AdamW
            As = [lomd[target.path].flatten() for target in self.targets]
            flat = torch.cat(As).float()
            self.shared = IdentityBank(flat[None].to(self.device))
        generator = torch.Generator().manual_seed(seed)
        rows = torch.zeros(num_identities, self.size)
        for row in rows:
            row.copy_(self.new_row(generator))
        self.bank = IdentityBank(rows.to(self.device))

    def new_row(self, generator: torch.Generator) -> Tensor:
        """An identity's row at the start (P,): M (or A) drawn, U zero."""
        drawn = {}
        for target in self.found:
            M = initial_down(self.rank, self.r1 or target.d_in, generator)
            drawn[target.path] = M.flatten()
        Ms = torch.cat([drawn[target.path] for target in self.targets])
        zeros = self.size - len(Ms)
        return F.pad(Ms, (0, zeros))

    def assign(self, ids: Tensor):
        """Prepares a batch in which image b shows identity ids[b], ids (B,). Call it before every
        forward pass. ValueError for more identities than slots."""
        self.present, slot, self.counts = torch.unique(
            ids.cpu(),
            return_inverse=True,
            return_counts=True,
        )
        n = len(self.present)
        if n > self.slots:
            raise ValueError(f"the batch holds {n} identities, the adapter has room for "
                             f"{self.slots}")

        # the leaves of this step's graph: the rows of those who are present, and LoMD
        rows = [self.bank.weight[i] for i in self.present.tolist()]
        self.rows = torch.stack(rows).requires_grad_()                                    # (n, P)
        all_slots = F.pad(self.rows, (0, 0, 0, self.slots - n))                     # (slots, P)
        *downs, U = views(all_slots, self.shapes)                    # M, or A of plain LoRA
        downs = [rearrange(M, "slot target rank r1 -> target (slot rank) r1") for M in downs]
        if self.r1:
            self.flat = self.shared.weight[0].detach()
            self.flat.requires_grad_(self.train_lomd)
            shapes = [(count, self.r1, d_in) for d_in, count in self.widths.items()]
            As = views(self.flat, shapes)
            downs = [M @ A for M, A in zip(downs, As)]               # C = M A, fp32

        dtype = self.layers[0].dtype
        Cs = []
        for d_in, C in zip(self.widths, downs):
            C = rearrange(C, "target R d_in -> (target R) d_in").to(dtype)
            layers = [layer for layer in self.layers if layer.base.in_features == d_in]
            Cs += C.split([layer.R for layer in layers])
        U = rearrange(U, "slot d_out rank -> d_out (slot rank)").to(dtype)
        Us = U.split([target.rows for target in self.targets])

        mask = None
        if n > 1:  # each image meets only its own person's columns
            mask = F.one_hot(slot, self.slots)                                      # (B, slots)
            mask = mask.repeat_interleave(self.rank, dim=1)                    # (B, slots rank)
            # a layer's m has these columns once for each of its parts, of which there are at most 4
            mask = mask.repeat(1, 4).to(dtype)
            mask = to_device(mask, self.device)
        set_update(self.layers, Cs, Us, mask)

    def step(self, lr: float, clip: float = 1.0,
             average: Callable[[Tensor], Tensor] | None = None) -> Pair:
        """One AdamW step, after backward() of the batch's *summed* losses.

        An identity's gradient is the mean over its own images. LoMD's is the mean over the batch,
        or what `average` makes of the sum. Each is clipped to the norm `clip` separately. Returns
        the gradient norms of the rows (n,) and of LoMD (). FloatingPointError, with nothing
        changed, where one is not finite."""
        counts = to_device(self.counts, self.device)
        rows = self.rows.grad / counts[:, None]
        norms = rows.norm(dim=1)
        lomd_norm = rows.new_zeros(())
        if self.train_lomd:
            if average:
                flat = average(self.flat.grad)
            else:
                flat = self.flat.grad / self.counts.sum().item()
            lomd_norm = flat.norm()
        if not (norms.isfinite().all() & lomd_norm.isfinite()):      # the one wait for the GPU
            raise FloatingPointError("a gradient is not finite")

        scale = (clip / (norms + 1e-6)).clamp(max=1.0)
        self.bank.step(self.present, rows * scale[:, None], lr)
        if self.train_lomd:
            # in place: an allocation that fails would leave the rows a step ahead of LoMD
            flat *= (clip / (lomd_norm + 1e-6)).clamp(max=1.0)
            self.shared.step(torch.tensor([0]), flat[None], lr)
        return norms, lomd_norm

    @property
    def lomd(self) -> dict[str, Tensor] | None:
        """{path: A (r1, d_in)}, views of what is trained; None for plain LoRA."""
        if not self.r1:
            return None
        shapes = [(self.r1, target.d_in) for target in self.targets]
        As = views(self.shared.weight[0], shapes)
        return {target.path: A for target, A in zip(self.targets, As)}

    @torch.no_grad()
    def collapse(self, identity: int = 0) -> LoRA:
        """An identity's plain LoRA {path: (M A (rank, d_in), U (d_out, rank))}, in fp32."""
        M_shapes = [(self.rank, self.r1 or target.d_in) for target in self.targets]
        U_shapes = [(target.rows, self.rank) for target in self.targets]
        matrices = views(self.bank.weight[identity], M_shapes + U_shapes)
        lomd = self.lomd
        lora = {}
        for i, target in enumerate(self.targets):
            down = matrices[i]
            if lomd:
                down = down @ lomd[target.path]
            up = matrices[len(M_shapes) + i]
            lora[target.path] = down.cpu().clone(), up.cpu().clone()
        return lora
