"""A training and a sampling step with a LoRA on every Linear of the blocks: ours beside diffusers + peft.

    pip install diffusers peft && python -m bench.peer --model small
"""
import statistics
import sys

import support  # before torch: how its threads wait
import torch
from torch import Tensor, nn

from bench.stages import choose, interleave, options, random_inputs, spread
from flux_model import Flux, FluxConfig, denoise, flow_matching_loss, pack, position_ids
from metalora import MetaLoRA, apply_loras
from support.common import pick_device, run_script


class Peer:
    """diffusers' transformer of the same shape, random weights, peft's LoRA on every Linear of its blocks."""
    def __init__(self, config: FluxConfig, rank: int, device: torch.device, dtype: torch.dtype):
        try:
            import peft                              # no dependencies: only who compares has them
            from diffusers import FluxTransformer2DModel
        except ImportError:
            raise ValueError("the peer is not installed here: pip install diffusers peft") from None
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
        model = model.requires_grad_(False).to(device, dtype)
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


def measure(flux: Flux, image_tokens: int, text_tokens: int, rank: int, seconds: float) -> None:
    """Both steps, ours and theirs in turn. Ours has a LoRA on each of q, k, v and mlp, as theirs has."""
    weight = flux.img_in.weight
    latent, noise, t, txt, y = random_inputs(flux, 1, image_tokens, text_tokens)
    peer, adapter = Peer(flux.config, rank, weight.device, weight.dtype), MetaLoRA(flux, rank)
    identity = torch.zeros(1, dtype=torch.long)

    def step() -> None:
        adapter.assign(identity)
        flow_matching_loss(flux, latent, noise, t, txt, y).sum().backward()
        adapter.step(1e-4)

    def row(name: str, ours: object, theirs: object) -> None:
        times = interleave([ours, theirs], weight.device, seconds)
        ratio = spread([a / b for a, b in zip(*times)], 3)
        print(
            f"  {name:<26} ours {statistics.median(times[0]):.4f} s, "
            f"theirs {statistics.median(times[1]):.4f} s, "
            f"ratio {ratio}, {len(times[0])} rounds"
        )

    row("training step", step, lambda: peer.train(latent, noise, t, txt, y))
    apply_loras(flux, [(adapter.collapse(), 1.0)])
    row("sampling step, one LoRA", lambda: denoise(flux, noise, txt, y, 1, 3.5),
        lambda: peer.sample(noise, txt, y))


def compare(argv: list[str] | None = None) -> None:
    args = options("bench.peer", "Time steps with a LoRA beside diffusers + peft.").parse_args(argv)
    args.seconds = args.seconds or 10.0
    device, name = pick_device(args.device), args.model or "small"
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models, image_tokens, text_tokens, weights = choose(args, name, device)
    print(f"{name}, {weights}: torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{str(models.flux.img_in.weight.dtype)[6:]}")
    measure(models.flux, image_tokens, args.text_tokens or text_tokens, args.rank, args.seconds)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C; one line on stderr for each."""
    return run_script("bench.peer", compare, argv)


if __name__ == "__main__":
    sys.exit(main())
