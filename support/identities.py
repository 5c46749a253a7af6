"""Folders of what is judged: identities with their real pictures, prompts, generated pictures."""
import re
import sys
from pathlib import Path
from typing import NamedTuple

from support import photos
from support.checkpoints import HUB, find_model
from support.common import digest, note, read_prompts
from support.folders import Captions, dead_links, unused
from support.photos import subfolders, visible

META_PHD = Path(__file__).resolve().parents[1] / "paper" / "meta_phd"
GENDERS = dict(man="man", men="man", male="man", woman="woman", women="woman", female="woman")


class Person(NamedTuple):
    name: str                        # the identity's; with --reference all the picture's too: anna@02
    identity: str
    gender: str | None
    reference: Path
    tests: tuple[Path, ...]          # the other pictures, never the reference; empty: CLIP-T only
    more: tuple[Path, ...] = ()      # further references: seen by the method, never a test


class Picture(NamedTuple):
    label: str                       # of its method: a row of the tables
    person: str
    prompt: int                      # its number among the person's prompts
    seed: int
    path: Path
    text: str                        # the prompt


def complain(problems: list[str]) -> None:
    """All problems on stderr, the last as ValueError."""
    for problem in problems[:-1]:
        print(f"eval_rfacesim.py: {' '.join(problem.split())}", file=sys.stderr)
    if problems:
        raise ValueError(problems[-1])


def own_folder(model: str) -> Path | None:
    """The folder of a model that may bring judges and prompts of its own."""
    if model in HUB or Path(model).is_file():
        return None if model in HUB else Path(model).parent
    return Path(find_model(model))


def read_people(folders: list[Path], reference: str = "first", gender: str | None = None,
                count: int = 1) -> list[Person]:
    """Identities of the folders, in order. reference: "first" by name (or the one called reference.*), or
    "all", each in turn; the count - 1 after it by name are shown to the method too. Gender: of the folder
    above, else as a picture's caption says, else `gender`.

    ValueError, after a line for each problem: an unreadable picture, the same picture twice, too few pictures
    of an identity, two identities of one name.
    """
    found, problems, persons = {}, [], []
    for folder in folders:
        inside, captions = subfolders(folder), Captions(folder)
        sexes = [f for f in inside if f.name.lower() in GENDERS]
        if sexes and (len(sexes) < len(inside) or photos.image_files(folder)):
            raise ValueError(f"{folder} holds {sexes[0].name}/ and others: sort all by gender, or none")
        for place in sexes or [folder]:
            people, loose = subfolders(place), photos.image_files(place)
            problems += dead_links(place)
            if bool(people) == bool(loose):
                raise ValueError(f"{place} must hold a folder for each person, or one picture for each: it "
                                 f"holds {'both' if people else 'neither'}")
            for name, paths in [(f.name, photos.image_files(f)) for f in people] + \
                    [(p.stem, [p]) for p in loose]:
                if name in found:
                    problems.append(f"{place / name}: another identity has this name already")
                if people and len(paths) <= count:
                    problems.append(f"{place / name} has {len(paths)} pictures: R-FaceSim needs {count} as "
                                    "reference and at least one other")
                found[name] = GENDERS.get(place.name.lower()) if sexes else None, paths, captions
    for name, (sex, paths, captions) in found.items():
        told, unreadable = gender_in_captions(paths, captions)
        problems += faults(paths) + unreadable
        sex = sex or told or gender
        named = [path for path in paths if path.stem == "reference"]
        first = [paths.index(named[0]) if named else 0][:len(paths)]
        for i in range(len(paths)) if reference == "all" else first:
            label = f"{name}@{paths[i].stem}" if reference == "all" and len(paths) > 1 else name
            own, *others = paths[i:] + paths[:i]
            tests, more = tuple(sorted(others[count - 1:])), tuple(others[:count - 1])
            persons.append(Person(label, name, sex, own, tests, more))
    for folder, captions in {path.parent: captions for *_, paths, captions in found.values()
                             for path in paths}.items():
        if line := unused(folder, captions, folders=True):
            note(line)
    complain(problems)
    return persons


