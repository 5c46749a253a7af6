"""A training and a sampling step with a LoRA on every Linear of the blocks: ours beside diffusers + peft, on
the same weights.

    pip install diffusers peft && python -m bench.peer --model small
"""
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial

import support  # before torch: how its threads wait
import torch
from torch import Tensor, nn

from bench.stages import Plan, Rows, choose, interleave, options, random_inputs, spread
from flux_model import Flux, denoise, flow_matching_loss, pack, position_ids
from metalora import MetaLoRA
from support.common import pick_device, run_script
from support.names import diffusers_flux_names, part_sizes


def shared_weights(flux: Flux) -> dict[str, Tensor]:
    """A Flux's parameters, adapted or not, under diffusers' names: views of the same memory."""
    found = {}
    for name, p in flux.named_parameters():
        if name.endswith(".S"):                                        # of which the weight is a view
            continue
        parts = diffusers_flux_names(name.replace(".base.", "."))
        layer = flux.get_submodule(name.rpartition(".")[0])
        sizes = part_sizes(len(parts), len(p), getattr(getattr(layer, "base", layer), "in_features", 0))
        found |= zip(parts, p.detach().split(sizes))
    for name in [name for name in found if name.startswith("norm_out.linear")]:
        found[name] = found[name].roll(len(found[name]) // 2, 0)       # diffusers has scale before shift
    return found


class Peer:
    """diffusers' transformer on the weights of a Flux, peft's LoRA on every Linear of its blocks."""
    def __init__(self, flux: Flux, rank: int):
        try:
            import peft                              # no dependencies: only who compares has them
            from diffusers import FluxTransformer2DModel
        except ImportError:
            raise ValueError("the peer is not installed here: pip install diffusers peft") from None
        config = flux.config
        with torch.device("meta"):
            model = FluxTransformer2DModel(
                in_channels=config.in_channels,
                num_layers=config.depth,
                num_single_layers=config.depth_single_blocks,
                attention_head_dim=config.hidden_size // config.num_heads,
                num_attention_heads=config.num_heads,
                joint_attention_dim=config.context_in_dim,
                pooled_projection_dim=config.vec_in_dim,
                guidance_embeds=config.guidance_embed,
                axes_dims_rope=config.axes_dim,
            )
        model.load_state_dict(shared_weights(flux), assign=True)
        model = model.requires_grad_(False).eval()
        names = [name for name, module in model.named_modules()
                 if isinstance(module, nn.Linear) and "transformer_blocks." in name]
        lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        self.model = peft.inject_adapter_in_model(lora, model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in self.trained:                       # fp32, as ours
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def velocity(self, latent: Tensor, t: Tensor, txt: Tensor, y: Tensor, guidance: float) -> Tensor:
        img_ids, txt_ids = position_ids(1, *latent.shape[2:], txt.shape[1], latent.device)
        return self.model(
            hidden_states=pack(latent).to(txt.dtype),
            encoder_hidden_states=txt,
            pooled_projections=y,
            timestep=t,
            img_ids=img_ids[0],
            txt_ids=txt_ids[0],
            return_dict=False,
            guidance=torch.full((1,), guidance, device=latent.device),
        )[0]

    def train(self, latent: Tensor, noise: Tensor, t: Tensor, txt: Tensor, y: Tensor) -> None:
        noisy = (1 - t) * latent + t * noise
        loss = (self.velocity(noisy, t, txt, y, 1.0).float() - pack(noise - latent)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sample(self, noise: Tensor, txt: Tensor, y: Tensor) -> Tensor:
        t = torch.ones(1, device=noise.device)
        return pack(noise) - self.velocity(noise, t, txt, y, 3.5).float()


def measure_peer(flux: Flux, rows: Rows, size: int, text_tokens: int, rank: int) -> None:
    """Rows for both steps, ours and theirs in turn, and how far the velocities are from each other. Ours has
    a LoRA on each of q, k, v and mlp, as theirs has."""
    adapter = MetaLoRA(flux, rank)                   # before theirs, since it moves the weights
    latent, noise, t, txt, y = random_inputs(flux, 1, (size // 16) ** 2, text_tokens)

    def step() -> None:
        adapter.assign(torch.zeros(1, dtype=torch.long))
        flow_matching_loss(flux, latent, noise, t, txt, y).sum().backward()
        adapter.step(1e-4)

    def sample() -> Tensor:
        return pack(denoise(flux, noise, txt, y, 1, 3.5))

    def distance() -> str:
        adapter.assign(torch.zeros(1, dtype=torch.long))
        start, ours, theirs = pack(noise), sample(), peer.sample(noise, txt, y)
        return f"{((ours - theirs).norm() / (theirs - start).norm()).item():.2g} of the velocity"

    def beside(ours: Callable, theirs: Callable) -> str:
        times = interleave([ours, theirs], rows.device, rows.seconds)
        ratio = spread([a / b for a, b in zip(*times)], 3)
        return (f"ours {statistics.median(times[0]):.4f} s, theirs {statistics.median(times[1]):.4f} s, "
                f"ratio {ratio}, {len(times[0])} rounds")
    peer = Peer(flux, rank)
    rows.tried(f"distance from diffusers, {size} px", distance)         # while both updates are zero
    train, draw = partial(peer.train, latent, noise, t, txt, y), partial(peer.sample, noise, txt, y)
    rows.tried(f"training step, {size} px", partial(beside, step, train))
    rows.tried(f"sampling step, {size} px, one LoRA", partial(beside, sample, draw))


def compare(argv: list[str] | None = None) -> None:
    args = options("bench.peer", "Time steps with a LoRA beside diffusers + peft.").parse_args(argv)
    device, name = pick_device(args.device), args.model or "small"
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models, image_tokens, text_tokens, dtype, weights = choose(args, name, device, Plan())
    print(f"{name}, {weights}: torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{str(dtype)[6:]}")
    size = args.resolution[0] if args.resolution else 16 * math.isqrt(image_tokens)
    rows = Rows(device, dtype, args.seconds or 10.0)
    measure_peer(models.flux(), rows, size, args.text_tokens or text_tokens, args.rank)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C; one line on stderr for each."""
    return run_script("bench.peer", compare, argv)


if __name__ == "__main__":
    sys.exit(main())
