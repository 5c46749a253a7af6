"""Folders of people, for stage 1 and the evaluation alike: who is in them, their pictures and captions.

Latents and text of stage 1, encoded once.

    buckets/<bucket>/<person>/<pictures>      stage 1; faces/<person>/<pictures> is dealt into buckets
    people/[man|woman/]<person>/<pictures>    the evaluation; or pictures of one person each and no folders

Captions are where trainers look for them: a.txt or kohya's a.caption beside a.png, or a.png.txt; else the
picture's line in the metadata.jsonl of a data set of the hub.
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

from flux_model import sample_times
from support.checkpoints import (autoencoder_fingerprint, load_autoencoder, load_text_encoders,
                                 text_fingerprints)
from support.common import JsonFile, check_readable, digest, expand, free, note, whole, write_whole
from support.photos import (SUFFIXES, fit_to_grid, grid_size, image_files, read_photo, subfolders,
                            to_tensor, visible)

CAPTIONS = ".txt", ".caption"             # the first that is there counts
METADATA = "metadata.jsonl", "metadata.csv"      # "file_name": path from its folder, "text": caption
GENDERS = dict(man="man", men="man", male="man", woman="woman", women="woman", female="woman")
# FLUXSynID's names: the person, the gender, what was made: 0123456789ab_f_live_0_e_d1.jpg
SYNTHETIC = re.compile(r"[0-9a-f]{12}_(f|m|nb)[_.]")
SYNTHETIC_CAPTIONS = {"f": "a photo of a woman", "m": "a photo of a man", "nb": "a photo of a person"}
MIN_PICTURES = 2                          # of one picture M and U would learn the picture, not the person

# ----------------------------------------------------------------------------------------------------------
# Captions


def read_text(path: Path) -> str:
    """ValueError names a file that is not text in UTF-8."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"                              # UTF-16 without its mark decodes, with zeros
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text in UTF-8: save it as UTF-8")
    return text


class Captions:
    """The captions of pictures under `root`; `used` are the files that had one."""
    def __init__(self, root: Path) -> None:
        self.root, self.used, self.beside, self.tables = root, set(), {}, {}

    def of(self, picture: Path) -> str | None:
        """The caption, None without one. ValueError: its file is empty, torn, or no text in UTF-8."""
        for path in self.candidates(picture):
            self.used.add(path)
            return self.one_line(read_text(path), path)
        for place in (picture.parent, *picture.parent.parents):
            for table in (place / name for name in METADATA):
                text = self.table(table).get(picture.relative_to(place).as_posix())
                if text is not None:
                    self.used.add(table)
                    return self.one_line(text, f"{table}: the text of {picture.name}")
            if place == self.root:
                break
        return None

    def candidates(self, picture: Path) -> list[Path]:
        if picture.parent not in self.beside:
            self.beside[picture.parent] = {(path.stem, path.suffix.lower()): path for path in
                                           visible(picture.parent) if path.suffix.lower() in CAPTIONS}
        found = []
        for suffix in CAPTIONS:
            for stem in (picture.stem, picture.name):
                path = self.beside[picture.parent].get((stem, suffix))
                if path and not path.is_dir():
                    found.append(path)
        return found

    def table(self, path: Path) -> dict[str, str | None]:
        """{picture: caption} of one of METADATA; read once, {} where there is none."""
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
        if not (caption := " ".join(text.split())):
            raise ValueError(f"{where} is empty")
        return caption


def named_photos(names: list[str]) -> list[str]:
    """Photos of one person: files, patterns, and of each folder its pictures. ValueError: it has none."""
    found = []
    for name in expand(names):
        folder = Path(name)
        if folder.is_dir():
            inside, captions = image_files(folder), Captions(folder)
            if not inside:
                raise ValueError(f"{name} is a folder without a picture")
            for path in inside:
                captions.used.update(captions.candidates(path))
            tell_unused(folder, captions, folders=True)
            found += map(str, inside)
        else:
            found.append(name)
    return found


def captions_beside(pictures: list[str | Path], prompt: str, tell: bool = False) -> dict[Path, str]:
    """What each picture is called: what a caption beside it says, else `prompt`. With `tell` the first is
    printed. ValueError as of Captions."""
    found = {path: Captions(path.parent).of(path) for path in map(Path, pictures)}
    for path, caption in found.items() if tell else ():
        if caption is not None:
            print(f"{path.name} is called {caption!r}, by the caption beside it")
    return {path: prompt if caption is None else caption for path, caption in found.items()}