def faults(paths: list[Path]) -> list[str]:
    """Unreadable pictures, and copies: one of the reference among the tests would be a perfect score."""
    pixels, problems = {}, []
    for path in paths:
        try:
            image = photos.read_photo(path)
            if (same := pixels.setdefault((image.size, digest(image.tobytes())), path)) != path:
                problems.append(f"{path} is the same picture as {same.name}")
        except ValueError as error:
            problems.append(str(error))
    return problems


def gender_in_captions(paths: list[Path], captions: Captions) -> tuple[str | None, list[str]]:
    """The gender that the first caption with one word for it tells, and a line for each unreadable one."""
    told, problems = [], []
    for path in paths:
        try:
            words = re.findall(r"[a-z]+", (captions.of(path) or "").lower())
        except ValueError as error:
            problems.append(str(error))
            continue
        if len(words := set(words) & set(GENDERS)) == 1:
            told.append(GENDERS[words.pop()])
    return told[0] if told else None, list(dict.fromkeys(problems))


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


def prompts_for(people: list[Person], own: Path | None,
                model_folder: Path | None) -> dict[str, list[str | None]]:
    """{person: its prompts, None where one is not for it}: of the file, else the model's or Meta-PHD's."""
    theirs = model_folder / "prompts.txt" if model_folder else META_PHD / "none"
    theirs = own or (theirs if theirs.is_file() else None)
    lists = {kind: read_prompts([], theirs or META_PHD / ("unsplash.txt" if kind else "ffhq.txt"))
             for kind in {bool(p.tests) for p in people}}
    return {p.name: [fill(prompt, p.gender) for prompt in lists[bool(p.tests)]] for p in people}


def find_pictures(root: Path, prompts: dict[str, list[str | None]]) -> tuple[list[Picture], list[str]]:
    """Pictures of <root>/<method>/<identity>/<prompt>_<seed>.<suffix>; a line for each thing that is none."""
    pictures, loose = [], [path for path in visible(root) if not path.is_dir()]
    odd = dict.fromkeys(loose, "it is not in a method's folder")
    for folder in [path for method in subfolders(root) for path in visible(method)]:
        if folder.name not in prompts or not folder.is_dir():
            odd[folder] = "no identity of that name in --data"
            continue
        texts = dict(enumerate(prompts[folder.name]))
        for path in visible(folder):
            match = re.fullmatch(r"(.+)_([0-9]+)", path.stem)
            if path.suffix.lower() not in photos.SUFFIXES or not match:
                odd[path] = "its name is not <prompt>_<seed>.png"
            elif not match[1].isdecimal() or texts.get(int(match[1])) is None:
                odd[path] = f"{match[1]} is no prompt of {folder.name}"
            else:
                number, seed = int(match[1]), int(match[2])
                pictures.append(Picture(folder.parent.name, folder.name, number, seed, path, texts[number]))
    return pictures, [f"{path} is not scored: {why}" for path, why in odd.items()]


def check_complete(pictures: list[Picture], people: list[Person], prompts: dict[str, list[str | None]],
                   seeds: int | None) -> tuple[list[Picture], list[str]]:
    """Each prompt and seed once, and a line for what is too much and for everybody's missing ones. Wanted are
    seeds 0 to seeds - 1, else all that there are of anybody by any method."""
    wanted = range(seeds) if seeds is not None else sorted({p.seed for p in pictures})
    kept, problems = {}, []
    for picture in pictures:
        if picture.seed not in wanted:
            problems.append(f"{picture.path} is not scored: its seed is beyond --seeds {seeds}")
        elif (first := kept.setdefault(picture[:4], picture)) is not picture:
            problems.append(f"{picture.path} is not scored: {first.path.name} is the same prompt and seed")
    for label, person in ((label, p) for label in dict.fromkeys(p.label for p in pictures) for p in people):
        cells = [(i, s) for i, text in enumerate(prompts[person.name]) if text is not None for s in wanted]
        if gone := [cell for cell in cells if (label, person.name, *cell) not in kept]:
            problems.append(f"{label}: {len(gone)} of {len(cells)} pictures of {person.name} are missing, "
                            f"the first is prompt {gone[0][0]}, seed {gone[0][1]}")
    return list(kept.values()), problems
