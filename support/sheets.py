"""Tables of scores in Markdown, contact sheets, and the plan of sample.py --compare."""
import itertools
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from support import photos
from support.common import check_writable, save_png, write_whole
from support.people import fill

BASE = "no LoRA"                                 # row of the pictures without a LoRA
PROMPTS = "prompts.txt"                          # both written by sample.py --compare
SHEET = "compare.png"


def percent(summary: dict | None) -> str:
    """Mean and standard error."""
    if summary is None:
        return "–"
    text = f"{100 * summary['mean']:.2f}"
    if summary["error"] is not None:
        text += f" ({100 * summary['error']:.2f})"
    return text


def counts(summary: dict | None) -> str:
    if summary is None:
        return "–"
    return f"{summary['identities']}, {summary['pictures']} of {summary['of']}"


def table(header: list[str], rows: list[list[object]]) -> str:
    """A table in Markdown."""
    text = ""
    for cells in [header, ["---"] * len(header), *rows]:
        text += f"| {' | '.join(str(cell) for cell in cells)} |\n"
    return text


def method_rows(method: dict, base: str) -> tuple[list[str], list[str]]:
    """A method's row of each of the two tables."""
    face, robust, text = method["facesim"], method["r_facesim"], method["clip_t"]
    likeness = robust or face
    change = found = "–"
    if robust and face["mean"] > 0:
        change = f"{100 * (robust['mean'] / face['mean'] - 1):+.1f}%"
    if likeness:
        found = f"{likeness['found']:.1%}"
    start = [method["title"], base]
    faces = [*start, percent(face), percent(robust), change, found, counts(likeness)]
    texts = [*start, percent(text), percent(robust), f"{counts(text)}; {counts(likeness)}"]
    return faces, texts


def quoted_cells(row: dict, columns: list[str]) -> list[str]:
    """Cells of a row of published.json, in italics."""
    cells = [f"*{row['method']}, quoted*", f"*{row['base']}*"]
    return cells + [f"*{row[column]:.2f}*" for column in columns]


def tables(
    methods: list[dict],
    real: dict | None,
    base: str,
    quoted: dict | None,
    no_face_as_zero: bool,
) -> str:
    """Markdown in the form of the paper's Tables 4 and 5."""
    faces, texts = [], []
    for method in methods:
        face_row, text_row = method_rows(method, base)
        faces.append(face_row)
        texts.append(text_row)
    if real:
        name = "the reference photo itself"
        faces.append([name, "–", "100.00", percent(real), "–", "100.0%", counts(real)])
    source = ""
    if quoted:
        for row in quoted["table 4"]:
            cells = quoted_cells(row, ["facesim", "r_facesim"])
            faces.append([*cells, f"*{row['difference']:+.1f}%*", "", ""])
        for row in quoted["table 5"]:
            texts.append([*quoted_cells(row, ["clip_t", "r_facesim"]), ""])
        source = (f"\nQuoted: {quoted['source']}. Other people, prompts and judges than here, "
                  "unless these are Meta-PHD's.\n")

    policy = "pictures without a face are left out"
    if no_face_as_zero:
        policy = "a picture without a face counts as 0"
    start = ["Model", "Base model"]
    first = table([*start, "FaceSim ↑", "R-FaceSim ↑", "Relative difference", "Faces found",
                   "Identities, pictures"], faces)
    second = table([*start, "CLIP-T ↑", "R-FaceSim ↑",
                    "Identities, pictures of CLIP-T; of the face scores"], texts)
    return ("In percent; in brackets the standard error over identities. "
            f"Face scores: {policy}.\n\n{first}\n{second}{source}")


