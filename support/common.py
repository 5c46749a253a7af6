"""What every script stands on: files that are whole or absent, command lines, printing, Ctrl-C."""
import argparse
import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError

from support import SIGHUP, SIGNALS
from support.devices import (free, is_out_of_memory, pick_device, to_device,  # noqa: F401: asked for here
                             use_threads)

NOT_SUPPORTED = errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK      # by a file system
NOT_YOURS = "may not be read: see its owner and mode (`ls -l`)"
RESERVED: dict[Path, Path] = {}                  # file -> its temporary file, which has its room already


def new_part(place: Path) -> Path:
    """A new, empty file beside `place`; its name is short, whatever that of `place`."""
    part = place.with_name(f"{place.name[:20]}.{secrets.token_hex(4)}.part")
    part.touch(exist_ok=False)
    return part


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """with whole(path) as part: at the end `part` is on disk in the place of `path`. OSError names path.

    A link stays, and what it points to is replaced. The mode is that of the old file, else umask's.
    """
    path, place = Path(path), Path(os.path.realpath(path))
    part = RESERVED.pop(place, None)
    try:
        part = part or new_part(place)
        mode = (place if place.exists() else part).stat().st_mode
        yield part
        with open(part, "rb+") as file:
            sync(file.fileno())
        with suppress(OSError):                  # save_file makes 0600; some file systems have no modes
            part.chmod(stat.S_IMODE(mode))
        os.replace(part, place)
        if os.name == "posix":         # the name too: what is written later never comes without it
            with suppress(PermissionError):      # a folder may take files and show none
                folder = os.open(place.parent, os.O_RDONLY)
                sync(folder)
                os.close(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError, AttributeError):  # a disk that is gone, or became read-only
            part.unlink(missing_ok=True)


def sync(descriptor: int) -> None:
    """Waits for the disk, where the file system can say: some cannot of folders (CIFS, FUSE)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def take_room(file: BinaryIO, size: int) -> None:
    """Makes an open file `size` bytes long and gives it all its blocks; what is in it stays. OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:                                        # macOS, Windows: zeros, where there is nothing yet
        file.seek(0, os.SEEK_END)
        while (missing := size - file.tell()) > 0:
            file.write(bytes(min(missing, 2 ** 24)))


@contextmanager
def reserved(paths: Iterable[Path], size: int) -> Iterator[None]:
    """Meanwhile `size` bytes of disk are kept for each of these files, for write_whole. OSError: no room."""
    with ExitStack() as parts:
        for path in paths:
            place = Path(os.path.realpath(path))
            with naming(path):
                RESERVED[place] = part = new_part(place)
                parts.callback(part.unlink, missing_ok=True)
                parts.callback(RESERVED.pop, place, None)
                with open(part, "rb+") as file:
                    take_room(file, size)
        yield


