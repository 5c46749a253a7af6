"""FLUX.1 in plain PyTorch: transformer, autoencoder, text encoders, noise path, Euler sampler, checkpoint loading.

    config = FluxConfig()                                     # FLUX.1-dev, 11.9 billion parameters
    flux = load_flux(find_model("flux-dev"), "cuda", torch.bfloat16)
    latent = denoise(flux, noise, txt, y, num_steps=30, guidance=3.5)

One alphabet: B batch, T text tokens, I image tokens, L = T + I, H heads, D head size, C channels.
One direction of time: t = 0 is the picture, t = 1 is noise, x_t = (1 - t) x_0 + t eps, and the network predicts the
velocity v = dx/dt = eps - x_0. Sampling walks t from 1 to 0.

Sources: Black Forest Labs' reference code (parameter names, order of modulation, schedule), "Scaling Rectified Flow
Transformers" (Esser et al. 2024, the noise path and the logit-normal t), "High-Resolution Image Synthesis with Latent
Diffusion Models" (Rombach et al. 2022, the autoencoder), RoFormer (Su et al. 2021, RoPE), DiT (Peebles & Xie 2022, adaLN).

Where this differs from the reference: t and guidance stay in fp32 until they are embedded; RoPE is applied in fp32; the
latent is accumulated in fp32 between Euler steps (the reference rounds each of them to bf16); GroupNorm's number of
groups is a setting, since a small autoencoder has fewer than 32 channels; pictures above 1.5 megapixels are decoded in
tiles, which is not quite the same (Decoder.upsample_tiled).
"""
import argparse
import hashlib
import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speed import E4M3, Fp8Linear, Offload, check_memory, choose_attention, compile_blocks, quantize_rows

# ---------------------------------------------------------------------------------------------------------------------
# Transformer


@dataclass
class FluxConfig:
    """Shape of the transformer, in the reference's field names. The defaults are FLUX.1-dev."""
    in_channels: int = 64             # 16 latent channels x 2 x 2 latent pixels per token
    out_channels: int = 64
    vec_in_dim: int = 768             # CLIP's pooled output
    context_in_dim: int = 4096        # T5's states
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19                   # double-stream blocks
    depth_single_blocks: int = 38
    axes_dim: tuple = (16, 56, 56)    # RoPE: how much of a head each of (unused, row, column) gets
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True       # False for schnell

    def __post_init__(self):
        self.axes_dim = tuple(self.axes_dim)
        if self.hidden_size % self.num_heads or sum(self.axes_dim) != self.hidden_size // self.num_heads:
            raise ValueError(f"axes_dim {self.axes_dim} must add up to the head size, "
                             f"hidden_size {self.hidden_size} / num_heads {self.num_heads}")


def sinusoidal_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """t in [0, 1] (B,) -> (B, dim) fp32: cosines, then sines, of 1000 t at dim / 2 geometric frequencies."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope_angles(ids: Tensor, axes_dim: tuple, theta: int) -> tuple[Tensor, Tensor]:
    """Positions (B, L, 3) -> cosines and sines, each (B, 1, L, D / 2) fp32: the axes one after the other."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** -(torch.arange(0, dim, 2, device=ids.device, dtype=torch.float32) / dim)
        angles.append(ids[..., axis, None].float() * omega)
    angles = torch.cat(angles, dim=-1)[:, None]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the neighbouring pairs of x (B, H, L, D) by their position's angles, in fp32; same dtype out."""
    cos, sin = rope
    x1, x2 = x.float().unflatten(-1, (-1, 2)).unbind(-1)                                             # (B, H, L, D/2)
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Attention of every token to every token. q, k, v (B, H, L, D) -> (B, L, H D)."""
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "B H L D -> B L (H D)")


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    def __init__(self, head_size: int):
        super().__init__()
        self.query_norm = RMSNorm(head_size)
        self.key_norm = RMSNorm(head_size)


class SelfAttention(nn.Module):
    """The weights of one stream's attention; the blocks decide what attends to what."""
    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        return self.norm.query_norm(q), self.norm.key_norm(k), v


class Modulation(nn.Module):
    def __init__(self, hidden_size: int, multiplier: int):
        super().__init__()
        self.multiplier = multiplier
        self.lin = nn.Linear(hidden_size, multiplier * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.multiplier, dim=-1)                    # each (B, 1, hidden)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


