"""Folders of people, for stage 1 and the evaluation: who is in them, their pictures and captions.

Also the latents and text embeddings of stage 1, which are encoded once.

    buckets/<bucket>/<person>/<pictures>      stage 1; a flat faces/<person>/ is split into buckets
    people/[man|woman/]<person>/<pictures>    the evaluation; or one picture per person, no folders

Captions are found where trainers look for them: a.txt or kohya's a.caption beside a.png, or
a.png.txt; else in the picture's line of the metadata.jsonl of a data set from the Hugging Face Hub.
"""
import collections
import csv
import gc
import hashlib
import io
import itertools
import json
import math
import re
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoints import load_autoencoder, load_text_encoders, part_fingerprints
from support.common import (JsonFile, Problems, check_readable, digest, encodable, expand, free,
                            note, progress, read_text, whole, write_whole)
from support.names import first_match
from support.photos import (SUFFIXES, grid_size, image_files, read_photo, subfolders,
                            to_tensor, visible)
from support.text import check_prompts

CAPTIONS = ".txt", ".caption"                    # a.txt counts if there are both
METADATA = "metadata.jsonl", "metadata.csv"      # "file_name" from its folder, "text": caption
GENDERS = dict(man="man", men="man", male="man", woman="woman", women="woman", female="woman")
# file names of FLUXSynID: person, gender, and which picture it is: 0123456789ab_f_live_0_e_d1.jpg
SYNTHETIC_CAPTIONS = {
    "a photo of a woman": r"^[0-9a-f]{12}_f[_.]",
    "a photo of a man": r"^[0-9a-f]{12}_m[_.]",
    "a photo of a person": r"^[0-9a-f]{12}_nb[_.]",
}
SYNTHETIC_ATTRIBUTES = "[0-9a-f]" * 12 + "_*.json"
MIN_PICTURES = 2                                 # from one, M and U would learn the picture itself

# --------------------------------------------------------------------------------------------------
# Captions


class Captions:
    """The captions of the pictures in `folders`, inner folders last; `used` are the files read.

    ValueError if a table of METADATA cannot be used."""
    def __init__(self, folders: Iterable[Path]):
        self.used = set()
        self.files = {}                          # {a picture, or its path without suffix: a file}
        self.tables = {}                         # {a picture: (its text, the table)}
        for folder in folders:
            for path in visible(folder):
                if path.name in METADATA:
                    for picture, text in read_metadata(path).items():
                        self.tables[picture] = text, path
                elif path.suffix.lower() in CAPTIONS:
                    self.files[path.with_suffix("")] = path  # a.txt is sorted after a.caption

    def of(self, picture: Path) -> str | None:
        """The caption, None without one. ValueError if it is empty or not UTF-8."""
        file = self.files.get(picture.with_suffix("")) or self.files.get(picture)
        text, table = self.tables.get(picture, (None, None))
        source = file or table
        if source is None:
            return first_match(SYNTHETIC_CAPTIONS, [picture.name])[0] or None
        self.used.add(source)
        if file:
            text = read_text(file)
        caption = " ".join(text.split())
        if not caption:
            raise ValueError(f"{source} is empty for {picture.name}")
        if caption != encodable(caption):
            raise ValueError(f"{source}: the caption of {picture.name} is not text in UTF-8")
        return caption


def read_metadata(path: Path) -> dict[Path, str]:
    """{picture: caption} of one of METADATA. ValueError names the line that cannot be used."""
    table = {}
    row = None
    content = read_text(path)
    lines = content.split("\n")
    if path.suffix == ".csv":                    # as lines of JSON; "" stands for the header
        reader = csv.DictReader(io.StringIO(content), strict=True)
        try:
            lines = ["", *map(json.dumps, reader)]
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                picture = path.parent / row["file_name"]
                text = row.get("text")
                if not isinstance(text, str | None) or "null" in row:
                    raise TypeError              # "null": more columns than the header has
            except (ValueError, TypeError, KeyError):
                raise ValueError(f'{path}, line {number}, is not {{"file_name": ..., '
                                 '"text": ...}') from None
            if text is not None:
                table[picture] = text
    if row and not table:
        raise ValueError(f'{path} has no captions: they are its fields "text", and it has '
                         f'{", ".join(row)}')
    return table


