"""How good is the baby? Samples it in every style and background and counts what came out as asked.

    python baby/check.py --out check.png

One picture for each style and background (72), each at a seed of its own, with faces it has not
seen. MTCNN, a detector trained on photographs of real people, says whether a sample shows a face;
the baby's own scorer (baby/metrics.py) picks its style among 6 and its background among 12. Renders
of test identities, passed through the autoencoder, are the ceiling. Last, how well the face
embedder tells test identities apart.
"""
import argparse
import functools
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support  # noqa: E402, F401  before torch: how its threads wait
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

import faces  # noqa: E402
from metrics import auc, pairs  # noqa: E402
from support.checkpoints import encode_prompts, load_autoencoder, load_flux  # noqa: E402
from support.checkpoints import model_defaults  # noqa: E402
from support.finding import find_model  # noqa: E402
from support.judges import Judges  # noqa: E402
from support.photos import find_faces, to_tensor  # noqa: E402
from sample import decode_latent, sample_latents  # noqa: E402
from support.common import check_out, positive, run_script, save_png  # noqa: E402


def scenes(count: int) -> list[tuple[str, dict, dict]]:
    """(caption, identity, scene) of test identities, `count` for every style and background."""
    cells = []
    for _, style, background in product(range(count), faces.STYLES, faces.BACKGROUNDS):
        index = len(cells)
        rng = np.random.default_rng([index, 7])
        who = faces.identity(faces.TEST.start + 1000 + index)
        scene = faces.scene(rng, style=style, background=background)
        cells.append((faces.caption(who, scene, rng), who, scene))
    return cells


def named(judges: Judges, images: list, cells: list) -> np.ndarray:
    """(2, n): whether the scorer names the style and the background of each picture, given the
    gender and the other of the two."""
    pictures = judges.embed_images(images)
    styles = []
    backgrounds = []
    for picture, (_, who, scene) in zip(pictures, cells):
        place = faces.BACKGROUNDS[scene["background"]]
        style = faces.STYLES[scene["style"]]
        texts = [f"{words} of a {who['gender']} {place}" for words in faces.STYLES.values()]
        best = best_text(judges, texts, picture)
        styles.append(list(faces.STYLES)[best] == scene["style"])
        texts = [f"{style} of a {who['gender']} {words}" for words in faces.BACKGROUNDS.values()]
        best = best_text(judges, texts, picture)
        backgrounds.append(list(faces.BACKGROUNDS)[best] == scene["background"])
    return np.array([styles, backgrounds])


def best_text(judges: Judges, texts: list[str], picture: torch.Tensor) -> int:
    return int((judges.embed_texts(texts) @ picture).argmax())


def verification(judges: Judges, people: int = 100, pictures: int = 4) -> tuple[float, int]:
    """AUC of "the same person?" over all pairs of photo-style pictures of test identities, and how
    many faces there were."""
    first = faces.TEST.start + 2000
    found = []
    who = []
    for person, index in product(range(people), range(pictures)):
        image, _ = faces.sample(first + person, index, style="photo")
        face = judges.embed(Image.fromarray(image))
        if face is not None:
            found.append(face)
            who.append(person)
    same, different = pairs(torch.stack(found).numpy(), np.array(who))
    return auc(same, different), len(who)


@torch.no_grad()
def draw(args: argparse.Namespace, cells: list) -> tuple[list, list, list]:
    """The renders of the cells, these decoded from their latents, and samples of their captions."""
    folder = find_model(args.model)
    captions = [caption for caption, _, _ in cells]
    embeddings = encode_prompts(folder, captions, torch.device("cpu"), torch.float32)
    flux = load_flux(folder, dtype=torch.float32)
    autoencoder = load_autoencoder(folder, dtype=torch.float32)
    guidance = model_defaults(folder)["guidance"] if args.guidance is None else args.guidance
    jobs = [(caption, seed) for seed, caption in enumerate(captions)]
    latents = sample_latents(flux, embeddings, jobs, 128, 128, args.steps, guidance, batch_size=24)
    samples = [decode_latent(autoencoder, latent) for latent in tqdm(latents, total=len(jobs))]
    renders = [Image.fromarray(faces.render(who, scene)) for _, who, scene in cells]
    pixels = [to_tensor(image)[None] for image in renders]
    decoded = [decode_latent(autoencoder, autoencoder.encode(image)) for image in pixels]
    return renders, decoded, samples


def print_shares(name: str, shares: np.ndarray, end: str = "\n"):
    """Of renders, decoded renders and samples."""
    print(f"{name:20} {shares[0]:7.0%}  {shares[1]:11.0%}  {shares[2]:7.0%}", end=end)


def report(columns: tuple[list, list, list], cells: list, judges: Judges):
    """Prints a line and two tables; columns: what `draw` returns."""
    renders, decoded, _ = columns
    errors = []
    for render, image in zip(renders, decoded):
        errors.append(np.square(np.float32(render) - np.float32(image)).mean())
    psnr = 10 * np.log10(255**2 / np.mean(errors))
    print(f"autoencoder on {len(renders)} renders of unseen identities: {psnr:.1f} dB")

    print(f"{'share with a face':20} renders  autoencoder  samples")
    found = []
    for column in columns:
        # 0.7 is the detector's own threshold; find_faces is stricter by default, since photos are
        # full of things
        found.append([bool(find_faces(image, threshold=0.7)) for image in column])
    found = np.array(found)
    by_style = found.reshape(3, -1, len(faces.STYLES), len(faces.BACKGROUNDS)).mean(axis=(1, 3))
    for style, shares in zip(faces.STYLES, by_style.T):
        print_shares(style, shares)
    print_shares("all", found.mean(axis=1), end=f"   (n = {len(cells)} each)\n")

    print(f"{'named by the scorer':20} renders  autoencoder  samples")
    hits = np.array([named(judges, column, cells).mean(axis=1) for column in columns])
    print_shares("style", hits[:, 0])
    print_shares("background", hits[:, 1])


def contact_sheet(samples: list) -> Image.Image:
    """Rows styles, columns backgrounds."""
    columns = len(faces.BACKGROUNDS)
    sheet = Image.new("RGB", (128 * columns, 128 * len(faces.STYLES)))
    for i, image in enumerate(samples[: columns * len(faces.STYLES)]):
        sheet.paste(image, (128 * (i % columns), 128 * (i // columns)))
    return sheet


def check(argv: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="baby", help="baby, or a folder in the hub's layout (default: baby)")
    sheet = "contact sheet: rows styles, columns backgrounds (default: check.png)"
    add("--out", type=Path, default=Path("check.png"), help=sheet)
    add("--steps", type=positive, default=30, help="sampling steps (default: 30)")
    add("--guidance", type=float, help="default: the model's")
    add("--each", type=positive, default=1, help="pictures per style and background (default: 1)")
    args = parser.parse_args(argv)
    check_out(args.out, ".png")
    cells = scenes(args.each)
    columns = draw(args, cells)
    judges = Judges(args.model)
    report(columns, cells, judges)
    area, count = verification(judges)
    print(f"face embedder, 100 unseen people in {count} photos: verification AUC {area:.4f}")
    save_png(contact_sheet(columns[2]), args.out)


main = functools.partial(run_script, "check.py", check)

if __name__ == "__main__":
    sys.exit(main())