class DoubleStreamBlock(nn.Module):
    """Image and text keep their own weights and meet in one attention."""
    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden, mlp = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(hidden, 6))
            self.add_module(f"{stream}_attn", SelfAttention(hidden, config.num_heads, config.qkv_bias))
            self.add_module(f"{stream}_mlp", nn.Sequential(
                nn.Linear(hidden, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, hidden)))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        img_q, img_k, img_v = self.img_attn.project(modulate(img, img_shift1, img_scale1))               # (B, H, I, D)
        txt_q, txt_k, txt_v = self.txt_attn.project(modulate(txt, txt_shift1, txt_scale1))               # (B, H, T, D)
        out = attention(torch.cat((txt_q, img_q), dim=2), torch.cat((txt_k, img_k), dim=2),
                        torch.cat((txt_v, img_v), dim=2), rope)                                       # (B, L, hidden)
        txt_out, img_out = out.split((txt.shape[1], img.shape[1]), dim=1)
        img = img + img_gate1 * self.img_attn.proj(img_out)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_out)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side, each half of two wide Linears."""
    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden, self.mlp_dim = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.num_heads = config.num_heads
        self.linear1 = nn.Linear(hidden, 3 * hidden + self.mlp_dim)
        self.linear2 = nn.Linear(hidden + self.mlp_dim, hidden)
        self.norm = QKNorm(hidden // config.num_heads)
        self.modulation = Modulation(hidden, 3)

    def forward(self, x: Tensor, vec: Tensor, rope) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split((3 * x.shape[-1], self.mlp_dim), dim=-1)
        q, k, v = rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        out = attention(self.norm.query_norm(q), self.norm.key_norm(k), v, rope)                      # (B, L, hidden)
        return x + gate * self.linear2(torch.cat((out, F.gelu(mlp, approximate="tanh")), dim=-1))


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class Flux(nn.Module):
    """The FLUX.1 transformer: packed noisy latent, text and time in, velocity out. Names are the original file's."""
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.vector_in = MLPEmbedder(config.vec_in_dim, hidden)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(256, hidden)
        self.txt_in = nn.Linear(config.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(config)
        self.recompute = 0            # training: so many blocks keep only their inputs and run again in the backward pass
        self.offload = None           # an Offload where the blocks live on the CPU
        self.compiled = False         # by speed.compile_blocks

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
                guidance: Tensor | None = None) -> Tensor:
        """Velocity of the noise path.

        img (B, I, 64) packed latent, img_ids (B, I, 3), txt (B, T, context_in_dim), txt_ids (B, T, 3),
        timesteps (B,) in [0, 1], y (B, vec_in_dim), guidance (B,) -> (B, I, 64).
        Raises ValueError when a guidance-distilled model gets no guidance.
        """
        dtype = self.img_in.weight.dtype
        vec = self.time_in(sinusoidal_embedding(timesteps).to(dtype)) + self.vector_in(y.to(dtype))        # (B, hidden)
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("this model was distilled with guidance: forward() needs a guidance value per image")
            vec = vec + self.guidance_in(sinusoidal_embedding(guidance).to(dtype))
        img, txt = self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype))              # (B, I, hidden), (B, T, hidden)
        rope = rope_angles(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)
        for i in range(len(self.double_blocks)):
            img, txt = self.run(i, img, txt, vec, rope)
        x = torch.cat((txt, img), dim=1)                                                                # (B, L, hidden)
        for i in range(len(self.double_blocks), len(self.blocks)):
            x = self.run(i, x, vec, rope)
        return self.final_layer(x[:, txt.shape[1]:], vec)                                                   # (B, I, 64)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def run(self, index: int, *inputs):
        """Block `index`, wherever its weights live, and with or without keeping what its backward pass will need."""
        block = partial(self.offload.run, index) if self.offload else self.blocks[index]
        # the backward pass of a block that lives elsewhere needs its weights once more, as running it again does
        if torch.is_grad_enabled() and (self.offload or index < self.recompute):
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder


@dataclass
class AutoEncoderConfig:
    """Shape of the autoencoder, in the reference's field names. The defaults are FLUX.1's."""
    resolution: int = 256             # what it was trained at; nothing depends on it
    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    num_groups: int = 32              # GroupNorm; fixed at 32 in the reference

    def __post_init__(self):
        self.ch_mult = tuple(self.ch_mult)


