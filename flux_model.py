"""FLUX.1 in plain PyTorch: transformer, autoencoder, noise path, Euler sampler, text encoders.

    flux = Flux(FluxConfig())                                 # FLUX.1-dev, 11.9 billion parameters
    latent = denoise(flux, noise, txt, y, num_steps=30, guidance=3.5)

One alphabet: B batch, T text tokens, I image tokens, L = T + I, H heads, D head size, C channels. One
direction of time: t = 0 is the picture, t = 1 is noise, x_t = (1 - t) x_0 + t eps, and the network predicts
the velocity v = dx/dt = eps - x_0. Sampling walks t from 1 to 0.

Sources: Black Forest Labs' reference code (parameter names, order of modulation, schedule), "Scaling
Rectified Flow Transformers" (Esser et al. 2024, the noise path and the logit-normal t), "High-Resolution
Image Synthesis with Latent Diffusion Models" (Rombach et al. 2022, the autoencoder), RoFormer (Su et al.
2021, RoPE), DiT (Peebles & Xie 2022, adaLN).

Where this differs from the reference: t and guidance stay in fp32 until they are embedded; RoPE is applied in
fp32; the latent is accumulated in fp32 between Euler steps (the reference rounds each of them to bf16);
GroupNorm's number of groups is a setting, since a small autoencoder has fewer than 32 channels.

Weights are read by support/checkpoints.py; how 12 billion of them fit a card is support/memory.py's business.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------------------
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
    steps = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10_000) * steps / (dim // 2))
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope_angles(ids: Tensor, axes_dim: tuple, theta: int) -> Tensor:
    """Positions (B, L, 3) -> their rotations (B, 1, L, D / 2), complex: the axes one after the other."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** -(torch.arange(0, dim, 2, device=ids.device, dtype=torch.float32) / dim)
        angles.append(ids[..., axis, None].float() * omega)
    angles = torch.cat(angles, dim=-1)[:, None]
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates neighbouring pairs of x (B, H, L, D) by their position's angles, in fp32; same dtype out."""
    pairs = x.float().unflatten(-1, (-1, 2))                                               # (B, H, L, D/2, 2)
    if torch.compiler.is_compiling():                # which fuses real numbers, and leaves complex ones alone
        (x1, x2), (cos, sin) = pairs.unbind(-1), torch.view_as_real(rope).unbind(-1)
        pairs = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * rope)
    return pairs.flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
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
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


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
        return self.lin(F.silu(vec))[:, None].chunk(self.multiplier, dim=-1)             # each (B, 1, hidden)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=1e-6))


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

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        img_q, img_k, img_v = self.img_attn.project(modulate(img, img_shift1, img_scale1))      # (B, H, I, D)
        txt_q, txt_k, txt_v = self.txt_attn.project(modulate(txt, txt_shift1, txt_scale1))      # (B, H, T, D)
        out = attention(torch.cat((txt_q, img_q), dim=2), torch.cat((txt_k, img_k), dim=2),
                        torch.cat((txt_v, img_v), dim=2), rope)                               # (B, L, hidden)
        txt_out, img_out = out.split((txt.shape[1], img.shape[1]), dim=1)
        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_out))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_out))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
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

    def forward(self, x: Tensor, vec: Tensor, rope: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split((3 * x.shape[-1], self.mlp_dim), dim=-1)
        q, k, v = rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        out = attention(self.norm.query_norm(q), self.norm.key_norm(k), v, rope)              # (B, L, hidden)
        out = self.linear2(torch.cat((out, F.gelu(mlp, approximate="tanh")), dim=-1))
        return torch.addcmul(x, gate, out)


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.out_channels)
        hidden = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class Flux(nn.Module):
    """The FLUX.1 transformer: packed noisy latent, text and time in, velocity out. Names are the original
    file's."""
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
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(config)

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor,
                y: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Velocity of the noise path.

        img (B, I, 64) packed latent, img_ids (B, I, 3), txt (B, T, context_in_dim), txt_ids (B, T, 3),
        timesteps (B,) in [0, 1], y (B, vec_in_dim), guidance (B,) -> (B, I, 64).
        Raises ValueError when a guidance-distilled model gets no guidance.
        """
        dtype = self.img_in.weight.dtype
        vec = self.time_in(sinusoidal_embedding(timesteps).to(dtype))
        vec = vec + self.vector_in(y.to(dtype))                                                  # (B, hidden)
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("this model was distilled with guidance: forward() needs it for each image")
            vec = vec + self.guidance_in(sinusoidal_embedding(guidance).to(dtype))
        img, txt = self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype))     # (B, I, hidden), (B, T, hidden)
        rope = rope_angles(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope)
        x = torch.cat((txt, img), dim=1)                                                      # (B, L, hidden)
        for block in self.single_blocks:
            x = block(x, vec, rope)
        return self.final_layer(x[:, txt.shape[1]:], vec)                                         # (B, I, 64)


# ------------------------------------------------------------------------------------------------------------
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


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(groups, in_channels), conv3x3(in_channels, out_channels)
        self.norm2, self.conv2 = group_norm(groups, out_channels), conv3x3(out_channels, out_channels)
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
        self.norm = group_norm(groups, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # so laid out, the attention never holds all (h w) x (h w) weights
        q, k, v = (rearrange(layer(h), "B C h w -> B 1 (h w) C").contiguous()
                   for layer in (self.q, self.k, self.v))
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
            kind = {"downsample": Downsample, "upsample": Upsample}[resample]
            self.add_module(resample, kind(channels[-1]))
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
            resample = "downsample" if i < len(widths) - 1 else None
            self.down.append(Level(channels, config.num_groups, resample))
        self.mid = Mid(widths[-1], config.num_groups)
        self.norm_out = group_norm(config.num_groups, widths[-1])
        self.conv_out = conv3x3(widths[-1], 2 * config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


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
        self.norm_out = group_norm(config.num_groups, widths[0])
        self.conv_out = conv3x3(widths[0], config.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        return self.upsample(self.mid(self.conv_in(z)))

    def upsample(self, x: Tensor) -> Tensor:
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Picture (B, 3, 8 h, 8 w) in [-1, 1] <-> latent (B, 16, h, w), shifted and scaled to about unit
    variance."""
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, image: Tensor) -> Tensor:
        """Picture -> (B, 2 z_channels, h, w): mean and log-variance of the posterior, not yet shifted and
        scaled."""
        # contiguous, whatever the layout of the weights: latents are written to files
        return self.encoder(image.to(self.encoder.conv_in.weight.dtype)).contiguous()

    def posterior(self, image: Tensor) -> Tensor:
        """Picture (B, 3, H, W) -> (B, 2, 16, h, w), fp32: mean and standard deviation of its latent, shifted
        and scaled."""
        mean, logvar = self.moments(image).float().chunk(2, dim=1)
        scale, shift = self.config.scale_factor, self.config.shift_factor
        return torch.stack((scale * (mean - shift), scale * torch.exp(0.5 * logvar)), dim=1)

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
        """Latent (B, 16, h, w) -> picture (B, 3, 8 h, 8 w), about [-1, 1], not clamped."""
        z = latent / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))


