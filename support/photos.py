"""Photos: read any picture, find faces, crop around them, fit the 16-pixel grid.

    python -c "from support import photos; print(photos.find_faces(photos.read_photo('face.jpg')))"

Sources: Meta-LoRA, section "Stage-2: Test-time ID Personalization" (the crops); MTCNN as packaged
by facenet-pytorch, weights included. Deviation: the paper does not say what "face centred" means
near a border. Here a crop keeps its size and moves, see `face_crops`. """
import functools
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor, nn

from support.common import check_file, check_writable, digest, not_content, note, save_png

# of pictures that Pillow reads, the last three with pillow-heif
SUFFIXES = set("""
.apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .emf .eps .fit .fits .flc .fli .ftc .ftu .gbr
.gif .icb .icns .ico .iim .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .msp .pbm
.pcd .pcx .pfm .pgm .png .pnm .ppm .ps .psd .pxr .qoi .ras .rgb .rgba .sgi .tga .tif .tiff .vda
.vst .webp .wmf .xbm .xpm .heic .heif .hif""".split())
# written by operating systems, besides hidden files
LITTER = set("thumbs.db|ehthumbs.db|desktop.ini|icon\r|__macosx|@eadir|"
             "system volume information".split("|"))
# where systems and file servers keep deleted files and older versions
DELETED = set("$recycle.bin|recycler|#recycle|@recycle|#snapshot|@recently-snapshot|lost+found|"
              "network trash folder|found.000".split("|"))
MASK = re.compile(r"(.+)(-masklabel|-condlabel|[-_.]mask)", re.IGNORECASE)   # OneTrainer and others
LARGEST = 16384 * 12288                          # pixels; 200 megapixels, the largest phone sensors
MIN_SIDE = 16                                    # pixels; one image token
MIN_RESOLUTION = 512                             # pixels; FLUX.1 was not made for less
ASPECTS = "16:9 4:3 1:1 3:4 9:16".split()        # width and height of crops
FACE_SCALES = (1.5, 2, 2.5, 3.5, 4.5)            # shorter side of a crop / longer side of the face
PREVIEW = 254                                    # tag of TIFF: odd for a preview
Face = tuple[float, ...]                         # x0, y0, x1, y1, probability
Box = tuple[int, ...]                            # x0, y0, x1, y1


def visible(folder: Path) -> list[Path]:
    """Sorted paths directly inside `folder`, without hidden files and the litter of systems."""
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    return [path for path in sorted(folder.iterdir())
            if path.name[0] != "." and path.name.lower() not in LITTER]


def subfolders(folder: Path) -> list[Path]:
    """Sorted paths of the visible folders directly inside `folder`, except for trash folders."""
    return [path for path in visible(folder)
            if path.is_dir() and path.name.lower() not in DELETED]


def image_files(folder: Path) -> list[Path]:
    """Sorted paths of the pictures directly inside `folder`, by suffix, without masks.

    Includes dead links, so that an error can name them."""
    return without_masks([path for path in visible(folder)
                          if path.suffix.lower() in SUFFIXES and not path.is_dir()])


def without_masks(paths: list[Path]) -> list[Path]:
    """Drops masks of other pictures: a_mask.png or a-masklabel.png next to a.jpg."""
    stems = {path.with_suffix("") for path in paths}
    kept = []
    for path in paths:
        mask = MASK.fullmatch(path.stem)
        if not mask or path.with_name(mask[1]) not in stems:
            kept.append(path)
    return kept


# --------------------------------------------------------------------------------------------------
# Reading


def read_photo(path: str | Path) -> Image.Image:
    """Any picture that Pillow reads -> PIL image, mode RGB in sRGB, upright by its EXIF
    orientation.

    The first frame of an animation; transparency on white. A JPEG that lacks its last bytes is
    read, with a note. ValueError, one line naming the file: damaged, under 16 pixels a side, or
    over 200 megapixels.
    """
    path = Path(path)
    check_file(path, "picture")
    can_read_heif()
    try:
        with raised_limits():
            try:
                image = decode(path)
            except OSError:
                image = mend_jpeg(path)
    except Image.DecompressionBombError:
        raise ValueError(f"{path} is too large: over {LARGEST:,} pixels") from None
    except Exception as error:                  # decoders raise all sorts of things on broken files
        why = repr(error)
        if isinstance(error, Image.UnidentifiedImageError):
            why = "it is not a picture of a known format"
            if path.read_bytes()[4:8] == b"ftyp" and not can_read_heif():
                why = "if it is HEIC, the format of iPhones: pip install pillow-heif"
        raise ValueError(f"{path} cannot be read: {not_content(path) or why}") from error
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{path} is {image.width} x {image.height} pixels, under {MIN_SIDE} x "
                         f"{MIN_SIDE}")
    return image


