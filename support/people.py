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
import itertools
import json
import math
import posixpath
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from support.checkpoints import fingerprint, load_autoencoder, load_text_encoders
from support.common import JsonFile, check_readable, digest, expand, free, note, whole, write_whole
from support.photos import (SUFFIXES, fit_to_grid, grid_size, image_files, read_photo, subfolders,
                            to_tensor, visible)

CAPTIONS = ".txt", ".caption"                    # the first that exists counts
METADATA = "metadata.jsonl", "metadata.csv"      # "file_name" from its folder, "text": caption
GENDERS = dict(man="man", men="man", male="man", woman="woman", women="woman", female="woman")
# file names of FLUXSynID: person, gender, and which picture it is: 0123456789ab_f_live_0_e_d1.jpg
SYNTHETIC = re.compile(r"[0-9a-f]{12}_(f|m|nb)[_.]")
SYNTHETIC_CAPTIONS = {
    "f": "a photo of a woman",
    "m": "a photo of a man",
    "nb": "a photo of a person",
}
MIN_PICTURES = 2                                 # from one, M and U would learn the picture itself

# --------------------------------------------------------------------------------------------------
# Captions


def read_text(path: Path) -> str:
    """ValueError if the file is not UTF-8 text."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"                              # refused below, as UTF-16 without its mark is
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text in UTF-8: save it as UTF-8")
    return text


class Captions:
    """The captions of pictures under `root`; `used` are the files that had one."""
    def __init__(self, root: Path) -> None:
        self.root = root
        self.used = set()
        self.beside = {}                         # {folder: {(stem, suffix): caption file}}
        self.tables = {}                         # {path of a METADATA: its captions, or its error}

    def of(self, picture: Path) -> str | None:
        """The caption, None without one. ValueError if its file is empty, torn, or not UTF-8."""
        for path in self.candidates(picture):
            self.used.add(path)
            return self.one_line(read_text(path), path)
        for folder in picture.parents:
            for name in METADATA:
                table = folder / name
                text = self.table(table).get(picture.relative_to(folder).as_posix())
                if text is not None:
                    self.used.add(table)
                    return self.one_line(text, f"{table}: the text of {picture.name}")
            if folder == self.root:
                break
        return None

    def candidates(self, picture: Path) -> list[Path]:
        """Files beside a picture that may hold its caption; the first counts."""
        if picture.parent not in self.beside:
            beside = {}
            for path in visible(picture.parent):
                if path.suffix.lower() in CAPTIONS:
                    beside[path.stem, path.suffix.lower()] = path
            self.beside[picture.parent] = beside
        found = []
        for suffix in CAPTIONS:
            for stem in (picture.stem, picture.name):
                path = self.beside[picture.parent].get((stem, suffix))
                if path and not path.is_dir():
                    found.append(path)
        return found

    def table(self, path: Path) -> dict[str, str | None]:
        """{picture: caption} of one of METADATA, {} if it does not exist; read once."""
        if path not in self.tables:
            self.tables[path] = {}
            if path.is_file():
                try:
                    self.tables[path] = read_metadata(path)
                except ValueError as error:
                    self.used.add(path)
                    self.tables[path] = error
        if isinstance(self.tables[path], ValueError):
            raise ValueError(*self.tables[path].args)
        return self.tables[path]

    @staticmethod
    def one_line(text: str, where: object) -> str:
        caption = " ".join(text.split())
        if not caption:
            raise ValueError(f"{where} is empty")
        return caption


def named_photos(names: list[str]) -> list[str]:
    """Photos of one person, from files, patterns and folders. ValueError if a folder has none."""
    found = []
    for name in expand(names):
        folder = Path(name)
        if folder.is_dir():
            inside = image_files(folder)
            captions = Captions(folder)
            if not inside:
                raise ValueError(f"{name} is a folder without a picture")
            for path in inside:
                captions.used.update(captions.candidates(path))
            tell_unused(folder, captions, folders=True)
            found += map(str, inside)
        else:
            found.append(name)
    return found


def captions_beside(
    pictures: list[str | Path],
    prompt: str,
    tell: bool = False,
) -> dict[Path, str]:
    """The caption beside each picture, else `prompt`; `tell` prints those that were found.

    ValueError as in Captions."""
    captions = {}
    for path in map(Path, pictures):
        captions[path] = Captions(path.parent).of(path)
    for path, caption in captions.items():
        if caption is None:
            captions[path] = prompt
        elif tell:
            print(f"{path.name} is called {caption!r}, by the caption beside it")
    return captions


def read_metadata(path: Path) -> dict[str, str | None]:
    """{picture: caption} of one of METADATA. ValueError names the line that cannot be used."""
    table = {}
    lines = read_text(path).split("\n")
    if path.suffix == ".csv":                    # as lines of JSON; "" stands for the header
        rows = csv.DictReader(line + "\n" for line in lines)
        lines = ["", *map(json.dumps, rows)]
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                name, text = row["file_name"], row.get("text")
                if not isinstance(name, str) or not isinstance(text, str | None):
                    raise TypeError
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f'{path}, line {number}, is not {{"file_name": ..., '
                                 '"text": ...}') from None
            table[posixpath.normpath(name)] = text
    if table and not any(table.values()):
        raise ValueError(f'{path} has no captions: they are its fields "text", and it has '
                         f'{", ".join(row)}')
    return table


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
    known: dict | None = None,
    smallest: int = 0,
) -> tuple[dict[Path, Photo], list[str]]:
    """{path: Photo} of the usable pictures, and a line for each of the others.

    smallest: pixels that the shorter side must have. known: {path: [bytes, time, digest, width,
    height, pixels]} of pictures that were decoded before; those decoded now are added."""
    known = {} if known is None else known
    found = {}
    problems = []
    for path in paths:
        try:
            if not path.is_file():
                read_photo(path)                 # its error says what the path is
            status = path.stat()
            facts = known.get(str(path), [])
            if facts[:2] != [status.st_size, status.st_mtime_ns] or len(facts) < 6:
                image = read_photo(path)
                file_digest = hashlib.sha256(path.read_bytes()).hexdigest()
                pixels = digest(image.tobytes())
                facts = [status.st_size, status.st_mtime_ns, file_digest, *image.size, pixels]
                known[str(path)] = facts
            *_, file_digest, width, height, pixels = facts
            if min(width, height) < smallest:
                raise ValueError(f"{path} is {width} x {height} pixels; its sides must be "
                                 f"{smallest} or more")
            found[path] = Photo(path, file_digest, width, height, captions.of(path), pixels)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return found, list(dict.fromkeys(problems))  # many pictures may share a damaged metadata.jsonl


def find_copies(photos: Iterable[Photo]) -> dict[Path, Path]:
    """{copy: the picture it repeats}. If several folders have one, all are copies: whose is it?"""
    copies = {}
    alike = collections.defaultdict(list)
    for photo in photos:
        alike[photo.width, photo.height, photo.pixels].append(photo.path)
    for same in alike.values():
        folders = {path.parent for path in same}
        for path in same if len(folders) > 1 else same[1:]:
            others = [other for other in same if other.parent != path.parent]
            copies[path] = (others or same)[0]
    return copies


def is_dead(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def dead_links(folder: Path) -> list[str]:
    """A line for each dead link in `folder`, but pictures: whoever reads those names them."""
    pictures = image_files(folder)
    dead = [path for path in visible(folder) if is_dead(path) and path not in pictures]
    return [f"{path} is a dead link" for path in dead]


def tell_unused(
    folder: Path,
    captions: Captions,
    folders: bool = False,
    links: bool = True,
) -> None:
    """Names the files in `folder` that are neither pictures nor captions, with `folders` folders,
    and with `links` dead links."""
    seen = {*image_files(folder), *captions.used}
    if not folders:
        seen.update(subfolders(folder))
    names = []
    for path in visible(folder):
        if path in seen or is_dead(path) and not links:
            continue
        if is_dead(path):
            names.append(f"{path.name} (a dead link)")
        else:
            names.append(path.name + "/" * path.is_dir())
    if names:
        note(f"{folder}: not used, since neither a picture nor the caption of one: "
             f"{', '.join(names)}")


def complain(problems: list[str], script: str) -> None:
    """Prints all problems but the last, which becomes a ValueError."""
    problems = [" ".join(problem.split()) for problem in problems]
    for problem in problems[:-1]:
        print(f"{script}: {problem}", file=sys.stderr)
    if problems:
        raise ValueError(problems[-1])


def tell(problems: list[str], start: str = "") -> None:
    """A note for each problem that the command goes on without."""
    for problem in problems:
        note(start + " ".join(problem.split()))


# --------------------------------------------------------------------------------------------------
# The evaluation: identities with their real pictures


class Person(NamedTuple):
    name: str                                    # the identity; with --reference all: anna@02
    identity: str
    gender: str | None
    reference: Path
    tests: tuple[Path, ...]                      # never the reference; empty: CLIP-T only
    more: tuple[Path, ...] = ()                  # further references: for the method, never a test


def find_identities(
    folder: Path,
    count: int,
) -> tuple[list[tuple[str, str | None, list[Path]]], list[str]]:
    """A folder of --data -> [(identity, gender or None, pictures)], and a line for each problem."""
    found = []
    problems = []
    inside = subfolders(folder)
    genders = [sub for sub in inside if sub.name.lower() in GENDERS]
    if genders and (len(genders) < len(inside) or image_files(folder)):
        raise ValueError(f"{folder} holds {genders[0].name}/ and others: sort all by gender, or "
                         "none")
    for parent in genders or [folder]:
        people = subfolders(parent)
        loose = image_files(parent)
        problems += dead_links(parent)
        if bool(people) == bool(loose):
            raise ValueError(f"{parent} must hold a folder for each person, or one picture for "
                             f"each: it holds {'both' if people else 'neither'}")
        gender = GENDERS.get(parent.name.lower()) if genders else None
        for person in people:
            paths = image_files(person)
            found.append((person.name, gender, paths))
            if len(paths) <= count:
                problems.append(f"{person} has {len(paths)} pictures: R-FaceSim needs {count} as "
                                "reference and at least one other")
        found += [(path.stem, gender, [path]) for path in loose]
    return found, problems


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
    photos = {}                                  # an ordered set
    groups = []                                  # [(captions, identities)]
    problems = []
    for folder in folders:
        if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
            photos[folder] = None
        else:
            found, wrong = find_identities(folder, count)
            groups.append((Captions(folder), found))
            problems += wrong
    if photos:
        groups.append((Captions(next(iter(photos)).parent), [("person", None, [*photos])]))

    persons = {}                                 # {identity: a Person for each of its references}
    captions_in = {}                             # {folder with pictures: Captions}
    for captions, found in groups:
        for name, sex, paths in found:
            if name in persons:
                problems.append(f"{captions.root}: another identity has the name {name} already")
            sound, wrong = check_photos(paths, captions)
            problems += wrong
            for copy, original in find_copies(sound.values()).items():
                problems.append(f"{copy} is the same picture as {original.name}")
            sex = sex or gender_of(sound.values()) or gender
            persons[name] = persons_of(name, sex, paths, reference, count)
            captions_in |= {path.parent: captions for path in paths if path not in photos}

    for captions, _ in groups:
        if captions.root in folders and captions.root not in captions_in:
            tell_unused(captions.root, captions, links=False)
    for folder, captions in captions_in.items():
        tell_unused(folder, captions, folders=True)
    complain(problems, "eval_rfacesim.py")
    return [*itertools.chain.from_iterable(persons.values())]


def persons_of(
    name: str,
    gender: str | None,
    paths: list[Path],
    reference: str,
    count: int,
) -> list[Person]:
    """An identity, once for each of its references."""
    named = [path for path in paths if path.stem == "reference"]
    references = paths if reference == "all" else [*named, *paths][:1]
    persons = []
    for path in references:
        at = paths.index(path)
        others = paths[at + 1:] + paths[:at]
        more = tuple(others[:count - 1])
        tests = tuple(sorted(others[count - 1:]))
        label = f"{name}@{path.stem}" if reference == "all" and len(paths) > 1 else name
        persons.append(Person(label, name, gender, path, tests, more))
    return persons


def gender_of(photos: Iterable[Photo]) -> str | None:
    """As the first caption says that has words for one gender only."""
    for photo in photos:
        words = {*re.findall(r"[a-z]+", (photo.caption or "").lower())} & {*GENDERS}
        if len(words) == 1:
            return GENDERS[words.pop()]
    return None


def fill(prompt: str, gender: str | None) -> str | None:
    """A prompt with [man/woman] filled in; `man: ...` is for men only, and None for others."""
    only, _, rest = prompt.partition(":")
    slots = r"\[([^][/]*)/([^][/]*)\]"
    if gender is None and (only in ("man", "woman") or re.search(slots, prompt)):
        raise ValueError(f"the prompt {prompt!r} depends on the gender: sort the people into man/ "
                         "and woman/, or give --gender")
    if only in ("man", "woman"):
        return fill(rest.strip(), gender) if only == gender else None
    side = 1 if gender == "man" else 2
    return re.sub(slots, lambda match: match[side], prompt)


# --------------------------------------------------------------------------------------------------
# Stage 1: buckets of people

Buckets = dict[str, dict[str, list[Photo]]]              # {bucket: {person: pictures}}


def find_people(data: Path) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Folder -> ({bucket: {person: folder}}, problems). People in no bucket are in bucket ""."""
    people = {}
    flat = {}
    problems = []
    if image_files(data):
        problems.append(f"{image_files(data)[0]} is in nobody's folder")
    problems += dead_links(data)
    for folder in subfolders(data):
        loose = image_files(folder)
        inner = subfolders(folder)
        if loose and not any(map(image_files, inner)):      # a person, with folders in theirs
            problems += [f"{odd} is a folder inside a person's" for odd in inner]
            inner = []
        if inner and loose:
            problems.append(f"{folder} holds people and also loose pictures, such as "
                            f"{loose[0].name}")
        if inner:
            problems += dead_links(folder)
            people[folder.name] = {person.name: person for person in inner}
        else:
            flat[folder.name] = folder
    if not people:
        return {"": flat} if flat else {}, problems
    for folder in flat.values():
        problems.append(f"{folder} is not a bucket as the others are: it holds no people")
    for members in people.values():
        for folder in members.values():
            problems += [f"{inner} is a folder inside a person's" for inner in subfolders(folder)]
    return people, problems


