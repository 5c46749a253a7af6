"""How good is the baby? Samples captions it may have seen and faces it has not, and counts those with a face.

    python baby/check.py --out check.png

One picture for each style and background (72), at seeds of their own. MTCNN, a detector trained on photographs of real
people, says whether a sample shows a face; renders of test identities, through the autoencoder, are the ceiling.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import faces  # noqa: E402
from flux_model import find_model, load_autoencoder, load_flux  # noqa: E402
from photos import find_faces, to_image, to_tensor  # noqa: E402
from sample import decode_latent, encode_prompts, sample_latents  # noqa: E402


def scenes() -> list[tuple[str, dict, dict]]:
    """(caption, identity, scene) for every style and background, of test identities."""
    cells = []
    for i, (style, background) in enumerate((s, b) for s in faces.STYLES for b in faces.BACKGROUNDS):
        rng, who = np.random.default_rng([i, 7]), faces.identity(faces.TEST.start + 1000 + i)
        scene = faces.scene(rng, style=style, background=background)
        cells.append((faces.caption(who, scene, rng), who, scene))
    return cells


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Sample the baby in every style and background and count the faces.")
    parser.add_argument("--model", default="baby", help="baby, or a folder in the hub's layout")
    parser.add_argument("--out", type=Path, default=Path("check.png"), help="contact sheet: rows styles, columns backgrounds")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.5)
    args = parser.parse_args(argv)
    folder, cells = find_model(args.model), scenes()
    embeddings = encode_prompts(folder, [caption for caption, _, _ in cells], torch.device("cpu"), torch.float32)
    flux = load_flux(folder, dtype=torch.float32)
    autoencoder = load_autoencoder(folder, dtype=torch.float32)
    jobs = [(caption, seed) for seed, (caption, _, _) in enumerate(cells)]
    with torch.no_grad():
        samples = [decode_latent(autoencoder, latent) for latent in
                   tqdm(sample_latents(flux, embeddings, jobs, 128, 128, args.steps, args.guidance), total=len(jobs))]
        renders = [Image.fromarray(faces.render(who, scene)) for _, who, scene in cells]
        decoded = [to_image(autoencoder.decode(autoencoder.encode(to_tensor(image)[None]))[0].clamp(-1, 1)) for image in renders]
    errors = [np.square(np.float32(a) - np.float32(b)).mean() for a, b in zip(renders, decoded)]
    print(f"autoencoder on {len(renders)} renders of unseen identities: {10 * np.log10(255 ** 2 / np.mean(errors)):.1f} dB")
    print(f"{'share with a face':20} renders  autoencoder  samples")
    # 0.7 is the detector's own threshold; find_faces is stricter by default, since photos are full of things
    found = np.array([[bool(find_faces(image, threshold=0.7)) for image in column] for column in (renders, decoded, samples)])
    found = found.reshape(3, len(faces.STYLES), len(faces.BACKGROUNDS))
    for style, share in zip(faces.STYLES, found.mean(axis=2).T):
        print(f"{style:20} {share[0]:7.0%}  {share[1]:11.0%}  {share[2]:7.0%}")
    print(f"{'all':20} {found[0].mean():7.0%}  {found[1].mean():11.0%}  {found[2].mean():7.0%}   (n = {found[0].size} each)")
    columns = len(faces.BACKGROUNDS)
    sheet = Image.new("RGB", (128 * columns, 128 * len(faces.STYLES)))
    for i, image in enumerate(samples):
        sheet.paste(image, (128 * (i % columns), 128 * (i // columns)))
    sheet.save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
