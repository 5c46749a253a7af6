"""How good is the baby? Samples captions it may have seen and faces it has not: how many show a face, and what was asked?

    python baby/check.py --out check.png

One picture for each style and background (72), at seeds of their own. MTCNN, a detector trained on photographs of real
people, says whether a sample shows a face; the baby's own scorer (baby/metrics.py) picks its style among 6 and its
background among 12. Renders of test identities, through the autoencoder, are the ceiling. And the face embedder tells
test identities apart.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support  # noqa: E402, F401  before torch: how its threads wait
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

import faces  # noqa: E402
from metrics import auc, pairs  # noqa: E402
from support.checkpoints import encode_prompts, find_model, load_autoencoder, load_flux, model_defaults  # noqa: E402
from eval_rfacesim import Judges  # noqa: E402
from support.photos import find_faces, to_image, to_tensor  # noqa: E402
from sample import decode_latent, sample_latents  # noqa: E402
from support.common import save_png  # noqa: E402


def scenes(each: int) -> list[tuple[str, dict, dict]]:
    """(caption, identity, scene), `each` for every style and background, of test identities."""
    cells = []
    for i, (_, style, background) in enumerate((n, s, b) for n in range(each) for s in faces.STYLES for b in faces.BACKGROUNDS):
        rng, who = np.random.default_rng([i, 7]), faces.identity(faces.TEST.start + 1000 + i)
        scene = faces.scene(rng, style=style, background=background)
        cells.append((faces.caption(who, scene, rng), who, scene))
    return cells


def named(judges: Judges, images: list, cells: list) -> tuple[np.ndarray, np.ndarray]:
    """Whether the scorer names the style and the background of each picture, the other one and the gender given."""
    pictures, right = judges.embed_images(images), []
    for picture, (_, who, scene) in zip(pictures, cells):
        hits = []
        for kind, every in (("style", faces.STYLES), ("background", faces.BACKGROUNDS)):
            own = [{"style": scene["style"], "background": scene["background"], kind: name} for name in every]
            texts = [f"{faces.STYLES[o['style']]} of a {who['gender']} {faces.BACKGROUNDS[o['background']]}" for o in own]
            hits.append(list(every)[int((judges.embed_texts(texts) @ picture).argmax())] == scene[kind])
        right.append(hits)
    return np.array(right).T


def verification(judges: Judges, people: int = 100, pictures: int = 4) -> tuple[float, int]:
    """AUC of "the same person?" over all pairs of photo-style pictures of test identities, and how many faces there were."""
    first = faces.TEST.start + 2000
    crops = [(p, judges.crop(Image.fromarray(faces.sample(first + p, i, style="photo")[0]))) for p in range(people) for i in range(pictures)]
    who, found = zip(*((p, crop) for p, crop in crops if crop is not None))
    return auc(*pairs(judges.embed(list(found)).numpy(), np.array(who))), len(who)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Sample the baby in every style and background and count the faces.")
    parser.add_argument("--model", default="baby", help="baby, or a folder in the hub's layout")
    parser.add_argument("--out", type=Path, default=Path("check.png"), help="contact sheet: rows styles, columns backgrounds")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--each", type=int, default=1, help="pictures for each style and background (default: 1)")
    args = parser.parse_args(argv)
    folder, cells = find_model(args.model), scenes(args.each)
    guidance = model_defaults(folder)["guidance"] if args.guidance is None else args.guidance
    embeddings = encode_prompts(folder, [caption for caption, _, _ in cells], torch.device("cpu"), torch.float32)
    flux = load_flux(folder, dtype=torch.float32)
    autoencoder = load_autoencoder(folder, dtype=torch.float32)
    jobs = [(caption, seed) for seed, (caption, _, _) in enumerate(cells)]
    with torch.no_grad():
        samples = [decode_latent(autoencoder, latent) for latent in
                   tqdm(sample_latents(flux, embeddings, jobs, 128, 128, args.steps, guidance, batch_size=24), total=len(jobs))]
        renders = [Image.fromarray(faces.render(who, scene)) for _, who, scene in cells]
        decoded = [to_image(autoencoder.decode(autoencoder.encode(to_tensor(image)[None]))[0].clamp(-1, 1)) for image in renders]
    errors = [np.square(np.float32(a) - np.float32(b)).mean() for a, b in zip(renders, decoded)]
    print(f"autoencoder on {len(renders)} renders of unseen identities: {10 * np.log10(255 ** 2 / np.mean(errors)):.1f} dB")
    print(f"{'share with a face':20} renders  autoencoder  samples")
    # 0.7 is the detector's own threshold; find_faces is stricter by default, since photos are full of things
    found = np.array([[bool(find_faces(image, threshold=0.7)) for image in column] for column in (renders, decoded, samples)])
    found = found.reshape(3, args.each, len(faces.STYLES), -1)
    for style, share in zip(faces.STYLES, found.mean(axis=(1, 3)).T):
        print(f"{style:20} {share[0]:7.0%}  {share[1]:11.0%}  {share[2]:7.0%}")
    print(f"{'all':20} {found[0].mean():7.0%}  {found[1].mean():11.0%}  {found[2].mean():7.0%}   (n = {found[0].size} each)")
    judges = Judges(args.model)
    print(f"{'named by the scorer':20} renders  autoencoder  samples")
    hits = np.array([named(judges, column, cells) for column in (renders, decoded, samples)]).mean(axis=2)
    for kind, share in zip(("style", "background"), hits.T):
        print(f"{kind:20} {share[0]:7.0%}  {share[1]:11.0%}  {share[2]:7.0%}")
    area, count = verification(judges)
    print(f"face embedder, 100 unseen people in {count} photos: verification AUC {area:.4f}")
    columns = len(faces.BACKGROUNDS)
    sheet = Image.new("RGB", (128 * columns, 128 * len(faces.STYLES)))
    for i, image in enumerate(samples[:columns * len(faces.STYLES)]):
        sheet.paste(image, (128 * (i % columns), 128 * (i // columns)))
    save_png(sheet, args.out, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