def named_photos(names: list[str]) -> list[Path]:
    """Photos of one person, from files, patterns and folders. ValueError if a folder has none."""
    found = []
    for name in map(Path, expand(names)):
        if name.is_dir():
            inside = image_files(name)
            if not inside:
                raise ValueError(f"{name} is a folder without a picture")
            captions = Captions([name])
            for path in inside:
                captions.of(path)
            tell(tell_unused(name, captions, inside=[]))
            found += inside
        else:
            found.append(name)
    return found


def captions_beside(pictures: list[Path], prompt: str) -> dict[Path, str]:
    """The caption beside each picture, else `prompt`. ValueError as in Captions."""
    captions = Captions(sorted({path.parent for path in pictures}))
    return {path: captions.of(path) or prompt for path in pictures}


# --------------------------------------------------------------------------------------------------
# The files of a folder


class Photo(NamedTuple):
    """A picture of a data folder that can be read."""
    path: Path
    digest: str                                  # sha256 of the file
    width: int
    height: int
    caption: str | None                          # None: --prompt
    pixels: str = ""                             # digest: the same in a copy, whatever its format


def check_photos(
    paths: Iterable[Path],
    captions: Captions,
    known: dict,
    smallest: int = 0,
) -> tuple[list[Photo], list[str]]:
    """The usable pictures, without copies, and a line for each of the others.

    smallest: pixels that the shorter side must have. known: {path, bytes and time of a file: the
    fields of its Photo} of pictures that were decoded before; those decoded now are added."""
    found = []
    problems = []
    for path in paths:
        try:
            if not path.is_file():
                read_photo(path)                 # its error says what the path is
            status = path.stat()
            state = f"{path} {status.st_size} {status.st_mtime_ns}"
            if state not in known:
                image = read_photo(path)
                known[state] = {
                    "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "width": image.width,
                    "height": image.height,
                    "pixels": digest(image.tobytes()),
                }
            photo = Photo(path, caption=captions.of(path), **known[state])
            if min(photo.width, photo.height) < smallest:
                raise ValueError(f"{path} is {photo.width} x {photo.height} pixels; its sides must "
                                 f"be {smallest} or more")
            found.append(photo)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    copies = find_copies(found)
    return [photo for photo in found if photo.path not in copies], [*problems, *copies.values()]


def find_copies(photos: list[Photo]) -> dict[Path, str]:
    """{copy: a line that names it}. If several folders have one, all are copies: whose is it?"""
    copies = {}
    alike = collections.defaultdict(list)
    for photo in photos:
        alike[photo.width, photo.height, photo.pixels].append(photo.path)
    for same in alike.values():
        for path in same:
            others = [other for other in same if other.parent != path.parent]
            if others or path != same[0]:
                copies[path] = f"{path} is the same picture as {(others or same)[0]}"
    return copies


def tell_unused(folder: Path, captions: Captions, inside: Collection[Path]) -> list[str]:
    """Names what in `folder` is neither a picture, a caption, nor one of the folders `inside`.

    Returns a line for each dead link, except to a picture, which its reader names."""
    pictures = set(image_files(folder))
    names = []
    dead = []
    for path in visible(folder):
        if path in pictures or path in inside or path in captions.used:
            continue
        if path.exists():
            names.append(path.name + "/" * path.is_dir())
        else:
            dead.append(f"{path} is a dead link")
    if names:
        note(f"{folder}: not used, since neither a picture nor the caption of one: "
             f"{', '.join(names)}")
    return dead


def tell(problems: list[str], start: str = ""):
    """A note for each problem."""
    for problem in problems:
        note(start + " ".join(problem.split()))


def complain(problems: list[str]):
    """Raises Problems, if there are any."""
    if problems:
        raise Problems(*problems)


# --------------------------------------------------------------------------------------------------
# The evaluation: identities with their real pictures


class Person(NamedTuple):
    name: str                                    # the identity; with --reference all: anna@02
    identity: str
    gender: str | None
    reference: Path
    tests: tuple[Path, ...]                      # never the reference; empty: CLIP-T only
    more: tuple[Path, ...] = ()                  # further references: for the method, never a test
    captions: tuple[str | None, ...] = ()        # of the reference and of `more`