@contextmanager
def raised_limits() -> Iterator[None]:
    """Raises Pillow's guards against bombs to what sound pictures hold: some carry megabytes of
    text."""
    png = PngImagePlugin
    before = Image.MAX_IMAGE_PIXELS, png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS = LARGEST / 2    # Pillow warns from here on, and refuses from twice this
    png.MAX_TEXT_CHUNK = 2 ** 28
    png.MAX_TEXT_MEMORY = 2 ** 29
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY = before


@functools.cache
def can_read_heif() -> bool:
    """Teaches Pillow to read HEIC if pillow-heif is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener
        register_heif_opener()
        return True
    return False


def turn_upright(image: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation; EXIF data that cannot be read count as none."""
    try:
        image.getexif()                          # the image remembers it
    except Exception:                            # readers of EXIF raise all sorts of things
        return image
    # or exif_transpose writes it anew, which fails for odd values of what nobody reads
    image.info.pop("exif", None)
    return ImageOps.exif_transpose(image)


def decode(source: Path | BytesIO) -> Image.Image:
    """An image file -> RGB, upright."""
    with Image.open(source) as image:
        if image.format == "TIFF" and image.tag_v2.get(PREVIEW, 0) % 2:
            raise Image.UnidentifiedImageError   # a camera's raw file begins with a thumbnail
        image.load()
        image = to_rgb(turn_upright(image))
    image.info = {}                              # drops the profile: the colors are sRGB now
    return image


