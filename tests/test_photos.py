"""Reading, detecting, cropping and fitting: colours checked by value, crops by hand and by properties."""
import random
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from baby import faces
from support import photos

ROOT = Path(__file__).parents[1]
ASPECTS = 16 / 9, 4 / 3, 1, 3 / 4, 9 / 16
SHARED = Path(__file__).parents[2] / "shared" / "photos"
ASTRONAUT = Path(__file__).parent / "photos" / "astronaut.png"
PAINTINGS = sorted((SHARED / "newton").glob("newton_*"))
needs_paintings = pytest.mark.skipif(not PAINTINGS, reason="shared paintings are not here")


def pixel(image, x=3, y=5):
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return image.getpixel((x, y))


def read_back(image, path, **options):
    image.save(path, **options)
    return photos.read_photo(path)


# reading

@pytest.mark.parametrize("mode, colour, expected", [
    ("RGB", (10, 200, 30), (10, 200, 30)),
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("LA", (40, 255), (40, 40, 40)),
    ("LA", (0, 128), (127, 127, 127)),
    ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
    ("RGBA", (200, 100, 0, 0), (255, 255, 255)),                 # transparent is white, not black
    ("RGBA", (255, 0, 0, 51), (255, 204, 204)),                  # a fifth of red over white
    ("I;16", 257 * 100, (100, 100, 100)),                        # scaled, neither clipped nor cut
    ("I;16", 65535, (255, 255, 255)),
    ("I;16", 200, (1, 1, 1)),
])
def test_png_modes(tmp_path, mode, colour, expected):
    assert pixel(read_back(Image.new(mode, (20, 30), colour), tmp_path / "a.png")) == expected


@pytest.mark.parametrize("mode, colour, expected", [
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("I;16", 257 * 9, (9, 9, 9)),
    ("I", 65535, (255, 255, 255)),
    ("I", 257 * 50, (50, 50, 50)),
    ("I", 10 ** 6, (255, 255, 255)),                             # beyond 16 bits: the maximum is white
    ("F", 1.0, (255, 255, 255)),
    ("F", 0.2, (51, 51, 51)),
    ("F", 100.0, (100, 100, 100)),
    ("F", -3.0, (0, 0, 0)),
])
def test_tiff_modes(tmp_path, mode, colour, expected):
    assert pixel(read_back(Image.new(mode, (20, 30), colour), tmp_path / "a.tif")) == expected


def test_palette(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 250, 20, 60, 0, 0, 255])
    image.paste(2, (10, 0, 20, 20))
    plain = read_back(image, tmp_path / "plain.png")
    assert (pixel(plain, 3, 3), pixel(plain, 15, 3)) == ((250, 20, 60), (0, 0, 255))
    clear = read_back(image, tmp_path / "clear.png", transparency=2)
    assert (pixel(clear, 3, 3), pixel(clear, 15, 3)) == ((250, 20, 60), (255, 255, 255))
    gif = read_back(image, tmp_path / "clear.gif", transparency=1)
    assert (pixel(gif, 3, 3), pixel(gif, 15, 3)) == ((255, 255, 255), (0, 0, 255))


def test_key_colour_transparency_of_plain_rgb(tmp_path):
    assert pixel(read_back(Image.new("RGB", (16, 16), (1, 2, 3)), tmp_path / "a.png",
                           transparency=(1, 2, 3))) == (255, 255, 255)


def test_cmyk_jpeg_and_webp(tmp_path):
    cmyk = read_back(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), tmp_path / "a.jpg", quality=100)
    assert np.allclose(pixel(cmyk), (0, 255, 255), atol=3)
    webp = read_back(Image.new("RGB", (32, 32), (12, 34, 56)), tmp_path / "a.webp", lossless=True)
    assert pixel(webp) == (12, 34, 56)
    glass = read_back(Image.new("RGBA", (32, 32), (12, 34, 56, 0)), tmp_path / "b.webp", lossless=True)
    assert pixel(glass) == (255, 255, 255)


