"""What scores are shown with: tables in Markdown, sheets of pictures."""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from support import photos
from support.common import save_png


def percent(summary: dict | None) -> str:
    if summary is None:
        return "–"
    error = "" if summary["error"] is None else f" ({100 * summary['error']:.2f})"
    return f"{100 * summary['mean']:.2f}{error}"


def tables(methods: list[dict], real: dict | None, base: str, quoted: dict | None,
           no_face_as_zero: bool) -> str:
    """Markdown in the form of the paper's Tables 4 and 5."""
    line = lambda *cells: f"| {' | '.join(cells)} |"
    star = lambda *cells: [f"*{cell}*" for cell in cells]
    count = lambda own: f"{own['identities']}, {own['pictures']} of {own['of']}" if own else "–"
    policy = "a picture without a face counts as 0" if no_face_as_zero else \
        "pictures without a face are left out"
    lines = [f"In percent; in brackets the standard error over identities. Face scores: {policy}.", "",
             line("Model", "Base model", "FaceSim ↑", "R-FaceSim ↑", "Relative difference", "Faces found",
                  "Identities, pictures"), line(*["---"] * 7)]
    second = ["", line("Model", "Base model", "CLIP-T ↑", "R-FaceSim ↑",
                       "Identities, pictures of CLIP-T; of R-FaceSim"), line(*["---"] * 5)]
    for own in methods:
        face, robust, text = own["facesim"], own["r_facesim"], own["clip_t"]
        change = f"{100 * (robust['mean'] / face['mean'] - 1):+.1f}%" if face and face["mean"] > 0 else "–"
        found = f"{robust['found']:.1%}" if robust else "–"
        lines.append(line(own["title"], base, percent(face), percent(robust), change, found, count(robust)))
        second.append(line(own["title"], base, percent(text), percent(robust),
                           f"{count(text)}; {count(robust)}"))
    if real:
        lines.append(line("the reference photo itself", "–", "100.00", percent(real), "–", "100.0%",
                          count(real)))
    for row in quoted["table 4"] if quoted else []:
        lines.append(line(*star(f"{row['method']}, quoted", row["base"], f"{row['facesim']:.2f}",
                                f"{row['r_facesim']:.2f}", f"{row['difference']:+.1f}%"), "", ""))
    for row in quoted["table 5"] if quoted else []:
        second.append(line(*star(f"{row['method']}, quoted", row["base"], f"{row['clip_t']:.2f}",
                                 f"{row['r_facesim']:.2f}"), ""))
    source = [] if not quoted else ["", f"Quoted: {quoted['source']}. Other people, prompts and judges than "
                                    "here, unless these are Meta-PHD's."]
    return "\n".join(lines + second + source) + "\n"


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