def find_identities(folder: Path) -> list[tuple[Path, str | None, list[Path]]]:
    """A folder of --data -> [(a person's folder, or their picture's path without its suffix, gender
    or None, pictures)]."""
    inside = subfolders(folder)
    genders = [sub for sub in inside if sub.name.lower() in GENDERS]
    if genders and (genders != inside or image_files(folder)):
        raise ValueError(f"{folder} holds {genders[0].name}/ and others: sort all by gender, or "
                         "none")
    found = []
    for parent in genders or [folder]:
        people = subfolders(parent)
        loose = image_files(parent)
        if bool(people) == bool(loose):
            raise ValueError(f"{parent} must hold a folder for each person, or one picture for "
                             f"each: it holds {'both' if people else 'neither'}")
        gender = GENDERS.get(parent.name.lower())
        found += [(person, gender, image_files(person)) for person in people]
        found += [(path.with_suffix(""), gender, [path]) for path in loose]
    return found


def read_people(
    folders: list[Path],
    reference: str = "first",
    gender: str | None = None,
    count: int = 1,
) -> list[Person]:
    """Identities of the folders, in order; photos among them are all of one identity, `person`.

    reference: "first" by name (or the one called reference.*), or "all", each in turn. count: how
    many references the method gets, the further ones next by name. Gender: by the folder above,
    else by a caption, else `gender`.

    ValueError, after a line for each problem: an unreadable picture, a picture twice, too few
    pictures of an identity, two identities of one name."""
    photos = {}                                  # an ordered set, as is the next
    places = {}                                  # folders of people, then people's own
    identities = []
    for folder in folders:
        if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
            photos[folder] = None
        else:
            found = find_identities(folder)
            identities += found
            places |= dict.fromkeys([folder, *(place.parent for place, _, _ in found)])
    own = {place: None for place, _, _ in identities if place.is_dir()}
    places |= own
    if photos:
        identities.append((Path("person"), None, list(photos)))

    captions = Captions([*places, *(photo.parent for photo in photos)])
    every = itertools.chain.from_iterable(paths for _, _, paths in identities)
    sound, problems = check_photos(every, captions, {})
    texts = {photo.path: photo.caption for photo in sound}
    persons = []
    for place, sex, paths in identities:
        name = unicodedata.normalize("NFC", place.name)      # macOS may spell it NFD
        if name in [person.identity for person in persons]:
            problems.append(f"{place}: another identity has the name {name} already")
        if place in own and len(paths) <= count:
            problems.append(f"{place} has {len(paths)} pictures: R-FaceSim needs {count} as "
                            "reference and at least one other")
        sex = sex or gender_of(map(texts.get, paths)) or gender
        persons += persons_of(name, sex, paths, texts, reference, count)
    for folder in places:
        problems += tell_unused(folder, captions, places)
    complain(problems)
    return persons


def persons_of(
    name: str,
    gender: str | None,
    paths: list[Path],
    captions: dict[Path, str | None],
    reference: str,
    count: int,
) -> list[Person]:
    """An identity, once for each of its references."""
    named = [path for path in paths if path.stem == "reference"]
    references = paths if reference == "all" else [*named, *paths][:1]
    stems = [path.stem for path in paths]
    persons = []
    for path in references:
        at = paths.index(path)
        others = paths[at + 1:] + paths[:at]
        more = tuple(others[:count - 1])
        own = path.stem if stems.count(path.stem) == 1 else path.name    # a.jpg and a.png
        own = unicodedata.normalize("NFC", own)
        persons.append(Person(
            name=f"{name}@{own}" if len(references) > 1 else name,
            identity=name,
            gender=gender,
            reference=path,
            tests=tuple(sorted(others[count - 1:])),
            more=more,
            captions=tuple(map(captions.get, (path, *more))),
        ))
    return persons


def gender_of(captions: Iterable[str | None]) -> str | None:
    """As the first caption says that has words for one gender only."""
    for caption in captions:
        words = re.findall(r"[a-z]+", (caption or "").lower())
        genders = {GENDERS[word] for word in words if word in GENDERS}
        if len(genders) == 1:
            return genders.pop()
    return None


def fill(prompt: str, gender: str | None) -> str | None:
    """A prompt with [man/woman] filled in; None for one of the other gender, as in `man: ...`."""
    only, colon, rest = prompt.partition(":")
    slots = r"\[([^][/]*)/([^][/]*)\]"
    only_one = colon and only in ("man", "woman")
    if gender is None and (only_one or re.search(slots, prompt)):
        raise ValueError(f"the prompt {prompt!r} depends on the gender: sort the people into man/ "
                         "and woman/, or give --gender")
    if only_one:
        return fill(rest.strip(), gender) if only == gender else None
    word = r"\1" if gender == "man" else r"\2"
    return re.sub(slots, word, prompt)


