"""Shared by all scripts: files that are complete or absent, command lines, printing, Ctrl-C."""
import argparse
import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import (ExitStack, contextmanager, redirect_stderr, redirect_stdout,
                        suppress)
from pathlib import Path
from typing import TextIO

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError
from tqdm import tqdm

from support import SIGNALS
from support.devices import (free, is_out_of_memory, peak_memory, pick_device,  # noqa: F401
                             suppress_out_of_memory, to_device, use_threads)

# errors of file systems that lack an operation
NOT_SUPPORTED = errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK
NOT_YOURS = "may not be read: see its owner and mode (`ls -l`)"
RESERVED: dict[Path, Path] = {}                  # file -> its temporary file, with space allocated
# first bytes of what stands in the place of a file, and what that is
NOT_CONTENT = {
    rb"version https://git-lfs":
        "a pointer of git-lfs, not the content: run `git lfs pull` in its folder",
    rb".*annex/objects/":
        "a pointer of git-annex, not the content: run `git annex get` in its folder",
    # alone or in a zip; a safetensors file begins with 8 bytes of any value and a brace
    rb"PK\x03\x04|\x80[\x02-\x05](?!.{6}{)":
        "a pickle, which is never loaded: take a .safetensors file",
    rb"\s*<(!doc|html|\?xml)":
        "a web page that was saved in its place: download the file itself",
    rb"\Z":
        "empty: download it again",
}


def new_part(place: Path) -> Path:
    """A new, empty file beside `place`, with a short name however long that of `place` is; creates
    the folder."""
    part = place.with_name(f"{place.name[:20]}.{secrets.token_hex(4)}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch(exist_ok=False)
    return part


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """with whole(path) as part: write `part`; on success it is synced and renamed to `path`.

    A link is kept, and its target replaced. The mode is the old file's, else umask's. OSError names
    the path.
    """
    place = Path(os.path.realpath(path))
    with naming(path):
        part = RESERVED.pop(place, None) or new_part(place)
        try:
            mode = (place if place.exists() else part).stat().st_mode
            yield part
            with open(part, "rb+") as file:
                sync(file.fileno())
            # save_file makes 0600; a file system may lack modes
            with suppress(OSError):
                part.chmod(stat.S_IMODE(mode))
            os.replace(part, place)
            # sync the folder too, so that no file written later outlives this one in a crash
            if os.name == "posix":
                with suppress(PermissionError):  # a folder can be writable and not readable
                    folder = os.open(place.parent, os.O_RDONLY)
                    sync(folder)
                    os.close(folder)
        finally:
            with suppress(OSError):              # the disk is gone or read-only
                part.unlink(missing_ok=True)


def sync(descriptor: int):
    """fsync, where the file system supports it; CIFS and FUSE may not for folders."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


@contextmanager
def reserved(paths: Iterable[Path], size: int) -> Iterator[None]:
    """Reserves `size` bytes of disk for each of these files, for write_whole. OSError: no space."""
    with ExitStack() as parts:
        for path in paths:
            place = Path(os.path.realpath(path))
            with naming(path):
                RESERVED[place] = part = new_part(place)
                parts.callback(part.unlink, missing_ok=True)
                parts.callback(RESERVED.pop, place, None)
                if hasattr(os, "posix_fallocate"):           # not on macOS and Windows
                    with open(part, "rb+") as file:
                        os.posix_fallocate(file.fileno(), 0, size)
        yield


def keep(path: Path, save: Callable[[Path], object]):
    """save(path); if that fails, saves elsewhere and raises an OSError that says where."""
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
def naming(path: str | Path) -> Iterator[None]:
    """Adds the file's name to an OSError from writing to an open file, which lacks it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} cannot be written: {reason}") from None


def write_whole(path: str | Path, data: bytes | str):
    """Writes a complete file; text in UTF-8."""
    with whole(path) as part, open(part, "rb+") as file:
        file.write(data if isinstance(data, bytes) else encodable(data).encode())
        file.truncate()                          # its reserved space may be larger


def encodable(text: object) -> str:
    """Text that encodes to UTF-8: other bytes, in file names of old archives, become escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def save_png(image: Image.Image, path: Path, fields: dict | None = None):
    """Saves a PNG with text fields {name: value}."""
    text = PngImagePlugin.PngInfo()
    for name, value in (fields or {}).items():
        text.add_text(name, encodable(value))
    with whole(path) as part:
        image.save(part, format="PNG", pnginfo=text)


def save_figure(figure: object, path: Path):
    """Saves a matplotlib figure as PNG."""
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=120)


def digest(data: bytes) -> str:
    """The first 16 hex digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def not_content(path: str | Path) -> str | None:
    """Why a file does not hold the expected content, and what to do; None if it looks fine."""
    path = Path(path)
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:3])
        if not inside:
            return "it is an empty folder"
        return f"it is a folder: name a file in it ({inside}, ...)"
    if not path.is_file():
        return "it is a dead link" if path.is_symlink() else None
    if not os.access(path, os.R_OK):
        return f"it {NOT_YOURS}"
    with open(path, "rb") as file:
        head = file.read(100)
    for pattern, what in NOT_CONTENT.items():
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            return f"it is {what}"
    return None


