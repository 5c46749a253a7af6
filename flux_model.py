"""FLUX.1 in plain PyTorch: transformer, autoencoder, noise path, Euler sampler, text encoders.

    flux = Flux(FluxConfig())                             # FLUX.1-dev, 11.9 billion parameters
    latent = denoise(flux, noise, txt, y, num_steps=30, guidance=3.5)

Shapes: B batch, T text tokens, I image tokens, L = T + I tokens, H heads, D head size, C channels
(in the transformer, C is the hidden size, H D).

Time: t = 0 is the image and t = 1 is noise, x_t = (1 - t) x_0 + t eps. The network predicts the
velocity v = dx/dt = eps - x_0. Sampling goes from t = 1 to t = 0.

Sources: Black Forest Labs' reference code (parameter names, order of the modulation, schedule),
"Scaling Rectified Flow Transformers" (Esser et al. 2024: noise path, logit-normal t),
"High-Resolution Image Synthesis with Latent Diffusion Models" (Rombach et al. 2022: autoencoder),
RoFormer (Su et al. 2021: RoPE), DiT (Peebles & Xie 2022: adaLN).

Differences from the reference: t and guidance stay in fp32 until they are embedded. RoPE is applied
in fp32. The latent stays in fp32 between Euler steps, where the reference rounds it to bf16. The
number of GroupNorm groups is configurable, because a small autoencoder has fewer than 32 channels.
A model without a guidance input is taken for schnell: no shift of the times, 256 text tokens.

support/checkpoints.py loads the weights; support/memory.py fits 12 billion of them on a GPU.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


# --------------------------------------------------------------------------------------------------
# Transformer


@dataclass
class FluxConfig:
    """Shape of the transformer, with the reference's field names. The defaults are FLUX.1-dev.
    ValueError if axes_dim does not add up to the head size."""
    in_channels: int = 64             # one token: 16 latent channels x 2 x 2 latent pixels
    out_channels: int = 64
    vec_in_dim: int = 768             # CLIP's pooled output
    context_in_dim: int = 4096        # T5's hidden states
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19                   # double-stream blocks
    depth_single_blocks: int = 38
    axes_dim: tuple = (16, 56, 56)    # RoPE dimensions of each head for (unused, row, column)
    theta: int = 10_000               # RoPE base
    qkv_bias: bool = True
    guidance_embed: bool = True       # False for schnell, which was not distilled with guidance

    def __post_init__(self):
        self.axes_dim = tuple(self.axes_dim)              # a list when read from JSON
        head_size, remainder = divmod(self.hidden_size, self.num_heads)
        if remainder or sum(self.axes_dim) != head_size:
            raise ValueError(f"axes_dim {self.axes_dim} must add up to the head size, "
                             f"hidden_size {self.hidden_size} / num_heads {self.num_heads}")


def sinusoidal_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """Embeds t or guidance (B,) as (B, dim) in fp32: cosines, then sines, of 1000 t at dim / 2
    geometrically spaced frequencies."""
    steps = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10_000) * steps / (dim // 2))
    angles = 1000.0 * t.float()[:, None] * frequencies                                  # (B, dim/2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_embedding(ids: Tensor, axes_dim: tuple, theta: int) -> Tensor:
    """Positions (B, L, 3) -> rotations (B, 1, L, D / 2), complex numbers of modulus 1. Each axis
    rotates its own axes_dim / 2 pairs of a head's channels."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, device=ids.device, dtype=torch.float32) / dim
        frequencies = theta ** -exponents
        positions = ids[..., axis, None].float()                                         # (B, L, 1)
        angles.append(positions * frequencies)                                       # (B, L, dim/2)
    angles = rearrange(torch.cat(angles, dim=-1), "B L pairs -> B 1 L pairs")       # for every head
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates adjacent pairs of channels of x (B, H, L, D) by rope, in fp32. Keeps x's dtype."""
    pairs = rearrange(x.float(), "B H L (pairs two) -> B H L pairs two", two=2)
    if torch.compiler.is_compiling():
        # the compiler does not fuse complex numbers, so write out their product
        x1, x2 = pairs.unbind(-1)
        cos, sin = torch.view_as_real(rope).unbind(-1)
        pairs = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)
    else:
        # in eager mode, one complex product is the fewest kernels
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * rope)
    return rearrange(pairs, "B H L pairs two -> B H L (pairs two)").to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
    """Every token attends to every token, without a mask. q, k, v (B, H, L, D) -> (B, L, H D)."""
    q = apply_rope(q, rope)
    k = apply_rope(k, rope)
    out = F.scaled_dot_product_attention(q, k, v)                                     # (B, H, L, D)
    return rearrange(out, "B H L D -> B L (H D)")