def test_pictures_written_by_opencv(tmp_path):
    colour = np.zeros((20, 20, 3), np.uint8) + np.array([10, 20, 30], np.uint8)         # blue, green, red
    cv2.imwrite(str(tmp_path / "a.png"), colour)
    assert pixel(photos.read_photo(tmp_path / "a.png")) == (30, 20, 10)
    cv2.imwrite(str(tmp_path / "b.png"), colour.astype(np.uint16) * 257)
    assert pixel(photos.read_photo(tmp_path / "b.png")) == (30, 20, 10)
    ramp = np.tile(np.arange(0, 65536, 257, dtype=np.uint16), (16, 1))
    cv2.imwrite(str(tmp_path / "c.png"), ramp)
    assert np.array_equal(np.array(photos.read_photo(tmp_path / "c.png"))[0, :, 0], np.arange(256))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations(tmp_path, orientation, suffix):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (240, 0, 0), (0, 240, 0), (0, 0, 240)
    # how a camera that was held so stores the upright scene: the inverse of what a viewer then does
    stored = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
              5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1),
              7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    stored = Image.fromarray(np.ascontiguousarray(stored(upright)))
    image = read_back(stored, tmp_path / f"a.{suffix}", exif=exif, **options)
    assert image.size == (48, 32)
    assert np.abs(np.array(image).astype(int) - upright).max() <= 4


@pytest.mark.parametrize("tag, value", [(296, "2"), (531, "1"), (256, 3.5)])       # ResolutionUnit, YCbCrPositioning, ImageWidth
def test_a_turned_photo_with_an_odd_tag_is_read(tmp_path, tag, value):
    """As phones and programs leave them: to write such EXIF data anew, as Pillow's own turning does, fails."""
    scene = np.zeros((32, 48, 3), np.uint8)
    scene[:16] = 240
    entries = [(274, 3, 1, (6).to_bytes(4, "little"))]
    if isinstance(value, str):
        entries.append((tag, 2, 2, value.encode() + bytes(3)))                        # ASCII
    else:
        entries.append((tag, 5, 1, (38).to_bytes(4, "little")))                       # RATIONAL, behind the entries
    entries.sort()
    tiff = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    for number, kind, size, content in entries:
        tiff += number.to_bytes(2, "little") + kind.to_bytes(2, "little") + size.to_bytes(4, "little") + content
    tiff += bytes(4) + (7).to_bytes(4, "little") + (2).to_bytes(4, "little")
    image = read_back(Image.fromarray(scene), tmp_path / "phone.jpg", exif=b"Exif\0\0" + tiff, quality=100)
    assert image.size == (32, 48) and np.asarray(image)[:, 16:].mean() > 200 and np.asarray(image)[:, :16].mean() < 40


def test_exif_data_that_are_none_count_as_none(tmp_path):
    image = read_back(Image.new("RGB", (48, 32), "red"), tmp_path / "a.png", exif=b"Exif\0\0garbage!")
    assert image.size == (48, 32)