def read_metadata(path: Path) -> dict[str, str | None]:
    """{picture: caption} of one of METADATA. ValueError names the line that cannot be used."""
    table, lines = {}, read_text(path).split("\n")
    if path.suffix == ".csv":                    # the same, as JSON: the line of names stays, empty
        lines = ["", *map(json.dumps, csv.DictReader(line + "\n" for line in lines))]
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                name, text = row["file_name"], row.get("text")
                if not isinstance(name, str) or not isinstance(text, str | None):
                    raise TypeError
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f'{path}, line {number}, is not {{"file_name": ..., "text": ...}}') from None
            table[posixpath.normpath(name)] = text
    if table and not any(table.values()):
        raise ValueError(f'{path} has no captions: they are its fields "text", and it has {", ".join(row)}')
    return table


# ----------------------------------------------------------------------------------------------------------
# What lies in a folder


class Photo(NamedTuple):
    """A picture of a data folder that can be read."""
    path: Path
    digest: str                                  # sha256 of the file
    width: int
    height: int
    caption: str | None                          # None: --prompt
    pixels: str = ""                             # digest: the same in a copy, whatever its format


def check_photos(paths: Iterable[Path], captions: Captions, known: dict | None = None,
                 smallest: int = 0) -> tuple[dict[Path, Photo], list[str]]:
    """{path: Photo} of what can be used, and a line for each that cannot.

    smallest: pixels of the shortest side. known: {path: [bytes, time, digest, width, height, pixels]} of what
    was decoded before; filled in.
    """
    known = {} if known is None else known
    found, problems = {}, []
    for path in paths:
        try:
            if not path.is_file():
                read_photo(path)                 # says what it is
            status = path.stat()
            facts = known.get(str(path), [])
            if facts[:2] != [status.st_size, status.st_mtime_ns] or len(facts) < 6:
                image = read_photo(path)
                file_digest = hashlib.sha256(path.read_bytes()).hexdigest()
                facts = [status.st_size, status.st_mtime_ns, file_digest, *image.size,
                         digest(image.tobytes())]
                known[str(path)] = facts
            *_, file_digest, width, height, pixels = facts
            if min(width, height) < smallest:
                raise ValueError(f"{path} is {width} x {height} pixels; its sides must be {smallest} or more")
            found[path] = Photo(path, file_digest, width, height, captions.of(path), pixels)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return found, list(dict.fromkeys(problems))       # a damaged metadata.jsonl is the problem of many


def find_copies(photos: Iterable[Photo]) -> dict[Path, Path]:
    """{copy: the picture it repeats}. One that several folders have is a copy in each: whose is it?"""
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
    """A line for each link in `folder` to what is gone; not of pictures, which readers of theirs name."""
    pictures = image_files(folder)
    return [f"{path} is a dead link" for path in visible(folder)
            if is_dead(path) and path not in pictures]


def tell_unused(folder: Path, captions: Captions, folders: bool = False, links: bool = True) -> None:
    """Names all files (and folders) in `folder` that are neither pictures nor a caption of one.

    Without `folders` those of deleted files alone; without `links` no dead ones."""
    seen = {*image_files(folder), *captions.used, *([] if folders else subfolders(folder))}
    names = [path.name + " (a dead link)" * is_dead(path) + "/" * path.is_dir()
             for path in visible(folder) if path not in seen and (links or not is_dead(path))]
    if names:
        note(f"{folder}: not used, since neither a picture nor the caption of one: {', '.join(names)}")


def complain(problems: list[str], script: str) -> None:
    """All problems on stderr, the last as ValueError."""
    problems = [" ".join(problem.split()) for problem in problems]
    for problem in problems[:-1]:
        print(f"{script}: {problem}", file=sys.stderr)
    if problems:
        raise ValueError(problems[-1])


# ----------------------------------------------------------------------------------------------------------
# The evaluation: identities with their real pictures


class Person(NamedTuple):
    name: str                        # the identity's; with --reference all the picture's too: anna@02
    identity: str
    gender: str | None
    reference: Path
    tests: tuple[Path, ...]          # the other pictures, never the reference; empty: CLIP-T only
    more: tuple[Path, ...] = ()      # further references: seen by the method, never a test


def find_identities(folder: Path,
                    count: int) -> tuple[list[tuple[str, str | None, list[Path]]], list[str]]:
    """A folder of --data -> [(identity, gender or None, pictures)], and a line for each problem."""
    found, problems = [], []
    inside = subfolders(folder)
    sexes = [place for place in inside if place.name.lower() in GENDERS]
    if sexes and (len(sexes) < len(inside) or image_files(folder)):
        raise ValueError(f"{folder} holds {sexes[0].name}/ and others: sort all by gender, or none")
    for place in sexes or [folder]:
        people = subfolders(place)
        loose = image_files(place)
        problems += dead_links(place)
        if bool(people) == bool(loose):
            raise ValueError(f"{place} must hold a folder for each person, or one picture for each: it "
                             f"holds {'both' if people else 'neither'}")
        gender = GENDERS.get(place.name.lower()) if sexes else None
        for person in people:
            paths = image_files(person)
            found.append((person.name, gender, paths))
            if len(paths) <= count:
                problems.append(f"{person} has {len(paths)} pictures: R-FaceSim needs {count} as "
                                "reference and at least one other")
        found += [(path.stem, gender, [path]) for path in loose]
    return found, problems


