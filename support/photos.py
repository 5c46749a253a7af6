"""Photos: read any picture, find faces, crop around them, fit the 16-pixel grid.

    python -c "from support import photos; print(photos.find_faces(photos.read_photo('face.jpg')))"

Sources: Meta-LoRA, section "Stage-2: Test-time ID Personalization" (the crops); MTCNN as packaged by
facenet-pytorch, weights included. Deviations: the paper does not say what "face centred" means beside a
border. Here a crop keeps its size and moves, see `face_crops`.
"""
import functools
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor, nn

from support.common import check_writable, digest, note, save_png

HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}   # Pillow knows these, and decodes none
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()
            if (kind in Image.OPEN or kind == "MPO") and kind not in NO_PICTURES} | HEIF_SUFFIXES
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir",
          "system volume information"}           # of operating systems, beside hidden files
# where systems and file servers keep deleted files, and older versions of others: never somebody's folder
DELETED = {"$recycle.bin", "recycler", "#recycle", "@recycle", "#snapshot", "@recently-snapshot",
           "lost+found", "network trash folder", "found.000"}
MASK = re.compile(r"(.+)(-masklabel|-condlabel|[-_.]mask)", re.IGNORECASE)      # OneTrainer's, and others'
LARGEST = 16384 * 12288                          # pixels; the largest sensors of phones, 200 megapixels
HALVED = 2 ** 26                                 # pixels from which a picture is read at half its sides
HEIF_BRANDS = b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split()       # at byte 8, after "ftyp"
MENDED: set[tuple[Path, int]] = set()            # pictures without their end, with their times: noted once
MIN_SIDE = 16                                    # pixels; one image token
ASPECTS = {"16:9": 16 / 9, "4:3": 4 / 3, "1:1": 1, "3:4": 3 / 4, "9:16": 9 / 16}    # of crops, width / height
FACE_SCALES = (1.5, 2, 2.5, 3.5, 4.5)            # shorter side of a crop / longer side of the face
Face = tuple[float, float, float, float, float]  # x0, y0, x1, y1, probability
Box = tuple[int, int, int, int]                  # x0, y0, x1, y1
FLOOR = 512                                      # pixels; FLUX.1 was not made for less