def test_the_preview_of_a_raw_file_is_refused(tmp_path):
    for number, refused in ((1, True), (0, False)):
        path = tmp_path / f"{number}.NEF"
        Image.new("RGB", (160, 120)).save(path, "TIFF", tiffinfo={254: number})
        if refused:
            with pytest.raises(ValueError, match="known format"):
                photos.read_photo(path)
        else:
            assert photos.read_photo(path).size == (160, 120)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 20), c) for c in ((255, 0, 0), (0, 255, 0))]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        first = read_back(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert pixel(first) == (255, 0, 0)


def test_odd_paths(tmp_path):
    folder = tmp_path / "é 写真 [1] %20"
    folder.mkdir()
    path = folder / "Zoë & Łukasz 😀.PNG"
    assert pixel(read_back(Image.new("RGB", (16, 16), (1, 2, 3)), path)) == (1, 2, 3)
    assert pixel(photos.read_photo(str(path))) == (1, 2, 3)
    assert photos.image_files(folder) == [path]


def test_large_phone_photo_makes_no_warning(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert read_back(Image.new("L", (20, 20)), tmp_path / "a.png").size == (20, 20)
    assert not len(recwarn)


def refused(path):
    with pytest.raises(ValueError) as error:
        photos.read_photo(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 120
    return message


def bad_png(path, width, height):
    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    return path


def test_bad_files_are_refused_in_one_line(tmp_path):
    assert "no such picture" in refused(tmp_path / "missing.jpg")
    assert "folder" in refused(tmp_path)
    for name, data in (("empty.jpg", b""), ("text.png", b"hello\n" * 50), ("phone.heic", bytes(500))):
        (tmp_path / name).write_bytes(data)
    assert "empty" in refused(tmp_path / "empty.jpg")
    assert "not a picture" in refused(tmp_path / "text.png")
    assert "not a picture" in refused(tmp_path / "phone.heic")
    Image.new("RGB", (15, 400)).save(tmp_path / "thin.png")
    assert "15 x 400" in refused(tmp_path / "thin.png")
    assert "too large" in refused(bad_png(tmp_path / "bomb.png", 60_000, 60_000))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_truncated_pictures_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    for share in (0.01, 0.3, 0.6, 0.95):
        path.write_bytes(data[:int(len(data) * share)])
        refused(path)


def test_random_damage_never_raises_anything_but_valueerror(tmp_path):
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "webp", "tif"):
        path = tmp_path / f"a.{suffix}"
        Image.new("RGB", (40, 40), (9, 9, 9)).save(path, exif=exif)
        data = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(4):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            try:
                assert photos.read_photo(path).mode == "RGB"
            except ValueError as error:
                assert str(path) in str(error)


def test_image_files(tmp_path):
    for name in ("b.JPG", "a.png", "c.webp", "._a.png", "a.txt", "noext"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in photos.image_files(tmp_path)] == ["a.png", "b.JPG", "c.webp"]
    with pytest.raises(ValueError, match="no such folder"):
        photos.image_files(tmp_path / "nowhere")


def test_every_suffix_that_pillow_reads():
    stubs = {"BUFR", "GRIB", "HDF5", "MPEG", "HEIF"}              # registered, but not read by Pillow alone
    readable = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind in {*Image.OPEN, "MPO"} - stubs}
    assert readable <= photos.SUFFIXES and photos.SUFFIXES - readable <= {".heic", ".heif", ".hif", ".avif", ".avifs"}


def test_masks_of_other_trainers_are_no_pictures(tmp_path):
    names = ["anna.jpg", "anna-masklabel.png", "anna-condlabel.PNG", "b.c.png", "b.c_mask.webp", "d-Mask.png", "D.png", "d.webp",
             "masked.png", "e_mask.png", "e_mask.txt", "_mask.png", "mask.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    kept = ["anna.jpg", "b.c.png", "D.png", "d.webp", "masked.png", "e_mask.png", "_mask.png", "mask.png"]
    assert photos.image_files(tmp_path) == sorted(tmp_path / name for name in kept)


@pytest.mark.parametrize("name", ["#recycle", "@Recycle", "RECYCLER", "$Recycle.Bin", ".Trash-1000", "lost+found"])
def test_folders_of_deleted_files_are_nobodys(tmp_path, name):
    for folder in (name, "anna"):
        (tmp_path / folder).mkdir()
    assert photos.subfolders(tmp_path) == [tmp_path / "anna"]


def texture(width=512, height=512, seed=0):
    """Smooth noise with edges, as a photo has them."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


def test_a_png_with_megabytes_of_text_or_profile(tmp_path):
    from PIL.PngImagePlugin import MAX_TEXT_CHUNK, PngInfo
    image, text = texture(64, 64), PngInfo()
    text.add_text("workflow", "node " * 600_000, zip=True)
    text.add_itxt("prompt", "größer " * 600_000)
    for options in ({"pnginfo": text}, {"icc_profile": wide_profile() + bytes(3 * 2 ** 20)}):
        image.save(tmp_path / "a.png", **options)
        assert photos.read_photo(tmp_path / "a.png").size == (64, 64)
    from PIL import PngImagePlugin
    assert PngImagePlugin.MAX_TEXT_CHUNK == MAX_TEXT_CHUNK                     # others keep their guards


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("lost", [1, 2, 20, 200])
def test_a_jpeg_without_its_last_bytes(tmp_path, capsys, lost, progressive):
    texture().save(tmp_path / "whole.jpg", quality=90, progressive=progressive)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-lost])
    whole, cut = (np.asarray(photos.read_photo(tmp_path / f"{name}.jpg")).astype(int) for name in ("whole", "cut"))
    assert (np.abs(whole - cut).max(-1) > 40).mean() < 0.02
    assert capsys.readouterr().err == f"note: {tmp_path / 'cut.jpg'} lacks its last bytes; the rest is used\n"
    photos.read_photo(tmp_path / "cut.jpg")
    assert capsys.readouterr().err == ""                                                        # said once


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("flat", [False, True])
def test_a_jpeg_that_lacks_more_is_refused(tmp_path, share, flat):
    image = Image.new("RGB", (512, 512), (90, 120, 30)) if flat else texture()
    image.save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:int(len(data) * share)])
    refused(tmp_path / "a.jpg")


def test_200_megapixels_are_read_and_more_refused(tmp_path):
    Image.new("L", (16320, 12240), 128).save(tmp_path / "a.jpg")
    image = photos.read_photo(tmp_path / "a.jpg")
    assert image.size == (16320, 12240) and pixel(image) == (128, 128, 128)
    assert "too large" in refused(bad_png(tmp_path / "b.png", 16384, 12289))


def wide_profile(gamma=2.2, grey=False):
    """An ICC profile of Adobe RGB's primaries, or of grey, from the format's definition."""
    def fixed(*values):
        return b"".join(round(v * 65536).to_bytes(4, "big", signed=True) for v in values)
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + bytes(2)
    name = b"desc" + bytes(4) + (5).to_bytes(4, "big") + b"Wide\0" + bytes(78)
    tags = {b"desc": name, b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    if grey:
        tags[b"kTRC"] = curve
    else:
        for letter, colour in zip("rgb", ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))):
            tags[f"{letter}XYZ".encode()] = b"XYZ " + bytes(4) + fixed(*colour)
            tags[f"{letter}TRC".encode()] = curve
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += tag + (start + len(data)).to_bytes(4, "big") + len(value).to_bytes(4, "big")
        data += value
    head = bytes(4) + b"lcms" + bytes([2, 16, 0, 0]) + b"mntr" + (b"GRAY" if grey else b"RGB ") + b"XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    body = head.ljust(128, b"\0") + len(tags).to_bytes(4, "big") + table + data
    return (len(body)).to_bytes(4, "big") + body[4:]


def test_embedded_profiles_are_converted_to_srgb(tmp_path):
    # Adobe RGB (100, 150, 100) by its definition: linear, to sRGB's primaries, sRGB's curve
    linear = np.array([[1.3984, -0.3984, 0], [0, 1, 0], [0, -0.0429, 1.0429]]) @ (np.array([100, 150, 100]) / 255) ** 2.2
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    for name in ("a.png", "a.tif", "a.webp", "a.jpg"):
        options = {"lossless": True} if name == "a.webp" else {"quality": 100} if name == "a.jpg" else {}
        seen = pixel(read_back(Image.new("RGB", (32, 32), (100, 150, 100)), tmp_path / name, icc_profile=wide_profile(), **options))
        assert np.allclose(seen, expected, atol=2), (name, seen, expected)
    clear = read_back(Image.new("RGBA", (32, 32), (100, 150, 100, 255)), tmp_path / "b.png", icc_profile=wide_profile())
    assert np.allclose(pixel(clear), expected, atol=2)
    palette = Image.new("RGB", (32, 32), (100, 150, 100)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.allclose(pixel(read_back(palette, tmp_path / "c.png", icc_profile=wide_profile())), expected, atol=3)
    grey = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)
    for mode, colour in (("L", 100), ("LA", (100, 255)), ("I;16", 257 * 100)):
        seen = pixel(read_back(Image.new(mode, (32, 32), colour), tmp_path / "d.png", icc_profile=wide_profile(1, grey=True)))
        assert np.allclose(seen, grey, atol=2), (mode, seen)


def test_profiles_that_change_nothing(tmp_path):
    from PIL import ImageCms
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"broken", wide_profile(grey=True)):                      # the last is not of this kind
        assert pixel(read_back(Image.new("RGB", (32, 32), (100, 150, 100)), tmp_path / "a.png",
                               icc_profile=profile)) == (100, 150, 100)


def test_heic_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "can_read_heif", lambda: False)
    for brand in (b"heic", b"mif1"):
        (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(500))
        assert "pip install pillow-heif" in refused(tmp_path / "phone.jpg")


def test_heic_is_read_where_the_package_is(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    for name in ("a.heic", "a.HIF", "a.jpg"):
        heif.from_pillow(Image.new("RGB", (64, 48), (200, 40, 90))).save(tmp_path / "made.heic", quality=95)
        (tmp_path / "made.heic").rename(tmp_path / name)
        image = photos.read_photo(tmp_path / name)
        assert image.size == (64, 48) and np.allclose(pixel(image), (200, 40, 90), atol=6)


# finding faces

def overlap(a, b):
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(across, 0) * max(down, 0)
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


@pytest.mark.parametrize("side", [64, 128, 512, 2000])
def test_one_face_at_any_size(side):
    image = photos.read_photo(ASTRONAUT).resize((side, side), Image.BICUBIC)
    (face,) = photos.find_faces(image)
    assert overlap([v * 512 / side for v in face[:4]], (180, 61, 268, 172)) > 0.75 and face[4] > 0.99


@needs_paintings
@pytest.mark.parametrize("path", PAINTINGS, ids=lambda p: p.stem)
def test_one_face_in_each_painting(path):
    image = photos.read_photo(path)
    (face,) = photos.find_faces(image)
    assert 0 <= face[0] < face[2] <= image.width and 0 <= face[1] < face[3] <= image.height
    crops = photos.face_crops(*image.size, face)
    assert 5 <= len(crops) <= 25 and len(set(crops)) == len(crops)


def test_some_aspects_and_scales_alone():
    box = (450, 400, 550, 520)
    every = photos.face_crops(1000, 1000, box)
    square = photos.face_crops(1000, 1000, box, aspects=["1:1"])
    assert square == [c for c in every if c[2] - c[0] == c[3] - c[1]] and len(square) == 5
    assert [c[2] - c[0] for c in photos.face_crops(1000, 1000, box, aspects=["1:1"], scales=[1.5, 4.5])] == [180, 540]
    assert len(photos.face_crops(1000, 1000, box, scales=[2])) == 5
    assert photos.face_crops(1000, 1000, box, ["1:1"], [20]) == [(0, 0, 1000, 1000)]


def test_the_head_is_more_than_the_face():
    face = photos.find_faces(photos.read_photo(ASTRONAUT))[0]
    x0, y0, x1, y1 = photos.head_box(face)
    assert x0 < face[0] < face[2] < x1 and y0 < face[1] < face[3] < y1
    # measured on the picture by eye: hair from (166, 6) to (276, 160)
    assert max(abs(found - seen) for found, seen in zip((x0, y0, x1), (166, 6, 276))) < 25


def test_tight_headshot_and_several_faces():
    image = photos.read_photo(ASTRONAUT)
    tight = image.crop((185, 70, 264, 166))
    (face,) = photos.find_faces(tight)
    assert face[2] - face[0] > 0.8 * tight.width and face[3] - face[1] > 0.8 * tight.height
    assert 0 <= face[0] and face[2] <= tight.width and 0 <= face[1] and face[3] <= tight.height

    pair = Image.new("RGB", (800, 512))
    pair.paste(image.resize((288, 288)), (512, 0))
    pair.paste(image, (0, 0))
    first, second = photos.find_faces(pair)
    assert first[0] < 512 < second[0] and first[2] - first[0] > 1.5 * (second[2] - second[0])


def test_no_face():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    blank = Image.new("RGB", (16, 16)), Image.new("L", (16, 3000), 200)
    for image in (noise, noise.resize((700, 40)), *blank):
        assert photos.find_faces(image) == []


@pytest.mark.parametrize("way, angle", [(2, 270), (3, 180), (4, 90)])
def test_a_turned_photo_is_turned_back(capsys, way, angle):
    image = photos.read_photo(ASTRONAUT)
    found, faces = photos.find_anywhere(image.transpose(way), Path("lying.jpg"))
    assert np.array_equal(np.asarray(found), np.asarray(image)) and faces == photos.find_faces(image)
    assert capsys.readouterr().err == f"note: no face in lying.jpg as it is; it is rotated {angle} degrees counterclockwise\n"
    assert photos.find_anywhere(image, Path("up.jpg"))[0] is image and capsys.readouterr().err == ""


def test_a_false_alarm_in_a_turned_copy_turns_nothing():
    """Upright, this drawn face has .77; turned, something that is none has .95."""
    pixels, _ = faces.sample(111114, 2, 256, 256, style="photo")
    with pytest.raises(ValueError, match="no face found"):
        photos.find_anywhere(Image.fromarray(pixels), Path("drawn.png"))


def test_a_small_face_is_found_in_a_part(capsys):
    face = photos.read_photo(ASTRONAUT).resize((200, 200), Image.BICUBIC)              # its face is 34 pixels wide
    scene = texture(4000, 3000).resize((1, 1)).resize((4000, 3000))
    scene.paste(face, (2300, 1500))
    assert not photos.find_faces(scene)
    (box,) = photos.find_anywhere(scene, Path("far.jpg"))[1]
    assert overlap(box, [place + v * 200 / 512 for place, v in zip((2300, 1500) * 2, (180, 61, 268, 172))]) > 0.7
    assert capsys.readouterr().err.startswith("note: the face in far.jpg is small: 3")


def test_parts_cover_the_picture_and_overlap_by_half():
    image = Image.new("RGB", (400, 200))
    assert photos.overlapping_boxes(image, 1) == [(0, 0, 400, 200)]
    assert photos.overlapping_boxes(image, 2) == [(x, y, x + 200, y + 100) for y in (0, 50, 100) for x in (0, 100, 200)]
    assert len(photos.overlapping_boxes(image, 4)) == 49 and photos.overlapping_boxes(image, 4)[-1] == (300, 150, 400, 200)


def test_the_surest_face_of_all_turns_counts(monkeypatch):
    seen = iter([[], [(1, 2, 30, 40, 0.992)], [(5, 6, 30, 40, 0.999)], [(9, 9, 30, 40, 0.995)]])
    monkeypatch.setattr(photos, "find_faces", lambda image, threshold: next(seen))
    image = texture(60, 90)
    upright, found = photos.find_anywhere(image, Path("lying.jpg"))
    assert np.array_equal(np.asarray(upright), np.asarray(image.rotate(180))) and found == [(5, 6, 30, 40, 0.999)]


def test_importing_photos_does_not_import_the_detector():
    code = "import sys; from support import photos; sys.exit('facenet_pytorch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# crops

def test_crops_worked_out_by_hand():
    # face 80 x 100 about (2000, 2000) in 4000 x 4000: shorter sides 150, 200, 250, 350, 450, all fit
    crops = photos.face_crops(4000, 4000, (1960, 1950, 2040, 2050, 0.99))
    assert [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in crops] == [
        (267, 150), (356, 200), (444, 250), (622, 350), (800, 450),
        (200, 150), (267, 200), (333, 250), (467, 350), (600, 450),
        (150, 150), (200, 200), (250, 250), (350, 350), (450, 450),
        (150, 200), (200, 267), (250, 333), (350, 467), (450, 600),
        (150, 267), (200, 356), (250, 444), (350, 622), (450, 800)]
    assert crops[10] == (1925, 1925, 2075, 2075) and crops[4] == (1600, 1775, 2400, 2225)


def test_a_size_that_does_not_fit_gives_the_largest_once():
    # face 100 x 100 in the middle of 300 x 300: squares 150, 200, 250, then 300 for both 350 and 450
    crops = photos.face_crops(300, 300, (100, 100, 200, 200))
    assert [c for c in crops if c[2] - c[0] == c[3] - c[1]] == [
        (75, 75, 225, 225), (50, 50, 250, 250), (25, 25, 275, 275), (0, 0, 300, 300)]
    # 16:9 and 4:3: the widths 267, then 300 (of 16:9 the height 168.75)
    assert [(c[2] - c[0], c[3] - c[1]) for c in crops[:4]] == [(267, 150), (300, 169), (200, 150), (267, 200)]


def test_face_beside_a_border_moves_the_crop_and_keeps_its_size():
    crops = photos.face_crops(1000, 1000, (0, 10, 80, 110))
    assert (0, 0, 150, 150) in crops and (0, 0, 450, 450) in crops and len(crops) == 25
    crops = photos.face_crops(1000, 1000, (900, 450, 1000, 550))       # moves sideways only
    assert (850, 425, 1000, 575) in crops and (550, 275, 1000, 725) in crops


def test_tight_headshots():
    # the face fills the picture: one largest crop per aspect, centred on the face
    assert photos.face_crops(160, 160, (0, 0, 160, 160)) == [
        (0, 35, 160, 125), (0, 20, 160, 140), (0, 0, 160, 160), (20, 0, 140, 160), (35, 0, 125, 160)]
    # 1.5 does not fit: the largest square still contains the whole face, and is moved inside
    assert (0, 0, 120, 120) in photos.face_crops(120, 200, (10, 0, 110, 110))
    # near-duplicates: 1.5 x 100 = 150 and the largest, 151, are the same crop
    squares = [c for c in photos.face_crops(151, 151, (25, 25, 125, 125)) if c[2] - c[0] == c[3] - c[1]]
    assert len(squares) == 1


def test_crop_properties_over_random_boxes():
    rng = random.Random(1)
    for _ in range(1500):
        width, height = rng.randint(16, 1200), rng.randint(16, 1200)
        fw, fh = rng.uniform(1, width), rng.uniform(1, height)
        if rng.random() < 0.5:
            fw, fh = fw * 0.15 + 0.1, fh * 0.15 + 0.1
        fx, fy = rng.uniform(0, width - fw), rng.uniform(0, height - fh)
        cx, cy, long = fx + fw / 2, fy + fh / 2, max(fw, fh)
        crops = photos.face_crops(width, height, (fx, fy, fx + fw, fy + fh))
        assert 1 <= len(crops) <= 25
        for i, (x0, y0, x1, y1) in enumerate(crops):
            assert all(isinstance(v, int) for v in crops[i])
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            assert all(max(abs(a - b) for a, b in zip(crops[i], other)) > 2 for other in crops[:i])
            w, h = x1 - x0, y1 - y0
            # some aspect explains both sides to within rounding
            assert any(abs(w - h * a) <= 0.5 + 0.5 * a for a in ASPECTS)
            for low, high, size, limit, centre, face_low, face_size in (
                    (x0, x1, w, width, cx, fx, fw), (y0, y1, h, height, cy, fy, fh)):
                if 0 <= centre - size / 2 and centre + size / 2 <= limit:
                    assert abs((low + high) / 2 - centre) <= 0.5 + 1e-9         # centred where it fits
                else:
                    assert low == 0 or high == limit                            # else moved no further
                if size >= face_size + 1:
                    assert low - 0.5 <= face_low and face_low + face_size <= high + 0.5
                if size < face_size - 1:                                # no more of the face would show
                    assert face_low - 1 <= low and high <= face_low + face_size + 1
        # every aspect and size of the paper is there, or the largest of that aspect
        for aspect in ASPECTS:
            wide, tall = max(1, aspect), max(1, 1 / aspect)
            for scale in photos.FACE_SCALES:
                short = min(scale * long, width / wide, height / tall)
                assert any(abs(x1 - x0 - short * wide) <= 5 and abs(y1 - y0 - short * tall) <= 5
                           for x0, y0, x1, y1 in crops)


@pytest.mark.parametrize("box", [(50, 50, 50, 60), (200, 0, 300, 50), (-20, 0, -10, 10),
                                 (0, 0, float("nan"), 10)])
def test_impossible_boxes_are_refused(box):
    with pytest.raises(ValueError, match="no area"):
        photos.face_crops(100, 100, box)


def test_box_hanging_over_the_border_is_cut():
    assert photos.face_crops(500, 500, (-30, -10, 70, 90)) == photos.face_crops(500, 500, (0, 0, 70, 90))


# the grid

@pytest.mark.parametrize("arguments, expected", [
    ((1024, 1024, 512), (512, 512)),
    ((4000, 3000, 1024), (1184, 880)),       # exact size 1182.4 x 886.8
    ((1920, 1080, 512), (688, 384)),         # exact size 682.7 x 384
    ((300, 300, 512), (288, 288)),           # not enlarged
    ((300, 300, 512, 16, True), (512, 512)),
    ((1000, 1000, 768, 64), (768, 768)),
    ((1920, 1080, 1024, 64), (1344, 768)),   # exact size 1365.3 x 768
    ((16, 16, 512), (16, 16)),
    ((20, 20, 512, 64), (64, 64)),           # a side under the multiple
    ((5000, 20, 512), (4992, 16)),
])
def test_grid_by_hand(arguments, expected):
    assert photos.grid_size(*arguments) == expected


def test_grid_properties():
    rng = random.Random(2)
    for _ in range(2000):
        multiple, upscale = rng.choice((16, 64)), rng.random() < 0.5
        width, height = rng.randint(multiple, 4000), rng.randint(multiple, 4000)
        resolution = rng.randint(multiple, 1024)
        w, h = photos.grid_size(width, height, resolution, multiple, upscale)
        assert w % multiple == h % multiple == 0 and w > 0 and h > 0
        if not upscale:
            assert w * h <= width * height
        area = resolution ** 2 if upscale else min(resolution ** 2, width * height)
        exact = (area * width / height) ** 0.5, (area * height / width) ** 0.5
        if min(exact) >= multiple:
            assert abs(w - exact[0]) < multiple and abs(h - exact[1]) < multiple
        assert photos.grid_size(height, width, resolution, multiple, upscale) == (h, w)


def test_fit_never_stretches_and_cuts_evenly():
    # a disc stays round, and in the centre
    y, x = np.mgrid[:600, :1000]
    inside = (x - 499.5) ** 2 + (y - 299.5) ** 2 < 200 ** 2
    disc = Image.fromarray((inside * 255).astype(np.uint8)).convert("RGB")
    fitted = photos.fit_to_grid(disc, 256, multiple=64)
    assert fitted.size == photos.grid_size(1000, 600, 256, 64) == (320, 192)
    mask = np.array(fitted)[:, :, 0] > 127
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    assert abs(np.ptp(columns) - np.ptp(rows)) <= 1
    assert abs(columns.mean() - 159.5) <= 0.5 and abs(rows.mean() - 95.5) <= 0.5


def test_fit_covers_crops_and_antialiases():
    image = Image.new("RGB", (1000, 300), (255, 255, 255))
    image.paste((255, 0, 0), (100, 0, 900, 300))
    w, h = photos.grid_size(1000, 300, 100, 64)
    assert (w, h) == (192, 64)                  # 213 x 64 cut to 192: 50 source pixels a side
    red = (np.array(photos.fit_to_grid(image, 100, 64))[:, :, 1] < 128).any(0).nonzero()[0]
    assert abs(red[0] - 50 * 64 / 300) <= 1 and abs(191 - red[-1] - 50 * 64 / 300) <= 1

    checks = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(np.array(photos.fit_to_grid(checks, 64)).astype(int) - 127)[4:-4, 4:-4].max() <= 3
    same = photos.fit_to_grid(checks, 512)
    assert np.array_equal(np.array(same), np.array(checks))        # nothing to do, nothing done
    assert photos.fit_to_grid(checks.crop((0, 0, 100, 50)), 512, upscale=True).size == (736, 368)


# tensors

def test_tensor_round_trip_is_exact():
    values = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    values.reshape(-1)[:256] = np.arange(256)
    tensor = photos.to_tensor(Image.fromarray(values))
    assert tensor.shape == (3, 16, 32) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert torch.equal(tensor[1, 2], torch.from_numpy(values[2, :, 1]).float() / 127.5 - 1)
    assert np.array_equal(np.array(photos.to_image(tensor)), values)
    assert np.array_equal(np.array(photos.to_image(tensor.double().requires_grad_())), values)


def test_to_image_rounds_clamps_and_refuses():
    tensor = torch.tensor([-7.0, 7.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1]).expand(3, 1, 4)
    assert np.array(photos.to_image(tensor))[0, :, 0].tolist() == [0, 255, 1, 0]
    assert photos.to_image(tensor.bfloat16()).size == (4, 1)
    with pytest.raises(FloatingPointError, match="not finite"):
        photos.to_image(torch.full((3, 2, 2), float("nan")))