def leave_out(
    data: Path,
    people: dict[str, dict[str, Path]],
    number: int | None,
    seed: int,
) -> None:
    """Removes from `people` folders of a flat `data` that hold files but no pictures; then, unless
    `number` is None, all but that many people at random."""
    flat = people.get("", {})
    others = [name for name, folder in flat.items() if visible(folder) and not image_files(folder)]
    if 0 < len(others) < len(flat):
        for name in others:
            del flat[name]
        note(f"{data}: folders without pictures are not people: {', '.join(others)}")
    if number is None:
        return
    everyone = []
    for bucket, members in people.items():
        everyone += [(bucket, name) for name in members]
    if number > len(everyone):
        note(f"--people {number}: there are {len(everyone)}")
    for i in np.random.default_rng(seed).permutation(len(everyone))[number:]:
        bucket, name = everyone[i]
        del people[bucket][name]


def check_people(
    data: Path,
    smallest: int,
    known: dict,
    number: int | None = None,
    seed: int = 0,
) -> tuple[Buckets, list[str]]:
    """Checks every file -> ({bucket: {person: [Photo]}} of the usable, a line for each problem).

    smallest, known: as in `check_photos`. number: how many people the seed draws; None is all."""
    people, problems = find_people(data)
    leave_out(data, people, number, seed)
    captions = Captions(data)
    folders = []
    for members in people.values():
        folders += members.values()
    paths = []
    for folder in folders:
        paths += image_files(folder)
    bar = tqdm(paths, "checking pictures", disable=None, leave=False)
    photos, wrong = check_photos(bar, captions, known, smallest)
    problems += wrong

    attributes = set()                           # FLUXSynID's
    for folder in folders:
        attributes |= {path for path in folder.glob("*.json") if SYNTHETIC.match(path.name)}
    if attributes:
        note(f"{data}: {len(attributes)} .json files are not read, such as {min(attributes)}")
    captions.used |= attributes
    above = [data, *(folder.parent for folder in folders)]
    for folder in dict.fromkeys([*above, *folders]):
        tell_unused(folder, captions, links=folder in folders)

    for path, photo in photos.items():
        name = SYNTHETIC.match(path.name)
        if name and photo.caption is None:
            photos[path] = photo._replace(caption=SYNTHETIC_CAPTIONS[name[1]])
    for copy, original in find_copies(photos.values()).items():
        problems.append(f"{copy} is the same picture as {original}")
        del photos[copy]
    photos_in = collections.defaultdict(list)
    for photo in photos.values():
        photos_in[photo.path.parent].append(photo)

    buckets = {}
    for bucket, members in people.items():
        sound = {}
        for person, folder in members.items():
            usable = len(photos_in[folder])
            if usable < MIN_PICTURES:
                problems.append(f"{folder} has {usable} usable picture{'s' * (usable != 1)}; "
                                f"a person needs {MIN_PICTURES} or more")
            else:
                sound[person] = photos_in[folder]
        if sound:
            buckets[bucket] = sound
    return buckets, problems