class MLPEmbedder(nn.Module):
    """Maps a conditioning vector (time, guidance, or pooled text) to the hidden size."""
    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    # nn.RMSNorm calls its parameter `weight`; the checkpoint calls it `scale`
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


class QKNorm(nn.Module):
    """Norms for the queries and keys of each head, for stable training in bf16 (Esser et al.)."""
    def __init__(self, head_size: int):
        super().__init__()
        self.head_size = head_size
        self.query_norm = RMSNorm(head_size)
        self.key_norm = RMSNorm(head_size)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B, L, 3C) -> normalized queries and keys, and values, each (B, H, L, D)."""
        q, k, v = rearrange(qkv, "B L (qkv H D) -> qkv B H L D", qkv=3, D=self.head_size)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """The attention weights of one stream. DoubleStreamBlock joins the streams and attends."""
    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden = config.hidden_size
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=config.qkv_bias)
        self.norm = QKNorm(hidden // config.num_heads)
        self.proj = nn.Linear(hidden, hidden)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, C) -> normalized queries and keys, and values, each (B, H, L, D)."""
        return self.norm(self.qkv(x))


class Modulation(nn.Module):
    """adaLN: predicts the shift, scale, and gate of one branch (multiplier 3) or two (6)."""
    def __init__(self, hidden_size: int, multiplier: int):
        super().__init__()
        self.multiplier = multiplier
        self.lin = nn.Linear(hidden_size, multiplier * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        out = self.lin(F.silu(vec))[:, None]                                # (B, 1, multiplier * C)
        return out.chunk(self.multiplier, dim=-1)                                   # each (B, 1, C)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then shift + (1 + scale) * x."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, 1 + scale, x)           # addcmul(a, b, c) = a + b * c in one kernel


def feed_forward(hidden_size: int, mlp_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden_size, mlp_dim),
        nn.GELU(approximate="tanh"),
        nn.Linear(mlp_dim, hidden_size),
    )