# --------------------------------------------------------------------------------------------------
# Stage 1: buckets of people

Buckets = dict[str, dict[str, list[Photo]]]              # {bucket: {person: pictures}}


def find_people(data: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Folder -> ([(bucket, a person's folder)], problems). Without buckets they are called ""."""
    people = []
    flat = []
    problems = [f"{path} is in nobody's folder" for path in image_files(data)[:1]]
    for folder in subfolders(data):
        loose = image_files(folder)
        inner = subfolders(folder)
        if inner and (not loose or any(map(image_files, inner))):
            people += [(folder.name, person) for person in inner]
            problems += [f"{folder} holds people and also loose pictures, such as {path.name}"
                         for path in loose[:1]]
        elif loose or not visible(folder):
            flat.append(("", folder))
        else:
            note(f"{folder} holds no pictures, and so is not a person")
    if people:
        problems += [f"{folder} is not a bucket as the others are: it holds no people"
                     for _, folder in flat]
    people = people or flat
    for _, folder in people:
        problems += [f"{inner} is a folder inside a person's" for inner in subfolders(folder)]
    return people, problems


def check_people(
    data: Path,
    smallest: int,
    known: dict,
    number: int | None = None,
    seed: int = 0,
) -> tuple[Buckets, list[str]]:
    """Checks every file -> ({bucket: {person: [Photo]}} of the usable, a line for each problem).

    smallest, known: as in `check_photos`. number: how many people the seed draws; None is all."""
    everyone, problems = find_people(data)
    if number and number > len(everyone):
        note(f"--people {number}: there are {len(everyone)}")
    drawn = np.random.default_rng(seed).permutation(len(everyone))[:number]
    people = [everyone[i] for i in sorted(drawn)]
    folders = [folder for _, folder in people]
    places = dict.fromkeys([data, *(folder.parent for folder in folders), *folders])
    captions = Captions(places)
    paths = []
    for folder in folders:
        paths += image_files(folder)
    bar = progress(paths, "checking pictures")
    photos, wrong = check_photos(bar, captions, known, smallest)
    problems += wrong

    attributes = list(data.rglob(SYNTHETIC_ATTRIBUTES))
    if attributes:
        note(f"{data}: {len(attributes)} .json files are not read, such as {min(attributes)}")
    captions.used.update(attributes)
    for place in places:
        problems += tell_unused(place, captions, set(subfolders(place)))

    photos_in = collections.defaultdict(list)
    for photo in photos:
        photos_in[photo.path.parent].append(photo)
    buckets = collections.defaultdict(dict)
    for bucket, folder in people:
        usable = len(photos_in[folder])
        if usable < MIN_PICTURES:
            problems.append(f"{folder} has {usable} usable picture{'s' * (usable != 1)}; "
                            f"a person needs {MIN_PICTURES} or more")
        else:
            buckets[bucket][folder.name] = photos_in[folder]
    return buckets, problems


def make_buckets(people: Buckets, size: int, seed: int) -> Buckets:
    """Buckets as they are; a flat folder is split at random into buckets of about `size` people."""
    if "" not in people:
        return people
    everyone = sorted(people[""].items())
    order = np.random.default_rng(seed).permutation(len(everyone))
    parts = np.array_split(order, math.ceil(len(everyone) / size))
    buckets = {}
    for i, part in enumerate(parts):
        buckets[f"{i:04d}"] = dict(everyone[j] for j in sorted(part))
    return buckets


def data_fingerprint(buckets: Buckets) -> str:
    """A short hash of who is in which bucket, with which pictures and captions."""
    lines = []
    for bucket, members in buckets.items():
        for person, pictures in members.items():
            for photo in pictures:
                lines.append(f"{bucket}\t{person}\t{photo.digest}\t{photo.caption}")
    return digest("\n".join(lines).encode("utf-8", "surrogateescape"))


def read_buckets(args: Namespace) -> Buckets:
    """Checks --data -> its buckets. pictures.json of the run remembers what was decoded, however
    this ends.

    Problems lists what is wrong; with --skip-bad it is notes, and the rest is used."""
    listing = args.run / "pictures.json"
    known = JsonFile(listing) if listing.exists() else {}
    before = len(known)
    smallest = max(map(Cache.step, args.resolution))
    try:
        people, problems = check_people(args.data, smallest, known, args.people, args.seed)
    finally:
        if len(known) > before:
            write_whole(listing, json.dumps(known))
    if not args.skip_bad:
        complain(problems)
    tell(problems, "skipped: ")
    if not people:
        raise ValueError(f"{args.data} holds no people with pictures")
    return make_buckets(people, args.identities_per_bucket, args.seed)


# --------------------------------------------------------------------------------------------------
# Latents and text, encoded once


State = dict[str, Tensor]


def save_state(path: Path, tensors: State, metadata: dict[str, str] | None = None):
    """Writes a safetensors file, from any device."""
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as part:
        save_file(on_cpu, part, metadata)


@contextmanager
def open_state(path: Path, advice: str, device: str | torch.device = "cpu") -> Iterator[safe_open]:
    """Opens a file by `save_state`. ValueError with `advice` if it is missing or damaged."""
    check_readable(path)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged {advice}: {error}") from None


def read_state(path: Path, device: torch.device) -> State:
    """The tensors of a file by `save_state`."""
    with open_state(path, "or missing", device) as file:
        # clone: on a CPU the bits of a matmul depend on alignment, and a file's is odd
        return {name: file.get_tensor(name).clone() for name in file.keys()}


@dataclass
class Cache:
    """Latents and text embeddings on disk, named by hashes of picture or caption, and model."""
    folder: Path
    model: Path
    device: torch.device
    text_device: torch.device
    dtype: torch.dtype
    resolutions: list[int]

    def __post_init__(self):
        parts = part_fingerprints(self.model).values()
        self.key = digest(" ".join([*parts, str(self.dtype)]).encode())[:12]

    @staticmethod
    def step(resolution: int) -> int:
        """Sides are multiples of this: 64 pixels as in the paper's trainer, less for a baby."""
        return min(64, max(16, resolution // 8 // 16 * 16))

    def sizes(self, picture: Photo) -> list[tuple[int, int]]:
        """(width, height) at which a picture is used, each once; it is never enlarged."""
        sizes = []
        for resolution in self.resolutions:
            step = self.step(resolution)
            sizes.append(grid_size(picture.width, picture.height, resolution, step))
        return list(dict.fromkeys(sizes))

    def latent_path(self, picture: Photo, size: tuple[int, int]) -> Path:
        return self.folder / f"{picture.digest[:32]}-{size[0]}x{size[1]}-{self.key}.safetensors"

    def text_path(self, caption: str) -> Path:
        name = hashlib.sha256(caption.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self.folder / f"{name}-text-{self.key}.safetensors"

    def missing(
        self,
        pictures: list[Photo],
        captions: list[str],
    ) -> tuple[list[Photo], list[str]]:
        """Those that are not encoded yet."""
        new = []
        for picture in pictures:
            paths = [self.latent_path(picture, size) for size in self.sizes(picture)]
            if not all(map(Path.exists, paths)):
                new.append(picture)
        captions = dict.fromkeys(captions)
        return new, [caption for caption in captions if not self.text_path(caption).exists()]

    @torch.no_grad()
    def fill(
        self,
        pictures: list[Photo],
        captions: list[str],
        stop: Callable[[], object] = lambda: None,
    ):
        """Encodes what is `missing`, one model in memory at a time. `stop()` may raise."""
        if captions:
            encoders = load_text_encoders(self.model, self.text_device, self.dtype)
            check_prompts(encoders, captions)
            for caption in progress(captions, "encoding text"):
                txt, y = encoders.encode([caption])
                save_state(self.text_path(caption), {"txt": txt[0], "y": y[0]})
                stop()
            del encoders
            gc.collect()                         # transformers' models hold reference cycles
            free(self.text_device)
        if pictures:
            autoencoder = load_autoencoder(self.model, self.device, self.dtype)
            for picture in progress(pictures, "encoding pictures"):
                if hashlib.sha256(picture.path.read_bytes()).hexdigest() != picture.digest:
                    raise ValueError(f"{picture.path} has changed since it was checked")
                photo = read_photo(picture.path)
                for size in self.sizes(picture):
                    pixels = to_tensor(ImageOps.fit(photo, size, Image.BICUBIC))
                    posterior = autoencoder.posterior(pixels[None].to(self.device))[0].half()
                    save_state(self.latent_path(picture, size), {"posterior": posterior})
                stop()
            del autoencoder
            free(self.device)

    def load(self, path: Path) -> State:
        """Tensors that lie in the system's cache of files, and not in this process's memory."""
        with open_state(path, "or missing: delete it and rerun") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