# ------------------------------------------------------------------------------------------------------------
# Noise path, loss and sampler


def pack(latent: Tensor) -> Tensor:
    """Latent (B, 16, h, w), h and w even -> tokens (B, h w / 4, 64): one token per 2 x 2 latent pixels."""
    return rearrange(latent, "B C (h p) (w q) -> B (h w) (C p q)", p=2, q=2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, I, 64) -> latent (B, 16, height, width); height and width in latent pixels (picture pixels /
    8)."""
    return rearrange(tokens, "B (h w) (C p q) -> B C (h p) (w q)", h=height // 2, p=2, q=2)


def position_ids(batch: int, height: int, width: int, text_len: int, device=None) -> tuple[Tensor, Tensor]:
    """RoPE positions for a latent of height x width: image (B, I, 3) as (0, row, column), text (B, T, 3)
    zeros."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] = torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=device)[None, :]
    return ids.reshape(1, -1, 3).expand(batch, -1, -1), torch.zeros(batch, text_len, 3, device=device)


def get_noise(height: int, width: int, seed: int, channels: int = 16) -> Tensor:
    """The reference's start noise (1, 16, h, w) for a picture of height x width pixels, the same on every
    device.

    Drawn on the CPU and directly in bf16: to draw in fp32 and round gives other numbers in some versions of
    torch. From one seed torch 2.9 and 2.14 draw different bf16 numbers.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, channels, 2 * math.ceil(height / 16), 2 * math.ceil(width / 16),
                       generator=generator, dtype=torch.bfloat16)


def get_schedule(num_steps: int, image_seq_len: int, shift: bool = True) -> list[float]:
    """num_steps + 1 times from 1 to 0. The shift keeps larger pictures longer at high noise (schnell: no
    shift)."""
    t = torch.linspace(1, 0, num_steps + 1)
    if shift:
        mu = 0.5 + (1.15 - 0.5) * (image_seq_len - 256) / (4096 - 256)
        t = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    return t.tolist()


def velocity(flux: Flux, latent: Tensor, t: Tensor, txt: Tensor, y: Tensor,
             guidance: float | Tensor) -> Tensor:
    """Velocity, unpacked and in fp32, of latents (B, 16, h, w) at times t (B,); text (B, T, _), y (B, _)."""
    batch, _, height, width = latent.shape
    img_ids, txt_ids = position_ids(batch, height, width, txt.shape[1], latent.device)
    if not isinstance(guidance, Tensor):             # a fill: the card is not waited for, as it is for a copy
        guidance = torch.full((batch,), guidance, device=latent.device)
    return unpack(flux(pack(latent), img_ids, txt, txt_ids, t, y, guidance).float(), height, width)


def sample_times(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times (B,) in (0, 1): the sigmoid of a standard normal (logit-normal), drawn on the CPU."""
    return torch.sigmoid(torch.randn(batch, generator=generator))