def make_buckets(people: Buckets, size: int, seed: int) -> Buckets:
    """Buckets as they are; a flat folder is split at random into buckets of about `size` people."""
    if list(people) != [""]:
        return people
    names = sorted(people[""])
    order = np.random.default_rng(seed).permutation(len(names))
    parts = np.array_split(order, math.ceil(len(names) / size))
    buckets = {}
    for i, part in enumerate(parts):
        buckets[f"{i:04d}"] = {names[j]: people[""][names[j]] for j in sorted(part)}
    return buckets


def data_fingerprint(buckets: Buckets) -> str:
    """A short hash of who is in which bucket, with which pictures and captions."""
    lines = []
    for bucket, members in buckets.items():
        for person, pictures in members.items():
            for photo in pictures:
                lines.append(f"{bucket}\t{person}\t{photo.digest}\t{photo.caption}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def read_buckets(
    data: Path,
    listing: Path,
    smallest: int,
    skip_bad: bool,
    size: int,
    seed: int,
    number: int | None = None,
) -> Buckets:
    """Checks the folder -> its buckets. `listing` remembers what was decoded, however this ends.

    ValueError after a line for each problem; with skip_bad they are notes, and the rest is used."""
    before = JsonFile(listing) if listing.exists() else {}
    known = dict(before)
    try:
        people, problems = check_people(data, smallest, known, number, seed)
    finally:
        if known != before:
            listing.parent.mkdir(parents=True, exist_ok=True)
            write_whole(listing, json.dumps(known))
    if not skip_bad:
        complain(problems, "meta_train.py")
    tell(problems, start="skipped: ")
    if not people:
        raise ValueError(f"{data} holds no people with pictures")
    return make_buckets(people, size, seed)