def keep(path: Path, save: Callable[[Path], object]) -> None:
    """save(path); where it cannot be written it is saved elsewhere, and the OSError says where."""
    try:
        save(path)
    except OSError as error:
        for folder in (Path.cwd(), Path(tempfile.gettempdir()), Path.home()):
            second = folder / f"kept-{os.getpid()}-{path.name[-60:]}"
            with suppress(OSError):
                save(second)
                error = OSError(f"{error}; it is in {second}")
                break
        raise error from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that came of writing to an open file names the file, as it does not by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Text in UTF-8."""
    with whole(path) as part, open(part, "rb+") as file:
        file.write(data if isinstance(data, bytes) else encodable(data).encode())
        file.truncate()                          # its room may be larger


def encodable(text: object) -> str:
    """Text that every file takes: bytes of names that are not UTF-8 (old archives) become escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def save_png(image: Image.Image, path: Path, fields: dict | None = None) -> None:
    """A PNG with text fields {name: value}; makes its folder."""
    text = PngImagePlugin.PngInfo()
    for name, value in (fields or {}).items():
        text.add_text(name, encodable(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        image.save(part, format="PNG", pnginfo=text)


def save_figure(figure: object, path: Path) -> None:
    """A matplotlib figure as PNG."""
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=120)


def digest(data: bytes) -> str:
    """The first 16 letters of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def not_content(path: str | Path) -> str | None:
    """What stands where a file's content is expected, and the way out; None where nothing is known of it."""
    path = Path(path)
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:3])
        return f"it is a folder: name a file in it ({inside}, ...)" if inside else "it is an empty folder"
    if not path.is_file():
        return "it is a dead link" if path.is_symlink() else None
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except PermissionError:
        return f"it {NOT_YOURS}"
    if head.startswith(b"version https://git-lfs"):
        return f"it is a pointer of git-lfs, not the content: `git lfs pull` in {path.parent} brings that"
    if b"annex/objects/" in head:
        return f"it is a pointer of git-annex, not the content: `git annex get` in {path.parent} brings that"
    # a pickle by its first bytes, alone or in a zip; a safetensors file has a brace after 8 of any value
    if head[:4] == b"PK\x03\x04" or re.match(rb"\x80[\x02-\x05]", head) and head[8:9] != b"{":
        return "it is a pickle, which is never loaded: take a .safetensors file"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        return "it is a web page that was saved in its place: download the file itself"
    return None if head else "it is empty: download it again"


def check_readable(path: Path) -> None:
    """PermissionError for a file that may not be read: safe_open calls it missing; it is not damaged."""
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(f"{path} {NOT_YOURS}")


def check_file(path: str | Path, what: str) -> None:
    """ValueError unless there is such a file; a folder is named as one."""
    if not Path(path).is_file():
        raise ValueError(f"no such {what}: {path}" + (f", {why}" if (why := not_content(path)) else ""))


class JsonFile(dict):
    """A JSON object on disk. ValueError, in one line: it cannot be read, or lacks the field in [...]."""
    def __init__(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it holds no object, {...}, and so is another file")
        except (OSError, ValueError, RecursionError) as error:
            why = not_content(path) or f"{error}; if it is torn, put a whole one in its place"
            raise ValueError(f"{path} cannot be read as JSON: {why}") from None
        super().__init__(found)
        self.path = path

    def __missing__(self, field: str) -> None:
        raise ValueError(f"{self.path} lacks the field {field!r}")


def check_writable(path: Path, option: str) -> None:
    """ValueError unless `path`, or the folders above it that are not there yet, can be made."""
    base = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not base.is_dir():
        raise ValueError(f"{option} {path}: {base} is not a folder")
    try:
        new_part(base / "try").unlink()
    except OSError as error:
        raise ValueError(f"{option} {path}: {base} is not writable: {error.strerror}") from None


def check_apart(path: Path, option: str, data: list[Path]) -> None:
    """ValueError unless `path` can be written, and is not among the data, where it would be read later."""
    check_writable(path, option)
    for folder in data:
        if path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{option} {path} lies within --data {folder}; name a folder outside of it")


def check_out_folder(path: Path, option: str) -> None:
    """ValueError unless the folder of an option is there or can be made, and the one above it is there."""
    check_writable(path, option)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of {option} does not exist: {path.parent}")


def check_out_file(path: Path, suffix: str, option: str = "--out") -> None:
    """ValueError unless a file can be written: its folder must be there, and its name end in `suffix`."""
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"{option} must be a file that ends in {suffix}, not {path}")
    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():
        raise ValueError(f"the folder of {option} does not exist: {path.parent}")
    if place.exists() and not os.access(place, os.W_OK):
        raise ValueError(f"{option} {path} is write-protected")
    check_writable(place.parent, f"the folder of {option},")


def expand(names: Iterable[str | Path]) -> list[str]:
    """Patterns become the files that they stand for, where no shell has done that (Windows)."""
    found = []
    for name in map(str, names):
        matches = [] if Path(name).exists() else sorted(glob.glob(name))
        found += matches or [name]
    return found