def check_readable(path: Path):
    """PermissionError for a file without read permission, which safe_open reports as missing."""
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(f"{path} {NOT_YOURS}")


def check_file(path: str | Path, what: str):
    """ValueError unless the file exists; says so if it is a folder."""
    if not Path(path).is_file():
        why = not_content(path)
        raise ValueError(f"no such {what}: {path}" + (f", {why}" if why else ""))


class JsonFile(dict):
    """A JSON object on disk. ValueError, in one line: unreadable, or file[field] is missing."""
    def __init__(self, path: Path):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it does not hold an object, {...}")
        except (OSError, ValueError, RecursionError) as error:
            why = not_content(path) or f"{error}; if it is torn, put a whole one in its place"
            raise ValueError(f"{path} cannot be read as JSON: {why}") from None
        super().__init__(found)
        self.path = path

    def __missing__(self, field: str):
        raise ValueError(f"{self.path} lacks the field {field!r}")


def check_settings(path: Path, now: dict, later: str = "") -> dict:
    """The settings at `path`, else `now`. ValueError, naming what differs, if they are not those of
    `now`. The setting `later` may be "none" in one of the two."""
    changed = []
    before = JsonFile(path) if path.exists() else now
    for name, value in now.items():
        was = before.get(name, "not written down")
        unknown = name == later and "none" in (was, value)
        if was != value and not unknown:
            was, value = str(was), str(value)
            # long values from shortly before their difference on
            start = max(0, len(os.path.commonprefix([was, value])) - 40)
            was, value = was[start:start + 80], value[start:start + 80]
            changed.append(f"{name} was {was} and is {value}")
    if changed:
        raise ValueError(f"{path.parent} was made with other settings: {', '.join(changed)}; "
                         "use those, or name a new folder")
    return before


def save_settings(path: Path, settings: dict):
    """Writes what `check_settings` reads."""
    write_whole(path, json.dumps(settings, indent=1))


def check_writable(path: Path, option: str, data: Iterable[Path] = ()):
    """ValueError unless the folder `path` exists or can be created, with its missing parents, and
    is outside of the data, where it would be read later."""
    base = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if not base.is_dir():
        raise ValueError(f"{option} {path}: {base} is not a folder")
    try:
        new_part(base / "try").unlink()
    except OSError as error:
        raise ValueError(f"{option} {path}: {base} is not writable: {error.strerror}") from None
    for folder in data:
        if path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{option} {path} lies within --data {folder}; "
                             "name a folder outside of it")


def check_out(path: Path, suffix: str = "", option: str = "--out"):
    """ValueError unless a file whose name ends in `suffix`, or without one a folder, can be written
    in a folder that exists."""
    if suffix and (path.suffix != suffix or path.is_dir()):
        raise ValueError(f"{option} must be a file that ends in {suffix}, not {path}")
    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():
        raise ValueError(f"the folder of {option} does not exist: {path.parent}")
    if place.is_file() and not os.access(place, os.W_OK):
        raise ValueError(f"{option} {path} is write-protected")
    check_writable(place.parent if suffix else path, option)


def expand(names: Iterable[str | Path]) -> list[str]:
    """Expands glob patterns, which the shell does not on Windows."""
    found = []
    for name in map(str, names):
        matches = [] if Path(name).exists() else sorted(glob.glob(name))
        found += matches or [name]
    return found


