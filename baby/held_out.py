"""Does a meta-trained LoMD help with people it has never seen? Stage 2 on one photo each, the loss on their other ones.

    python baby/faces.py --identities 200 --images 10 --out faces/ --seed 100000
    python meta_train.py --data faces/ --model baby --iters 5000 --lr 2e-3
    python baby/held_out.py lomd.safetensors --out held_out.png

For each person personalize.py's own training runs twice, over the learned LoMD and over a random one of the same shape:
same photo, crops, seeds and learning rate. Along the way the flow-matching loss is taken on other pictures of the
person, at noise and times that are the same for both and for every step. Results are kept beside --out as .json, so that
the same command goes on where it was stopped.
"""
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import faces  # noqa: E402
from flux_model import (Parser, find_model, flow_matching_loss, load_autoencoder, load_flux, load_text_encoders,  # noqa: E402
                        model_defaults, positive, run_script)
from meta_train import save_figure  # noqa: E402
from metalora import MetaLoRA, find_targets, load_lomd, random_lomd  # noqa: E402
from personalize import encode_crops, load_crops, train  # noqa: E402
from photos import to_tensor  # noqa: E402

STEPS = (0, 10, 25, 50, 75, 100, 150, 200, 250, 300, 375)
TIMES = 8                                                     # times and noises for each of the other pictures


@torch.no_grad()
def others_of(person: int, count: int, autoencoder, encoders) -> dict:
    """Noise, latents, times and captions of a person's other pictures: what the loss is taken on, the same each time."""
    drawn = [faces.sample(person, 100 + i) for i in range(count)]
    latents = autoencoder.encode(torch.stack([to_tensor(Image.fromarray(image)) for image, _ in drawn]))
    txt, y = encoders.encode([caption for _, caption in drawn])
    generator = torch.Generator().manual_seed(person)
    repeat = lambda x: x.repeat_interleave(TIMES, dim=0)
    return dict(latent=repeat(latents), noise=torch.randn(count * TIMES, *latents.shape[1:], generator=generator),
                t=(torch.arange(TIMES) + 0.5).div(TIMES).repeat(count), txt=repeat(txt), y=repeat(y))


def losses_of(person: int, lomd: dict, folder: Path, others: dict, rank: int, lr: float, seed: int, shared: dict) -> list:
    """Stage 2 on one photo of a person -> the loss on the others at each of STEPS."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "face.png"
        Image.fromarray(faces.sample(person, 0, 384, 384, style="photo", yaw=0)[0]).save(path)
        crops = load_crops([path], [shared["resolution"]], True, shared["aspects"], shared["scales"])
    latents, weights = encode_crops(shared["autoencoder"], crops, shared["background"], shared["mirror"])
    flux = load_flux(folder, dtype=torch.float32)
    adapter, losses = MetaLoRA(flux, rank, lomd=lomd, seed=seed), []

    @torch.no_grad()
    def look(step, *_):
        if step in STEPS:
            adapter.assign(torch.zeros(len(others["t"]), dtype=torch.long))
            losses.append(flow_matching_loss(flux, **others).mean().item())

    look(0)
    train(flux, adapter, [latents], *shared["text"], STEPS[-1], lr, seed=seed, on_step=look, weights=[weights])
    return losses


def summary(results: dict, kinds: list[str], people: list[int]) -> dict:
    """{kind: (mean over people (STEPS,), its standard error, each person's (people, STEPS))}: change since step 0 in %."""
    found = {}
    for kind in kinds:
        values = np.array([results[f"{kind} {person}"] for person in people])
        relative = 100 * (values / values[:, :1] - 1)
        found[kind] = relative.mean(axis=0), relative.std(axis=0, ddof=1) / len(people) ** 0.5, relative
    return found


def draw(found: dict, path: Path, title: str):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, (mean, error, _) in found.items():
        axes.errorbar(STEPS, mean, error, label=f"{kind} LoMD", capsize=3, marker="o", markersize=3)
    axes.axhline(found["random"][0][-1], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step of stage 2", ylabel="loss on other pictures, change in %", title=title)
    axes.legend()
    save_figure(figure, path)


def held_out(argv=None):
    parser = Parser(prog="held_out.py", description="Learned against random LoMD on people never seen.", allow_abbrev=False)
    add = parser.add_argument
    add("lomd", type=Path, help="of meta_train.py")
    add("--model", default="baby")
    add("--people", type=positive, default=16)
    add("--first", type=int, default=faces.TEST.start + 100, help="seed of the first person; settings are chosen on "
        f"{faces.CHOOSE.start} and up, reported are {faces.TEST.start} and up")
    add("--pictures", type=positive, default=8, help="other pictures of each person")
    add("--rank", type=positive, default=1)
    add("--lr", type=float, default=1e-4, help="of stage 2 (default: 1e-4; of 1e-4, 3e-4 and 1e-3 the one at which a random "
        "LoMD brings the loss lowest)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("held_out.png"))
    args = parser.parse_args(argv)
    folder, (learned, _) = find_model(args.model), load_lomd(args.lomd)
    defaults, kept = model_defaults(folder), args.out.with_suffix(".json")
    flux = load_flux(folder, dtype=torch.float32)
    lomds = {"random": random_lomd(find_targets(flux), len(next(iter(learned.values()))), args.seed), "learned": learned}
    encoders = load_text_encoders(folder, dtype=torch.float32)
    shared = defaults | {"autoencoder": load_autoencoder(folder, dtype=torch.float32), "text": encoders.encode([defaults["prompt"]])}
    people = list(range(args.first, args.first + args.people))
    settings = f"{args.lomd.resolve()} {args.lomd.stat().st_mtime_ns} rank {args.rank} lr {args.lr:g} seed {args.seed} pictures {args.pictures}"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    if results.get("settings") != settings:
        results = {"settings": settings, "steps": STEPS}
    for person in tqdm(people, "people"):
        others = None
        for kind, lomd in lomds.items():
            if f"{kind} {person}" not in results:
                others = others or others_of(person, args.pictures, shared["autoencoder"], encoders)
                results[f"{kind} {person}"] = losses_of(person, lomd, folder, others, args.rank, args.lr, args.seed, shared)
                kept.with_name(kept.name + ".part").write_text(json.dumps(results))
                os.replace(kept.with_name(kept.name + ".part"), kept)
    found = summary(results, list(lomds), people)
    print(f"change of the loss on {args.pictures} other pictures in %, mean (standard error) of {len(people)} people")
    print(f"{'step':>5} {'random':>18} {'learned':>18} {'difference':>18}")
    gap = found["learned"][2] - found["random"][2]
    for i, step in enumerate(STEPS):
        cells = [f"{m:8.2f} ({e:.2f})" for m, e in [(found[k][0][i], found[k][1][i]) for k in lomds]
                 + [(gap[:, i].mean(), gap[:, i].std(ddof=1) / len(people) ** 0.5)]]
        print(f"{step:>5} {cells[0]:>18} {cells[1]:>18} {cells[2]:>18}")
    reached = [step for step, value in zip(STEPS, found["learned"][0]) if value <= found["random"][0][-1]]
    print(f"what the random one has at step {STEPS[-1]} the learned one has " + (f"by step {reached[0]}" if reached else "never"))
    draw(found, args.out, f"{len(people)} people never seen, rank {args.rank}, lr {args.lr:g}")


if __name__ == "__main__":
    sys.exit(run_script("held_out.py", held_out))