WHOLE_PIXELS = 1_500_000              # larger pictures are decoded in tiles
TILE, OVERLAP = 96, 16                # of at most so many latent pixels a side, so many of them shared with the next


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that can hold on to statistics, since those of a tile are not those of its picture.

    statistics: None, each call has its own; [], the next call's are kept; [mean, variance], (C,) each, they are used.
    """
    statistics = None

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if self.statistics is None:
            return super().forward(x)
        if not self.statistics:
            var, mean = torch.var_mean(rearrange(x.float(), "1 (g c) h w -> g (c h w)", g=self.num_groups), 1, correction=0)
            self.statistics = [each.repeat_interleave(len(self.weight) // self.num_groups) for each in (mean, var)]
        # a BatchNorm at inference is just that: given statistics, in fp32 whatever x is
        return F.batch_norm(x, *self.statistics, self.weight.float(), self.bias.float(), eps=self.eps)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, in_channels), conv3x3(in_channels, out_channels)
        self.norm2, self.conv2 = GroupNorm(groups, out_channels), conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """One head of attention between all positions of a feature map."""
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, kernel_size=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # so laid out, the attention never holds all (h w) x (h w) weights
        q, k, v = (rearrange(layer(h), "B C h w -> B 1 (h w) C").contiguous() for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))           # the reference pads right and below only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, and the step to the next."""
    def __init__(self, channels: list[int], groups: int, resample: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(i, o, groups) for i, o in zip(channels, channels[1:]))
        if resample:
            self.add_module(resample, {"downsample": Downsample, "upsample": Upsample}[resample](channels[-1]))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = conv3x3(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            channels = [widths[i - 1] if i else config.ch] + [width] * config.num_res_blocks
            self.down.append(Level(channels, config.num_groups, "downsample" if i < len(widths) - 1 else None))
        self.mid = Mid(widths[-1], config.num_groups)
        self.norm_out = GroupNorm(config.num_groups, widths[-1])
        self.conv_out = conv3x3(widths[-1], 2 * config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


def tiles(size: int) -> list[slice]:
    """The fewest slices of one length, at most TILE, that cover `size` and overlap by OVERLAP or by one more."""
    count = max(1, math.ceil((size - OVERLAP) / (TILE - OVERLAP)))
    length = math.ceil((size + (count - 1) * OVERLAP) / count)
    starts = [i * (size - length) // max(1, count - 1) for i in range(count)]
    return [slice(start, start + length) for start in starts]


class Decoder(nn.Module):
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = conv3x3(config.z_channels, widths[-1])
        self.mid = Mid(widths[-1], config.num_groups)
        self.up = nn.ModuleList()                           # up[0] is the full resolution, and runs last
        for i, width in enumerate(widths):
            channels = [widths[min(i + 1, len(widths) - 1)]] + [width] * (config.num_res_blocks + 1)
            self.up.append(Level(channels, config.num_groups, "upsample" if i else None))
        self.norm_out = GroupNorm(config.num_groups, widths[0])
        self.conv_out = conv3x3(widths[0], config.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        return self.upsample(self.mid(self.conv_in(z)))

    def upsample(self, x: Tensor) -> Tensor:
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))

    def upsample_tiled(self, x: Tensor) -> Tensor:
        """upsample() of one picture, (1, C, h, w) -> (1, 3, 8 h, 8 w), with the memory of one tile.

        Not quite the same picture. All tiles share the GroupNorm statistics of one pass over a coarser grid, every
        step-th feature each way, after the "fast mode" of Tiled VAE (pkuliyi2015/multidiffusion-upscaler-for-automatic1111);
        and edges see less of their surroundings. With the baby's autoencoder at 1024 x 1536 that is a relative distance
        of 0.005 (56 dB, a third of an 8-bit level on average); with statistics of each tile's own it was 0.045 (37 dB).
        """
        norms = [module for module in (*self.up.modules(), self.norm_out) if isinstance(module, GroupNorm)]
        scale, step = 2 ** (len(self.up) - 1), math.ceil(math.sqrt(x[0, 0].numel()) / TILE)
        size = [scale * n for n in x.shape[2:]]
        picture = torch.zeros(1, self.conv_out.out_channels, *size, device=x.device)
        weights = torch.zeros(size, device=x.device)
        try:
            for norm in norms:
                norm.statistics = []
            self.upsample(x[..., ::step, ::step])
            for rows, columns in product(*map(tiles, x.shape[2:])):
                tile = self.upsample(x[..., rows, columns])
                # The distance to the nearest edge: made to sum to 1, linear over the overlap. Pixels at the edge saw zeros
                # beyond it and count for almost nothing; at the picture's own edge they are the only ones.
                ramps = (torch.arange(0.5, n, device=x.device) for n in tile.shape[2:])
                weight_y, weight_x = ((torch.minimum(r, r.flip(0)) - scale * OVERLAP / 4).clamp(min=1e-3) for r in ramps)
                weight = weight_y[:, None] * weight_x
                place = ..., *(slice(scale * part.start, scale * part.stop) for part in (rows, columns))
                picture[place] += weight * tile
                weights[place] += weight
        finally:
            for norm in norms:
                norm.statistics = None
        return (picture / weights).to(x.dtype)


class AutoEncoder(nn.Module):
    """Picture (B, 3, 8 h, 8 w) in [-1, 1] <-> latent (B, 16, h, w), shifted and scaled to about unit variance."""
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, image: Tensor) -> Tensor:
        """Picture -> (B, 2 z_channels, h, w): mean and log-variance of the posterior, not yet shifted and scaled."""
        # contiguous, whatever the layout of the weights: latents are written to files
        return self.encoder(image.to(self.encoder.conv_in.weight.dtype)).contiguous()

    def posterior(self, image: Tensor) -> Tensor:
        """Picture (B, 3, H, W) -> (B, 2, 16, h, w), fp32: mean and standard deviation of its latent, shifted and scaled."""
        mean, logvar = self.moments(image).float().chunk(2, dim=1)
        scale = self.config.scale_factor
        return torch.stack((scale * (mean - self.config.shift_factor), scale * torch.exp(0.5 * logvar)), dim=1)

    def encode(self, image: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Picture (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> latent (B, 16, H / 8, W / 8).

        The posterior's mean, or with sample=True a draw from it (from `generator`, if given).
        """
        mean, logvar = self.moments(image).chunk(2, dim=1)
        if sample:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype,
                                device=generator.device if generator else mean.device).to(mean.device)
            mean = mean + torch.exp(0.5 * logvar) * noise
        return self.config.scale_factor * (mean - self.config.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (B, 16, h, w) -> picture (B, 3, 8 h, 8 w), about [-1, 1], not clamped.

        More than WHOLE_PIXELS a picture in tiles: see Decoder.upsample_tiled, also for what that changes.
        """
        z = (latent / self.config.scale_factor + self.config.shift_factor).to(self.decoder.conv_in.weight.dtype)
        if z[0, 0].numel() * 4 ** (len(self.decoder.up) - 1) <= WHOLE_PIXELS:
            return self.decoder(z)
        x = self.decoder.mid(self.decoder.conv_in(z))       # its attention is global, and it is small: not in tiles
        return torch.cat([self.decoder.upsample_tiled(each) for each in x.split(1)])


# ---------------------------------------------------------------------------------------------------------------------
# Noise path, loss and sampler


def pack(latent: Tensor) -> Tensor:
    """Latent (B, 16, h, w), h and w even -> tokens (B, h w / 4, 64): one token per 2 x 2 latent pixels."""
    return rearrange(latent, "B C (h p) (w q) -> B (h w) (C p q)", p=2, q=2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, I, 64) -> latent (B, 16, height, width); height and width in latent pixels (picture pixels / 8)."""
    return rearrange(tokens, "B (h w) (C p q) -> B C (h p) (w q)", h=height // 2, p=2, q=2)


def position_ids(batch: int, height: int, width: int, text_len: int, device=None) -> tuple[Tensor, Tensor]:
    """RoPE positions for a latent of height x width: image (B, I, 3) as (0, row, column), text (B, T, 3) zeros."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] = torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=device)[None, :]
    return ids.reshape(1, -1, 3).expand(batch, -1, -1), torch.zeros(batch, text_len, 3, device=device)


def get_noise(height: int, width: int, seed: int, channels: int = 16) -> Tensor:
    """The reference's start noise (1, 16, h, w) for a picture of height x width pixels, the same on every device.

    Drawn on the CPU and directly in bf16: to draw in fp32 and round gives other numbers in some versions of torch.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, channels, 2 * math.ceil(height / 16), 2 * math.ceil(width / 16),
                       generator=generator, dtype=torch.bfloat16)


def get_schedule(num_steps: int, image_seq_len: int, shift: bool = True) -> list[float]:
    """num_steps + 1 times from 1 to 0. The shift keeps larger pictures longer at high noise (schnell: no shift)."""
    t = torch.linspace(1, 0, num_steps + 1)
    if shift:
        mu = 0.5 + (1.15 - 0.5) * (image_seq_len - 256) / (4096 - 256)
        t = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    return t.tolist()


def velocity(flux: Flux, latent: Tensor, t: Tensor, txt: Tensor, y: Tensor, guidance: float | Tensor) -> Tensor:
    """Velocity, unpacked and in fp32, of latents (B, 16, h, w) at times t (B,); text (B, T, _), y (B, _)."""
    batch, _, height, width = latent.shape
    img_ids, txt_ids = position_ids(batch, height, width, txt.shape[1], latent.device)
    guidance = torch.as_tensor(guidance, dtype=torch.float32, device=latent.device).expand(batch)
    return unpack(flux(pack(latent), img_ids, txt, txt_ids, t, y, guidance).float(), height, width)


def sample_times(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times (B,) in (0, 1): the sigmoid of a standard normal (logit-normal), drawn on the CPU."""
    return torch.sigmoid(torch.randn(batch, generator=generator))


def flow_matching_loss(flux: Flux, latent: Tensor, noise: Tensor, t: Tensor, txt: Tensor, y: Tensor,
                       guidance: float | Tensor = 1.0, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity, in fp32, one value per image (B,).

    latent and noise (B, 16, h, w), t (B,), txt (B, T, _), y (B, _). The network runs in its own dtype. `weight`: of the
    places, broadcast against the latent; it moves effort, and not what the best velocity is.
    """
    latent, noise = latent.float(), noise.float()
    at = t[:, None, None, None].float()
    predicted = velocity(flux, (1 - at) * latent + at * noise, t, txt, y, guidance)
    error = (predicted - (noise - latent)).square()
    return (error if weight is None else weight * error).mean(dim=(1, 2, 3))


@torch.no_grad()
def denoise(flux: Flux, noise: Tensor, txt: Tensor, y: Tensor, num_steps: int, guidance: float,
            neg_txt: Tensor | None = None, neg_y: Tensor | None = None, true_cfg: float = 1.0,
            on_step=None) -> Tensor:
    """Euler steps from noise to latent, both (B, 16, h, w), h and w even. The result is fp32.

    guidance is the distilled input of the dev models (ignored by schnell). true_cfg other than 1 also runs the
    negative prompt (neg_txt, neg_y) and extrapolates: v_neg + true_cfg (v - v_neg). on_step() is called after each.
    """
    if true_cfg != 1.0 and (neg_txt is None or neg_y is None):
        raise ValueError("true_cfg other than 1 needs a negative prompt (neg_txt and neg_y)")
    latent = noise.float()
    times = get_schedule(num_steps, noise.shape[2] * noise.shape[3] // 4, shift=flux.config.guidance_embed)
    for t, t_next in zip(times, times[1:]):
        t_batch = torch.full((latent.shape[0],), t, device=latent.device)
        v = velocity(flux, latent, t_batch, txt, y, guidance)
        if true_cfg != 1.0:
            v_neg = velocity(flux, latent, t_batch, neg_txt, neg_y, guidance)
            v = v_neg + true_cfg * (v - v_neg)
        latent = latent + (t_next - t) * v
        if on_step:
            on_step()
    return latent


# ---------------------------------------------------------------------------------------------------------------------
# Names: original module -> diffusers modules. A fused layer is several, whose rows follow each other.

FLUX_LINEARS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "double_blocks.{}.img_attn.qkv": ("transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_k",
                                      "transformer_blocks.{}.attn.to_v"),
    "double_blocks.{}.txt_attn.qkv": ("transformer_blocks.{}.attn.add_q_proj", "transformer_blocks.{}.attn.add_k_proj",
                                      "transformer_blocks.{}.attn.add_v_proj"),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "single_blocks.{}.linear1": ("single_transformer_blocks.{}.attn.to_q", "single_transformer_blocks.{}.attn.to_k",
                                 "single_transformer_blocks.{}.attn.to_v", "single_transformer_blocks.{}.proj_mlp"),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),          # diffusers: scale before shift
    "final_layer.linear": ("proj_out",),
}
FLUX_NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_added_k",
    "single_blocks.{}.norm.query_norm": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.norm.key_norm": "single_transformer_blocks.{}.attn.norm_k",
}
AUTOENCODER_NAMES = (                        # original -> diffusers, as pattern and replacement, in this order
    (r"(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."), (r"down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"up\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."), (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."), (r"mid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
    (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"mid\.attn_1\.proj_out\.", "mid_block.attentions.0.to_out.0."),
    (r"nin_shortcut", "conv_shortcut"), (r"\.norm_out\.", ".conv_norm_out."))


def diffusers_flux_names(name: str) -> list[str]:
    """Name of a parameter of Flux -> the diffusers parameters whose rows, one after the other, are its rows."""
    module, _, kind = name.rpartition(".")
    number = re.search(r"blocks\.(\d+)\.", name)
    template = module.replace(f".{number[1]}.", ".{}.", 1) if number else module
    index = number[1] if number else ""
    if kind == "scale":
        return [f"{FLUX_NORMS[template]}.weight".format(index)]
    return [f"{target}.{kind}".format(index) for target in FLUX_LINEARS[template]]


def diffusers_autoencoder_names(name: str, levels: int) -> list[str]:
    """Name of a parameter of AutoEncoder with this many resolutions -> the one diffusers parameter."""
    for pattern, replacement in AUTOENCODER_NAMES:
        name = re.sub(pattern, replacement, name)
    return [re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", name)]   # they count from the top


# ---------------------------------------------------------------------------------------------------------------------
# Loading


PREFIXES = ("model.diffusion_model.",)           # ComfyUI's files with everything: only the transformer is ours
SCALES = "scale_weight", "weight_scale"          # ComfyUI's scaled fp8, and that of others
MARKS = "scaled_fp8", "comfy_quant", "scale_input", "input_scale"


class TensorFiles:
    """The tensors of one safetensors file, or of all shards of a folder, by name; read only when asked for."""
    def __init__(self, files: list[Path]):
        self.file_of, self.metadata = {}, {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from None
            self.metadata.update(file.metadata() or {})
            self.file_of.update(dict.fromkeys(file.keys(), file))
        self.path = files[0] if len(files) == 1 else files[0].parent
        self.prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in self.file_of)), "")
        self.file_of = {name.removeprefix(self.prefix): file for name, file in self.file_of.items() if name.startswith(self.prefix)}
        # 8-bit files have one scale for each weight beside it, under one of several names, and marks of their makers
        self.scales = {name.removesuffix(end) + "weight": name for name in self.file_of for end in SCALES if name.endswith("." + end)}
        self.raw = {name: self.file_of.pop(name) for name in [*self.file_of] if name in self.scales.values() or name.endswith(MARKS)}

    def shape(self, name: str) -> list[int]:
        return self.file_of[name].get_slice(self.prefix + name).get_shape()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.file_of[name].get_tensor(self.prefix + name)
        return tensor.float() * self.scale(name) if tensor.dtype.itemsize == 1 else tensor

    def scale(self, name: str) -> Tensor:
        """What an 8-bit weight of the file is to be multiplied by: fp32, one number, or one for each row (d_out, 1)."""
        if name not in self.scales:
            return torch.ones(1)
        scale = self.raw[self.scales[name]].get_tensor(self.prefix + self.scales[name]).float()
        return scale.view(-1, 1) if scale.numel() > 1 else scale.view(1)

    def quantized(self, name: str) -> tuple[Tensor, Tensor]:
        """A weight (d_out, d_in) as float8_e4m3 with row scales (d_out, 1); one that has 8 bits already stays as it is."""
        tensor = self.file_of[name].get_tensor(self.prefix + name)
        return (tensor, self.scale(name).expand(len(tensor), 1)) if tensor.dtype == E4M3 else quantize_rows(self[name])


class JsonFile(dict):
    """A JSON object on disk. ValueError, in one line, where it cannot be read, and on `[...]` of a field it lacks."""
    def __init__(self, path: Path):
        try:
            super().__init__(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from None
        self.path = path

    def __missing__(self, field: str):
        raise ValueError(f"{self.path} lacks the field {field!r}")


def weight_files(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The weights of one model folder: what the index lists if there is one, so that half a download shows."""
    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.exists():
        names = sorted(set(JsonFile(index)["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}{f', which {index.name} lists' if index.exists() else ''}: "
                             "complete the download")
    return [folder / name for name in names]


def read_config(kind, text: str, path: Path):
    """Dataclass `kind` from JSON with the same fields; an unknown one would change the model, so it is refused."""
    try:
        values = json.loads(text)
        unknown = set(values) - {field.name for field in fields(kind)}
        if unknown:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the {kind.__name__} in its metadata cannot be used: {error}") from None


def load_weights(model: nn.Module, files: TensorFiles, sources, dtype: torch.dtype, place, fp8: bool = False) -> nn.Module:
    """Fills a model built on the meta device, strictly, tensor by tensor: the peak is the model and one tensor.

    sources(name) lists the tensors whose rows make up a parameter, place(name) says on which device it goes. With `fp8`
    the Linears of the blocks become Fp8Linears on the way. Raises ValueError that names the first missing, misshapen and
    unexpected tensor.
    """
    plan = {name: sources(name) for name, _ in model.named_parameters()}
    missing = [part for parts in plan.values() for part in parts if part not in files.file_of]
    unexpected = sorted(set(files.file_of) - {part for parts in plan.values() for part in parts})
    misshapen = []
    for name, parameter in model.named_parameters():
        if not set(plan[name]) & set(missing):
            shapes = [files.shape(part) for part in plan[name]]
            found = [sum(shape[0] for shape in shapes), *shapes[0][1:]] if all(shapes) else []
            alike = all(shape == shapes[0] for shape in shapes[:3]) and all(shape[1:] == found[1:] for shape in shapes)
            # diffusers keeps the autoencoder's 1 x 1 convolutions as Linears
            if not alike or found != list(parameter.shape) and found + [1, 1] != list(parameter.shape):
                have = " + ".join(f"{part} {shape}" for part, shape in zip(plan[name], shapes))
                misshapen.append(f"{have} instead of {list(parameter.shape)}")
    problems = [f"{len(what)} {kind} ({what[0]})" for kind, what in
                (("missing", missing), ("misshapen", misshapen), ("unexpected", unexpected)) if what]
    if problems:
        raise ValueError(f"{files.path} does not fit this {type(model).__name__}: {', '.join(problems)}")
    for name, parameter in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        layer, row = model.get_submodule(module), 0
        if fp8 and isinstance(layer, nn.Linear) and "_blocks." in name:              # the weight comes before the bias
            layer = Fp8Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype, place(name))
            model.set_submodule(module, layer)
        if isinstance(layer, Fp8Linear) and attribute == "weight":
            for part in plan[name]:
                tensor, scale = files.quantized(part)
                layer.weight[row:row + len(tensor)], layer.scale[row:row + len(tensor)] = tensor.to(layer.weight.device), scale
                row += len(tensor)
            continue
        weight = torch.empty(parameter.shape, dtype=dtype, device=place(name))
        for part in plan[name]:
            tensor = files[part]
            weight[row:row + len(tensor)].copy_(tensor.view(tensor.shape + (1,) * (weight.dim() - tensor.dim())))
            row += len(tensor)
        if plan[name][0].startswith("norm_out.linear."):
            weight = weight.roll(len(weight) // 2, 0)
        setattr(layer, attribute, nn.Parameter(weight, requires_grad=False))
    return model.eval()


def locate(folder: str | Path, names: tuple[str, ...], diffusers: str, what: str) -> tuple[list[Path], dict | None]:
    """The files of one part of a snapshot, and its diffusers config (None: original layout)."""
    folder = Path(folder)
    for name in names:
        if (folder / name).is_file():
            return [folder / name], None
    if (folder / diffusers / "config.json").is_file():
        return weight_files(folder / diffusers), JsonFile(folder / diffusers / "config.json")
    raise ValueError(f"{folder} holds no {what}: neither {' nor '.join(names)} nor {diffusers}/")


FLUX_FILES = tuple(f"flux1-{kind}{bits}.safetensors" for bits in ("", "-fp8") for kind in ("dev", "schnell"))


def flux_files(folder: str | Path) -> tuple[TensorFiles, FluxConfig, bool]:
    """Tensors and configuration of the transformer of a snapshot, and whether they are in the diffusers layout."""
    paths, config = locate(folder, FLUX_FILES, "transformer", "transformer")
    files = TensorFiles(paths)
    if config is not None:
        heads, head_size = config["num_attention_heads"], config["attention_head_dim"]
        return files, FluxConfig(
            in_channels=config["in_channels"], out_channels=config.get("out_channels") or config["in_channels"],
            vec_in_dim=config["pooled_projection_dim"], context_in_dim=config["joint_attention_dim"],
            hidden_size=heads * head_size, num_heads=heads, depth=config["num_layers"],
            depth_single_blocks=config["num_single_layers"], axes_dim=config.get("axes_dims_rope", (16, 56, 56)),
            guidance_embed=config["guidance_embeds"]), True
    if "config" in files.metadata:
        return files, read_config(FluxConfig, files.metadata["config"], files.path), False
    return files, FluxConfig(guidance_embed="guidance_in.in_layer.weight" in files.file_of), False


def load_flux(folder: str | Path, device="cpu", dtype: torch.dtype = torch.bfloat16, fp8: bool = False, offload: bool = False) -> Flux:
    """The transformer of a snapshot folder (original or diffusers files), frozen, on `device` in `dtype`.

    fp8: weights of the blocks' Linears in 8 bits, quantised one by one as they are read. offload: the blocks live in CPU
    memory. ValueError, in one line, where the files are missing, torn or of another model.
    """
    files, config, is_diffusers = flux_files(folder)
    with torch.device("meta"):
        model = Flux(config)
    place = lambda name: "cpu" if offload and "_blocks." in name else device
    load_weights(model, files, diffusers_flux_names if is_diffusers else lambda name: [name], dtype, place, fp8)
    if offload:
        model.offload = Offload(model.blocks, device)
    return model


def autoencoder_files(folder: str | Path) -> tuple[list[Path], dict | None]:
    """As `locate`: ae.safetensors, or vae/ and its config."""
    return locate(folder, ("ae.safetensors",), "vae", "autoencoder")


def load_autoencoder(folder: str | Path, device="cpu", dtype: torch.dtype = torch.bfloat16) -> AutoEncoder:
    """The autoencoder of a snapshot folder (ae.safetensors or vae/), frozen, on `device` in `dtype`; errors as above."""
    paths, config = autoencoder_files(folder)
    files, sources = TensorFiles(paths), lambda name: [name]
    if config is not None:
        widths = config["block_out_channels"]
        config = AutoEncoderConfig(
            ch=widths[0], ch_mult=[w // widths[0] for w in widths], z_channels=config["latent_channels"],
            num_res_blocks=config["layers_per_block"], scale_factor=config["scaling_factor"],
            shift_factor=config["shift_factor"], num_groups=config["norm_num_groups"], resolution=config["sample_size"])
        sources = lambda name: diffusers_autoencoder_names(name, len(widths))
    else:
        config = read_config(AutoEncoderConfig, files.metadata.get("config", "{}"), files.path)
    with torch.device("meta"):
        model = AutoEncoder(config)
    load_weights(model, files, sources, dtype, lambda name: device)
    # cuDNN's convolutions want channels last. On a CPU the baby takes 0.54 to 0.82 of its time so, but PyTorch's GroupNorm
    # is then a hundred times less exact (3e-5 of the picture at 384 px): not worth it.
    return model.to(memory_format=torch.channels_last) if torch.device(device).type == "cuda" else model


@contextmanager
def quiet_transformers():
    """No progress bars and no reports of transformers on the way; what is wrong is raised by us."""
    from transformers.utils import logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_transformers_model(kind, folder: str | Path, dtype: torch.dtype, use_safetensors: bool | None = True) -> nn.Module:
    """A model of transformers, strictly: it would itself fill what a file lacks with random weights and go on."""
    model, report = kind.from_pretrained(folder, dtype=dtype, use_safetensors=use_safetensors, ignore_mismatched_sizes=True,
                                         output_loading_info=True)
    for problem in ("missing", "mismatched"):
        names = sorted(map(str, report[f"{problem}_keys"]))
        if names:
            raise ValueError(f"{Path(folder).name}/ does not fit its config.json: {len(names)} {problem} ({names[0]})")
    return model.eval()


class TextEncoders:
    """CLIP's pooled output and T5's states for prompts, as FLUX.1 uses them: padded to the maximum, no mask."""
    def __init__(self, folder: Path, device, dtype: torch.dtype, max_length: int):
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer
        self.device, self.max_length = device, max_length
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.t5_tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer_2")
        self.clip = load_transformers_model(CLIPTextModel, folder / "text_encoder", dtype).to(device)
        self.t5 = load_transformers_model(T5EncoderModel, folder / "text_encoder_2", dtype).to(device)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids of CLIP (B, 77) and T5 (B, max_length). Longer prompts are cut at the end."""
        if any("\ud800" <= letter <= "\udfff" for prompt in prompts for letter in prompt):
            raise ValueError("a prompt is not valid UTF-8 text")
        clip_length = min(77, self.clip_tokenizer.model_max_length)
        return tuple(tokenizer(prompts, padding="max_length", truncation=True, max_length=length,
                               return_tensors="pt").input_ids
                     for tokenizer, length in ((self.clip_tokenizer, clip_length), (self.t5_tokenizer, self.max_length)))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> txt (B, T, context_in_dim), y (B, vec_in_dim)."""
        clip_ids, t5_ids = (ids.to(self.device) for ids in self.tokenize(list(prompts)))
        return self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output


def check_text_files(folder: Path) -> None:
    """ValueError unless the text encoders' files are all there: transformers makes up a vocabulary that is missing."""
    for part, choices in (("tokenizer", (("tokenizer.json",), ("vocab.json", "merges.txt"))),
                          ("tokenizer_2", (("tokenizer.json",), ("spiece.model",)))):
        if not any(all((folder / part / name).is_file() for name in choice) for choice in choices):
            raise ValueError(f"{folder} holds no whole {part}/: it needs {' or '.join(map(' and '.join, choices))}")
    for part in ("text_encoder", "text_encoder_2"):
        if not (folder / part / "config.json").is_file():
            raise ValueError(f"{folder} holds no whole {part}/: it needs config.json and the weights")
        weight_files(folder / part, "model")


def load_text_encoders(folder: str | Path, device="cpu", dtype: torch.dtype = torch.bfloat16,
                       max_length: int | None = None) -> TextEncoders:
    """Tokenizers and text encoders of a snapshot folder. T5 sees 512 tokens, with schnell 256, or `max_length`.

    ValueError, in one line, where the files are missing, torn or do not fit.
    """
    folder = Path(folder)
    check_text_files(folder)
    if max_length is None:
        path = folder / "tokenizer_2" / "tokenizer_config.json"
        limit = JsonFile(path).get("model_max_length", 512) if path.is_file() else 512
        max_length = min(limit, 512 if flux_files(folder)[1].guidance_embed else 256)
    try:
        with quiet_transformers():
            return TextEncoders(folder, device, dtype, max_length)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder}: the text encoders cannot be loaded: {str(error).splitlines()[0]}") from None


HUB = {"flux-dev": ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors", "FLUX.1 [dev] Non-Commercial License"),
       "flux-schnell": ("black-forest-labs/FLUX.1-schnell", "flux1-schnell.safetensors", "Apache 2.0")}


def check_snapshot(folder: Path) -> None:
    """ValueError that names the first part a snapshot lacks, in either layout."""
    locate(folder, FLUX_FILES, "transformer", "transformer")
    locate(folder, ("ae.safetensors",), "vae", "autoencoder")
    check_text_files(folder)


def find_model(name: str) -> Path:
    """--model -> folder: `baby`, a folder, or `flux-dev` / `flux-schnell` from the local hub cache, else downloaded.

    The download takes the user's own token (`hf auth login`). ValueError says in one line what to do instead.
    """
    if name == "baby":
        name = Path(__file__).resolve().parent / "baby" / "checkpoint"
    if name not in HUB:
        if not Path(name).is_dir():
            raise ValueError(f"no model {str(name)!r}: --model takes flux-dev, flux-schnell, baby or a folder in the hub's layout")
        check_snapshot(Path(name))
        return Path(name)
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError          # HTTPError: its http client's own
    repo, weights, licence = HUB[name]
    wanted = [weights, "ae.safetensors", "text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*"]
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        check_snapshot(folder)
        return folder
    except (LocalEntryNotFoundError, ValueError):
        pass                                                      # not in the cache, or not whole: ask the hub below
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
        check_snapshot(folder)                                    # without network the hub gives what it has, in silence
        return folder
    except (HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{repo} is neither in the hub cache nor could it be downloaded ({reason[:200]}): accept its licence ({licence}) at "
            f"huggingface.co/{repo}, run `hf auth login` and then this command again (it downloads 34 GB), or try "
            "--model baby, which needs no download") from None


def fingerprint(files: TensorFiles, names: list[str] | None = None) -> str:
    """A short hash of a model: of its tensors' values in bf16, `names` or all of up to 4,096 elements."""
    digest = hashlib.sha256()
    for name in sorted(files.file_of) if names is None else names:
        if names is not None or math.prod(files.shape(name)) <= 4096:
            digest.update(files[name].bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def flux_fingerprint(folder: str | Path) -> str:
    """`fingerprint` of a snapshot's transformer, the same for its original and its diffusers files."""
    files, config, is_diffusers = flux_files(folder)
    with torch.device("meta"):
        names = [name for name, _ in Flux(config).named_parameters() if name.endswith(".scale") or name == "img_in.bias"]
    return fingerprint(files, [part for name in names for part in (diffusers_flux_names(name) if is_diffusers else [name])])


def autoencoder_fingerprint(folder: str | Path) -> str:
    """`fingerprint` of a snapshot's autoencoder, of the file that `load_autoencoder` reads."""
    return fingerprint(TensorFiles(autoencoder_files(folder)[0]))


# ---------------------------------------------------------------------------------------------------------------------
# What every script asks: where to run, in which precision, at which size; how it reads its arguments and ends


def free(device):
    """Gives the memory of models that were just dropped back to the device."""
    if torch.device(device).type in ("cuda", "mps"):
        getattr(torch, torch.device(device).type).empty_cache()


class Parser(argparse.ArgumentParser):
    """Raises ValueError on bad arguments, where argparse would print its usage and exit."""
    def error(self, message):
        raise ValueError(f"{message} (--help lists all options)")


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def number(low: float, high: float):
    """The type of an option that takes a number of this range."""
    def read(text: str) -> float:
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"must be {low:g} to {high:g}, not {text}")
        return float(text)
    return read


def add_speed_options(add, training: bool) -> None:
    """The switches of large models, for the parser of a script."""
    add("--fp8", action="store_true", help="weights of the blocks in 8 bits: half the memory, and faster on recent cards; the "
        "pictures change a little")
    add("--offload", action="store_true", help="the blocks' weights stay in CPU memory and come one by one: for small cards")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the blocks first, which takes a minute or so "
        "(default: on a GPU, where it is a large model's long run)")
    if training:
        add("--recompute", type=int, metavar="N", help="blocks that are run twice to save memory (default: as few as it takes)")


def check_fit(args, device: torch.device) -> None:
    """Before anything is read: says how much of the device's memory the transformer takes, or ValueError with what helps."""
    with torch.device("meta"):
        line = check_memory(Flux(flux_files(args.folder)[1]), device, args.dtype, args.fp8, args.offload)
    if device.type != "cpu":
        print(line)


LONG_RUN = 300                        # steps of a large model after which compiling may pay: a guess, never measured


def open_flux(args, device: torch.device, steps: int, tokens: int, training: bool) -> Flux:
    """The transformer as args.folder, args.dtype, args.fp8, args.offload and args.compile want it, for so many steps of
    pictures of so many tokens, text included."""
    flux = load_flux(args.folder, device, args.dtype, args.fp8, args.offload)
    pays = device.type == "cuda" and steps >= LONG_RUN and not is_small(args.folder) and find_spec("triton")
    if pays if args.compile is None else args.compile:
        compile_blocks(flux)
    heads = flux.config.num_heads
    choose_attention((1, heads, tokens, flux.config.hidden_size // heads), device, args.dtype, training)
    return flux


def check_training(args) -> None:
    """ValueError for a lr, resolution or seed that neither training stage takes; None (the model's default) is fine."""
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr must be a positive number, not {args.lr}")
    if args.resolution and not 64 <= min(args.resolution) <= max(args.resolution) <= 4096:
        raise ValueError(f"--resolution takes 64 to 4096 pixels, not {' '.join(map(str, args.resolution))}")
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed is between 0 and {2 ** 63 - 1}, not {args.seed}")
    if args.recompute is not None and args.recompute < 0:
        raise ValueError(f"--recompute takes 0 or more blocks, not {args.recompute}")


def take_model(args, device: torch.device, use: str) -> None:
    """args.model -> args.folder (may download) and args.dtype; resolution, prompt, lr (for `use`) and, where the command has them,
    guidance, the warm-up and what concerns crops default to the model's."""
    args.folder = find_model(args.model)
    args.dtype = pick_dtype(device, args.folder)
    defaults = model_defaults(args.folder)
    args.lr = args.lr or learning_rate(args.folder, use)
    args.resolution = args.resolution or [defaults["resolution"]]
    args.prompt = defaults["prompt"] if args.prompt is None else args.prompt
    for name in ("guidance", "warmup", "aspects", "scales", "background", "mirror"):
        if getattr(args, name, "not an option") is None:
            setattr(args, name, defaults[name])
    check_fit(args, device)


def run_script(name: str, script, argv=None) -> int:
    """script(argv) -> exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C; one line on stderr for each."""
    try:
        script(argv)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, OSError)) else 1
    return 0


def model_defaults(folder: str | Path) -> dict:
    """Resolution, learning rate (one, or {use: rate}), prompt, guidance of pictures, stage 1's warm-up, and the crops that suit a
    model: FLUX.1's, or of its own defaults.json. Aspects and scales of crops: None is all of the paper's; background: its weight in
    the loss of a crop; mirror: whether their mirror images are trained on too."""
    path = Path(folder) / "defaults.json"
    own = json.loads(path.read_text()) if path.is_file() else {}
    return {"resolution": 1024, "learning_rate": 4e-4, "prompt": "a photo of a person", "guidance": 3.5, "warmup": 0.4,
            "aspects": None, "scales": None, "background": 1.0, "mirror": True} | own


def learning_rate(folder: str | Path, use: str) -> float:
    """The model's default; a small model may need another one for each use: "meta-lora", "lora" and "stage 1"."""
    rate = model_defaults(folder)["learning_rate"]
    return rate[use] if isinstance(rate, dict) else rate


def pick_device(name: str | None = None) -> torch.device:
    """The device by name, or the best one here. ValueError where the named one is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, there in available.items() if there))
    kind, _, index = name.partition(":")
    counts = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": 1}
    if not available.get(kind, False) or ":" in name and not (index.isdecimal() and int(index) < counts[kind]):
        raise ValueError(f"--device {name} is not available here; available: "
                         f"{', '.join(kind for kind, there in available.items() if there)}")
    return torch.device(name)


def pick_dtype(device: torch.device, folder: str | Path) -> torch.dtype:
    """bf16, but fp32 on a CPU for models small enough that memory is no matter."""
    return torch.float32 if torch.device(device).type == "cpu" and is_small(folder) else torch.bfloat16


def is_small(folder: str | Path) -> bool:
    """Under a billion parameters in the transformer: memory is no matter then, and batches pay."""
    files = flux_files(folder)[0]
    return sum(math.prod(files.shape(name)) for name in files.file_of) < 1e9