class DoubleStreamBlock(nn.Module):
    """Image and text tokens have separate weights but share one attention."""
    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden = config.hidden_size
        mlp_dim = int(hidden * config.mlp_ratio)
        self.img_mod = Modulation(hidden, multiplier=6)
        self.img_attn = SelfAttention(config)
        self.img_mlp = feed_forward(hidden, mlp_dim)
        self.txt_mod = Modulation(hidden, multiplier=6)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = feed_forward(hidden, mlp_dim)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        # 1 is the attention branch, 2 the MLP branch
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        # one attention over both streams, text first
        img_q, img_k, img_v = self.img_attn.project(modulate(img, img_shift1, img_scale1))
        txt_q, txt_k, txt_v = self.txt_attn.project(modulate(txt, txt_shift1, txt_scale1))
        q = torch.cat((txt_q, img_q), dim=2)                                          # (B, H, L, D)
        k = torch.cat((txt_k, img_k), dim=2)
        v = torch.cat((txt_v, img_v), dim=2)
        out = attention(q, k, v, rope)                                                   # (B, L, C)
        txt_out, img_out = out.split((txt.shape[1], img.shape[1]), dim=1)

        # gated residuals: x + gate * branch
        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_out))                 # (B, I, C)
        img_out = self.img_mlp(modulate(img, img_shift2, img_scale2))
        img = torch.addcmul(img, img_gate2, img_out)
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_out))                 # (B, T, C)
        txt_out = self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        txt = torch.addcmul(txt, txt_gate2, txt_out)
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image tokens as one sequence. Attention and MLP run in parallel: linear1 computes
    q, k, v and the MLP's hidden layer, linear2 projects both branches back."""
    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden = config.hidden_size
        self.mlp_dim = int(hidden * config.mlp_ratio)
        self.linear1 = nn.Linear(hidden, 3 * hidden + self.mlp_dim)
        self.linear2 = nn.Linear(hidden + self.mlp_dim, hidden)
        self.norm = QKNorm(hidden // config.num_heads)
        self.modulation = Modulation(hidden, multiplier=3)

    def forward(self, x: Tensor, vec: Tensor, rope: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv_mlp = self.linear1(modulate(x, shift, scale))                     # (B, L, 3C + mlp_dim)
        qkv, mlp = qkv_mlp.split((3 * x.shape[-1], self.mlp_dim), dim=-1)
        attn = attention(*self.norm(qkv), rope)                                          # (B, L, C)
        attn_mlp = torch.cat((attn, F.gelu(mlp, approximate="tanh")), dim=-1)  # (B, L, C + mlp_dim)
        return torch.addcmul(x, gate, self.linear2(attn_mlp))                            # (B, L, C)


class LastLayer(nn.Module):
    """Modulated LayerNorm, then a projection to the velocity of each token's latent pixels."""
    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden = config.hidden_size
        self.linear = nn.Linear(hidden, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)              # (B, 1, C)
        return self.linear(modulate(x, shift, scale))


class Flux(nn.Module):
    """The FLUX.1 transformer: packed noisy latent, text, and time in, velocity out. Submodules are
    named as in the original checkpoint."""
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
        self.double_blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.double_blocks.append(DoubleStreamBlock(config))
        self.single_blocks = nn.ModuleList()
        for _ in range(config.depth_single_blocks):
            self.single_blocks.append(SingleStreamBlock(config))
        self.final_layer = LastLayer(config)

    def forward(
        self,
        img: Tensor,                          # (B, I, 64) packed noisy latent
        img_ids: Tensor,                      # (B, I, 3) positions, see position_ids
        txt: Tensor,                          # (B, T, context_in_dim) T5's hidden states
        txt_ids: Tensor,                      # (B, T, 3)
        timesteps: Tensor,                    # (B,) in [0, 1]
        y: Tensor,                            # (B, vec_in_dim) CLIP's pooled output
        guidance: Tensor | None = None,       # (B,)
    ) -> Tensor:
        """Predicts the velocity (B, I, 64). Raises ValueError if a guidance-distilled model gets no
        guidance."""
        dtype = self.img_in.weight.dtype

        # vec conditions every block: time, pooled text, and guidance
        vec = self.time_in(sinusoidal_embedding(timesteps).to(dtype))
        vec = vec + self.vector_in(y.to(dtype))                                             # (B, C)
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("this model was distilled with guidance: "
                                 "forward() needs a guidance value for each image")
            vec = vec + self.guidance_in(sinusoidal_embedding(guidance).to(dtype))

        img = self.img_in(img.to(dtype))                                                 # (B, I, C)
        txt = self.txt_in(txt.to(dtype))                                                 # (B, T, C)
        ids = torch.cat((txt_ids, img_ids), dim=1)                                       # (B, L, 3)
        rope = rotary_embedding(ids, self.config.axes_dim, self.config.theta)       # (B, 1, L, D/2)

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope)
        x = torch.cat((txt, img), dim=1)                                                 # (B, L, C)
        for block in self.single_blocks:
            x = block(x, vec, rope)
        img = x[:, txt.shape[1]:]                                                        # (B, I, C)
        return self.final_layer(img, vec)                                               # (B, I, 64)


# --------------------------------------------------------------------------------------------------
# Autoencoder


@dataclass
class AutoEncoderConfig:
    """Shape of the autoencoder, with the reference's field names. The defaults are FLUX.1's."""
    resolution: int = 256             # training resolution; nothing here depends on it
    in_channels: int = 3
    ch: int = 128                     # channels at full resolution
    out_ch: int = 3
    ch_mult: tuple = (1, 2, 4, 4)     # channels of each level, in units of ch
    num_res_blocks: int = 2           # per level of the encoder; the decoder has one more
    z_channels: int = 16
    scale_factor: float = 0.3611      # latent = scale_factor * (z - shift_factor)
    shift_factor: float = 0.1159
    num_groups: int = 32              # GroupNorm groups; the reference always uses 32

    def __post_init__(self):
        self.ch_mult = tuple(self.ch_mult)                # a list when read from JSON


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.nin_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention with one head over all positions of a feature map."""
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # contiguous q, k, v let PyTorch pick a kernel that never stores the (h w) x (h w) matrix
        q, k, v = [rearrange(conv(h), "B C h w -> B 1 (h w) C").contiguous()
                   for conv in (self.q, self.k, self.v)]
        out = F.scaled_dot_product_attention(q, k, v)                               # (B, 1, h w, C)
        out = rearrange(out, "B 1 (h w) C -> B C h w", h=x.shape[2])
        return x + self.proj_out(out)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))                    # like the reference, only right and bottom
        return self.conv(x)                                                       # (B, C, h/2, w/2)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)                                                         # (B, C, 2h, 2w)


class Mid(nn.Module):
    """The lowest resolution, the only one with attention."""
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks at one resolution. The encoder gives it a `downsample`, the decoder an
    `upsample`, which runs after the blocks."""
    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, groups: int):
        super().__init__()
        self.block = nn.ModuleList()
        for _ in range(num_blocks):
            self.block.append(ResnetBlock(in_channels, out_channels, groups))
            in_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> mean and log-variance of the posterior, (B, 2 z_channels, h, w)."""
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        self.conv_in = conv3x3(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        channels = config.ch
        for i, width in enumerate(widths):
            level = Level(channels, width, config.num_res_blocks, config.num_groups)
            last = i == len(widths) - 1
            level.downsample = nn.Identity() if last else Downsample(width)
            self.down.append(level)
            channels = width
        self.mid = Mid(channels, config.num_groups)
        self.norm_out = group_norm(config.num_groups, channels)
        self.conv_out = conv3x3(channels, 2 * config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)                                                          # (B, ch, H, W)
        for level in self.down:
            x = level.downsample(level(x))
        x = self.mid(x)                                                               # (B, C, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent (B, z_channels, h, w), neither shifted nor scaled -> image (B, 3, H, W)."""
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        self.conv_in = conv3x3(config.z_channels, widths[-1])
        self.mid = Mid(widths[-1], config.num_groups)
        # up[0] is the full resolution and runs last, so level i gets the channels of level i + 1
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            channels = widths[min(i + 1, len(widths) - 1)]
            level = Level(channels, width, config.num_res_blocks + 1, config.num_groups)
            level.upsample = nn.Identity() if i == 0 else Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(config.num_groups, widths[0])
        self.conv_out = conv3x3(widths[0], config.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        return self.upsample(self.mid(self.conv_in(z)))

    def upsample(self, x: Tensor) -> Tensor:
        """Everything after the attention. It is local, so support/memory.py can run it in tiles."""
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Image (B, 3, 8h, 8w) in [-1, 1] <-> latent (B, 16, h, w), shifted and scaled to about zero
    mean and unit variance."""
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, image: Tensor) -> Tensor:
        """Image -> mean and log-variance of the posterior, not shifted or scaled yet,
        (B, 2 z_channels, h, w)."""
        image = image.to(self.encoder.conv_in.weight.dtype)
        # with channels-last weights the output is not contiguous, and latents are saved to files
        return self.encoder(image).contiguous()

    def posterior(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) -> mean and standard deviation of its latent, shifted and scaled,
        (B, 2, 16, h, w) in fp32. A draw of the latent is mean + std * noise."""
        mean, logvar = self.moments(image).float().chunk(2, dim=1)
        mean = self.config.scale_factor * (mean - self.config.shift_factor)
        std = self.config.scale_factor * torch.exp(0.5 * logvar)
        return torch.stack((mean, std), dim=1)

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> latent (B, 16, H / 8, W / 8),
        the posterior's mean."""
        return self.posterior(image)[:, 0]

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (B, 16, h, w) -> image (B, 3, 8h, 8w), roughly in [-1, 1], not clamped."""
        z = latent / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))


# --------------------------------------------------------------------------------------------------
# Noise path, loss and sampler


def pack(latent: Tensor) -> Tensor:
    """Latent (B, 16, h, w), h and w even -> tokens (B, h w / 4, 64), 2 x 2 latent pixels each."""
    return rearrange(latent, "B C (h p) (w q) -> B (h w) (C p q)", p=2, q=2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, I, 64) -> latent (B, 16, height, width). Sizes are in latent pixels; one latent
    pixel is 8 x 8 image pixels."""
    return rearrange(tokens, "B (h w) (C p q) -> B C (h p) (w q)", h=height // 2, w=width // 2,
                     p=2, q=2)


def position_ids(batch: int, height: int, width: int, text_len: int,
                 device=None) -> tuple[Tensor, Tensor]:
    """RoPE positions for a latent of height x width latent pixels: image tokens (B, I, 3) are at
    (0, row, column), text tokens (B, T, 3) all at (0, 0, 0)."""
    rows, columns = height // 2, width // 2
    img_ids = torch.zeros(rows, columns, 3, device=device)
    img_ids[..., 1] = torch.arange(rows, device=device)[:, None]
    img_ids[..., 2] = torch.arange(columns, device=device)[None, :]
    img_ids = repeat(img_ids, "row column id -> B (row column) id", B=batch)
    txt_ids = torch.zeros(batch, text_len, 3, device=device)
    return img_ids, txt_ids


def get_noise(height: int, width: int, seed: int) -> Tensor:
    """The reference's initial noise (1, 16, h, w) in bf16 for an image of height x width pixels.

    It is drawn on the CPU, so it does not depend on the device, and directly in bf16: in some
    versions of PyTorch, drawing in fp32 and rounding gives other numbers. PyTorch 2.9 and 2.14 draw
    different bf16 numbers from the same seed.
    """
    h = 2 * math.ceil(height / 16)
    w = 2 * math.ceil(width / 16)
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, 16, h, w, generator=generator, dtype=torch.bfloat16)