def visible(folder: str | Path) -> list[Path]:
    """Sorted paths of what is directly inside `folder`, without hidden files and litter of systems."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in LITTER)


def subfolders(folder: str | Path) -> list[Path]:
    """Sorted paths of the visible folders directly inside `folder`, without those of deleted files."""
    return [path for path in visible(folder) if path.is_dir() and path.name.lower() not in DELETED]


def image_files(folder: str | Path) -> list[Path]:
    """Sorted paths of the pictures directly inside `folder`, by suffix; dead links too, to be named.

    Without masks that other trainers keep beside them."""
    paths = [path for path in visible(folder) if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    return without_masks(paths)


def without_masks(paths: list[Path]) -> list[Path]:
    """The pictures that are not the mask of another, as a_mask.png or a-masklabel.png beside a.jpg is."""
    named = {path: MASK.fullmatch(path.stem) for path in paths}
    others = {path.with_suffix("") for path in paths}
    return [path for path in paths if not named[path] or path.with_name(named[path][1]) not in others]


def read_photo(path: str | Path) -> Image.Image:
    """Any picture that Pillow reads -> PIL image, mode RGB in sRGB, upright by its EXIF orientation.

    The first frame of an animation, transparency on white; over 67 megapixels at half its sides, which
    info["reduced"] then says. ValueError, one line naming the file: no whole picture, under 16 pixels a
    side, or over 200 megapixels. A JPEG without its last bytes is read, with a note.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a picture")
    if not path.is_file():
        raise ValueError(f"{path} is a dead link" if path.is_symlink() else f"no such picture: {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with open(path, "rb") as file, generous_limits():
            head = file.read(12)
            if is_heif := head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS:
                can_read_heif()
            image = decode(path)
    except Image.UnidentifiedImageError as error:
        hint = ""
        if is_heif or path.suffix.lower() in HEIF_SUFFIXES:
            hint = " as HEIC" if can_read_heif() else "; HEIC is read after: pip install pillow-heif"
        raise ValueError(f"{path} is not a picture that can be read{hint}") from error
    except Image.DecompressionBombError:
        raise ValueError(f"{path} is too large: over {LARGEST:,} pixels") from None
    except PermissionError:
        raise ValueError(f"{path} may not be read: see its owner and mode (`ls -l`)") from None
    except Exception as error:                   # on broken files the decoders raise whatever they stumble on
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or cannot be read: {reason}") from error
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise ValueError(f"{path} is {width} x {height} pixels; at least {MIN_SIDE} x {MIN_SIDE} are needed")
    return image


@contextmanager
def generous_limits() -> Iterator[None]:
    """Pillow's guards against bombs, raised to what sound pictures hold: editors write megabytes of text."""
    png = PngImagePlugin
    before = Image.MAX_IMAGE_PIXELS, png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS, png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY = LARGEST / 2, 2 ** 28, 2 ** 29
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # Pillow warns from half of its limit on
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY = before


@functools.cache
def can_read_heif() -> bool:
    """Teaches Pillow to read HEIC, where pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def decode(path: Path) -> Image.Image:
    """An image file -> RGB, upright, half as large in each direction where it is huge."""
    with Image.open(path) as image:
        reduced = 1 + (image.width * image.height > HALVED)
        size = image.width // reduced, image.height // reduced
        if reduced > 1:
            image.draft(None, size)              # of JPEG alone: scaled while it is decoded
        try:
            image.load()
        except OSError:
            if image.format not in ("JPEG", "MPO"):
                raise
            image = mend_jpeg(path, size)
        image = to_rgb(ImageOps.exif_transpose(image))
    if image.width * image.height > HALVED:
        image = image.reduce(reduced)
    image.info = {"reduced": reduced}            # a profile would be saved with crops, whose colours are sRGB
    return image


def mend_jpeg(path: Path, size: tuple[int, int]) -> Image.Image:
    """A JPEG that lacks its end, with a note. OSError where more than a fiftieth of the picture is lost."""
    data = path.read_bytes().rstrip(b"\xff")     # half a marker

    def finish(filler: bytes) -> Image.Image:    # with an end marker the decoder makes up what is missing
        image = Image.open(BytesIO(data + filler + b"\xff\xd9"))
        image.draft(None, size)
        image.load()
        return image

    image = finish(b"")
    # what depends on the bytes that follow was not in the file
    other = finish(b"\x55" * (image.width * image.height // 8 + 1000))
    lost = np.asarray(ImageChops.difference(image, other)) > 0
    if lost.reshape(image.height, image.width, -1).any(-1).mean() > 0.02:
        raise OSError("its end is missing")
    if (this := (path.resolve(), path.stat().st_mtime_ns)) not in MENDED:
        note(f"{path} lacks its last bytes; the rest is used")
        MENDED.add(this)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> mode RGB, sRGB. Pillow's own conversion clips 16 bits, drops transparency."""
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I") or image.mode == "F":    # no white point is stated: the first that fits
        values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
        whites = (1, 255) if image.mode == "F" else (65535,)
        white = next((w for w in whites if values.max() <= w), values.max())
        image = Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        kind = "L" if image.mode.startswith("L") else "RGB"
        image = image.convert("RGBA")
        image, alpha = image.convert(kind), image.getchannel("A")
    elif image.mode == "P":
        image = image.convert("RGB")
    image = to_srgb(image, profile)
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours that the profile gives the numbers; without one, or with a broken one, they are sRGB's."""
    try:
        own = ImageCms.ImageCmsProfile(BytesIO(profile)) if profile else None
        if own and not ImageCms.getProfileDescription(own).startswith("sRGB"):
            return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        pass                                     # viewers do the same
    return image.convert("RGB")


@functools.lru_cache(maxsize=2)
def face_detector(device: str) -> nn.Module:
    """MTCNN with its packaged weights on `device`, built once."""
    from facenet_pytorch import MTCNN            # slow to import, and most users of this file need no faces
    return MTCNN(keep_all=True, device=torch.device(device)).eval()


@torch.no_grad()
def find_faces(image: Image.Image, device: str | torch.device = "cpu", threshold: float = 0.9) -> list[Face]:
    """PIL image -> [(x0, y0, x1, y1, probability)], in pixels, within the image, the largest box first.

    MTCNN sees it at 480 to 1024 pixels (side of a square of its area), in a grey margin for faces that fill
    it. The threshold: faces in photos and paintings get above 0.99, 1 of 210 textures more than 0.9.
    """
    own_side = (image.width * image.height) ** 0.5
    side = min(max(own_side, 480), 1024)
    scale = side / own_side
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    margin = round(0.2 * side)
    seen = ImageOps.expand(image.convert("RGB").resize(size, Image.BICUBIC), margin, (128, 128, 128))
    # Pooling to arbitrary sizes does not exist on mps; the CPU needs a tenth of a second.
    detector = face_detector("cpu" if torch.device(device).type == "mps" else str(device))
    detector.min_face_size = max(20, side / 32)
    boxes, probabilities = detector.detect(seen)
    faces = []
    for box, probability in zip(boxes if boxes is not None else (), probabilities):
        box = (np.asarray(box, dtype=np.float64) - margin) / [*size, *size]
        x0, y0, x1, y1 = (box.clip(0, 1) * [*image.size, *image.size]).tolist()
        if probability >= threshold and x1 - x0 >= 1 and y1 - y0 >= 1:
            faces.append((x0, y0, x1, y1, float(probability)))
    return sorted(faces, key=lambda f: (f[2] - f[0]) * (f[3] - f[1]), reverse=True)


def head_box(face: tuple[float, ...]) -> Box:
    """A face (x0, y0, x1, y1, ...) -> the box of the head, which may reach beyond the picture."""
    x0, y0, x1, y1 = face[:4]             # from the middle of the forehead to the chin, without hair and ears
    w, h = x1 - x0, y1 - y0
    return round(x0 - 0.12 * w), round(y0 - 0.35 * h), round(x1 + 0.12 * w), round(y1 + 0.08 * h)


def face_crops(width: int, height: int, box: tuple[float, ...], aspects: list[str] | None = None,
               scales: list[float] | None = None) -> list[Box]:
    """The paper's crops around one face: 1 to 25 boxes (x0, y0, x1, y1), integer pixels, inside the picture.

    For each aspect the shorter side is the face's longer side x 1.5, 2, 2.5, 3.5 and 4.5, the face centred.
      - A size that the picture does not hold is replaced by the largest of that aspect, once.
      - A crop that hangs over a border is moved inside, not shrunk, which would leave one size of the five:
        faces are mostly near the top. It contains the face, or as much of it as its aspect allows.
      - A crop within 2 pixels of an earlier one on all four edges is left out.
    `aspects`: names in ASPECTS; `scales`: of the face's longer side; None is all of the paper's. ValueError
    if `box` (x0, y0, x1, y1, ...) has no area inside the picture.
    """
    x0, y0, x1, y1 = (min(max(v, 0), limit) for v, limit in zip(box[:4], (width, height, width, height)))
    if not (x1 > x0 and y1 > y0):                # also refuses nan
        raise ValueError(f"face box {tuple(box[:4])} has no area inside a {width} x {height} picture")

    def place(size: int, limit: int, low: float, high: float) -> tuple[int, int]:      # along one axis
        start = min(max(round((low + high - size) / 2), 0), limit - size)
        return start, start + size

    crops = []
    for aspect in map(ASPECTS.get, aspects or ASPECTS):
        wide, tall = max(1, aspect), max(1, 1 / aspect)    # sides, in units of the shorter one
        largest = min(width / wide, height / tall)
        for scale in scales or FACE_SCALES:
            short = min(scale * max(x1 - x0, y1 - y0), largest)
            across = place(min(max(1, round(short * wide)), width), width, x0, x1)
            down = place(min(max(1, round(short * tall)), height), height, y0, y1)
            crop = across[0], down[0], across[1], down[1]
            if not any(max(abs(a - b) for a, b in zip(crop, other)) <= 2 for other in crops):
                crops.append(crop)
    return crops


def grid_size(width: int, height: int, resolution: int, multiple: int = 16,
              upscale: bool = False) -> tuple[int, int]:
    """(w, h), multiples of `multiple`, with w * h near resolution**2 and w / h near width / height.

    Without `upscale`, w * h is at most width * height, unless a side is under `multiple`.
    """
    if min(width, height, resolution, multiple) < 1:
        sizes = f"{width} x {height}, resolution {resolution}, multiple {multiple}"
        raise ValueError(f"sizes must be positive: {sizes}")
    limit = float("inf") if upscale else width * height
    area, aspect = min(resolution ** 2, limit), width / height

    def around(side: float) -> tuple[int, int]:
        low = max(1, int(side / multiple)) * multiple
        return low, low + multiple
    sizes = [(w, h) for w in around((area * aspect) ** 0.5) for h in around((area / aspect) ** 0.5)]
    fitting = [(w, h) for w, h in sizes if w * h <= limit] or sizes[:1]
    # the error in aspect is cropped away, that in area is blur or cost
    return min(fitting, key=lambda s: 2 * abs(np.log(s[0] / s[1] / aspect)) + abs(np.log(s[0] * s[1] / area)))


def fit_to_grid(image: Image.Image, resolution: int, multiple: int = 16,
                upscale: bool = False) -> Image.Image:
    """PIL image -> PIL image of `grid_size`: scaled to cover it, the rest cut off evenly, never stretched."""
    w, h = grid_size(*image.size, resolution, multiple, upscale)
    scale = max(w / image.width, h / image.height)
    left, top = (image.width - w / scale) / 2, (image.height - h / scale) / 2
    box = max(0, left), max(0, top), min(image.width, left + w / scale), min(image.height, top + h / scale)
    return image.resize((w, h), Image.BICUBIC, box=box)


class Crop(NamedTuple):
    picture: Image.Image                         # as the model sees it
    photo: Path
    box: Box                                     # where in the photo
    head: Image.Image | None = None     # white where the head is, of the picture's size; None: not looked for


def to_sizes(picture: Image.Image, resolutions: list[int]) -> list[Image.Image]:
    """A picture at each resolution, no size twice; enlarged only from under 512 x 512 or the resolution."""
    sized = {}
    for resolution in resolutions:
        floor = min(resolution, FLOOR)           # blur is a smaller evil than a handful of tokens
        small = picture.width * picture.height < floor ** 2
        fitted = fit_to_grid(picture, floor if small else resolution, upscale=small)
        sized.setdefault(fitted.size, fitted)
    return list(sized.values())


def check_photos(paths: list[str], box: list[int] | None, augment: bool) -> None:
    """ValueError for a photo that cannot be read, and for a --box that does not fit."""
    if box and (len(paths) > 1 or not augment):
        raise ValueError("--box is for one photo and its crops: "
                         + ("leave out --no-augment" if not augment else f"{len(paths)} photos are given"))
    for path in paths:
        photo = read_photo(path)
        if box:
            width, height = (length * photo.info["reduced"] for length in photo.size)
            x0, y0, x1, y1 = box
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise ValueError(f"--box {x0} {y0} {x1} {y1} must be X0 < X1 and Y0 < Y1 within {path}, "
                                 f"which is {width} x {height} pixels")


def fingerprints(paths: list[str | Path]) -> dict[str, str]:
    """What the metadata of a LoRA say of its photos, in order: their names, and digests of the files."""
    paths = [*map(Path, paths)]
    return {"photos": ", ".join(path.name for path in paths),
            "photo_digests": " ".join(digest(path.read_bytes()) for path in paths)}


def parts_of(image: Image.Image, number: int) -> list[Box]:
    """Boxes of 1 / number of the sides that overlap by half, so that each small thing is whole in one."""
    w, h = image.width / number, image.height / number
    return [(round(x * w / 2), round(y * h / 2), round(x * w / 2 + w), round(y * h / 2 + h))
            for y in range(2 * number - 1) for x in range(2 * number - 1)]


def find_anywhere(image: Image.Image, path: Path) -> tuple[Image.Image, list[Face]]:
    """A picture -> itself, or turned with a note, and the faces in it, found in parts of it if need be.

    As it is, turned, then in parts: an upright face of any size counts before a lying one among details.
    """
    turn = Image.Transpose
    turned = {0: image} | {angle: image.transpose(way) for angle, way in
                           ((90, turn.ROTATE_90), (180, turn.ROTATE_180), (270, turn.ROTATE_270))}
    others = [90, 180, 270]
    # the detector sees at most 1024 x 1024; a part of a small picture is a handful of pixels
    parts = [([0], 2), ([0], 4), (others, 2)] if image.width * image.height > FLOOR ** 2 else []
    for angles, number in [([0], 1), (others, 1), *parts]:
        best = []
        for angle in angles:
            view = turned[angle]
            for x, y, x1, y1 in parts_of(view, number):
                faces = find_faces(view.crop((x, y, x1, y1)) if number > 1 else view)
                # many looks at little: more is asked for
                sure = [f for f in faces if number == 1 or f[4] > 0.99]
                here = [(f[0] + x, f[1] + y, f[2] + x, f[3] + y, f[4]) for f in sure]
                if here and (not best or here[0][4] > best[1][0][4]):
                    best = [angle, here]
        if best:
            angle, faces = best
            if angle:
                note(f"no face in {path} as it is; it is taken turned by {angle} degrees to the left")
            if number > 1:
                x0, y0, x1, y1 = map(round, faces[0][:4])
                note(f"the face in {path} is small: {x1 - x0} x {y1 - y0} pixels at ({x0}, {y0})")
            return turned[angle], faces
    raise ValueError(f"no face found in {path}, turned or enlarged: --box X0 Y0 X1 Y1 says where the subject "
                     "is, in pixels, and --no-augment takes whole photos")


def load_crops(paths: list[str | Path], resolutions: list[int], augment: bool = True,
               aspects: list[str] | None = None, scales: list[float] | None = None,
               box: list[int] | None = None) -> list[Crop]:
    """Photos of one person -> the crops of all of them; without `augment` each photo as a whole.

    box: where the subject is (x0, y0, x1, y1), in pixels of the one photo; else its face is looked for. Of
    several faces the largest counts. ValueError names a photo that cannot be read or shows no face.
    """
    crops = []
    for path in map(Path, paths):
        photo = read_photo(path)
        boxes, head = [(0, 0, *photo.size)], None
        if augment and box:
            subject = tuple(round(edge / photo.info["reduced"]) for edge in box)
            inner = subject
        elif augment:
            photo, faces = find_anywhere(photo, path)    # on the CPU: the same crops on any device
            if len(faces) > 1:
                x, y, x1, y1 = map(round, faces[0][:4])
                largest = f"{x1 - x} x {y1 - y} pixels at ({x}, {y})"
                note(f"{len(faces)} faces in {path}; taking the largest, {largest}")
            subject, inner = faces[0], head_box(faces[0])
        if augment:
            boxes, head = face_crops(*photo.size, subject, aspects, scales), Image.new("L", photo.size)
            head.paste(255, inner)
        for place in boxes:
            pictures = to_sizes(photo.crop(place), resolutions)
            heads = to_sizes(head.crop(place), resolutions) if head else [None] * len(pictures)
            crops += [Crop(picture, path, place, own) for picture, own in zip(pictures, heads)]
    return crops


def head_weights(crop: Crop, background: float) -> Tensor:
    """How much the loss counts at each place of a crop's latent, (1, H / 8, W / 8), with a mean of 1;
    `background` is the share of what is not head, 1 to count all alike, as the paper does."""
    if crop.head is None:
        return torch.ones(1, 1, 1)
    head = F.avg_pool2d(torch.from_numpy(np.array(crop.head)).float()[None] / 255, 8)
    weights = background + (1 - background) * head
    return weights / weights.mean()


def save_crops(crops: list[Crop], folder: Path) -> None:
    """One PNG for each, numbered and named by size and photo."""
    for i, (picture, photo, *_) in enumerate(crops):
        save_png(picture, folder / f"{i:02d}-{picture.width}x{picture.height}-{photo.stem}.png")


def to_tensor(image: Image.Image) -> Tensor:
    """PIL image -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clamped and rounded -> PIL image. ValueError: another shape, or not finite."""
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"a picture has shape (3, height, width), not {tuple(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError("the picture has values that are not finite")
    pixels = (tensor.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def picture_fields(prompt: str, seed: int, settings: dict, model: str,
                   loras: list[tuple[str, float]]) -> dict[str, object]:
    """Text fields of a PNG: first `parameters`, as A1111 writes it and Forge, Civitai and viewers read it.

    None is called `prompt`, under which ComfyUI looks for JSON. settings: of sample.py.
    """
    named = [(Path(path).stem, f"{strength:g}") for path, strength in loras]
    lines = [prompt + "".join(f" <lora:{name}:{strength}>" for name, strength in named)]
    if settings["true_cfg"] != 1.0:
        lines.append(f"Negative prompt: {settings['negative']}")
    name = model.removesuffix(".safetensors")
    quoted = json.dumps(name, ensure_ascii=False) if set(name) & set(',:"') else name
    facts = {"Steps": settings["steps"], "Sampler": "Euler", "CFG scale": f"{settings['true_cfg']:g}",
             "Distilled CFG Scale": f"{settings['guidance']:g}", "Seed": seed,
             "Size": f"{settings['width']}x{settings['height']}", "Model": quoted}
    lines.append(", ".join(f"{key}: {value}" for key, value in facts.items()))
    files = ", ".join(f"{Path(path).name}:{strength:g}" for path, strength in loras)
    return {"parameters": "\n".join(lines), "prompt_text": prompt, "seed": seed, **settings,
            "model": model, "loras": files}


def plan_files(out: Path | None, prompts: int, seeds: range) -> tuple[list[Path], Path | None]:
    """Where each picture goes, prompt after prompt, and the grid (None for one picture). Writes nothing."""
    count = prompts * len(seeds)
    out = out or Path("samples" if count > 1 else "out.png")
    is_file = out.suffix.lower() == ".png" and not out.is_dir()
    if is_file and count > 1:
        raise ValueError(f"--out {out} is one file, but there are {count} pictures: name a folder")
    if out.suffix.lower() in SUFFIXES - {".png"} and not out.is_dir():
        raise ValueError(f"--out {out}: pictures are written as PNG")
    check_writable(out.parent if is_file else out, "--out")
    files = [out / f"{prompt}_{seed}.png" for prompt in range(prompts) for seed in seeds]
    return [out] if is_file else files, out / "grid.png" if count > 1 else None