def read_prompts(words: list[str], path: Path | None) -> list[str]:
    """The prompts of the command line and of the file, in their order, without repetition."""
    prompts = list(words)
    if path:
        try:
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {path} is not a text file in UTF-8") from None
        prompts += [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompt" if path else "no prompt: give one, or --prompts FILE")
    for prompt in prompts:
        if not prompt.strip() or prompt != prompt.encode("utf-8", "replace").decode():
            raise ValueError(f"a prompt is {'not text in UTF-8' if prompt.strip() else 'empty'}")
    return list(dict.fromkeys(prompts))


def note(text: object) -> None:
    print(f"note: {text}", file=sys.stderr)


def shorten(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")


def finite_number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


class Parser(argparse.ArgumentParser):
    """Raises ValueError on bad arguments, where argparse would print its usage and exit."""
    def error(self, message: str) -> None:
        raise ValueError(f"{message} (--help lists all options)")


def side(text: str) -> int:
    """Pixels of a picture's side: a multiple of 16."""
    value = int(text)
    low = value - value % 16
    if value < 16 or value % 16:
        near = f"{value} is no multiple of 16; the nearest are {low} and {low + 16}"
        raise argparse.ArgumentTypeError(near if value >= 16 else f"must be at least 16, not {value}")
    return value


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return int(text)


def check_training(args: argparse.Namespace) -> None:
    """ValueError for options that neither training stage takes. None, the model's default, is fine."""
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr must be a positive number, not {args.lr}")
    if args.resolution and not 64 <= min(args.resolution) <= max(args.resolution) <= 4096:
        raise ValueError(f"--resolution takes 64 to 4096 pixels, not {' '.join(map(str, args.resolution))}")
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed is between 0 and {2 ** 63 - 1}, not {args.seed}")
    if args.recompute is not None and args.recompute < 0:
        raise ValueError(f"--recompute takes 0 or more blocks, not {args.recompute}")


class Console:
    """Standard output or error: that nobody reads on, or that it cannot show a letter, is not an error."""
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, act: Callable[..., object], *words: str) -> None:
        try:
            act(*words)
        except (OSError, ValueError):            # a closed pipe or terminal, a full disk
            with suppress(OSError, ValueError):  # what the stream still holds goes nowhere, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def consoles() -> Iterator[None]:
    """Meanwhile printing decides nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Console(stream) for stream in before)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def on_signals(act: Callable[[int, object], object]) -> Iterator[None]:
    """Meanwhile Ctrl-C, SIGTERM and SIGHUP (a closed terminal) call `act`; under nohup SIGHUP does not."""
    able = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if able}
    if before.get(SIGHUP) is signal.SIG_IGN:
        del before[SIGHUP]
    for number in before:
        signal.signal(number, act)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(KeyboardInterrupt):
    """By the signal of this number."""


def stop(number: int, frame: object = None) -> None:
    raise Stopped(number)


def run_script(name: str, script: Callable[[list[str] | None], object],
               argv: list[str] | None = None) -> int:
    """script(argv) -> exit code: 0 or, with a line on stderr, 1 failed computing, 2 bad input, 130 Ctrl-C,
    143 SIGTERM, 129 SIGHUP."""
    with consoles(), on_signals(stop):
        try:
            script(argv)
        except KeyboardInterrupt as error:
            print(f"{name}: interrupted", file=sys.stderr)
            return 128 + (error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
        except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2 if isinstance(error, (ValueError, OSError)) else 1
    return 0


class Interruption:
    """with Interruption(): a signal is a flag, read between two iterations; a second one acts."""
    def __enter__(self) -> "Interruption":
        self.asked = self.time = None            # the number of the signal, and when it came
        self.signals = on_signals(self.ask)
        self.signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.signals.__exit__(None, None, None)

    def ask(self, number: int, frame: object) -> None:
        if self.asked and time.monotonic() - self.time > 3:
            stop(number)
        if not self.asked:                       # torchrun passes on what the terminal has already sent
            self.asked, self.time = number, time.monotonic()

    def raise_if_asked(self) -> None:
        if self.asked:
            stop(self.asked)