def flow_matching_loss(flux: Flux, latent: Tensor, noise: Tensor, t: Tensor, txt: Tensor, y: Tensor,
                       guidance: float | Tensor = 1.0, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity, in fp32, one value per image (B,).

    latent and noise (B, 16, h, w), t (B,), txt (B, T, _), y (B, _). The network runs in its own dtype.
    `weight`: of the places, broadcast against the latent; it moves effort, and not what the best velocity is.
    """
    latent, noise = latent.float(), noise.float()
    at = t[:, None, None, None].float()
    predicted = velocity(flux, (1 - at) * latent + at * noise, t, txt, y, guidance)
    error = (predicted - (noise - latent)).square()
    return (error if weight is None else weight * error).mean(dim=(1, 2, 3))


@torch.no_grad()
def denoise(flux: Flux, noise: Tensor, txt: Tensor, y: Tensor, num_steps: int, guidance: float,
            neg_txt: Tensor | None = None, neg_y: Tensor | None = None, true_cfg: float = 1.0,
            on_step: Callable[[], object] | None = None) -> Tensor:
    """Euler steps from noise to latent, both (B, 16, h, w), h and w even. The result is fp32.

    guidance is the distilled input of the dev models (ignored by schnell). true_cfg other than 1 also runs
    the negative prompt (neg_txt, neg_y) and extrapolates: v_neg + true_cfg (v - v_neg). on_step() is called
    after each.
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


# ------------------------------------------------------------------------------------------------------------
# Text


class TextEncoders:
    """CLIP's pooled output and T5's states for prompts, as FLUX.1 uses them: padded to the maximum, no mask.

    clip and t5 are transformers' CLIPTextModel and T5EncoderModel, the tokenizers theirs; T5 sees
    `max_length` tokens, 512 of FLUX.1-dev, 256 of schnell.
    """
    def __init__(self, clip: nn.Module, clip_tokenizer, t5: nn.Module, t5_tokenizer, max_length: int = 512):
        self.clip, self.t5, self.max_length = clip, t5, max_length
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids of CLIP (B, 77) and T5 (B, max_length). Longer prompts are cut at the end."""
        if any("\ud800" <= letter <= "\udfff" for prompt in prompts for letter in prompt):
            raise ValueError("a prompt is not valid UTF-8 text")
        lengths = min(77, self.clip_tokenizer.model_max_length), self.max_length
        return tuple(tokenizer(prompts, padding="max_length", truncation=True, max_length=length,
                               return_tensors="pt").input_ids
                     for tokenizer, length in zip((self.clip_tokenizer, self.t5_tokenizer), lengths))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> txt (B, T, context_in_dim), y (B, vec_in_dim), on the encoders' device."""
        clip_ids, t5_ids = (ids.to(self.t5.device) for ids in self.tokenize(list(prompts)))
        return self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output