def read_text(path: Path) -> str:
    """ValueError if the file is not UTF-8 text."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"                              # refused below, as UTF-16 without its mark is
    if "\0" in text:
        raise ValueError(f"{path} is not text in UTF-8: save it as UTF-8")
    return text


def read_prompts(words: list[str], path: Path | None) -> list[str]:
    """Prompts from the command line, then from the file, without duplicates."""
    prompts = [word.strip() for word in words]
    for prompt in prompts:
        if re.search(r"\.safetensors(:\S*)?$", prompt):
            raise ValueError(f"{prompt} is a LoRA file and not a prompt: write --lora before each")
    if path:
        lines = map(str.strip, read_text(path).splitlines())
        prompts += [line for line in lines if line and line[0] != "#"]
    if not prompts:
        none = f"{path} holds no prompt" if path else "no prompt: give one, or --prompts FILE"
        raise ValueError(none)
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt is empty")
        if prompt != encodable(prompt):
            raise ValueError(f"a prompt is not text in UTF-8: {shorten(prompt)}")
    return list(dict.fromkeys(prompts))


def progress(things: Iterable, name: str, **options: object) -> tqdm:
    """A progress bar that vanishes at its end; of torchrun's processes the first one's alone."""
    first = os.environ.get("RANK", "0") == "0"
    return tqdm(things, name, disable=None if first else True, leave=False, **options)


def batched(things: list, size: int) -> Iterator[list]:
    """Consecutive parts of `size` things; the last may be smaller. As Python 3.12's of itertools."""
    for start in range(0, len(things), size):
        yield things[start:start + size]


def command_line(*words: object) -> str:
    """Words for the user's shell: cmd.exe has no single quotes."""
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    return join([str(word) for word in words])


def note(text: object):
    print(f"note: {text}", file=sys.stderr)


def shorten(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")


def finite_number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def positive_number(text: str) -> float:
    if finite_number(text) <= 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return float(text)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and raises ValueError for bad arguments; argparse would print its
    usage and exit."""
    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists all options)")


def whole_number(least: int, most: int = 2 ** 63 - 1) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
        return int(text)
    return number


count = whole_number(0)
positive = whole_number(1)
resolution = whole_number(64, 4096)


def side(text: str) -> int:
    """Side of a picture in pixels, a multiple of 16."""
    value = whole_number(16)(text)
    if value % 16:
        low = value - value % 16
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of 16; the nearest are {low} "
                                         f"and {low + 16}")
    return value


class Console:
    """Standard output or error that never fails: not without a reader, nor over a character."""
    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, act: Callable[..., object], *words: str):
        try:
            act(*words)
        except (OSError, ValueError):            # a closed pipe or terminal, a full disk
            with suppress(OSError, ValueError):  # discard what is still buffered
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def on_signals(act: Callable[[int, object], object]) -> Iterator[None]:
    """Within this block Ctrl-C, SIGTERM, and SIGHUP except under nohup, call `act`."""
    able = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if able}
    for number in before:
        signal.signal(number, act)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int, frame: object = None):
    raise KeyboardInterrupt(number)


class Problems(ValueError):
    """Problems(*lines): bad input, with a line for each problem."""


def run_script(name: str, script: Callable[[list[str] | None], object],
               argv: list[str] | None = None) -> int:
    """Runs script(argv) -> exit code: 0, or with lines on stderr 1 failed while computing, 2 bad
    input, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    out = Console(sys.stdout)
    err = Console(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err), on_signals(stop):
        try:
            script(argv)
        except KeyboardInterrupt as error:
            print(f"{name}: interrupted", file=sys.stderr)
            return 128 + (error.args[0] if error.args else signal.SIGINT)
        except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            lines = error.args if isinstance(error, Problems) else [error]
            for line in lines:
                print(f"{name}: {' '.join(str(line).split())}", file=sys.stderr)
            return 2 if isinstance(error, (ValueError, OSError)) else 1
        finally:
            out.flush()
            err.flush()
    return 0


class Interruption(ExitStack):
    """with Interruption(): a signal sets a flag, checked between iterations; a second one, at least
    3 seconds later, stops."""
    def __enter__(self) -> "Interruption":
        self.asked = None                        # the number of the signal
        self.enter_context(on_signals(self.ask))
        return self

    def ask(self, number: int, frame: object):
        if not self.asked:
            self.time = time.monotonic()
            self.asked = number
        # earlier than this, it is torchrun, which forwards what the terminal already sent
        elif time.monotonic() - self.time > 3:
            stop(number)

    def raise_if_asked(self):
        if self.asked:
            stop(self.asked)