def get_schedule(num_steps: int, image_seq_len: int, shift: bool = True) -> list[float]:
    """The sampler's num_steps + 1 times, from 1 to 0. With shift (dev, not schnell), larger images
    spend more steps at high noise."""
    t = torch.linspace(1, 0, num_steps + 1)
    if shift:
        # mu is 0.5 at 256 tokens and 1.15 at 4096, which is 256 x 256 and 1024 x 1024 pixels
        mu = 0.5 + (1.15 - 0.5) * (image_seq_len - 256) / (4096 - 256)
        t = math.exp(mu) / (math.exp(mu) + (1 / t - 1))        # t = 0 stays 0: 1 / 0 is inf
    return t.tolist()


def velocity(flux: Flux, latent: Tensor, t: Tensor, txt: Tensor, y: Tensor,
             guidance: float | Tensor) -> Tensor:
    """Velocity (B, 16, h, w) in fp32 at latents (B, 16, h, w) and times t (B,), given txt
    (B, T, context_in_dim), y (B, vec_in_dim), and guidance, one number or (B,)."""
    batch, _, height, width = latent.shape
    img_ids, txt_ids = position_ids(batch, height, width, txt.shape[1], latent.device)
    if not isinstance(guidance, Tensor):
        # torch.full runs on the GPU; copying a CPU tensor there would make the CPU wait
        guidance = torch.full((batch,), guidance, device=latent.device)
    v = flux(pack(latent), img_ids, txt, txt_ids, t, y, guidance)                       # (B, I, 64)
    return unpack(v.float(), height, width)


