"""A training step of plain LoRA on every Linear of the blocks: ours, peft's and the frozen base's, timed in
turn.

    pip install peft && python -m bench.peer --model mid
"""
import copy
import statistics
import sys

import support  # before torch: how its threads wait
import torch

from bench.stages import choose, interleave, options, random_inputs, spread
from flux_model import Flux, flow_matching_loss
from metalora import MetaLoRA
from support.checkpoints import find_targets
from support.common import pick_device, run_script


def measure_against_peft(base: Flux, image_tokens: int, text_tokens: int, rank: int, seconds: float) -> None:
    """Times a step of plain LoRA on every Linear of the blocks: ours, peft's and the frozen base's, in turn.

    Both have a LoRA of this rank on every Linear; ours has one on each of q, k, v and mlp of a fused one, so
    three or four times as much there. peft's parameters are fp32, as ours, and are trained by torch's fused
    AdamW.
    """
    try:
        import peft                                  # no dependency: only who compares has it
    except ImportError:
        raise ValueError("peft is not installed here: pip install peft") from None
    weight = base.img_in.weight
    latent, noise, t, txt, y = random_inputs(base, 1, image_tokens, text_tokens)
    inputs = latent.clone().requires_grad_(), txt.clone().requires_grad_()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    adapter, identity = MetaLoRA(ours, rank), torch.zeros(1, dtype=torch.long)
    names = sorted({target.module for target in find_targets(theirs)})
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names), theirs)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def our_step():
        adapter.assign(identity)
        flow_matching_loss(ours, latent, noise, t, txt, y).sum().backward()
        adapter.step(1e-4)

    def peft_step():
        flow_matching_loss(theirs, latent, noise, t, txt, y).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def base_step():
        torch.autograd.grad(flow_matching_loss(base, inputs[0], noise, t, inputs[1], y).mean(), inputs)
    times = interleave([our_step, peft_step, base_step], weight.device, seconds)
    for name, values in zip(("plain LoRA, ours", f"  peft {peft.__version__}", "  base alone"), times):
        print(f"  {name:<24} {spread(values, 4):>30} s")
    us, peft_, alone = (statistics.median(values) for values in times)
    print(f"    step, ours / peft {spread([a / b for a, b, _ in zip(*times)], 4):>34}     {len(times[0])} rounds\n"
          f"    cost over the base, ours / peft: {(us - alone) / (peft_ - alone):.3f}, of medians")


def compare(argv: list[str] | None = None) -> None:
    args = options("bench.peer", "Time a plain LoRA's training step beside peft's.").parse_args(argv)
    device = pick_device(args.device)
    torch.manual_seed(0)
    models, image_tokens, text_tokens, weights = choose(args, args.model or "mid", device)
    print(f"{args.model or 'mid'}, {weights}: torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{str(models.flux.img_in.weight.dtype)[6:]}")
    measure_against_peft(models.flux, image_tokens, args.text_tokens or text_tokens, args.rank, args.seconds)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C; one line on stderr for each."""
    return run_script("bench.peer", compare, argv)


if __name__ == "__main__":
    sys.exit(main())
