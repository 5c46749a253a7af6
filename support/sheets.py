"""Tables of scores in Markdown, contact sheets, and the plan of sample.py --compare."""
import itertools
import json
import textwrap
from contextlib import suppress
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps

from support import photos
from support.common import check_writable, read_text, save_png, write_whole
from support.people import fill

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


def tables(scores: dict, base: str) -> str:
    """Markdown in the form of the paper's Tables 4 and 5, of what scores.json holds."""
    faces, texts = [], []
    for method in scores["methods"]:
        face_row, text_row = method_rows(method, base)
        faces.append(face_row)
        texts.append(text_row)
    copied = scores["reference"]
    if copied:
        name = "the reference photo itself"
        faces.append([name, "–", "100.00", percent(copied), "–", "100.0%", counts(copied)])
    source = ""
    quoted = scores["quoted"]
    if quoted:
        for row in quoted["table 4"]:
            cells = quoted_cells(row, ["facesim", "r_facesim"])
            faces.append([*cells, f"*{row['difference']:+.1f}%*", "", ""])
        for row in quoted["table 5"]:
            texts.append([*quoted_cells(row, ["clip_t", "r_facesim"]), ""])
        source = (f"\nQuoted: {quoted['source']}. Other people, prompts and judges than here, "
                  "unless these are Meta-PHD's.\n")

    policy = "pictures without a face are left out"
    if scores["settings"]["no_face_as_zero"]:
        policy = "a picture without a face counts as 0"
    start = ["Model", "Base model"]
    first = table([*start, "FaceSim ↑", "R-FaceSim ↑", "Relative difference", "Faces found",
                   "Identities, pictures"], faces)
    second = table([*start, "CLIP-T ↑", "R-FaceSim ↑",
                    "Identities, pictures of CLIP-T; of the face scores"], texts)
    return ("In percent; in brackets the standard error over identities. "
            f"Face scores: {policy}.\n\n{first}\n{second}{source}")


def write_report(out: Path, scores: dict, base: str = "–") -> str:
    """Writes scores.json and tables.md -> the tables. base: the model that drew the pictures."""
    text = tables(scores, base)
    content = json.dumps(scores, indent=1, default=lambda path: path.name)
    write_whole(out / "scores.json", content)
    write_whole(out / "tables.md", text)
    return text


def write(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, width: int, height: int):
    """Text into a box of a sheet, as many lines as fit."""
    lines = textwrap.wrap(text, width // 7)[:height // 14]
    draw.text((x + 4, y + 2), "\n".join(lines), "black", ImageFont.load_default(12), spacing=2)


def sheet(
    path: Path,
    columns: list[str],
    rows: list[tuple[str, list[Path]]],
    side: int = 144,
):
    """A contact sheet: text above each column and to the left of each row of pictures.

    side: pixels of each picture's side. A picture that cannot be read stays white."""
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
            with suppress(ValueError):
                photo = ImageOps.pad(photos.read_photo(file), (side, side), color="white")
                picture.paste(photo, (left + side * i, y))
    save_png(picture, path)


def tile(files: list[Path], columns: int) -> Image.Image:
    """Pictures of one size, `columns` in a row."""
    pictures = [np.asarray(photos.read_photo(file)) for file in files]
    grid = "(row column) height width rgb -> (row height) (column width) rgb"
    return Image.fromarray(rearrange(pictures, grid, column=columns))


# --------------------------------------------------------------------------------------------------
# LoRAs side by side


def row_names(loras: list[tuple[str, float]], base: str) -> list[str]:
    """`base`, and a distinct name for each (file, strength): the file's, with as many folders as it
    takes."""
    for depth in range(1, 20):
        rows = [base]
        for path, strength in loras:
            name = "_".join(Path(path).absolute().with_suffix("").parts[1:][-depth:])
            rows.append(name if strength == 1 else f"{name}@{strength:g}")
        # some file systems ignore the case
        if len({name.lower() for name in rows}) == len(rows):
            return rows
    raise ValueError("--compare names a LoRA twice")


def plan_comparison(
    out: Path,
    person: str,
    loras: list[tuple[str, float]],
    prompts: list[str],
    seeds: range,
    base: str,
) -> list[Path]:
    """The picture of each prompt at each seed without these LoRAs, in the row `base`, then with
    each. Writes nothing.

    ValueError if the folder could not hold them, or eval_rfacesim.py would take one for another."""
    if out.suffix.lower() in photos.SUFFIXES and not out.is_dir():
        raise ValueError(f"--out {out}: --compare writes a folder")
    if person in ("", "..") or person != Path(person).name:
        raise ValueError(f"--person {person}: it must be a folder name")
    for prompt in prompts:
        # as they will be read again
        one_line = prompt.splitlines() == [prompt.strip()] and prompt[0] != "#"
        if not one_line or fill(prompt, "man") != prompt:
            raise ValueError("--compare takes prompts of one line without # in front and without "
                             f"[man/woman], not {prompt!r}")
    check_writable(out, "--out")

    files = []
    for row, i, seed in itertools.product(row_names(loras, base), range(len(prompts)), seeds):
        files.append(out / row / person / f"{i}_{seed}.png")

    # pictures or prompts of another comparison would be scored together with these
    expected = {*files, out / SHEET}
    others = [path for path in sorted(out.rglob("[!.]*.png")) if path not in expected]
    prompt_file = out / PROMPTS
    if prompt_file.is_file() and read_text(prompt_file).splitlines() != prompts:
        others.append(prompt_file)
    if others:
        raise ValueError(
            f"--out {out} holds another comparison, such as {others[0]}: name a new folder")
    return files


def draw_comparison(out: Path, files: list[Path], prompts: list[str], seeds: range) -> Path:
    """The sheet of a comparison, one row per LoRA -> its file."""
    columns = []
    for prompt, seed in itertools.product(prompts, seeds):
        columns.append(f"seed {seed}: {prompt}" if len(seeds) > 1 else prompt)
    rows = {}
    for file in files:
        rows.setdefault(file.parts[-3], []).append(file)
    side = min(256, photos.read_photo(files[0]).width)
    sheet(out / SHEET, columns, [*rows.items()], side)
    return out / SHEET