def write(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, width: int, height: int) -> None:
    """Text into a box of a sheet, as many lines as fit."""
    font = ImageFont.load_default(12)
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and draw.textlength(longer, font) > width - 8:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    for i, line in enumerate(lines[:height // 14]):
        draw.text((x + 4, y + 14 * i + 2), line, "black", font)


def sheet(
    path: Path,
    columns: list[str],
    rows: list[tuple[str, list[Path | None]]],
    side: int = 144,
) -> None:
    """A contact sheet: text above each column and to the left of each row of pictures.

    side: pixels of each picture's side. A picture that is None or cannot be read stays white."""
    left = 130
    top = 84
    size = left + side * len(columns), top + side * len(rows)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(columns):
        write(draw, text, left + side * i, 0, side, top)
    for j, (name, paths) in enumerate(rows):
        y = top + side * j
        write(draw, name, 0, y, left, side)
        for i, file in enumerate(paths):
            if file is None:
                continue
            try:
                photo = photos.read_photo(file)
            except ValueError:
                continue
            padded = ImageOps.pad(photo, (side, side), color="white")
            picture.paste(padded, (left + side * i, y))
    save_png(picture, path)


# --------------------------------------------------------------------------------------------------
# LoRAs side by side


class Comparison(NamedTuple):
    """What sample.py --compare draws: all prompts at all seeds without a LoRA, then with each."""
    out: Path
    rows: list[str]
    prompts: list[str]
    seeds: range
    files: list[Path]                            # by row, then prompt, then seed

    def save_prompts(self) -> None:
        """Comes before the pictures: eval_rfacesim.py must not score them by other prompts."""
        self.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{prompt}\n" for prompt in self.prompts)
        write_whole(self.out / PROMPTS, lines.encode())

    def draw(self) -> Path:
        """Draws the sheet, one row per LoRA."""
        columns = []
        for prompt, seed in itertools.product(self.prompts, self.seeds):
            columns.append(f"seed {seed}: {prompt}" if len(self.seeds) > 1 else prompt)
        width = len(columns)
        rows = []
        for i, name in enumerate(self.rows):
            rows.append((name, self.files[i * width:(i + 1) * width]))
        side = min(256, photos.read_photo(self.files[0]).width)
        sheet(self.out / SHEET, columns, rows, side)
        return self.out / SHEET


def row_names(loras: list[tuple[str, float]]) -> list[str]:
    """A distinct name for each (file, strength): the file's, with as many folders as it takes."""
    parts = []
    for path, strength in loras:
        *folders, name = Path(path).absolute().with_suffix("").parts[1:]
        if strength != 1:
            name = f"{name}@{strength:g}"
        parts.append([*folders, name])
    deepest = max(len(names) for names in parts)
    for depth in range(1, 1 + deepest):
        rows = ["_".join(names[-depth:]) for names in parts]
        distinct = {name.lower() for name in [BASE, *rows]}      # some file systems ignore the case
        if len(distinct) == 1 + len(rows):
            return rows
    raise ValueError("--compare names a LoRA twice")


def check_comparison(out: Path, person: str, prompts: list[str]) -> None:
    """ValueError where the folder or eval_rfacesim.py could not hold what is drawn."""
    if out.suffix.lower() in photos.SUFFIXES and not out.is_dir():
        raise ValueError(f"--out {out}: --compare writes a folder")
    if person != Path(person).name:
        raise ValueError(f"--person {person}: it must be a folder name")
    for prompt in prompts:
        if prompt != prompt.strip() or len(prompt.splitlines()) > 1 or prompt.startswith("#"):
            raise ValueError(
                f"--compare takes prompts of one line without # in front, not {prompt!r}")
        if fill(prompt, "man") != prompt:
            raise ValueError(
                f"the prompt {prompt!r} depends on the gender: write it for this person")
    check_writable(out, "--out")


def plan_comparison(
    out: Path | None,
    person: str,
    loras: list[tuple[str, float]],
    prompts: list[str],
    seeds: range,
) -> Comparison:
    """The path of each picture. Writes nothing.

    ValueError if eval_rfacesim.py would take a picture for another."""
    out = out or Path("compare")
    check_comparison(out, person, prompts)
    rows = [BASE, *row_names(loras)]
    files = []
    for row, i, seed in itertools.product(rows, range(len(prompts)), seeds):
        files.append(out / row / person / f"{i}_{seed}.png")

    # pictures or prompts of another comparison would be scored together with these
    prompt_file = out / PROMPTS
    expected = {*files, prompt_file, out / SHEET}
    others = []
    for path in sorted(out.rglob("*")):
        is_picture = path.is_file() and path.suffix.lower() in photos.SUFFIXES
        if is_picture and path not in expected:
            others.append(path)
    if prompt_file.is_file() and prompt_file.read_text("utf-8").splitlines() != prompts:
        others.append(prompt_file)
    if others:
        raise ValueError(
            f"--out {out} holds another comparison, such as {others[0]}: name a new folder")
    return Comparison(out, rows, prompts, seeds, files)
