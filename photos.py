"""Photos: read any picture, find faces, crop around them, fit the 16-pixel grid.

    python -c "import photos; print(photos.find_faces(photos.read_photo('face.jpg')))"

Sources: Meta-LoRA, section "Stage-2: Test-time ID Personalization" (the crops); MTCNN as packaged by
facenet-pytorch (its weights come inside the package, so nothing is downloaded).
Deviations: the paper does not say what "face centred" means beside a border. Here a crop keeps its size and
moves, see `face_crops`. Embedded colour profiles are ignored.
"""
import functools
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif",
            ".tiff", ".webp"}
MIN_SIDE = 16                                    # pixels; one image token
ASPECTS = {"16:9": 16 / 9, "4:3": 4 / 3, "1:1": 1, "3:4": 3 / 4, "9:16": 9 / 16}      # width / height of the crops
FACE_SCALES = (1.5, 2, 2.5, 3.5, 4.5)            # shorter side of a crop / longer side of the face


def image_files(folder):
    """Sorted paths of the pictures directly inside `folder`, known by their suffix; hidden files (macOS
    leaves `._face.jpg`) are left out. No pictures give an empty list, no folder a ValueError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    return sorted(p for p in folder.iterdir()
                  if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


def read_photo(path):
    """Any picture that Pillow reads -> PIL image, mode RGB, upright by its EXIF orientation.

    The first frame of an animation; transparency on white. 16-bit grey is scaled (65535 -> 255). The modes I
    and F state no white point: I takes 65535 else its maximum, F takes 1, else 255, else its maximum.
    ValueError, one line naming the file: missing, a folder, empty, not a picture, truncated, under 16 pixels
    a side, or so large that Pillow takes it for a decompression bomb (about 179 megapixels).
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a picture")
    if not path.is_file():
        raise ValueError(f"no such picture: {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # phones do take the 90 megapixels that Pillow warns about
            with Image.open(path) as image:
                image.load()
                image = to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        hint = "; convert HEIC to JPEG or PNG first" if path.suffix.lower() in (".heic", ".heif") else ""
        raise ValueError(f"{path} is not a picture that can be read{hint}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: over {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except Exception as error:                   # on broken files the decoders raise whatever they stumble on
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or cannot be read: {reason}") from error
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{path} is {image.width} x {image.height} pixels; "
                         f"at least {MIN_SIDE} x {MIN_SIDE} are needed")
    return image


def to_rgb(image):
    """PIL image of any mode -> mode RGB. Pillow's own conversion clips 16 bits and drops transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
        whites = {"I": (65535,), "F": (1, 255)}.get(image.mode, (65535,))
        white = next((w for w in whites if values.max() <= w), values.max())
        image = Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@functools.lru_cache(maxsize=2)
def face_detector(device):
    """MTCNN with its packaged weights on `device`, built once."""
    from facenet_pytorch import MTCNN            # slow to import, and most users of this file need no faces
    return MTCNN(keep_all=True, device=torch.device(device)).eval()


@torch.no_grad()
def find_faces(image, device="cpu", threshold=0.9):
    """PIL image -> [(x0, y0, x1, y1, probability)], in pixels, within the image, the largest box first.

    MTCNN sees the picture with the side of an equal square brought into 480 to 1024 pixels, so that a picture
    of 128 gives it detail and one of 100 megapixels costs no more than one of 1. It looks for faces down to
    20 pixels there, or 1/32 of that side. A grey margin of 20 % helps with faces that fill the picture.
    The threshold: on photos and paintings faces get above 0.99. Of 210 textures without a face 7 get
    more than 0.7 and 1 more than 0.9; of 42 drawn 120-pixel faces 37 and 34.
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


def head_box(face):
    """A face (x0, y0, x1, y1, ...) -> the box of the head in whole pixels, which may reach beyond the picture: MTCNN's boxes
    go from the middle of the forehead to the chin, and leave out the hair and the ears."""
    x0, y0, x1, y1 = face[:4]
    w, h = x1 - x0, y1 - y0
    return round(x0 - 0.12 * w), round(y0 - 0.35 * h), round(x1 + 0.12 * w), round(y1 + 0.08 * h)


def face_crops(width, height, box, aspects=None, scales=None):
    """The paper's crops around one face: 1 to 25 boxes (x0, y0, x1, y1), integer pixels, inside the picture.

    For each aspect the shorter side is the face's longer side x 1.5, 2, 2.5, 3.5 and 4.5, the face centred.
      - A size that the picture does not hold is replaced by the largest of that aspect, once.
      - A crop that fits but hangs over a border is moved by the least that brings it inside; it is not
        shrunk. Faces are mostly near the top of a picture: shrinking would leave one tight size of the five.
      - Every crop contains the face where its aspect lets it. On a tight headshot the wide or narrow aspects
        may be too small for that: these show as much of it as they can, around its centre.
      - A crop within 2 pixels of an earlier one on all four edges is the same crop, and left out.
    `aspects`: some of the names in ASPECTS; `scales`: of the face's longer side; None is all of the paper's.
    `box` starts with (x0, y0, x1, y1), floats; the rest (a probability) is ignored. ValueError if it has no
    area inside the picture.
    """
    x0, y0, x1, y1 = (min(max(v, 0), limit) for v, limit in zip(box[:4], (width, height, width, height)))
    if not (x1 > x0 and y1 > y0):                # also refuses nan
        raise ValueError(f"face box {tuple(box[:4])} has no area inside a {width} x {height} picture")

    def place(size, limit, low, high):     # along one axis: centred, then the least move to the inside
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


def grid_size(width, height, resolution, multiple=16, upscale=False):
    """(w, h), both multiples of `multiple`, with w * h near resolution**2 and w / h near width / height.

    Without `upscale`, w * h is at most width * height; only where no multiple fits (a side under `multiple`)
    the smallest sides are taken all the same. Of the grid points around the exact size the nearest
    wins, by 2 |log| of the error in aspect (which is cropped away) plus |log| of that in area (blur or cost).
    """
    if min(width, height, resolution, multiple) < 1:
        raise ValueError(f"sizes must be positive: {width} x {height}, resolution {resolution}, "
                         f"multiple {multiple}")
    limit = float("inf") if upscale else width * height
    area, aspect = min(resolution ** 2, limit), width / height

    def around(side):
        low = max(1, int(side / multiple)) * multiple
        return low, low + multiple
    sizes = [(w, h) for w in around((area * aspect) ** 0.5) for h in around((area / aspect) ** 0.5)]
    fitting = [(w, h) for w, h in sizes if w * h <= limit] or sizes[:1]
    return min(fitting, key=lambda s: 2 * abs(np.log(s[0] / s[1] / aspect)) + abs(np.log(s[0] * s[1] / area)))


def fit_to_grid(image, resolution, multiple=16, upscale=False):
    """PIL image -> PIL image of `grid_size`: scaled to cover it, the rest cut off evenly on both sides, never
    stretched. One bicubic resampling with antialiasing."""
    w, h = grid_size(*image.size, resolution, multiple, upscale)
    scale = max(w / image.width, h / image.height)
    left, top = (image.width - w / scale) / 2, (image.height - h / scale) / 2
    box = max(0, left), max(0, top), min(image.width, left + w / scale), min(image.height, top + h / scale)
    return image.resize((w, h), Image.BICUBIC, box=box)


def to_tensor(image):
    """PIL image -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def to_image(tensor):
    """(3, H, W) in [-1, 1], any float type, any device -> PIL image; values outside are clamped, all rounded.
    ValueError for another shape or values that are not finite."""
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"a picture has shape (3, height, width), not {tuple(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError("the picture has values that are not finite")
    pixels = (tensor.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
