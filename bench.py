"""Seconds of a personalisation step and of a sampling step, beside those of the frozen base alone; and of a
meta-training iteration with four identities, beside one with four images of one.

    python bench.py                                 # the baby, and a random mid-size model
    python bench.py --model flux-dev --seconds 60   # or mid, baby, a folder; needs room for its weights twice
    python bench.py --identities 200 2000           # memory of meta-training by the size of the run
    python bench.py --model baby --people 16        # personalising many people together against one by one
    python bench.py --model mid --against peft      # the same layers under peft, where it is installed

Both are timed in turn, A B A B, on random inputs, after a warm-up, so that whatever else the machine does
hits both. A personalisation step is batch 1: weights of the adapter into place, forward, backward, AdamW.
Beside it: the base's forward and backward to its inputs. A sampling step is one Euler step with one LoRA
applied, beside one without.

The bound is what the base alone must compute, over the rate of a large matmul here in the same dtype, timed
between the steps. Two FLOPs per multiply-add; elementwise work, norms, RoPE and adapter count as nothing,
and so lower the share.
"""
import copy
import math
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from flux_model import (Flux, FluxConfig, Parser, denoise, find_model, flow_matching_loss, load_flux, model_defaults,
                        pick_device, pick_dtype, run_script)
from metalora import DiskBank, IdentityBank, MetaLoRA, apply_loras, find_targets, random_lomd
from personalize import people_at_once, train

MODELS = {                                                            # config, image tokens, text tokens
    "baby": (FluxConfig(vec_in_dim=64, context_in_dim=64, hidden_size=128, num_heads=4, depth=3,
                        depth_single_blocks=6, axes_dim=(8, 12, 12)), 64, 24),
    "mid": (FluxConfig(context_in_dim=768, hidden_size=768, num_heads=6, depth=4, depth_single_blocks=8),
            1024, 128)}
R1 = 16                                                                              # rows of the random LoMD


def count_flops(config: FluxConfig, image_tokens: int, text_tokens: int) -> dict[str, float]:
    """FLOPs of one image: a forward pass's "linears" and "attention"; a training "step" on a frozen base.

    The step adds the gradients of the inputs of all Linears that see tokens, and an attention backward of 2.5
    times its forward (five matmuls against two: scores are recomputed, never stored). The inputs of the
    modulation need no gradient.
    """
    both, linears, once = image_tokens + text_tokens, 0, 0
    with torch.device("meta"):
        flux = Flux(config)
    for name, module in flux.named_modules():
        if isinstance(module, nn.Linear):
            flops = 2 * module.in_features * module.out_features
            if "mod" in name or name.startswith(("time_in", "vector_in", "guidance_in")):
                once += flops                                                               # once per image
            elif name.startswith(("img_in", "final_layer")) or ".img_" in name:
                linears += flops * image_tokens
            else:
                linears += flops * (text_tokens if name == "txt_in" or ".txt_" in name else both)
    attention = (config.depth + config.depth_single_blocks) * 4 * both ** 2 * config.hidden_size
    return {"linears": linears + once, "attention": attention, "step": 2 * linears + once + 3.5 * attention}


def seconds_of(function, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize,
            "cpu": lambda: None}[device.type]
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def interleave(functions: list, device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds of each call of each function, in turn, for `seconds` or three rounds, after a warm-up."""
    for function in functions:
        function()
    rounds, spent = [], 0.0
    with tqdm(total=seconds, bar_format="{percentage:3.0f}%|{bar}| {elapsed}", leave=False,
              disable=None) as bar:                                                 # None: only on a terminal
        while spent < seconds or len(rounds) < 3:
            rounds.append([seconds_of(function, device) for function in functions])
            spent += sum(rounds[-1])
            bar.update(min(sum(rounds[-1]), seconds - bar.n))
    return [list(times) for times in zip(*rounds)]


def spread(values: list[float], digits: int) -> str:
    """Median, and in brackets the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def report(what: str, adapted, base, flops: float, weight: torch.Tensor, seconds: float, beside="  base alone") -> None:
    """Times adapted() and base() for `seconds` and prints; the bound is `flops` at the rate of a matmul."""
    n = 1024 if weight.device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=weight.device, dtype=weight.dtype) for _ in range(2))
    *times, matmuls = interleave([adapted, base, lambda: a @ b], weight.device, seconds)
    rate = 2 * n ** 3 / statistics.median(matmuls)
    for name, values in zip((what, beside), times):
        share = flops / rate / statistics.median(values)
        print(f"  {name:<24} {spread(values, 3):>30} s   {share:5.1%} of the bound")
    ratios = [a / b for a, b in zip(*times)]
    print(f"    {'ratio, pair by pair':<20} {spread(ratios, 4):>32}     {len(ratios)} pairs, "
          f"matmul {rate / 1e9:.3g} GFLOP/s")