def sample_times(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times (B,) in (0, 1), drawn on the CPU. They are logit-normal: the sigmoid of a
    standard normal."""
    return torch.sigmoid(torch.randn(batch, generator=generator))


def flow_matching_loss(flux: Flux, latent: Tensor, noise: Tensor, t: Tensor, txt: Tensor, y: Tensor,
                       guidance: float | Tensor = 1.0, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity, one value per image (B,), in fp32.

    latent and noise (B, 16, h, w), t (B,), txt (B, T, context_in_dim), y (B, vec_in_dim). The
    network runs in its own dtype. `weight` broadcasts against the latent and scales the squared
    error. It changes what training focuses on, but not which velocity is optimal.
    """
    x_0 = latent.float()
    noise = noise.float()
    t_latent = rearrange(t, "B -> B 1 1 1").float()
    x_t = (1 - t_latent) * x_0 + t_latent * noise
    predicted = velocity(flux, x_t, t, txt, y, guidance)                             # (B, 16, h, w)
    error = (predicted - (noise - x_0)).square()
    if weight is not None:
        error = weight * error
    return error.mean(dim=(1, 2, 3))


@torch.no_grad()
def denoise(
    flux: Flux,
    noise: Tensor,                                # (B, 16, h, w), h and w even
    txt: Tensor,                                  # (B, T, context_in_dim)
    y: Tensor,                                    # (B, vec_in_dim)
    num_steps: int,
    guidance: float,                              # an input of the dev models; schnell ignores it
    neg_txt: Tensor | None = None,                # the negative prompt, as txt and y
    neg_y: Tensor | None = None,
    true_cfg: float = 1.0,
    on_step: Callable[[], object] | None = None,  # called after each step
) -> Tensor:
    """Euler steps from noise to latent (B, 16, h, w) in fp32.

    If true_cfg is not 1, each step also runs the negative prompt and extrapolates:
    v_neg + true_cfg (v - v_neg). Raises ValueError if there is no negative prompt then.
    """
    if true_cfg != 1.0 and (neg_txt is None or neg_y is None):
        raise ValueError("true_cfg other than 1 needs a negative prompt (neg_txt and neg_y)")
    batch, _, height, width = noise.shape
    times = get_schedule(num_steps, height * width // 4, shift=flux.config.guidance_embed)
    latent = noise.float()
    for t, t_next in zip(times, times[1:]):
        t_batch = torch.full((batch,), t, device=latent.device)
        v = velocity(flux, latent, t_batch, txt, y, guidance)
        if true_cfg != 1.0:
            v_neg = velocity(flux, latent, t_batch, neg_txt, neg_y, guidance)
            v = v_neg + true_cfg * (v - v_neg)
        latent = latent + (t_next - t) * v                    # t_next < t: against the velocity
        if on_step:
            on_step()
    return latent


# --------------------------------------------------------------------------------------------------
# Text


@dataclass
class TextEncoders:
    """CLIP's pooled output and T5's hidden states for prompts, as FLUX.1 uses them: padded to the
    maximum length, without a mask.

    clip and t5 are transformers' CLIPTextModel and T5EncoderModel, with their tokenizers.
    max_length is the number of T5 tokens: 512 for FLUX.1-dev, 256 for schnell.
    """
    clip: nn.Module
    clip_tokenizer: object
    t5: nn.Module
    t5_tokenizer: object
    max_length: int = 512

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids for CLIP (B, 77) and T5 (B, max_length). Longer prompts are cut off."""
        options = dict(padding="max_length", truncation=True, return_tensors="pt")
        clip_length = min(77, self.clip_tokenizer.model_max_length)
        clip = self.clip_tokenizer(prompts, max_length=clip_length, **options)
        t5 = self.t5_tokenizer(prompts, max_length=self.max_length, **options)
        return clip.input_ids, t5.input_ids

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> txt (B, T, context_in_dim) and y (B, vec_in_dim), on the encoders' device."""
        clip_ids, t5_ids = self.tokenize(prompts)
        txt = self.t5(t5_ids.to(self.t5.device)).last_hidden_state                    # (B, T, 4096)
        y = self.clip(clip_ids.to(self.t5.device)).pooler_output                          # (B, 768)
        return txt, y