def mend_jpeg(path: Path) -> Image.Image:
    """A JPEG that lacks its end, with a note; after an end marker the decoder makes up the missing
    pixels. OSError if more than 2 % of the picture is missing."""
    data = path.read_bytes().rstrip(b"\xff")     # half a marker
    if data[:2] != b"\xff\xd8":
        raise                                    # not a JPEG: the error of `decode`
    image = decode(BytesIO(data + b"\xff\xd9"))
    # pixels that depend on the bytes that follow are missing from the file
    filler = b"\x55" * (image.width * image.height // 8 + 1000)
    other = decode(BytesIO(data + filler + b"\xff\xd9"))
    changed = (np.asarray(image) != np.asarray(other)).any(axis=-1)
    if changed.mean() > 0.02:
        raise OSError("its end is missing")
    note_mended(path)
    return image


@functools.cache                                 # one note a file
def note_mended(path: Path):
    note(f"{path} lacks its last bytes; the rest is used")


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> RGB, sRGB. Pillow's own conversion clips 16 bits and drops
    transparency."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode[0] in "IF":                    # 16 or 32 bits
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        # the file does not state its white point: take the first that fits
        usual = 65535
        if image.mode == "F":
            usual = 1 if values.max() <= 1 else 255
        white = max(values.max(), usual)
        image = Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    if alpha or image.mode == "P":
        image = image.convert("L" if image.mode[0] == "L" else "RGB")
    image = to_srgb(image, profile)
    if alpha:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts from the embedded profile to sRGB; a missing or broken profile counts as sRGB."""
    with suppress(ImageCms.PyCMSError, OSError, ValueError):     # image viewers do the same
        embedded = ImageCms.ImageCmsProfile(BytesIO(profile))
        if not ImageCms.getProfileDescription(embedded).startswith("sRGB"):
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, embedded, srgb, outputMode="RGB")
    return image.convert("RGB")


# --------------------------------------------------------------------------------------------------
# Faces


@functools.cache
def face_detector() -> nn.Module:
    """MTCNN with its packaged weights, built once, on the CPU: the same crops on any device."""
    from facenet_pytorch import MTCNN    # slow to import, and most users of this file need no faces
    return MTCNN(keep_all=True).eval()


@torch.no_grad()
def find_faces(image: Image.Image, threshold: float = 0.9) -> list[Face]:
    """PIL image -> [(x0, y0, x1, y1, probability)] in pixels, within the image, largest box first.

    MTCNN sees it at 480 to 1024 pixels (side of a square of its area), with a gray margin for faces
    that fill it. Faces in photos and paintings score above 0.99; 1 of 210 textures scored above
    0.9. """
    full_side = (image.width * image.height) ** 0.5
    side = min(max(full_side, 480), 1024)
    margin = round(0.2 * side)
    seen = ImageOps.scale(image.convert("RGB"), side / full_side, Image.BICUBIC)
    detector = face_detector()
    detector.min_face_size = max(20, side / 32)
    boxes, probabilities = detector.detect(ImageOps.expand(seen, margin, (128, 128, 128)))
    if boxes is None:
        return []
    shares = (np.asarray(boxes, dtype=np.float64) - margin) / (seen.size * 2)
    places = shares.clip(0, 1) * (image.size * 2)
    faces = []
    for (x0, y0, x1, y1), probability in zip(places.tolist(), probabilities):
        if probability >= threshold and x1 - x0 >= 1 and y1 - y0 >= 1:
            faces.append((x0, y0, x1, y1, float(probability)))
    return faces


def head_box(face: Face) -> Box:
    """A face (x0, y0, x1, y1, ...) -> the box of the head, which may reach beyond the picture."""
    x0, y0, x1, y1 = face[:4]             # from mid-forehead to the chin, without hair and ears
    w = x1 - x0
    h = y1 - y0
    return round(x0 - 0.12 * w), round(y0 - 0.35 * h), round(x1 + 0.12 * w), round(y1 + 0.08 * h)


def overlapping_boxes(image: Image.Image, number: int) -> list[Box]:
    """Boxes of 1 / number of the sides that overlap by half, so that a small face is whole in
    one."""
    w = image.width / number
    h = image.height / number
    boxes = []
    for row, column in itertools.product(range(2 * number - 1), repeat=2):
        x = column * w / 2
        y = row * h / 2
        boxes.append((round(x), round(y), round(x + w), round(y + h)))
    return boxes


def find_anywhere(image: Image.Image, path: Path) -> tuple[Image.Image, list[Face]]:
    """The picture, turned upright if need be, and the faces in it; notes say what it took to find
    them.

    Searched whole as it is, then whole and turned, then in enlarged parts, upright before turned.
    """
    lying = [90, 180, 270]
    # angles, parts a side, and how sure the detector must be: many angles or parts are as many
    # chances for a false alarm
    searches = [([0], 1, 0.9), (lying, 1, 0.99)]
    # the detector sees at most 1024 x 1024; a part of a small picture is a handful of pixels
    if image.width * image.height > MIN_RESOLUTION ** 2:
        searches += [([0], 2, 0.99), ([0], 4, 0.99), (lying, 2, 0.99)]

    for angles, number, threshold in searches:
        best = []
        for angle in angles:
            turned = image.rotate(angle, expand=True) if angle else image
            for box in overlapping_boxes(turned, number):
                faces = find_faces(turned.crop(box), threshold)
                if faces and (not best or faces[0][4] > best[0][4]):
                    x, y = box[:2]
                    best = [(f[0] + x, f[1] + y, f[2] + x, f[3] + y, f[4]) for f in faces]
                    best_angle = angle
                    upright = turned
        if best:
            if best_angle:
                note(f"no face in {path} as it is; "
                     f"it is rotated {best_angle} degrees counterclockwise")
            if number > 1:
                note(f"the face in {path} is small: {describe(best[0])}")
            return upright, best
    raise ValueError(f"no face found in {path}, even turned or enlarged: mark the subject with "
                     "--box X0 Y0 X1 Y1, in pixels, or take whole photos with --no-augment")


def describe(face: Face) -> str:
    x0, y0, x1, y1 = map(round, face[:4])
    return f"{x1 - x0} x {y1 - y0} pixels at ({x0}, {y0})"


# --------------------------------------------------------------------------------------------------
# Crops


def face_crops(
    width: int,
    height: int,
    box: tuple[float, ...],
    aspects: list[str] | None = None,
    scales: list[float] | None = None,
) -> list[Box]:
    """The paper's crops around one face: 1 to 25 boxes (x0, y0, x1, y1), integer pixels, inside the
    picture.

    For each aspect the shorter side is the face's longer side x 1.5, 2, 2.5, 3.5 and 4.5, the face
    centered.
      - A size that does not fit into the picture is replaced by the largest of that aspect, once.
      - A crop that reaches over a border is moved inside, not shrunk: faces are mostly near the
        top, and shrinking would leave one size of the five.
      - A crop within 2 pixels of an earlier one on all four edges is left out.
    aspects: as in ASPECTS; scales: of the face's longer side; None: all of the paper's.
    ValueError if `box` (x0, y0, x1, y1, ...) has no area inside the picture. """
    sides = np.array([width, height])
    low = np.clip(box[:2], 0, sides)
    high = np.clip(box[2:4], 0, sides)
    if not (high > low).all():                   # also refuses nan
        raise ValueError(f"face box {tuple(box[:4])} has no area within {width} x {height} pixels")
    crops = []
    for name, scale in itertools.product(aspects or ASPECTS, scales or FACE_SCALES):
        shape = np.array(name.split(":"), float)
        shape /= shape.min()                     # now its shorter side is 1
        short = min(scale * max(high - low), *(sides / shape))
        size = np.clip(np.round(short * shape), 1, sides)
        start = np.clip(np.round((low + high - size) / 2), 0, sides - size)
        crop = tuple(map(int, (*start, *(start + size))))
        if not any(np.abs(np.subtract(crop, other)).max() <= 2 for other in crops):
            crops.append(crop)
    return crops


def grid_size(
    width: int,
    height: int,
    resolution: int,
    multiple: int = 16,
    upscale: bool = False,
) -> tuple[int, int]:
    """(w, h), multiples of `multiple`, with w * h near resolution**2 and w / h near width / height.

    Without `upscale`, w * h is at most width * height, unless a side is under `multiple`.
    """
    limit = float("inf") if upscale else width * height
    area = min(resolution ** 2, limit)
    aspect = width / height
    sides = []
    for side in (area * aspect) ** 0.5, (area / aspect) ** 0.5:
        low = max(1, int(side / multiple)) * multiple
        sides.append((low, low + multiple))

    sizes = list(itertools.product(*sides))
    fitting = [(w, h) for w, h in sizes if w * h <= limit]
    # the error in aspect is cropped away, that in area is blur or cost
    return min(
        fitting or sizes[:1],
        key=lambda s: 2 * abs(np.log(s[0] / s[1] / aspect)) + abs(np.log(s[0] * s[1] / area)),
    )


def fit_to_grid(
    image: Image.Image,
    resolution: int,
    multiple: int = 16,
    upscale: bool = False,
) -> Image.Image:
    """PIL image -> PIL image of `grid_size`: scaled to cover it, the rest cut off evenly, never
    stretched."""
    size = grid_size(*image.size, resolution, multiple, upscale)
    return ImageOps.fit(image, size, Image.BICUBIC)


class Crop(NamedTuple):
    picture: Image.Image                         # as the model sees it
    photo: Path
    box: Box                                     # its place in the photo
    # white where the head is, of the picture's size; None: not searched
    head: Image.Image | None = None


def to_sizes(picture: Image.Image, resolutions: list[int]) -> list[Image.Image]:
    """A picture at each resolution, no size twice; enlarged only from under 512 x 512 or the
    resolution."""
    sized = {}
    for resolution in resolutions:
        smallest = min(resolution, MIN_RESOLUTION)       # better some blur than a handful of tokens
        small = picture.width * picture.height < smallest ** 2
        fitted = fit_to_grid(picture, smallest if small else resolution, upscale=small)
        sized.setdefault(fitted.size, fitted)
    return list(sized.values())


def fingerprints(paths: list[Path]) -> dict[str, str]:
    """Names and digests of photos, in order, for the metadata of a LoRA."""
    return {
        "photos": ", ".join(path.name for path in paths),
        "photo_digests": " ".join(digest(path.read_bytes()) for path in paths),
    }


def load_crops(
    paths: list[str | Path],
    resolutions: list[int],
    augment: bool = True,
    aspects: list[str] | None = None,
    scales: list[float] | None = None,
    box: list[int] | None = None,
) -> list[Crop]:
    """Photos of one person -> the crops of all of them; without `augment`, each photo as a whole.

    box: the subject (x0, y0, x1, y1) in pixels of the one photo; otherwise its face is searched,
    and the largest of several counts. ValueError names a photo that cannot be read or shows no
    face. """
    crops = []
    for path in map(Path, paths):
        photo = read_photo(path)
        areas = [(0, 0, *photo.size)]
        head = None
        if augment:
            if box:
                subject = head_area = tuple(box)
            else:
                photo, faces = find_anywhere(photo, path)
                subject = faces[0]
                head_area = head_box(subject)
                if len(faces) > 1:
                    note(f"{len(faces)} faces in {path}; taking the largest, {describe(subject)}")
            head = Image.new("L", photo.size)
            head.paste(255, head_area)
            areas = face_crops(*photo.size, subject, aspects, scales)
        for area in areas:
            for picture in to_sizes(photo.crop(area), resolutions):
                mask = head
                if head:
                    mask = ImageOps.fit(head.crop(area), picture.size, Image.BICUBIC)
                crops.append(Crop(picture, path, area, mask))
    return crops


def head_weights(crop: Crop, background: float) -> Tensor:
    """Weight of the loss at each place of a crop's latent, (1, H / 8, W / 8), with a mean of 1.

    background: weight of what is not head; 1 weighs all places alike, as the paper does."""
    if crop.head is None:
        return torch.ones(1, 1, 1)
    head = F.avg_pool2d(torch.from_numpy(np.array(crop.head)).float()[None] / 255, 8)
    weights = background + (1 - background) * head
    return weights / weights.mean()


def save_crops(crops: list[Crop], folder: Path):
    """One PNG for each crop, numbered, and named by its size and photo."""
    for i, (picture, photo, *_) in enumerate(crops):
        save_png(picture, folder / f"{i:02d}-{picture.width}x{picture.height}-{photo.stem}.png")


# --------------------------------------------------------------------------------------------------
# Tensors and generated pictures


def to_tensor(image: Image.Image) -> Tensor:
    """PIL image -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clamped and rounded -> PIL image. FloatingPointError if not finite."""
    if not torch.isfinite(tensor).all():
        raise FloatingPointError("the picture has values that are not finite")
    pixels = (tensor.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def picture_fields(
    prompt: str,
    seed: int,
    settings: dict,
    model: str,
    loras: list[tuple[str, float]],
) -> dict[str, object]:
    """Text fields of a PNG: first `parameters`, in the format of A1111 that Forge, Civitai and
    viewers read.

    No field is called `prompt`, where ComfyUI expects JSON. settings: sample.py's.
    """
    lines = [prompt]
    for path, strength in loras:
        lines[0] += f" <lora:{Path(path).stem}:{strength:g}>"
    if settings["true_cfg"] != 1.0:
        lines.append(f"Negative prompt: {settings['negative']}")
    name = model.removesuffix(".safetensors")
    if set(name) & set(',:"'):
        name = json.dumps(name, ensure_ascii=False)
    lines.append(
        f"Steps: {settings['steps']}, Sampler: Euler, CFG scale: {settings['true_cfg']:g}, "
        f"Distilled CFG Scale: {settings['guidance']:g}, Seed: {seed}, "
        f"Size: {settings['width']}x{settings['height']}, Model: {name}")
    return {
        "parameters": "\n".join(lines),
        "prompt_text": prompt,
        "seed": seed,
        **settings,
        "model": model,
        "loras": ", ".join(f"{Path(path).name}:{strength:g}" for path, strength in loras),
    }


def plan_files(out: Path | None, prompts: int, seeds: range) -> list[Path]:
    """Paths of the pictures, prompt after prompt. Writes nothing."""
    count = prompts * len(seeds)
    out = out or Path("samples" if count > 1 else "out.png")
    suffix = "" if out.is_dir() else out.suffix.lower()
    if suffix in SUFFIXES - {".png"}:
        raise ValueError(f"--out {out}: pictures are written as PNG")
    if suffix == ".png":
        if count > 1:
            raise ValueError(f"--out {out} is one file for {count} pictures: name a folder")
        check_writable(out.parent, "--out")
        return [out]
    check_writable(out, "--out")
    numbers = itertools.product(range(prompts), seeds)
    return [out / f"{prompt}_{seed}.png" for prompt, seed in numbers]