def read_people(folders: list[Path], reference: str = "first", gender: str | None = None,
                count: int = 1) -> list[Person]:
    """Identities of the folders, in order; photos among them are all of one identity, `person`.

    reference: "first" by name (or the one called reference.*), or "all", each in turn; the count - 1 after it
    by name are shown to the method too. Gender: of the folder above, else as a caption says, else `gender`.

    ValueError, after a line for each problem: an unreadable picture, the same picture twice, too few pictures
    of an identity, two identities of one name.
    """
    photos, groups, problems, persons, places = {}, [], [], {}, {}
    for folder in folders:
        if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
            photos[folder] = None
        else:
            found, wrong = find_identities(folder, count)
            groups.append((Captions(folder), found))
            problems += wrong
    if photos:
        groups.append((Captions(next(iter(photos)).parent), [("person", None, [*photos])]))
    for captions, found in groups:
        for name, sex, paths in found:
            if name in persons:
                problems.append(f"{captions.root}: another identity has the name {name} already")
            sound, wrong = check_photos(paths, captions)
            problems += wrong
            problems += [f"{copy} is the same picture as {original.name}"
                         for copy, original in find_copies(sound.values()).items()]
            sex = sex or gender_of(sound.values()) or gender
            persons[name] = persons_of(name, sex, paths, reference, count)
            places |= {path.parent: captions for path in paths if path not in photos}
    for captions, _ in groups:
        if captions.root in folders and captions.root not in places:
            tell_unused(captions.root, captions, links=False)
    for place, captions in places.items():
        tell_unused(place, captions, folders=True)
    complain(problems, "eval_rfacesim.py")
    return [*itertools.chain.from_iterable(persons.values())]


def persons_of(name: str, gender: str | None, paths: list[Path], reference: str, count: int) -> list[Person]:
    """An identity, once for each of its references."""
    persons = []
    named = [path for path in paths if path.stem == "reference"]
    for own in paths if reference == "all" else [*named, *paths][:1]:
        at = paths.index(own)
        others = paths[at + 1:] + paths[:at]
        tests = tuple(sorted(others[count - 1:]))
        label = f"{name}@{own.stem}" if reference == "all" and len(paths) > 1 else name
        persons.append(Person(label, name, gender, own, tests, more=tuple(others[:count - 1])))
    return persons


def gender_of(photos: Iterable[Photo]) -> str | None:
    """What the first caption with one word for a gender says."""
    for photo in photos:
        words = {*re.findall(r"[a-z]+", (photo.caption or "").lower())} & {*GENDERS}
        if len(words) == 1:
            return GENDERS[words.pop()]
    return None


def fill(prompt: str, gender: str | None) -> str | None:
    """A prompt for somebody: [man/woman] takes the gender's side; `man: ...` is None for others."""
    only, _, rest = prompt.partition(":")
    slots = r"\[([^][/]*)/([^][/]*)\]"
    if gender is None and (only in ("man", "woman") or re.search(slots, prompt)):
        raise ValueError(f"the prompt {prompt!r} depends on the gender: sort the people into man/ and "
                         "woman/, or give --gender")
    if only in ("man", "woman"):
        return fill(rest.strip(), gender) if only == gender else None
    return re.sub(slots, lambda match: match[1 if gender == "man" else 2], prompt)


# ----------------------------------------------------------------------------------------------------------
# Stage 1: buckets of people

Buckets = dict[str, dict[str, list[Photo]]]              # {bucket: {person: pictures}}


