"""Stage 1's data: folders of people, captions, buckets; latents and text encoded once.

    buckets/<bucket>/<person>/<pictures, captions as folders.py says>, or faces/<person>/<pictures>, which is
    cut into buckets
"""
import collections
import gc
import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from flux_model import sample_times
from support.checkpoints import (autoencoder_fingerprint, load_autoencoder, load_text_encoders,
                                 text_fingerprints)
from support.common import JsonFile, free, note, whole
from support.folders import Captions, dead_links, unused
from support.photos import fit_to_grid, grid_size, image_files, read_photo, subfolders, to_tensor

MIN_PICTURES = 2          # of one picture M and U would learn the picture, not the person

# ----------------------------------------------------------------------------------------------------------
# The folder of people


class Picture(NamedTuple):
    path: Path
    digest: str                                  # sha256 of the file
    width: int
    height: int
    caption: str | None                          # None: --prompt


Buckets = dict[str, dict[str, list[Picture]]]            # {bucket: {person: pictures}}


def find_people(data: Path) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Folder -> ({bucket: {person: folder}}, problems). A flat folder of people is one bucket, named ""."""
    people, flat, problems = {}, {}, []
    if image_files(data):
        problems.append(f"{image_files(data)[0]} is in nobody's folder")
    problems += dead_links(data)
    for folder in subfolders(data):
        loose, inner = image_files(folder), subfolders(folder)
        if loose and not any(map(image_files, inner)):    # a person, although somebody made folders in theirs
            problems += [f"{odd} is a folder inside a person's" for odd in inner]
            inner = []
        if inner and loose:
            problems.append(f"{folder} holds people and also loose pictures, such as {loose[0].name}")
        if inner:
            problems += dead_links(folder)
            people[folder.name] = {person.name: person for person in inner}
        else:
            flat[folder.name] = folder
    if not people:
        return {"": flat} if flat else {}, problems
    for folder in flat.values():
        problems.append(f"{folder} is no bucket as the others are: it holds no people")
    for folder in (person for bucket in people.values() for person in bucket.values()):
        problems += [f"{inner} is a folder inside a person's" for inner in subfolders(folder)]
    return people, problems


def read_people(data: Path, smallest: int, known: dict, show: bool = True) -> tuple[Buckets, list[str]]:
    """Checks every file -> ({bucket: {person: [Picture]}} of what is sound, problems, one line each).

    smallest: pixels of the shortest side that can be used. known: {path: [size, mtime, digest, width,
    height]} of pictures that were decoded before; filled in.
    """
    people, problems = find_people(data)
    captions = Captions(data)

    def examine(path):
        try:
            if not path.is_file():
                read_photo(path)                 # says what it is
            status = path.stat()
            found = known.get(str(path), [])
            if found[:2] != [status.st_size, status.st_mtime_ns]:
                image = read_photo(path)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                known[str(path)] = found = [status.st_size, status.st_mtime_ns, digest, *image.size]
            if min(found[3:]) < smallest:
                raise ValueError(f"{path} is {found[3]} x {found[4]} pixels; "
                                 f"its sides must be {smallest} or more")
            return Picture(path, *found[2:], captions.of(path))
        except (ValueError, OSError) as error:
            return str(error)

    everyone = [(bucket, person, folder) for bucket in people for person, folder in people[bucket].items()]
    files = {folder: image_files(folder) for _, _, folder in everyone}
    paths = [path for folder in files for path in files[folder]]
    bar = tqdm(paths, "checking pictures", disable=None if show else True, leave=False)
    found = {path: examine(path) for path in bar}
    # a damaged metadata.jsonl is the problem of many pictures
    problems += dict.fromkeys(result for result in found.values() if isinstance(result, str))
    for line in filter(None, (unused(folder, captions) for folder in files)) if show else ():
        note(line)

    owners = collections.defaultdict(list)
    for folder, pictures in files.items():
        for path in pictures:
            if isinstance(found[path], Picture):
                owners[found[path].digest].append(path)
    for same in owners.values():
        shared = len({path.parent for path in same}) > 1         # then nobody knows whose it is
        for path in same if shared else same[1:]:
            other = next(p for p in same if p.parent != path.parent) if shared else same[0]
            problems.append(f"{path} is the same picture as {other}")
            found[path] = None
    sound = {bucket: {} for bucket in people}
    for bucket, person, folder in everyone:
        pictures = [found[path] for path in files[folder] if isinstance(found[path], Picture)]
        if len(pictures) < MIN_PICTURES:
            problems.append(f"{folder} has {len(pictures)} usable picture{'s' * (len(pictures) != 1)}; "
                            f"a person needs {MIN_PICTURES} or more")
        else:
            sound[bucket][person] = pictures
    return {bucket: members for bucket, members in sound.items() if members}, problems


def make_buckets(people: Buckets, size: int, seed: int) -> Buckets:
    """{bucket: {person: [Picture]}} -> the same; a flat one is dealt at random into buckets of about
    `size`."""
    if list(people) != [""]:
        return people
    names = sorted(people[""])
    order = np.random.default_rng(seed).permutation(len(names))
    parts = np.array_split(order, math.ceil(len(names) / size))
    return {f"{i:04d}": {names[j]: people[""][names[j]] for j in sorted(part)}
            for i, part in enumerate(parts)}


def data_fingerprint(buckets: Buckets) -> str:
    """A short hash of who is in which bucket, with which pictures and captions."""
    lines = [f"{bucket}\t{person}\t{picture.digest}\t{picture.caption}" for bucket, members in buckets.items()
             for person, pictures in members.items() for picture in pictures]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def read_buckets(data: Path, listing: Path, smallest: int, skip_bad: bool, size: int, seed: int,
                 show: bool) -> tuple[Buckets, dict]:
    """The checked folder -> its buckets, and what `listing` is to hold of its pictures for the next time.

    ValueError at anything wrong, after a line for each; with skip_bad notes, and the rest."""
    known = JsonFile(listing) if listing.exists() else {}
    people, problems = read_people(data, smallest, known, show)
    problems = [" ".join(problem.split()) for problem in problems]
    if problems and not skip_bad:
        for problem in problems[:-1]:
            print(f"meta_train.py: {problem}", file=sys.stderr)
        raise ValueError(problems[-1])
    for problem in problems if show else []:
        note(f"skipped: {problem}")
    if not people:
        raise ValueError(f"{data} holds no people with pictures")
    return make_buckets(people, size, seed), known


def tell_bare(buckets: Buckets) -> None:
    """Says how many pictures have no caption, where others have one."""
    pictures = [picture for members in buckets.values() for own in members.values() for picture in own]
    bare = sum(picture.caption is None for picture in pictures)
    if 0 < bare < len(pictures):
        print(f"{bare} of {len(pictures)} pictures have no caption of their own, and take that of --prompt")


# ----------------------------------------------------------------------------------------------------------
# Latents and text, encoded once


class Cache:
    """Latents and text embeddings on disk, named by what they are made from: picture or caption, and
    model."""
    def __init__(self, folder: Path, model: Path, device: torch.device, dtype: torch.dtype,
                 resolutions: list[int]):
        self.folder, self.model, self.device, self.dtype = folder, model, device, dtype
        self.resolutions = resolutions
        key = [autoencoder_fingerprint(model), *text_fingerprints(model), str(dtype)]
        self.key = hashlib.sha256(" ".join(key).encode()).hexdigest()[:12]

    @staticmethod
    def step(resolution: int) -> int:
        """Sides are multiples of this: 64 pixels as in the paper's trainer, less for a baby."""
        return min(64, max(16, resolution // 8 // 16 * 16))

    def sizes(self, picture: Picture) -> dict[tuple[int, int], int]:
        """{(width, height): resolution}: how a picture is seen, never larger than it is."""
        return {grid_size(picture.width, picture.height, r, self.step(r)): r for r in self.resolutions}

    def latent_path(self, picture: Picture, size: tuple[int, int]) -> Path:
        return self.folder / f"{picture.digest[:32]}-{size[0]}x{size[1]}-{self.key}.safetensors"

    def text_path(self, caption: str) -> Path:
        digest = hashlib.sha256(caption.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / f"{digest[:32]}-text-{self.key}.safetensors"

    def missing(self, pictures: list[Picture], captions: list[str]) -> tuple[list[Picture], list[str]]:
        return ([picture for picture in pictures
                 if not all(self.latent_path(picture, size).exists() for size in self.sizes(picture))],
                [caption for caption in dict.fromkeys(captions) if not self.text_path(caption).exists()])

    @torch.no_grad()
    def fill(self, pictures: list[Picture], captions: list[str], stop: Callable[[], object] | None = None,
             show: bool = True) -> None:
        """Encodes what is not there yet. The models come one after the other, and go. `stop()` may raise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures, captions = self.missing(pictures, captions)
        bar = tqdm(total=len(captions) + len(pictures), desc="encoding", disable=None if show else True,
                   leave=False)
        if captions:
            encoders = load_text_encoders(self.model, self.device, self.dtype)
            encoders.tell(captions)
            for caption in captions:
                txt, y = encoders.encode([caption])
                self.save(self.text_path(caption), {"txt": txt[0], "y": y[0]}, stop)
                bar.update()
            del encoders
            gc.collect()                         # transformers' models hold reference cycles
            free(self.device)
        if pictures:
            autoencoder = load_autoencoder(self.model, self.device, self.dtype)
            for picture in pictures:
                if hashlib.sha256(picture.path.read_bytes()).hexdigest() != picture.digest:
                    raise ValueError(f"{picture.path} has changed since it was checked")
                photo = read_photo(picture.path)
                for size, resolution in self.sizes(picture).items():
                    pixels = to_tensor(fit_to_grid(photo, resolution, self.step(resolution)))
                    posterior = autoencoder.posterior(pixels[None].to(self.device))[0]
                    self.save(self.latent_path(picture, size), {"posterior": posterior.half()}, stop)
                bar.update()
            del autoencoder
            free(self.device)
        bar.close()

    def save(self, path: Path, tensors: dict[str, Tensor], stop: Callable[[], object] | None) -> None:
        with whole(path) as part:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
        if stop:
            stop()

    def load(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged, delete it: {error}") from None


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the integers of `key` and on nothing else."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


def draw_batch(posteriors: list[Tensor], texts: list[dict[str, Tensor]],
               rng: torch.Generator) -> list[Tensor]:
    """What the cache holds of B pictures and captions -> latent (B, 16, h, w), noise, t (B,), txt (B, T, _),
    y (B, _), on the CPU. The latent is drawn anew from the posterior, as the paper's trainer does."""
    mean, deviation = torch.stack(posteriors).float().unbind(1)
    latent = mean + deviation * torch.randn(mean.shape, generator=rng)
    noise, t = torch.randn(mean.shape, generator=rng), sample_times(len(posteriors), rng)
    return [latent, noise, t, *(torch.stack([text[part] for text in texts]) for part in ("txt", "y"))]


def room_for(cache: Cache, pictures: list[Picture], captions: list[str], text_bytes: int) -> int:
    """Bytes that the cache will take beyond what is there; text_bytes: of one caption."""
    pictures, captions = cache.missing(pictures, captions)
    size = len(captions) * text_bytes
    for picture in pictures:
        # mean and deviation of 16 channels, 2 bytes each, for 8 x 8 pixels: a byte for each pixel
        size += sum(width * height for width, height in cache.sizes(picture))
    return size
