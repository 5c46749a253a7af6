"""What lies in a folder of pictures: captions, and what is neither picture nor caption.

Captions are where trainers look for them: a.txt or kohya's a.caption beside a.png, or a.png.txt; else the
picture's line in the metadata.jsonl of a data set of the hub.
"""
import json
import posixpath
from pathlib import Path

from support.photos import image_files, visible

CAPTIONS = ".txt", ".caption"                    # the first that is there counts
METADATA = "metadata.jsonl"                      # {"file_name": path from its folder, "text": caption}


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
            text = self.table(place / METADATA).get(picture.relative_to(place).as_posix())
            if text is not None:
                self.used.add(place / METADATA)
                return self.one_line(text, f"{place / METADATA}: the text of {picture.name}")
            if place == self.root:
                break
        return None

    def candidates(self, picture: Path) -> list[Path]:
        if picture.parent not in self.beside:
            self.beside[picture.parent] = {(path.stem, path.suffix.lower()): path for path in
                                           visible(picture.parent) if path.suffix.lower() in CAPTIONS}
        names = [(stem, suffix) for suffix in CAPTIONS for stem in (picture.stem, picture.name)]
        files = self.beside[picture.parent]
        return [files[name] for name in names if name in files and not files[name].is_dir()]

    def table(self, path: Path) -> dict[str, str | None]:
        """{picture: caption} of a metadata.jsonl; read once, {} where there is none."""
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


def captions_beside(pictures: list[str | Path], prompt: str, tell: bool = False) -> dict[Path, str]:
    """What each picture is called: what a caption beside it says, else `prompt`. With `tell` the first is
    printed. ValueError as of Captions."""
    found = {path: Captions(path.parent).of(path) for path in map(Path, pictures)}
    for path, caption in found.items() if tell else ():
        if caption is not None:
            print(f"{path.name} is called {caption!r}, by the caption beside it")
    return {path: prompt if caption is None else caption for path, caption in found.items()}


def read_metadata(path: Path) -> dict[str, str | None]:
    """{picture: caption} of a metadata.jsonl. ValueError names the line that cannot be used."""
    table = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
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


def is_dead(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def dead_links(folder: Path) -> list[str]:
    """A line for each link in `folder` to what is gone; not of pictures, which readers of theirs name."""
    pictures = image_files(folder)
    return [f"{path} is a dead link" for path in visible(folder)
            if is_dead(path) and path not in pictures]


def unused(folder: Path, captions: Captions, folders: bool = False) -> str | None:
    """A line that names all files (and folders) in one that are neither pictures nor a caption of one."""
    seen = {*image_files(folder), *captions.used}
    names = [path.name + " (a dead link)" * is_dead(path) + "/" * path.is_dir()
             for path in visible(folder) if path not in seen and (folders or not path.is_dir())]
    return f"{folder}: not used, since neither a picture nor the caption of one: {', '.join(names)}" \
        if names else None