def find_people(data: Path) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Folder -> ({bucket: {person: folder}}, problems). A flat folder of people is one bucket, named ""."""
    people, flat, problems = {}, {}, []
    if image_files(data):
        problems.append(f"{image_files(data)[0]} is in nobody's folder")
    problems += dead_links(data)
    for folder in subfolders(data):
        loose = image_files(folder)
        inner = subfolders(folder)
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
    for members in people.values():
        for folder in members.values():
            problems += [f"{inner} is a folder inside a person's" for inner in subfolders(folder)]
    return people, problems


def leave_out(data: Path, people: dict[str, dict[str, Path]], number: int | None,
              seed: int) -> None:
    """Takes folders of a flat `data` out of `people` that hold something, but no pictures; with a `number`
    all but as many people at random."""
    flat = people.get("", {})
    bare = [name for name, folder in flat.items() if visible(folder) and not image_files(folder)]
    if 0 < len(bare) < len(flat):
        for name in bare:
            del flat[name]
        note(f"{data}: folders without pictures are not people: {', '.join(bare)}")
    if number is None:
        return
    everyone = []
    for bucket, members in people.items():
        everyone += [(bucket, name) for name in members]
    if number > len(everyone):
        note(f"--people {number}: there are {len(everyone)}")
    for place in np.random.default_rng(seed).permutation(len(everyone))[number:]:
        bucket, name = everyone[place]
        del people[bucket][name]


def check_people(data: Path, smallest: int, known: dict, number: int | None = None,
                 seed: int = 0) -> tuple[Buckets, list[str]]:
    """Checks every file -> ({bucket: {person: [Photo]}} of what is sound, problems, one line each).

    smallest, known: as of `check_photos`. number: of people, at random by the seed; None is all.
    """
    people, problems = find_people(data)
    leave_out(data, people, number, seed)
    captions = Captions(data)
    folders, paths, sound = [], [], {}
    for members in people.values():
        folders += members.values()
    for folder in folders:
        paths += image_files(folder)
    bar = tqdm(paths, "checking pictures", disable=None, leave=False)
    photos, wrong = check_photos(bar, captions, known, smallest)
    problems += wrong
    attributes = set()
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
    of_folder = collections.defaultdict(list)
    for photo in photos.values():
        of_folder[photo.path.parent].append(photo)
    for bucket, members in people.items():
        sound[bucket] = {}
        for person, folder in members.items():
            own = of_folder[folder]
            if len(own) < MIN_PICTURES:
                problems.append(f"{folder} has {len(own)} usable picture{'s' * (len(own) != 1)}; "
                                f"a person needs {MIN_PICTURES} or more")
            else:
                sound[bucket][person] = own
    return {bucket: members for bucket, members in sound.items() if members}, problems


def make_buckets(people: Buckets, size: int, seed: int) -> Buckets:
    """{bucket: {person: [Photo]}} -> the same; a flat one is dealt at random into buckets of about
    `size`."""
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
            lines += [f"{bucket}\t{person}\t{own.digest}\t{own.caption}" for own in pictures]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def read_buckets(data: Path, listing: Path, smallest: int, skip_bad: bool, size: int, seed: int,
                 number: int | None = None) -> Buckets:
    """The checked folder -> its buckets. What was decoded stays in `listing`, however this ends.

    ValueError at anything wrong, after a line for each; with skip_bad notes, and the rest."""
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
    for problem in problems:
        note(f"skipped: {' '.join(problem.split())}")
    if not people:
        raise ValueError(f"{data} holds no people with pictures")
    return make_buckets(people, size, seed)


def tell_bare(buckets: Buckets) -> None:
    """Says how many pictures have no caption, where others have one."""
    pictures = []
    for members in buckets.values():
        for own in members.values():
            pictures += own
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

    def sizes(self, picture: Photo) -> dict[tuple[int, int], int]:
        """{(width, height): resolution}: how a picture is seen, never larger than it is."""
        return {grid_size(picture.width, picture.height, r, self.step(r)): r for r in self.resolutions}

    def latent_path(self, picture: Photo, size: tuple[int, int]) -> Path:
        return self.folder / f"{picture.digest[:32]}-{size[0]}x{size[1]}-{self.key}.safetensors"

    def text_path(self, caption: str) -> Path:
        digest = hashlib.sha256(caption.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / f"{digest[:32]}-text-{self.key}.safetensors"

    def missing(self, pictures: list[Photo], captions: list[str]) -> tuple[list[Photo], list[str]]:
        new = []
        for picture in pictures:
            paths = [self.latent_path(picture, size) for size in self.sizes(picture)]
            if not all(path.exists() for path in paths):
                new.append(picture)
        captions = dict.fromkeys(captions)
        return new, [caption for caption in captions if not self.text_path(caption).exists()]

    @torch.no_grad()
    def fill(self, pictures: list[Photo], captions: list[str], stop: Callable[[], object] | None = None,
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
        check_readable(path)
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
    noise = torch.randn(mean.shape, generator=rng)
    t = sample_times(len(posteriors), rng)
    txt = torch.stack([text["txt"] for text in texts])
    return [latent, noise, t, txt, torch.stack([text["y"] for text in texts])]


def room_for(cache: Cache, pictures: list[Photo], captions: list[str], text_bytes: int) -> int:
    """Bytes that the cache will take beyond what is there; text_bytes: of one caption."""
    pictures, captions = cache.missing(pictures, captions)
    size = len(captions) * text_bytes
    for picture in pictures:
        # mean and deviation of 16 channels, 2 bytes each, for 8 x 8 pixels: a byte for each pixel
        size += sum(width * height for width, height in cache.sizes(picture))
    return size