def random_inputs(flux: Flux, batch: int, image_tokens: int, text_tokens: int) -> tuple:
    """latent, noise, t, txt, y of flow_matching_loss, for a latent as square as the number of tokens lets it be."""
    config, weight = flux.config, flux.img_in.weight
    rows = next(n for n in range(math.isqrt(image_tokens), 0, -1) if image_tokens % n == 0)
    size = (batch, config.in_channels // 4, 2 * rows, 2 * image_tokens // rows)
    like = dict(device=weight.device, dtype=weight.dtype)
    return (torch.randn(size, device=weight.device), torch.randn(size, device=weight.device),
            torch.rand(batch, device=weight.device), torch.randn(batch, text_tokens, config.context_in_dim, **like),
            torch.randn(batch, config.vec_in_dim, **like))


def measure(base: Flux, image_tokens: int, text_tokens: int, rank: int, seconds: float) -> None:
    """Times both kinds of step of a frozen model and prints them."""
    weight = base.img_in.weight
    flops = count_flops(base.config, image_tokens, text_tokens)
    forward = flops["linears"] + flops["attention"]
    parameters = sum(p.numel() for p in base.parameters())
    print(f"  {parameters / 1e6:,.1f} M parameters, {image_tokens} image + {text_tokens} text tokens, "
          f"rank {rank}, r1 {R1}; {forward:.3g} FLOP forward, {flops['step']:.3g} per training step")

    latent, noise, t, txt, y = random_inputs(base, 1, image_tokens, text_tokens)
    inputs = latent.clone().requires_grad_(), txt.clone().requires_grad_()

    flux = copy.deepcopy(base)
    adapter = MetaLoRA(flux, rank, lomd=random_lomd(find_targets(flux), R1))
    adapter.bank.weight.add_(1e-2 * torch.randn_like(adapter.bank.weight))                     # no U of zeros
    identity = torch.zeros(1, dtype=torch.long)

    def personalisation_step():
        adapter.assign(identity)
        flow_matching_loss(flux, latent, noise, t, txt, y).sum().backward()
        adapter.step(1e-4)

    def base_step():
        loss = flow_matching_loss(base, inputs[0], noise, t, inputs[1], y).mean()
        torch.autograd.grad(loss, inputs)

    report("personalisation step", personalisation_step, base_step, flops["step"], weight, seconds)
    lora = adapter.collapse()
    apply_loras(flux, [(lora, 1.0)])
    report("sampling step", lambda: denoise(flux, noise, txt, y, 1, 3.5),
           lambda: denoise(base, noise, txt, y, 1, 3.5), forward, weight, seconds)


def measure_mixing(flux: Flux, image_tokens: int, text_tokens: int, rank: int, seconds: float) -> None:
    """Times a joint iteration of meta_train.py: four identities against four images of one. Leaves `flux` adapted."""
    inputs = random_inputs(flux, 4, image_tokens, text_tokens)
    adapter = MetaLoRA(flux, rank, lomd=random_lomd(find_targets(flux), R1), num_identities=4, slots=4)
    adapter.bank.weight.add_(1e-2 * torch.randn_like(adapter.bank.weight))
    adapter.train_lomd = True

    def step(*ids):
        adapter.assign(torch.tensor(ids))
        flow_matching_loss(flux, *inputs).sum().backward()
        adapter.step(1e-4)

    flops = 4 * count_flops(flux.config, image_tokens, text_tokens)["step"]
    report("4 identities, joint step", lambda: step(0, 1, 2, 3), lambda: step(0, 0, 0, 0), flops, flux.img_in.weight, seconds,
           beside="  4 images of one")


def measure_against_peft(base: Flux, image_tokens: int, text_tokens: int, rank: int, seconds: float) -> None:
    """Times a step of plain LoRA on every Linear of the blocks: ours, peft's and the frozen base's, in turn.

    Both have a LoRA of this rank on every Linear; ours has one on each of q, k, v and mlp of a fused one, so three or four
    times as much there. peft's parameters are fp32, as ours, and are trained by torch's fused AdamW.
    """
    try:
        import peft                                  # no dependency: only who compares has it
    except ImportError:
        raise ValueError("--against peft: peft is not installed here (pip install peft)") from None
    weight = base.img_in.weight
    latent, noise, t, txt, y = random_inputs(base, 1, image_tokens, text_tokens)
    inputs = latent.clone().requires_grad_(), txt.clone().requires_grad_()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    adapter, identity = MetaLoRA(ours, rank, method="lora"), torch.zeros(1, dtype=torch.long)
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


def measure_people(flux: Flux, count: int, text_tokens: int, rank: int, seconds: float) -> None:
    """Times personalize.train on `count` people together, against one. Everybody has 15 random crops of five shapes."""
    device, lomd, config = flux.img_in.weight.device, random_lomd(find_targets(flux), R1), flux.config
    shapes = [(16, 16), (18, 14), (14, 18), (22, 12), (12, 22)]
    people = [[torch.randn(2, 2, 16, *shape, device=device) for shape in shapes * 3] for _ in range(count)]
    txt, y = (torch.randn(count, *size, device=device, dtype=flux.img_in.weight.dtype)
              for size in ((text_tokens, config.context_in_dim), (config.vec_in_dim,)))
    slots = min(count, people_at_once(flux, rank))

    def trained(people, slots):
        adapter = MetaLoRA(flux, rank, lomd=lomd, num_identities=0, slots=slots)
        row = adapter.new_row(torch.Generator().manual_seed(0))
        adapter.bank = IdentityBank(row.repeat(len(people), 1).to(device))
        train(flux, adapter, people, txt, y, 8, 1e-4)
        adapter.remove()
    together, alone = interleave([lambda: trained(people, slots), lambda: trained(people[:1], 1)], device, seconds)
    for what, times, n in ((f"{count} people, {slots} at once", together, count), ("  one alone", alone, 1)):
        print(f"  {what:<24} {spread([value / 8 / n for value in times], 4):>30} s a step and person")
    print(f"    {'one by one / together':<22} {spread([count * b / a for a, b in zip(together, alone)], 3):>30}     {len(alone)} pairs")


def private_memory(device: torch.device) -> float:
    """MB: the peak on a GPU, else what this process holds by itself (Linux), its mapped files not counted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def measure_bank(flux: Flux, rank: int, counts: list[int]) -> None:
    """Memory of meta-training by the number of identities: synthetic rows on disk, buckets of 50 opened in turn."""
    adapter = MetaLoRA(flux, rank, lomd=random_lomd(find_targets(flux), R1), num_identities=0, slots=4)
    device, size = adapter.device, sum(adapter.sizes)
    for count in counts:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with tempfile.TemporaryDirectory() as folder:
            disk = DiskBank(Path(folder) / "bank", count, size)
            for start in tqdm(range(0, count, 50), f"{count} identities", leave=False, disable=None):
                ids = list(range(start, min(start + 50, count)))
                adapter.bank = disk.read(ids, device)
                adapter.bank.weight.normal_()
                for _ in range(2):
                    adapter.bank.step(torch.arange(min(4, len(ids)), device=device), torch.randn(min(4, len(ids)), size,
                                      device=device), 1e-4)
                disk.write(ids, adapter.bank)
            print(f"  {count:>6} identities: {(Path(folder) / 'bank').stat().st_size / 1e6:9.1f} MB on disk, "
                  f"{private_memory(device):9.1f} MB in memory, the model included")


def choose(name: str, device: torch.device, dtype: torch.dtype | None) -> tuple[Flux, int, int, str]:
    """--model -> frozen model, its usual image and text tokens, and what its weights are."""
    if name not in MODELS or name == "baby" and (Path(__file__).parent / "baby" / "checkpoint").is_dir():
        folder = find_model(name)
        flux = load_flux(folder, device, dtype or pick_dtype(device, folder))
        tokens = (model_defaults(folder)["resolution"] // 16) ** 2, 512 if flux.config.guidance_embed else 256
        return flux, *(MODELS[name][1:] if name in MODELS else tokens), "its own weights"
    config, *tokens = MODELS[name]
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    return Flux(config).requires_grad_(False).to(device, dtype), *tokens, "random weights"


def positive(kind):
    def convert(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value
    convert.__name__ = f"positive {kind.__name__}"                                    # for argparse's message
    return convert


def bench(argv=None) -> None:
    parser = Parser(prog="bench.py", allow_abbrev=False,
                    description="Time personalisation and sampling steps against the frozen base alone.")
    add = parser.add_argument
    add("--model", help="baby, mid (random weights), flux-dev, flux-schnell, a folder (default: baby, mid)")
    add("--seconds", type=positive(float), default=10.0, help="time for each kind of step (default: 10)")
    add("--tokens", type=positive(int), help="image tokens, width x height / 256 (default: the model's own)")
    add("--text-tokens", type=positive(int), help="text tokens (default: the model's usual)")
    add("--rank", type=positive(int), default=1, help="rank of the adapter (default: 1)")
    add("--identities", type=positive(int), nargs="+", metavar="N", help="memory of meta-training with N identities instead")
    add("--people", type=positive(int), metavar="N", help="speed of personalising N people together instead")
    add("--against", choices=("peft",), help="speed of a plain LoRA's step beside another library's, where it is installed, instead")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen base (default: by the device)")
    add("--threads", type=positive(int), help="CPU threads (default: torch's choice)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name in [args.model] if args.model else MODELS:
        flux, image_tokens, text_tokens, weights = choose(name, device, args.dtype and getattr(torch, args.dtype))
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print(f"{name}, {weights}: torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, "
              f"{str(flux.img_in.weight.dtype)[6:]}")
        if args.identities:
            measure_bank(flux, args.rank, args.identities)
            continue
        if args.against:
            measure_against_peft(flux, args.tokens or image_tokens, args.text_tokens or text_tokens, args.rank, args.seconds)
            continue
        if args.people:
            measure_people(flux, args.people, args.text_tokens or text_tokens, args.rank, args.seconds)
            continue
        tokens = args.tokens or image_tokens, args.text_tokens or text_tokens
        measure(flux, *tokens, args.rank, args.seconds)
        measure_mixing(flux, *tokens, args.rank, args.seconds)


def main(argv=None) -> int:
    """Exit code: 0 done, 1 failed while computing, 2 bad input, 130 Ctrl-C; one line on stderr for each."""
    return run_script("bench.py", bench, argv)


if __name__ == "__main__":
    sys.exit(main())