def tell_uncaptioned(buckets: Buckets) -> None:
    """Says how many pictures have no caption, if others have one."""
    captions = []
    for members in buckets.values():
        for photos in members.values():
            captions += [photo.caption for photo in photos]
    missing = captions.count(None)
    if 0 < missing < len(captions):
        print(f"{missing} of {len(captions)} pictures have no caption of their own, and take that "
              "of --prompt")


# --------------------------------------------------------------------------------------------------
# Latents and text, encoded once


class Cache:
    """Latents and text embeddings on disk, named by hashes of picture or caption, and model."""
    def __init__(
        self,
        folder: Path,
        model: Path,
        device: torch.device,
        dtype: torch.dtype,
        resolutions: list[int],
    ):
        self.folder = folder
        self.model = model
        self.device = device
        self.dtype = dtype
        self.resolutions = resolutions
        parts = [fingerprint(model, part) for part in ("autoencoder", "clip", "t5")]
        self.key = hashlib.sha256(" ".join([*parts, str(dtype)]).encode()).hexdigest()[:12]

    @staticmethod
    def step(resolution: int) -> int:
        """Sides are multiples of this: 64 pixels as in the paper's trainer, less for a baby."""
        return min(64, max(16, resolution // 8 // 16 * 16))

    def sizes(self, picture: Photo) -> dict[tuple[int, int], int]:
        """{(width, height): resolution} at which a picture is used; it is never enlarged."""
        sizes = {}
        for resolution in self.resolutions:
            step = self.step(resolution)
            sizes[grid_size(picture.width, picture.height, resolution, step)] = resolution
        return sizes

    def latent_path(self, picture: Photo, size: tuple[int, int]) -> Path:
        return self.folder / f"{picture.digest[:32]}-{size[0]}x{size[1]}-{self.key}.safetensors"

    def text_path(self, caption: str) -> Path:
        digest = hashlib.sha256(caption.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / f"{digest[:32]}-text-{self.key}.safetensors"

    def missing(
        self,
        pictures: list[Photo],
        captions: list[str],
    ) -> tuple[list[Photo], list[str]]:
        """Those that are not encoded yet."""
        new = []
        for picture in pictures:
            paths = [self.latent_path(picture, size) for size in self.sizes(picture)]
            if not all(path.exists() for path in paths):
                new.append(picture)
        captions = dict.fromkeys(captions)
        return new, [caption for caption in captions if not self.text_path(caption).exists()]

    @torch.no_grad()
    def fill(
        self,
        pictures: list[Photo],
        captions: list[str],
        stop: Callable[[], object] | None = None,
        show: bool = True,
    ) -> None:
        """Encodes what is missing, one model in memory at a time. `stop()` may raise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures, captions = self.missing(pictures, captions)
        bar = tqdm(
            total=len(captions) + len(pictures),
            desc="encoding",
            disable=None if show else True,
            leave=False,
        )
        if captions:
            encoders = load_text_encoders(self.model, self.device, self.dtype)
            encoders.check(captions)
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
                    posterior = autoencoder.posterior(pixels[None].to(self.device))[0].half()
                    self.save(self.latent_path(picture, size), {"posterior": posterior}, stop)
                bar.update()
            del autoencoder
            free(self.device)
        bar.close()

    def save(
        self,
        path: Path,
        tensors: dict[str, Tensor],
        stop: Callable[[], object] | None,
    ) -> None:
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with whole(path) as part:
            save_file(on_cpu, part)
        if stop:
            stop()

    def load(self, path: Path) -> dict[str, Tensor]:
        check_readable(path)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged, delete it: {error}") from None


def room_for(cache: Cache, pictures: list[Photo], captions: list[str], text_bytes: int) -> int:
    """Bytes that the cache will grow by; text_bytes: size of one encoded caption."""
    pictures, captions = cache.missing(pictures, captions)
    size = len(captions) * text_bytes
    for picture in pictures:
        for width, height in cache.sizes(picture):
            # mean and deviation of 16 channels, 2 bytes each, for 8 x 8 pixels: a byte a pixel
            size += width * height
    return size
