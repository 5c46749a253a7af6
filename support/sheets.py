"""What is shown: scores in tables of Markdown, pictures in sheets, LoRAs side by side."""
import itertools
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from support import photos
from support.common import check_writable, save_png, write_whole
from support.people import fill

BASE = "no LoRA"                                 # the row of what is drawn without one
PROMPTS, SHEET = "prompts.txt", "compare.png"    # of sample.py --compare, beside its pictures


def percent(summary: dict | None) -> str:
    if summary is None:
        return "–"
    error = "" if summary["error"] is None else f" ({100 * summary['error']:.2f})"
    return f"{100 * summary['mean']:.2f}{error}"


def table(header: list[str], rows: list[list[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def tables(methods: list[dict], real: dict | None, base: str, quoted: dict | None,
           no_face_as_zero: bool) -> str:
    """Markdown in the form of the paper's Tables 4 and 5."""
    policy = "a picture without a face counts as 0" if no_face_as_zero else \
        "pictures without a face are left out"
    faces, texts, source = [], [], ""
    for own in methods:
        face, robust, text = own["facesim"], own["r_facesim"], own["clip_t"]
        likeness, change = robust or face, "–"
        if robust and face["mean"] > 0:
            change = f"{100 * (robust['mean'] / face['mean'] - 1):+.1f}%"
        found = f"{likeness['found']:.1%}" if likeness else "–"
        faces.append([own["title"], base, percent(face), percent(robust), change, found, counts(likeness)])
        texts.append([own["title"], base, percent(text), percent(robust),
                      f"{counts(text)}; {counts(likeness)}"])
    if real:
        faces.append(["the reference photo itself", "–", "100.00", percent(real), "–", "100.0%",
                      counts(real)])
    if quoted:
        for row in quoted["table 4"]:
            name, change = f"*{row['method']}, quoted*", f"*{row['difference']:+.1f}%*"
            faces.append([name, f"*{row['base']}*", f"*{row['facesim']:.2f}*", f"*{row['r_facesim']:.2f}*",
                          change, "", ""])
        for row in quoted["table 5"]:
            texts.append([f"*{row['method']}, quoted*", f"*{row['base']}*", f"*{row['clip_t']:.2f}*",
                          f"*{row['r_facesim']:.2f}*", ""])
        source = f"\nQuoted: {quoted['source']}. Other people, prompts and judges than here, unless " \
            "these are Meta-PHD's.\n"
    first = table(["Model", "Base model", "FaceSim ↑", "R-FaceSim ↑", "Relative difference", "Faces found",
                   "Identities, pictures"], faces)
    second = table(["Model", "Base model", "CLIP-T ↑", "R-FaceSim ↑",
                    "Identities, pictures of CLIP-T; of the face scores"], texts)
    return "In percent; in brackets the standard error over identities. " \
        f"Face scores: {policy}.\n\n{first}\n{second}{source}"


def counts(summary: dict | None) -> str:
    return f"{summary['identities']}, {summary['pictures']} of {summary['of']}" if summary else "–"


def write(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, width: int, height: int) -> None:
    """Text into a box of a sheet, as many lines as fit."""
    font, end = ImageFont.load_default(12), y + height
    for part in text.splitlines():
        line = ""
        for word in [*part.split(), None]:
            if word is None or line and draw.textlength(f"{line} {word}", font) > width - 8:
                if y + 14 > end:
                    return
                draw.text((x + 4, y + 2), line, "black", font)
                y, line = y + 14, ""
            line = f"{line} {word}".strip()


def sheet(path: Path, columns: list[str], rows: list[tuple[str, list[Path | None]]], side: int = 144) -> None:
    """A contact sheet: a text over each column, a text left of each row, and its pictures, of which one that
    is None or cannot be read stays white; side: of each, in pixels."""
    left, head = 130, 84
    picture = Image.new("RGB", (left + side * len(columns), head + side * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(columns):
        write(draw, text, left + side * i, 0, side, head)
    for j, (name, paths) in enumerate(rows):
        write(draw, name, 0, head + side * j, left, side)
        for i, file in enumerate(paths):
            try:
                photo = file and photos.read_photo(file)
            except ValueError:
                continue
            if photo:
                padded = ImageOps.pad(photo, (side, side), color="white")
                picture.paste(padded, (left + side * i, head + side * j))
    save_png(picture, path)


# LoRAs side by side -----------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """What sample.py --compare draws: all prompts at all seeds without a LoRA, then with each."""
    out: Path
    rows: list[str]
    prompts: list[str]
    seeds: range
    files: list[Path]                            # row after row, prompt after prompt

    def save_prompts(self) -> None:
        """Before the pictures: eval_rfacesim.py must not take them for those of other prompts."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / PROMPTS, "".join(f"{prompt}\n" for prompt in self.prompts).encode())

    def draw(self) -> Path:
        """The sheet, a row for each LoRA."""
        columns = []
        for prompt in self.prompts:
            columns += [f"seed {seed}: {prompt}" if len(self.seeds) > 1 else prompt for seed in self.seeds]
        width, rows = len(columns), []
        for i, name in enumerate(self.rows):
            rows.append((name, self.files[i * width:(i + 1) * width]))
        sheet(self.out / SHEET, columns, rows, min(256, photos.read_photo(self.files[0]).width))
        return self.out / SHEET


def row_names(loras: list[tuple[str, float]]) -> list[str]:
    """What tells (file, strength) apart: the files' names, with as many of their folders as it takes."""
    parts = []
    for path, strength in loras:
        *folders, name = Path(path).absolute().with_suffix("").parts[1:]
        parts.append([*folders, name if strength == 1 else f"{name}@{strength:g}"])
    for depth in range(1, 1 + max(map(len, parts))):
        names = ["_".join(own[-depth:]) for own in parts]
        if len({name.lower() for name in (BASE, *names)}) == 1 + len(names):
            return names
    raise ValueError("--compare names a LoRA twice")


def plan_comparison(out: Path | None, person: str, loras: list[tuple[str, float]], prompts: list[str],
                    seeds: range) -> Comparison:
    """Where each picture goes. ValueError where eval_rfacesim.py would take one for another. Writes
    nothing."""
    out = out or Path("compare")
    if out.suffix.lower() in photos.SUFFIXES and not out.is_dir():
        raise ValueError(f"--out {out}: --compare writes a folder")
    if person != Path(person).name:
        raise ValueError(f"--person {person}: it is to be the name of a folder")
    for prompt in prompts:
        if prompt != prompt.strip() or len(prompt.splitlines()) > 1 or prompt.startswith("#"):
            raise ValueError(f"--compare takes prompts of one line without # in front, not {prompt!r}")
        if fill(prompt, "man") != prompt:
            raise ValueError(f"the prompt {prompt!r} depends on the gender: write it for this person")
    check_writable(out, "--out")
    rows = [BASE, *row_names(loras)]
    files = [out / row / person / f"{i}_{seed}.png"
             for row, i, seed in itertools.product(rows, range(len(prompts)), seeds)]
    own = {*files, out / PROMPTS, out / SHEET}
    others = [path for path in sorted(out.rglob("*"))
              if path.is_file() and path not in own and path.suffix.lower() in photos.SUFFIXES]
    before = out / PROMPTS
    if before.is_file() and before.read_text("utf-8").splitlines() != prompts:
        others.append(before)
    if others:
        raise ValueError(f"--out {out} holds another comparison, such as {others[0]}: name a new folder")
    return Comparison(out, rows, prompts, seeds, files)
