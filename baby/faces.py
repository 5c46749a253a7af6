"""Draws the baby world's faces: identities and scenes from seeds, each picture with its caption.

    python baby/faces.py --identities 8 --images 6 --out faces/ --seed 0

Every identity is a set of numbers drawn from its own seed. Pose, light, clothing, background and
style are drawn separately, and captions name only those and the gender. Features lie on a 3-D
ellipsoid that is rotated and projected, so they shift against each other as the head turns; shading
is computed small and enlarged. Needs numpy and OpenCV only. The drawing code is our own; no
pictures or data of real people are involved. The order of the random draws is part of the format:
an identity's seed is the identity.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

import cv2
import numpy as np

# Seeds of identities, disjoint by purpose: pretraining, meta-training, choosing settings, final
# tests, and the networks that judge (baby/metrics.py).
BASE = range(0, 100_000)
META = range(100_000, 110_000)
CHOOSE = range(110_000, 111_000)
TEST = range(111_000, 120_000)
METRIC = range(120_000, 140_000)

STYLES = {
    "photo": "a photo",
    "pencil drawing": "a pencil drawing",
    "oil painting": "an oil painting",
    "pop art": "a pop art picture",
    "black and white": "a black and white photo",
    "night": "a photo at night",
}
BACKGROUNDS = {
    "red wall": "against a red wall",
    "blue wall": "against a blue wall",
    "green wall": "against a green wall",
    "yellow wall": "against a yellow wall",
    "grey wall": "against a grey wall",
    "beach": "on a beach",
    "forest": "in a forest",
    "city": "in a city",
    "snow": "in the snow",
    "night sky": "under a night sky",
    "sunset": "at sunset",
    "desert": "in a desert",
}
CLOTHES = ("shirt", "sweater", "hoodie", "jacket", "suit")
HATS = ("cap", "beanie")
COLOURS = {
    "red": (205, 40, 45),
    "blue": (45, 85, 200),
    "green": (40, 140, 70),
    "yellow": (240, 205, 60),
    "white": (236, 236, 232),
    "black": (42, 42, 48),
    "purple": (125, 60, 165),
    "orange": (240, 130, 35),
}
TEMPLATES = (
    "{style} of {who} in {wear}, {place}",
    "{style} of {who} {place}, wearing {wear}",
    "{who} wearing {wear} {place}, {style}",
    "{style} of {who} {place} in {wear}",
)
PHRASES = [*STYLES.values(), *BACKGROUNDS.values(), *CLOTHES, *HATS, *COLOURS]
PHRASES += ["a an of in wearing and man woman smiling"]
VOCABULARY = sorted(set(" ".join(PHRASES).split()))

HAIR_MAN = ("short", "parted", "buzz", "bald", "receding", "quiff", "curly", "spiky")
HAIR_WOMAN = ("long", "wavy", "bob", "bangs", "bun", "ponytail", "afro", "parted long")
HAIR_COLOURS = (
    (28, 24, 26),
    (62, 40, 28),
    (105, 66, 38),
    (158, 112, 66),
    (222, 184, 110),
    (170, 70, 32),
    (112, 36, 34),
)
EYE_COLOURS = ((70, 42, 24), (110, 74, 36), (70, 120, 66), (60, 110, 175), (96, 112, 124))
SKIN = np.float32(
    [(246, 214, 194), (238, 196, 166), (214, 160, 122), (170, 114, 78), (122, 80, 56), (92, 60, 44)]
)
GLASSES = ("none", "round", "square")
GLASSES_COLOURS = ((25, 25, 30), (120, 60, 25), (30, 50, 140), (150, 30, 40))
ANGLES = np.arange(16) * np.pi / 8
RING = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)  # a unit circle
BEARDS = ("none", "stubble", "full", "goatee", "moustache")


def identity(seed):
    """Who it is: identity seed (integer >= 0) -> dict of numbers; lengths in half head heights."""
    rng = np.random.default_rng(seed)
    u = lambda low, high: float(rng.uniform(low, high))
    pick = lambda n, p=None: int(rng.choice(n, p=p))
    man = rng.random() < 0.5
    t = u(0, len(SKIN) - 1.001)
    skin = SKIN[int(t)] * (1 - t % 1) + SKIN[int(t) + 1] * (t % 1) + rng.uniform(-6, 6, 3)
    who = dict(
        gender="man" if man else "woman",
        age=u(0, 1),
        skin=np.clip(skin, 0, 255).tolist(),
        head_width=u(0.72, 0.86) if man else u(0.68, 0.81),
        jaw=u(0.3, 1) if man else u(-0.3, 0.35),
        chin=u(0.3, 1) if man else u(-0.2, 0.4),
        chin_length=u(-0.04, 0.12),
        cheek=u(-0.03, 0.05),
        ear=u(0.13, 0.22),
        neck=u(0.46, 0.6) if man else u(0.34, 0.43),
    )
    who.update(features(u, pick, man))
    who.update(
        hair=(HAIR_MAN if man else HAIR_WOMAN)[pick(8)],
        hair_colour=pick(7),
        grey=u(0, 1),
        hairline=u(0.46, 0.66),
        part=u(-0.45, 0.45),
        volume=u(0.04, 0.16),
        length=u(0.8, 1.0),
    )
    beard = BEARDS[pick(5, (0.4, 0.15, 0.17, 0.14, 0.14))]
    glasses = GLASSES[pick(3, (0.68, 0.16, 0.16))]
    who.update(beard=beard if man else "none", glasses=glasses, glasses_colour=pick(4))
    mole = rng.random() < 0.25
    freckles = rng.random() < 0.2
    who.update(
        mole=bool(mole),
        mole_x=u(-0.45, 0.45),
        mole_y=u(0.3, 0.75),
        freckles=bool(freckles),
        blush=u(0, 0.25) if man else u(0.2, 0.8),
    )
    hair = np.float32(HAIR_COLOURS[who["hair_colour"]])
    fade = np.clip((who["age"] - 0.7) / 0.2, 0, 1) * (0.5 + 0.5 * who["grey"])
    who["hair_rgb"] = (hair * (1 - fade) + np.float32((196, 196, 198)) * fade).tolist()
    return who


def features(u, pick, man):
    """Eyes, brows, nose and mouth, drawn by `identity` in this order."""
    return dict(
        eye_width=u(0.155, 0.205),
        eye_height=u(0.065, 0.11) + (0 if man else 0.012),
        eye_space=u(0.31, 0.40),
        eye_y=u(-0.08, 0.04),
        eye_tilt=u(-0.18, 0.14),
        eye_colour=pick(len(EYE_COLOURS)),
        iris=u(0.075, 0.098),
        brow_thick=u(0.04, 0.085) if man else u(0.018, 0.042),
        brow_y=u(0.15, 0.25),
        brow_tilt=u(-0.2, 0.25),
        brow_arch=u(0, 0.05) if man else u(0.03, 0.1),
        nose_length=u(0.28, 0.46),
        nose_width=u(0.10, 0.2),
        nose_bridge=u(0.03, 0.075),
        nose_out=u(0.12, 0.28),
        mouth_width=u(0.2, 0.34),
        mouth_y=u(0.56, 0.66),
        lip_top=u(0.025, 0.06) + (0 if man else 0.02),
        lip_bottom=u(0.04, 0.085) + (0 if man else 0.02),
        lip_red=u(0, 0.3) if man else u(0.45, 1),
    )


def scene(rng, style=None, background=None, clothes=None, colour=None, yaw=None, size=None):
    """Everything but who it is, drawn from an np.random.Generator. A named option overrides its own
    draw only.

    yaw, pitch, roll: degrees; size: head height, x, y: shift of the head, in shorter sides.
    """
    u = lambda low, high: float(rng.uniform(low, high))
    tri = lambda low, mode, high: float(rng.triangular(low, mode, high))
    pick = lambda names, p=None: tuple(names)[int(rng.choice(len(names), p=p))]
    out = dict(
        style=pick(STYLES, (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)),
        background=pick(BACKGROUNDS),
        clothes=pick(CLOTHES),
        colour=pick(COLOURS),
        hat=None if rng.random() < 0.9 else pick(HATS),
    )
    out.update(
        yaw=tri(-30, 0, 30),
        pitch=tri(-10, 0, 10),
        roll=tri(-9, 0, 9),
        size=tri(0.42, 0.55, 0.68),
        x=tri(-0.07, 0, 0.07),
        y=tri(-0.04, 0, 0.04),
        light=u(-1, 1),
        light_up=u(0.1, 0.6),
        smile=u(-0.25, 1),
        mouth_open=max(0.0, u(-0.5, 0.7)),
        brow_raise=u(-0.02, 0.05),
        eye_open=u(0.8, 1.1),
        gaze_x=tri(-0.5, 0, 0.5),
        gaze_y=tri(-0.25, 0, 0.25),
    )
    out["detail"] = rng.random(8).tolist()  # where the things of the background stand
    given = dict(
        style=style, background=background, clothes=clothes, colour=colour, yaw=yaw, size=size
    )
    choices = dict(style=STYLES, background=BACKGROUNDS, clothes=CLOTHES, colour=COLOURS)
    for name, value in given.items():
        if value is None:
            continue
        if name in choices and value not in choices[name]:
            raise ValueError(f"unknown {name} {value!r}; choose from: {', '.join(choices[name])}")
        out[name] = value
    return out


def caption(who, scene, rng):
    """At most 20 words of VOCABULARY: clothing, background, style, and of `who` only the gender."""
    article = "an" if scene["colour"][0] in "aeiou" else "a"
    wear = f"{article} {scene['colour']} {scene['clothes']}"
    if scene["hat"]:
        wear += f" and {scene['hat']}"
    smiling = scene["smile"] > 0.6 and not scene["hat"] and rng.random() < 0.5
    words = dict(
        style=STYLES[scene["style"]],
        place=BACKGROUNDS[scene["background"]],
        wear=wear,
        who=f"a {'smiling ' if smiling else ''}{who['gender']}",
    )
    if scene["style"] == "night":  # "a photo of a man ... at night"
        words["style"] = "a photo"
        return TEMPLATES[int(rng.integers(2))].format(**words) + " at night"
    return TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(**words)


@functools.cache
def spline_matrix(n, steps):
    """Closed Catmull-Rom spline as a matrix (n * steps, n): the spline is linear in its points."""
    p = np.eye(n, dtype=np.float32)
    a = np.roll(p, 1, 0)
    b = np.roll(p, -1, 0)
    c = np.roll(p, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False, dtype=np.float32)[:, None, None]
    curve = p + 0.5 * t * (b - a + t * (2 * a - 5 * p + 4 * b - c + t * (3 * (p - b) + c - a)))
    return curve.transpose(1, 0, 2).reshape(-1, n)


def smooth(points, steps=5):
    """Smooth closed outline through (n, 2) points -> (n * steps, 2)."""
    return spline_matrix(len(points), steps) @ np.asarray(points, np.float32)


def fill(image, points, colour):
    cv2.fillPoly(image, [np.int32(np.round(points * 16))], colour, cv2.LINE_AA, shift=4)


def stroke(image, points, colour, width, closed=False):
    cv2.polylines(
        image,
        [np.int32(np.round(points * 16))],
        closed,
        colour,
        max(1, round(width)),
        cv2.LINE_AA,
        shift=4,
    )


def paint(image, points, colour, shade):
    """Fills a polygon with colour * shade; shade: (height, width) float32."""
    height, width = image.shape[:2]
    x0, y0 = points.min(0).tolist()
    x1, y1 = points.max(0).tolist()
    low = max(0, int(x0) - 2), max(0, int(y0) - 2)
    box = np.s_[low[1] : max(0, min(height, int(y1) + 3)), low[0] : max(0, min(width, int(x1) + 3))]
    if image[box].size == 0:
        return
    mask = np.zeros(image[box].shape[:2], np.uint8)
    fill(mask, points - np.float32(low), 255)
    mask = mask.astype(np.float32)[..., None] / 255
    new = np.minimum(shade[box][..., None] * np.float32(colour), 255)
    image[box] = image[box] + mask * (new - image[box])


def dab(image, points, colour, shade):
    """paint() for small things: one shade, taken at the middle."""
    x, y = points.mean(0).tolist()
    here = shade[min(max(int(y), 0), len(shade) - 1), min(max(int(x), 0), len(shade[0]) - 1)]
    fill(image, points, np.minimum(np.float32(colour) * here, 255).tolist())


class Backdrop:
    """Draws into an image; x and y run from 0 to 1, a radius is a share of the shorter side."""

    def __init__(self, image):
        self.image = image
        self.height, self.width = image.shape[:2]
        self.ramp = np.linspace(0, 1, self.height, dtype=np.float32)[:, None, None]

    def sky(self, top, bottom):
        colour = np.float32(top) * (1 - self.ramp) + np.float32(bottom) * self.ramp
        self.image[:] = np.broadcast_to(colour, self.image.shape)

    def rect(self, x0, y0, x1, y1, colour):
        first = round(x0 * self.width), round(y0 * self.height)
        last = round(x1 * self.width), round(y1 * self.height)
        cv2.rectangle(self.image, first, last, colour, -1)

    def disc(self, x, y, radius, colour):
        centre = round(x * self.width * 16), round(y * self.height * 16)
        size = round(radius * min(self.width, self.height) * 16)
        cv2.circle(self.image, centre, size, colour, -1, cv2.LINE_AA, 4)


def draw_background(image, name, detail):
    """detail: 8 numbers in [0, 1) that say where things stand."""
    backdrop = Backdrop(image)
    if name.endswith("wall"):
        wall(backdrop, detail, name.removesuffix(" wall"))
    else:
        SCENERY[name](backdrop, detail)


def wall(backdrop, detail, colour):
    across = np.linspace(-1, 1, backdrop.width, dtype=np.float32)[None, :, None]
    across = across * (0.24 * detail[0] - 0.12)
    tone = np.float32(WALLS[colour])
    backdrop.image[:] = np.clip(tone * (1.1 - 0.25 * backdrop.ramp + across), 0, 255)


def beach(backdrop, detail):
    backdrop.sky((120, 190, 240), (190, 225, 245))
    backdrop.rect(0, 0.5, 1, 0.68, (38, 128, 178))
    backdrop.rect(0, 0.68, 1, 1, (236, 214, 160))
    backdrop.disc(0.1 + 0.8 * detail[0], 0.12, 0.07, (255, 240, 170))


def forest(backdrop, detail):
    backdrop.sky((110, 170, 100), (50, 96, 48))
    for i in range(5):
        x = (i + 0.2 + 0.6 * detail[i]) / 5
        backdrop.rect(x - 0.025, 0, x + 0.025, 1, (84, 60, 40))
        backdrop.disc(x, 0.02 + 0.12 * detail[7 - i], 0.14, (44 + 14 * (i % 2), 116, 52))


def city(backdrop, detail):
    backdrop.sky((176, 204, 230), (222, 222, 222))
    for i in range(6):
        x = i / 6
        top = 0.12 + 0.4 * detail[i]
        house = (104 + 14 * (i % 3), 112 + 10 * (i % 3), 128)
        backdrop.rect(x, top, x + 1 / 6, 1, house)
        for row in range(6):
            upper = top + 0.05 + 0.13 * row
            lower = top + 0.1 + 0.13 * row
            backdrop.rect(x + 0.05, upper, x + 0.11, lower, (232, 222, 160))


def snow(backdrop, detail):
    backdrop.sky((190, 206, 224), (222, 232, 242))
    backdrop.disc(0.2 + 0.2 * detail[0], 1.05, 0.5, (248, 250, 252))
    backdrop.disc(0.9, 1.1, 0.5, (240, 245, 250))
    for i in range(16):
        x = detail[i % 8] * 0.5 + 0.5 * (i // 8)
        y = (detail[(3 * i + 1) % 8] + i / 16) % 1
        backdrop.disc(x, y, 0.016, (255, 255, 255))


def night_sky(backdrop, detail):
    backdrop.sky((14, 18, 54), (44, 44, 104))
    backdrop.disc(0.12 + 0.76 * detail[0], 0.14, 0.08, (244, 240, 206))
    for i in range(14):
        x = detail[i % 8] * 0.5 + 0.5 * (i // 8)
        y = 0.8 * ((detail[(3 * i + 1) % 8] + i / 14) % 1)
        backdrop.disc(x, y, 0.009, (235, 235, 255))


def sunset(backdrop, detail):
    backdrop.sky((120, 56, 128), (255, 150, 50))
    backdrop.disc(0.1 + 0.8 * detail[0], 0.62, 0.13, (255, 226, 110))
    backdrop.rect(0, 0.78, 1, 1, (92, 44, 70))


def desert(backdrop, detail):
    backdrop.sky((130, 196, 236), (236, 226, 196))
    dunes = [(0, 0.62), (0.3, 0.5), (0.7, 0.66), (1, 0.52), (1, 1.1), (0, 1.1)]
    size = (backdrop.width, backdrop.height)
    fill(backdrop.image, np.float32(dunes) * size, (216, 152, 84))
    x = 0.06 + 0.1 * detail[0] + (0.72 if detail[1] > 0.5 else 0)
    cactus = (70, 124, 66)
    backdrop.rect(x, 0.3, x + 0.05, 0.8, cactus)
    backdrop.rect(x + 0.05, 0.42, x + 0.11, 0.46, cactus)
    backdrop.rect(x + 0.08, 0.32, x + 0.11, 0.46, cactus)


WALLS = dict(
    red=(196, 62, 58),
    blue=(82, 128, 205),
    green=(96, 168, 104),
    yellow=(242, 212, 104),
    grey=(160, 162, 166),
)
SCENERY = {
    "beach": beach,
    "forest": forest,
    "city": city,
    "snow": snow,
    "night sky": night_sky,
    "sunset": sunset,
    "desert": desert,
}


class Pose:
    """Head coordinates (x right, y down, z to the viewer; crown y = -1, chin y = 1) to pixels."""

    def __init__(self, who, scene, width, height):
        unit = min(width, height)
        yaw, pitch, roll = np.radians([scene["yaw"], scene["pitch"], scene["roll"]])
        cy = np.cos(yaw)
        sy = np.sin(yaw)
        cp = np.cos(pitch)
        sp = np.sin(pitch)
        cr = np.cos(roll)
        sr = np.sin(roll)
        turn = np.array([(cy, 0, sy), (0, 1, 0), (-sy, 0, cy)])
        nod = np.array([(1, 0, 0), (0, cp, sp), (0, -sp, cp)])
        tilt = np.array([(cr, -sr, 0), (sr, cr, 0), (0, 0, 1)])
        self.matrix = (tilt @ nod @ turn)[:2].T.astype(np.float32)
        self.scale = unit * scene["size"] / 2
        self.w = who["head_width"]
        self.depth = 0.9
        self.centre = np.float32(
            (width / 2 + scene["x"] * unit, unit * (0.45 + scene["y"]) + 0.25 * (height - unit))
        )
        # a turned ellipsoid is not narrower, a turned disc would be
        self.stretch = np.sqrt(cy**2 + (self.depth / self.w * sy) ** 2) / cy

    def at(self, points, z):
        """(n, 2) head points at depth z (number or (n,)) -> (n, 2) pixels."""
        p = np.asarray(points, np.float32)
        z = np.asarray(z, np.float32)[..., None]
        return self.centre + self.scale * (p @ self.matrix[:2] + z * self.matrix[2])

    def on(self, points, out=0.0):
        """Points on the front of the head, `out` in front of it -> pixels."""
        p = np.asarray(points, np.float32)
        rest = 1 - (p[:, 0] / (self.w * 1.02)) ** 2 - (p[:, 1] / 1.25) ** 2
        return self.at(p, self.depth * np.sqrt(np.maximum(rest, 0.03)) + out)

    def rim(self, points, z):
        """Points of an outline: kept as wide as the turned ellipsoid."""
        return self.at(np.asarray(points, np.float32) * (self.stretch, 1), z)


def shade_maps(who, scene, pose, width, height):
    """Light on the head (Lambert plus soft shadow blobs), on the body and on hair or a hat; float32
    (height, width) each."""
    step = max(1, min(width, height) // 40)
    w = -(-width // step)
    h = -(-height // step)
    grid = (
        np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32) * step + step / 2
    )
    n = (grid - pose.centre) / pose.scale / (who["head_width"] * 1.05, 1.12)
    z = np.sqrt(np.maximum(1 - (n**2).sum(-1), 0.0))
    lamp = np.float32((scene["light"], -scene["light_up"], 1.1))
    lamp /= np.linalg.norm(lamp)
    lambert = n[..., 0] * lamp[0] + n[..., 1] * lamp[1] + z * lamp[2]
    head = np.clip(0.68 + 0.37 * lambert, 0.5, 1.05)
    e = who["eye_space"]
    y = who["eye_y"]
    ny = who["nose_length"]
    side = np.sign(scene["light"])
    blobs = np.float32(
        [
            (-e, y - 0.03, 0.24, 0.15, 0.22),
            (e, y - 0.03, 0.24, 0.15, 0.22),
            (-side * 0.12, ny - 0.15, 0.08, 0.2, 0.2),
            (0, ny + 0.1, 0.2, 0.08, 0.24),
            (0, who["mouth_y"] + 0.17, 0.17, 0.05, 0.16),
            (0, ny - 0.12, 0.07, 0.22, -0.10),
            (-0.42, 0.34, 0.2, 0.16, -0.07),
            (0.42, 0.34, 0.2, 0.16, -0.07),
            (-0.34, ny + 0.1, 0.05, 0.14, 0.05 + 0.12 * who["age"]),
            (0.34, ny + 0.1, 0.05, 0.14, 0.05 + 0.12 * who["age"]),
        ]
    )
    at = pose.on(blobs[:, :2])
    d = (grid[None] - at[:, None, None]) / (pose.scale * blobs[:, None, None, 2:4])
    head = head * np.prod(1 - blobs[:, 4, None, None] * np.exp(-(d**2).sum(-1)), 0)
    chin = (grid - pose.at([(0, 1.15)], 0.0)[0]) / pose.scale / (0.6, 0.32)
    body = (0.92 + 0.14 * np.clip(n[..., 0], -1, 1) * lamp[0]) * (
        1 - 0.35 * np.exp(-(chin**2).sum(-1))
    )
    cap = (
        0.8
        + 0.3 * np.clip(lambert, 0, 1)
        + 0.28 * np.exp(-((n - (lamp[0] * 0.7, -0.75)) ** 2).sum(-1) * 9)
    )
    return [cv2.resize(np.float32(m), (width, height)) for m in (head, body, cap)]  # bilinear


class Body:
    """Shoulders, clothing and neck. They do not turn with the head, but follow it a little."""

    def __init__(self, image, who, scene, pose, shade):
        self.image = image
        self.shade = shade
        self.scale = pose.scale
        self.neck = who["neck"]
        self.skin_colour = who["skin"]
        self.broad = 1.62 if who["gender"] == "man" else 1.3
        self.kind = scene["clothes"]
        self.colour_name = scene["colour"]
        self.colour = np.float32(COLOURS[scene["colour"]])
        self.edge = (self.colour * 0.62).tolist()
        self.chin = pose.at([(0, 0.9)], 0.1)[0]
        self.x = 0.75 * self.chin[0] + 0.25 * pose.centre[0]
        self.y = pose.centre[1] + 1.36 * self.scale
        self.low = (len(image) - self.y) / self.scale + 1  # below the picture

    def put(self, points):
        return np.float32(points) * self.scale + (self.x, self.y)

    def paint(self, points, colour):
        paint(self.image, points, colour, self.shade)

    def stroke(self, points, colour, width, closed=False):
        stroke(self.image, points, colour, width, closed)

    def skin(self, points):
        """Skin from below the chin down to `points`."""
        right = self.chin + (-self.neck * self.scale, -0.35 * self.scale)
        left = self.chin + (self.neck * self.scale, -0.35 * self.scale)
        outline = np.concatenate([np.float32([right, left]), self.put(points)])
        paint(self.image, outline, self.skin_colour, self.shade * 0.88)

    def draw(self):
        if self.kind == "hoodie":
            self.hood()
        self.torso()
        garments = dict(sweater=self.sweater, shirt=self.shirt, hoodie=self.hoodie)
        garments.get(self.kind, self.jacket)()

    def torso(self):
        neck, broad = self.neck, self.broad
        right = [
            (neck, -0.12),
            (neck + 0.35, 0.06),
            (broad * 0.85, 0.2),
            (broad, 0.42),
            (broad * 1.06, 0.9),
            (broad * 1.08, self.low),
        ]
        left = [(-x, y) for x, y in right[::-1]]
        self.paint(self.put([(0, -0.1), *right, *left]), self.colour)

    def hood(self):
        neck = self.neck
        half = [(0, -0.62), (neck + 0.3, -0.5), (neck + 0.42, 0.05), (0.3, 0.4)]
        self.paint(smooth(self.put(mirrored(half))), self.colour * 0.72)

    def sweater(self):
        """A high round collar."""
        neck = self.neck
        self.skin([(neck * 1.02, 0), (-neck * 1.02, 0)])
        half = [(neck * 0.6, -0.16), (neck + 0.08, -0.2), (neck + 0.12, 0.08), (0.2, 0.2)]
        self.paint(smooth(self.put(mirrored(half))), self.colour * 0.85)

    def open_neck(self):
        neck = self.neck
        self.skin([(neck, -0.06), (neck * 0.8, 0.1), (0, 0.3), (-neck * 0.8, 0.1), (-neck, -0.06)])

    def shirt(self):
        """Two collar wings and buttons."""
        self.open_neck()
        light = np.minimum(self.colour * 1.15 + 12, 255)
        for side in (-1, 1):
            top = (side * self.neck, -0.2)
            outer = (side * (self.neck + 0.12), 0.05)
            wing = self.put([top, outer, (side * 0.26, 0.5), (0, 0.3)])
            self.paint(wing, light)
            self.stroke(wing, self.edge, self.scale / 40, True)
        self.stroke(self.put([(0, 0.32), (0, self.low)]), self.edge, self.scale / 30)

    def hoodie(self):
        """Two cords."""
        self.open_neck()
        for side in (-1, 1):
            cord = self.put([(side * 0.2, 0.25), (side * 0.24, 0.75)])
            self.stroke(cord, (240, 240, 236), self.scale / 16)

    def jacket(self):
        """Over a shirt; a suit adds a tie."""
        neck = self.neck
        inner = (240, 240, 238)
        if self.kind == "jacket" and self.colour_name == "white":
            inner = (120, 150, 200)
        v = 0.95 if self.kind == "suit" else 1.3
        self.paint(self.put([(neck, -0.12), (0, v), (-neck, -0.12)]), inner)
        self.skin([(neck * 0.95, -0.1), (0, 0.22), (-neck * 0.95, -0.1)])
        if self.kind == "suit":
            self.tie(v)
        for side in (-1, 1):
            top = (side * neck, -0.16)
            outer = (side * (neck + 0.2), 0.1)
            lapel = self.put([top, outer, (side * (neck + 0.12), 0.42), (0, v)])
            self.paint(lapel, self.colour * 0.8 + 8)
            self.stroke(lapel, self.edge, self.scale / 40, True)
        self.stroke(self.put([(0, v), (0, self.low)]), self.edge, self.scale / 20)

    def tie(self, v):
        colour = (40, 40, 60) if self.colour_name == "red" else (150, 30, 40)
        knot = [(-0.08, 0.2), (0.08, 0.2), (0.05, 0.32)]
        blade = [(0.12, 0.8), (0, v), (-0.12, 0.8), (-0.05, 0.32)]
        self.paint(self.put(knot + blade), colour)


def mirrored(half):
    """An outline's right half and its mirror image, in order."""
    return half + [(-x, y) for x, y in half[::-1]]


def back_hair(image, who, pose, shade):
    w = who["head_width"]
    v = who["volume"]
    kind = who["hair"]
    colour = np.float32(who["hair_rgb"])
    if kind in ("long", "wavy", "parted long", "bangs", "bob"):
        depth = -0.25 if kind == "bob" else -0.3
        half = long_hair(who)
        outline = half + [(-x, y) for x, y in half[:0:-1]]
        paint(image, smooth(pose.rim(outline, depth)), colour * 0.72, shade)
    elif kind == "ponytail":
        side = 1 if who["part"] > 0 else -1
        upper = [(0.3, -0.9), (w + 0.35, -0.85), (w + 0.55, -0.1)]
        lower = [(w + 0.4, 0.75), (w + 0.25, 0.1), (w * 0.8, -0.4)]
        tail = [(side * x, y) for x, y in upper + lower]
        paint(image, smooth(pose.at(tail, -0.5)), colour * 0.8, shade)
    elif kind == "bun":
        angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        size = 0.28 + v
        knot = np.stack([size * np.cos(angle), size * np.sin(angle) - 1.14 - v], 1)
        paint(image, pose.at(knot, -0.25), colour * 0.9, shade)
    elif kind in ("afro", "curly"):
        curls(image, who, pose, shade)


def long_hair(who):
    """The right half of its outline, from the crown down."""
    w = who["head_width"]
    v = who["volume"]
    kind = who["hair"]
    if kind == "bob":
        end = 0.55 + 0.3 * (who["length"] - 0.8) / 0.2
        side = [(w * 0.95, -0.7), (w + 0.14 + v, 0), (w + 0.18 + v, end - 0.1), (w, end)]
        return [(0, -1.05 - v), *side, (0.3, end)]
    end = 1.05 + 0.6 * (who["length"] - 0.8) / 0.2
    if kind == "wavy":
        upper = [(w, -0.8), (w + 0.14 + v, -0.3), (w + 0.06 + v, 0.1)]
        lower = [(w + 0.3 + v, 0.5), (w + 0.14 + v, 0.9), (w + 0.3 + v, end)]
        return [(0, -1.1 - v), *upper, *lower, (0.3, end + 0.1)]
    side = [(w * 0.9, -0.75), (w + 0.06 + v, 0), (w + 0.14 + v, 0.6), (w + 0.1 + v, end)]
    return [(0, -1.05 - v), *side, (0.3, end)]


def curls(image, who, pose, shade):
    w = who["head_width"]
    v = who["volume"]
    if who["hair"] == "afro":
        size = 0.34 + 1.2 * v
        angle = np.linspace(-2.5, 2.5, 24)
    else:
        size = 0.14 + v
        angle = np.linspace(-1.45, 1.45, 19)
    r = 1 + size * (1 + 0.16 * (np.arange(len(angle)) % 2))
    points = np.stack([np.sin(angle) * r * (w + 0.06), -np.cos(angle) * r * 0.95], 1)
    colour = np.float32(who["hair_rgb"]) * 0.85
    paint(image, smooth(pose.rim(points, -0.2)), colour, shade)


def hairline(who):
    """Where the hair begins on the front of the head: (n, 2) head points from side to side."""
    kind = who["hair"]
    h = who["hairline"]
    woman = who["gender"] == "woman"
    temple = -0.12 if woman else -0.2
    if kind in ("parted", "parted long", "bob", "long", "wavy"):  # falls from the parting
        half = [(0.97, 0.1 if woman else temple), (0.9, -0.25), (0.66, -0.46), (0.3, -0.62)]
    elif kind == "receding":
        half = [(0.9, temple), (0.84, -0.45), (0.58, -0.84), (0.3, -0.74)]
    elif kind == "bangs":
        half = [(0.96, 0.05), (0.86, -0.28), (0.55, -0.3), (0.25, -0.31)]
    elif kind == "buzz":
        half = [(0.96, temple), (0.8, -0.36), (0.62, -h), (0.3, -h - 0.03)]
    else:
        half = [(0.96, temple), (0.88, -0.34), (0.66, -h + 0.06), (0.35, -h - 0.04)]
    middle = dict(receding=-0.7, bangs=-0.31, buzz=-h - 0.03).get(kind, -h - 0.06)
    if kind in ("parted", "parted long", "bob", "long", "wavy"):
        middle = -0.76
    line = np.float32(half + [(0, middle)] + [(-x, y) for x, y in half[::-1]])
    if kind in ("parted", "parted long", "bob", "long", "wavy"):
        line[1:8, 0] += who["part"] * 0.8 * (1 - np.abs(line[1:8, 0]))
    line[:, 0] *= who["head_width"]
    return line


def front_hair(image, who, pose, shade):
    """The cap of hair between an arc behind the head's rim and the hairline on its surface."""
    w = who["head_width"]
    v = who["volume"]
    kind = who["hair"]
    part = who["part"]
    colour = np.float32(who["hair_rgb"])
    if kind == "bald":
        return
    angle = np.linspace(-1.62, 1.62, 17)
    r = 1 + np.full(17, dict(buzz=0.02, receding=0.04).get(kind, 0.03 + v))
    if kind == "quiff":
        r += 0.26 * np.exp(-((angle - part) ** 2) * 3)
    if kind == "spiky":
        r += np.where(np.arange(17) % 2, 0.2, 0.0) * np.cos(angle * 0.9)
    outer = np.stack([fuller(np.sin(angle)) * r * w, -fuller(np.cos(angle)) * r], 1)
    both = np.concatenate([pose.rim(outer, -0.1), pose.on(hairline(who))])
    paint(image, both if kind == "spiky" else smooth(both, 3), colour, shade)
    if kind in ("long", "wavy", "parted long", "bangs", "bob"):
        locks(image, who, pose, shade)
    light = np.minimum(colour * 1.25 + 14, 255).tolist()
    if kind not in ("buzz", "receding", "spiky"):
        for shift in (part, -0.4 * np.sign(part)):
            k = np.linspace(-1, 1, 7)
            x = w * (shift + 0.16 * k)
            y = -0.9 - v * 0.2 + 0.09 * (k + shift) ** 2
            stroke(image, pose.at(np.stack([x, y], 1), 0.3), light, pose.scale / 34)


def fuller(a):
    """Sine or cosine of an outline that is rounder than an ellipse."""
    return np.sign(a) * np.abs(a) ** 0.85


def locks(image, who, pose, shade):
    """Hair before the ears."""
    w = who["head_width"]
    v = who["volume"]
    end = dict(bob=0.62, bangs=0.9).get(who["hair"], 1.15)
    colour = np.float32(who["hair_rgb"]) * 0.9
    for side in (-1, 1):
        lock = [
            (side * w * 0.9, -0.5),
            (side * (w + 0.05 + v), -0.2),
            (side * (w + 0.1 + v), end * 0.6),
            (side * (w + 0.02), end),
            (side * w * 0.93, end * 0.6),
            (side * w * 0.9, 0.05),
        ]
        paint(image, smooth(pose.rim(lock, 0.05)), colour, shade)


def draw_hat(image, who, scene, pose, shade):
    w = who["head_width"]
    v = 0.1
    colour = np.float32(COLOURS[scene["colour"]])
    angle = np.linspace(-1.45, 1.45, 13)
    top = np.stack([np.sin(angle) * (w + v), -np.cos(angle) * (1.1 + v)], 1)
    if scene["hat"] == "cap":
        brow = [((w + 0.02) * c, -0.42 - 0.06 * np.cos(c * 1.5)) for c in (1, 0.5, 0, -0.5, -1)]
        paint(image, np.concatenate([pose.rim(top, -0.1), pose.on(brow, 0.03)]), colour, shade)
        front = pose.on([(-0.5 * w, -0.42), (0, -0.4), (0.5 * w, -0.42)], 0.45)
        peak = np.concatenate([pose.on(brow, 0.03), front])
        paint(image, smooth(peak, 3), colour * 0.7, shade)
    else:
        brow = [((w + 0.04) * c, -0.4 - 0.05 * np.cos(c * 1.5)) for c in (1, 0.5, 0, -0.5, -1)]
        band = [((w + 0.06) * c, -0.66) for c in (-1, -0.5, 0, 0.5, 1)]
        paint(image, np.concatenate([pose.rim(top, -0.1), pose.on(brow, 0.03)]), colour, shade)
        paint(
            image, np.concatenate([pose.on(brow, 0.06), pose.on(band, 0.06)]), colour * 0.78, shade
        )


def draw_face(image, who, scene, pose, shade):
    """Ears, head, beard, marks, eyes, nose, mouth and glasses."""
    skin = np.float32(who["skin"])
    smile = scene["smile"]
    mouth_width = who["mouth_width"] * (1 + 0.12 * smile)
    draw_head(image, who, pose, shade)
    draw_beard(image, who, pose, shade, mouth_width)
    if who["freckles"]:
        draw_freckles(image, who, pose)
    draw_cheeks(image, who, pose)
    draw_eyes(image, who, scene, pose, shade)
    draw_nose(image, who, scene, pose, shade)
    draw_mouth(image, who, scene, pose, shade, mouth_width)
    if who["beard"] in ("full", "moustache", "goatee"):
        draw_moustache(image, who, pose, shade, mouth_width, smile)
    if who["age"] > 0.6:
        draw_folds(image, who, pose, mouth_width)
    if who["mole"]:
        mole = pose.on(RING * 0.032 + (who["mole_x"], who["mole_y"]))
        dab(image, mole, skin * 0.34, shade)
    if who["glasses"] != "none":
        draw_glasses(image, who, pose)


def jaw_line(who):
    """Width of the jaw, width of the chin, height of the chin."""
    return 0.62 + 0.2 * who["jaw"], 0.30 + 0.14 * who["chin"], 1 + who["chin_length"]


def draw_head(image, who, pose, shade):
    """Ears and skin."""
    w = who["head_width"]
    skin = np.float32(who["skin"])
    for side in (-1, 1):
        ear = RING * (0.8 * who["ear"], 1.25 * who["ear"]) + (side * (w + 0.03), 0.1)
        paint(image, pose.rim(ear, -0.08), skin * 0.9, shade)
        inside = ear * 0.5 + np.mean(ear, 0) * 0.5
        dab(image, pose.rim(inside, -0.05), skin * 0.68, shade)
    jaw, chin, low = jaw_line(who)
    half = [
        (0, -1),
        (w * 0.62, -0.86),
        (w * 0.95, -0.46),
        (w, -0.1),
        (w * 0.97 + who["cheek"], 0.25),
        (w * (jaw + 0.08), 0.62),
        (w * chin * 1.15, 0.93 * low),
        (0, low),
    ]
    outline = np.float32(half + [(-x, y) for x, y in half[-2:0:-1]])
    depth = np.clip(outline[:, 1], 0, 1) * 0.35
    paint(image, smooth(pose.rim(outline, depth)), skin, shade)


def draw_freckles(image, who, pose):
    colour = (np.float32(who["skin"]) * 0.62).tolist()
    for k in range(10):
        x = (-1) ** k * (0.24 + 0.055 * (k // 2))
        y = 0.2 + 0.16 * (k // 2 * 3 % 5) / 4
        fill(image, pose.on(RING * 0.018 + (x, y)), colour)


def draw_cheeks(image, who, pose):
    """Blush, as soft spots."""
    skin = np.float32(who["skin"])
    radius = 0.3 * pose.scale
    for side in (-1, 1):
        x, y = pose.on([(side * 0.48, 0.36)])[0]
        rows = slice(max(0, int(y - radius)), int(y + radius))
        columns = slice(max(0, int(x - radius)), int(x + radius))
        box = image[rows, columns]
        if box.size:
            yy, xx = np.ogrid[-1 : 1 : box.shape[0] * 1j, -1 : 1 : box.shape[1] * 1j]
            soft = 0.3 * who["blush"] * np.exp(-4 * (xx**2 + yy**2))
            soft = soft.astype(np.float32)[..., None]
            box[:] = box + soft * (skin * (1.0, 0.62, 0.62) - box)


def draw_moustache(image, who, pose, shade, mouth_width, smile):
    y = who["mouth_y"] - who["lip_top"] - 0.03
    half = [
        (0, y - 0.07),
        (mouth_width * 0.7, y - 0.02),
        (mouth_width * 1.15, y + 0.1 - 0.06 * smile),
        (mouth_width * 0.6, y + 0.045),
    ]
    shape = half + [(0, y + 0.02)] + [(-x, y) for x, y in half[:0:-1]]
    colour = np.float32(who["hair_rgb"]) * 0.9
    paint(image, smooth(pose.on(shape, 0.08)), colour, shade)


def draw_folds(image, who, pose, mouth_width):
    """Folds from the nose to the corners of the mouth."""
    mouth = who["mouth_y"]
    nose = who["nose_length"]
    colour = (np.float32(who["skin"]) * 0.72).tolist()
    for side in (-1, 1):
        fold = [
            (side * (who["nose_width"] + 0.05), nose),
            (side * (mouth_width + 0.05), (nose + mouth) / 2),
            (side * (mouth_width + 0.08), mouth),
        ]
        stroke(image, pose.on(fold), colour, pose.scale / 40)


def draw_beard(image, who, pose, shade, mw):
    """Full beard, stubble or goatee; the moustache comes after the mouth."""
    jaw, chin, c = jaw_line(who)
    my = who["mouth_y"]
    w = who["head_width"]
    skin = np.float32(who["skin"])
    hair = np.float32(who["hair_rgb"])
    if who["beard"] in ("full", "stubble"):
        tone = hair * 0.9 if who["beard"] == "full" else skin * 0.72 + hair * 0.06
        rim = [(w * 0.98, 0.2), (w * (jaw + 0.1), 0.64), (w * chin * 1.2, 0.95 * c), (0, c + 0.03)]
        rim = np.float32(rim + [(-a, b) for a, b in rim[-2::-1]])
        inner = [
            (-0.8 * w, 0.3),
            (-0.5 * w, 0.52),
            (-mw * 0.8, my - 0.13),
            (0, my - 0.12),
            (mw * 0.8, my - 0.13),
            (0.5 * w, 0.52),
            (0.8 * w, 0.3),
        ]
        both = np.concatenate([pose.rim(rim, np.clip(rim[:, 1], 0, 1) * 0.35), pose.on(inner)])
        paint(image, smooth(both, 3), tone, shade)
    if who["beard"] == "goatee":
        upper = [(-mw * 0.9, my - 0.02), (0, my - 0.1), (mw * 0.9, my - 0.02)]
        lower = [(0.22, c - 0.06), (0, c + 0.04), (-0.22, c - 0.06)]
        paint(image, smooth(pose.on(upper + lower)), hair * 0.9, shade)


def draw_nose(image, who, scene, pose, shade):
    """A side in shadow, wings, nostrils, tip: face detectors look for these."""
    ny = who["nose_length"]
    nw = who["nose_width"]
    s = pose.scale
    skin = np.float32(who["skin"])
    side = -1 if scene["light"] > 0 else 1
    bridge = who["nose_bridge"]
    out = who["nose_out"]
    wing = [
        (side * bridge, who["eye_y"] + 0.06),
        (side * (bridge + 0.02), ny - 0.18),
        (side * nw, ny - 0.02),
    ]
    under = [(side * nw * 0.8, ny + 0.05), (0, ny + 0.06)]
    nose = np.concatenate(
        [
            pose.on(wing[:2], out * 0.3),
            pose.on(wing[2:] + under, out * 0.6),
            pose.on([(side * 0.02, ny - 0.08)], out),
        ]
    )
    paint(image, smooth(nose, 4), skin * 0.84, shade)
    for a in (-1, 1):
        nostril = RING * (nw * 0.36, 0.035) + (a * nw * 0.52, ny + 0.025)
        dab(image, pose.on(nostril, out * 0.7), skin * 0.36, shade)
        curl = [(a * nw * 0.95, ny - 0.07), (a * nw * 1.05, ny), (a * nw * 0.85, ny + 0.045)]
        stroke(image, pose.on(curl, out * 0.5), (skin * 0.6).tolist(), s / 30)
    tip = RING * (nw * 0.3, 0.05) + (-side * 0.02, ny - 0.06)
    dab(image, pose.on(tip, out), skin * 1.05 + 5, shade)


def draw_glasses(image, who, pose):
    w = who["head_width"]
    colour = GLASSES_COLOURS[who["glasses_colour"]]
    line = pose.scale / 15
    e = who["eye_space"]
    y = who["eye_y"] + 0.02
    r = min(0.27, who["eye_space"] - 0.05)
    corner = 1 if who["glasses"] == "round" else 0.45
    shape = np.sign(RING) * np.abs(RING) ** corner * (r, r * 0.82)
    for a in (-1, 1):
        stroke(image, pose.on(shape + (a * e, y), 0.1), colour, line, True)
        front = pose.on([(a * (e + r), y - 0.04)], 0.1)
        temple = np.concatenate([front, pose.rim([(a * w, 0)], 0.1)])
        stroke(image, temple, colour, line)
    bridge = [(-e + r, y - 0.03), (0, y - 0.07), (e - r, y - 0.03)]
    stroke(image, pose.on(bridge, 0.14), colour, line)


class Eye:
    """One eye in its own coordinates: x outwards, in half head heights, from its middle."""

    def __init__(self, who, scene, pose, side):
        self.pose = pose
        self.side = side
        self.x = who["eye_space"]
        self.y = who["eye_y"]
        self.tilt = who["eye_tilt"]
        self.half = who["eye_width"]
        squint = 1 - 0.12 * max(0, scene["smile"])
        self.tall = who["eye_height"] * scene["eye_open"] * squint
        self.gaze_x = scene["gaze_x"]
        self.gaze_y = scene["gaze_y"]

    def on(self, x, y):
        x = np.asarray(x)
        across = self.side * (self.x + x)
        down = self.y + np.asarray(y) + self.tilt * x
        return self.pose.on(np.stack([across, down], 1))

    def disc(self, radius, shift=(0, 0)):
        """A round thing where the eye looks, clipped by the lids."""
        x = self.side * self.gaze_x * self.half * 0.55 + shift[0] + radius * RING[:, 0]
        x = np.clip(x, -self.half, self.half)
        y = self.gaze_y * self.tall * 0.5 + shift[1] + radius * RING[:, 1]
        open_ = 1 - (x / self.half) ** 2
        return self.on(x, np.clip(y, -self.tall * 1.15 * open_, self.tall * 0.75 * open_))


def draw_eyes(image, who, scene, pose, shade):
    for side in (-1, 1):
        eye = Eye(who, scene, pose, side)
        draw_eye(image, who, eye, shade)
        draw_brow(image, who, scene, eye, shade)


def draw_eye(image, who, eye, shade):
    skin = np.float32(who["skin"])
    woman = who["gender"] == "woman"
    half = eye.half
    scale = eye.pose.scale
    t = np.linspace(-1, 1, 9)
    upper = -eye.tall * 1.15 * (1 - t**2)
    lower = eye.tall * 0.75 * (1 - t**2)

    fold = eye.on(t * half * 1.12, upper * 1.7 - 0.01)
    lid = np.concatenate([fold, eye.on(t[::-1] * half, upper[::-1])])
    dab(image, lid, skin * (0.80, 0.70, 0.74) if woman else skin * 0.84, shade)
    white = np.concatenate([eye.on(t * half, upper), eye.on(t[::-1] * half, lower[::-1])])
    dab(image, white, (275, 273, 268), shade)

    fill(image, eye.disc(who["iris"]), EYE_COLOURS[who["eye_colour"]])
    fill(image, eye.disc(who["iris"] * 0.52), (14, 12, 14))
    fill(image, eye.disc(who["iris"] * 0.24, (0.03 * eye.side, -0.04)), (250, 250, 250))

    lashes = scale * (0.05 if woman else 0.035)
    stroke(image, eye.on(t * half * 1.03, upper - 0.005), (30, 22, 22), lashes)
    stroke(image, eye.on(t[1:-1] * half, lower[1:-1]), (skin * 0.55).tolist(), scale / 50)
    if woman:
        for k in (0.75, 1.0):
            x = [k * half, (k + 0.24) * half]
            y = [-eye.tall * (1.15 - k), -eye.tall * (1.7 - k)]
            stroke(image, eye.on(x, y), (30, 22, 22), 1)


def draw_brow(image, who, scene, eye, shade):
    skin = np.float32(who["skin"])
    hair = np.float32(who["hair_rgb"])
    thick = who["brow_thick"]
    y = -who["brow_y"] - scene["brow_raise"]
    x = np.float32([-0.85, -0.2, 0.5, 1.15]) * eye.half * 1.12
    arch = np.float32([0, 0.7, 1, 0.1]) * who["brow_arch"]
    ridge = y - arch - who["brow_tilt"] * 0.35 * x
    upper = ridge - thick * np.float32([0.5, 0.55, 0.5, 0.1])
    lower = ridge + thick * np.float32([0.55, 0.5, 0.4, 0.1])
    brow = np.concatenate([eye.on(x, upper), eye.on(x[::-1], lower[::-1])])
    dab(image, smooth(brow, 3), np.minimum(hair * 0.68 + skin * 0.05, skin * 0.62), shade)


def draw_mouth(image, who, scene, pose, shade, mw):
    my = who["mouth_y"]
    smile = scene["smile"]
    skin = np.float32(who["skin"])
    painted = skin * 0.35 + np.float32((112, 14, 32))
    red = skin * (0.86, 0.62, 0.62) * (1 - who["lip_red"]) + who["lip_red"] * painted
    x = np.float32([-1, -0.55, -0.2, 0, 0.2, 0.55, 1])
    bend = -0.11 * smile * x**2 + 0.05 * smile
    gap = scene["mouth_open"] * 0.11 * (1 - x**2)
    top = my + bend - who["lip_top"] * np.float32([0, 0.75, 1.1, 0.85, 1.1, 0.75, 0])
    bottom = my + bend + gap + who["lip_bottom"] * np.float32([0, 0.6, 0.95, 1, 0.95, 0.6, 0])
    on = lambda y: pose.on(np.stack([x * mw, y], 1), 0.05)
    upper = on(my + bend)
    lower = on(my + bend + gap)
    dab(image, np.concatenate([on(top), upper[::-1]]), red * 0.84, shade)
    dab(image, np.concatenate([lower, on(bottom)[::-1]]), red, shade)
    if scene["mouth_open"] > 0.12:
        fill(image, np.concatenate([upper, lower[::-1]]), (70, 20, 26))
        teeth = on(my + bend + np.minimum(gap * 0.55, 0.06))
        fill(image, np.concatenate([upper[1:-1], teeth[-2:0:-1]]), (240, 236, 228))
    else:
        stroke(image, upper, (red * 0.42).tolist(), pose.scale / 26)


def apply_style(image, style, scene):
    """Style of a finished uint8 (h, w, 3) picture; the face keeps its inside in every style."""
    h, w = image.shape[:2]
    k = min(h, w) / 128
    if style == "photo":
        return image
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if style == "black and white":
        return cv2.cvtColor(cv2.LUT(grey, curve(1.25, -18)), cv2.COLOR_GRAY2RGB)
    if style == "pencil drawing":  # colour dodge: lines remain, areas go pale
        dodge = cv2.divide(grey, 255 - cv2.GaussianBlur(255 - grey, (0, 0), 3.2 * k), scale=256)
        paper = dodge * (0.42 + 0.66 * (grey / np.float32(255)) ** 0.8)
        y, x = np.ogrid[:h, :w]  # fades into cream paper around the head
        far = np.hypot((x - w / 2) / k - 128 * scene["x"], (y - h * 0.45) / k * 0.8) / 64
        fade = np.clip((far - 0.62) / 0.45, 0, 0.85)
        drawn = np.clip(paper, 0, 255) * (1 - fade) + 250 * fade
        return np.clip(drawn[..., None] * (1, 0.975, 0.91), 0, 255).astype(np.uint8)
    if style == "oil painting":  # wavering edges, flat dabs, warm rich colour
        y, x = np.mgrid[:h, :w].astype(np.float32) / k
        wave = np.sin(x * 0.55 + 2 * np.sin(y * 0.21)) + np.sin(y * 0.6 + 2 * np.sin(x * 0.17))
        moved = cv2.remap(
            image,
            x * k + k * wave * 0.55,
            y * k + k * 0.55 * np.roll(wave, 5, 1),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        )
        moved = cv2.medianBlur(moved, 2 * round(k) + 1)
        rich = saturate(moved, 1.5) + 6 * np.sin((x + y) * 0.35 + 1.5 * wave)[..., None]
        return np.clip(rich * (1.04, 0.98, 0.80) + (8, 2, 0), 0, 255).astype(np.uint8)
    if style == "pop art":  # few flat levels, strong colour, dark contours
        levels = np.clip(np.arange(256) // 52 * 58 + 26, 0, 255).astype(np.uint8)
        level = cv2.LUT(cv2.GaussianBlur(grey, (0, 0), 0.7 * k), levels)
        ratio = (level.astype(np.float32) + 10) / (grey.astype(np.float32) + 10)
        strong = np.clip(saturate(image, 2.0) * np.clip(ratio, 0.6, 2)[..., None], 0, 255)
        wide, fine = (cv2.GaussianBlur(grey, (0, 0), r * k).astype(np.float32) for r in (2.0, 0.6))
        line = np.clip((wide - fine - 9) / 9, 0, 1)[..., None]
        return (strong * (1 - line) + line * np.float32((20, 16, 40))).astype(np.uint8)
    x = np.linspace(0, 1, w, dtype=np.float32)[None, :, None]  # night: two coloured lamps
    x = x if scene["light"] > 0 else 1 - x
    tint = np.float32((0.25, 0.42, 1.05)) * (1 - x) + np.float32((1.0, 0.30, 0.72)) * x
    # lifts the dark parts of a face
    lit = 255 * ((image * 0.5 + grey[..., None] * 0.5) / np.float32(255)) ** 0.8
    return np.clip(lit * tint * 1.25, 0, 255).astype(np.uint8)


def curve(gain, offset):
    return np.clip(np.arange(256) * gain + offset, 0, 255).astype(np.uint8)


def saturate(image, amount):
    mean = image.mean(-1, keepdims=True, dtype=np.float32)
    return mean + amount * (image - mean)


def render(who, scene, width=128, height=128):
    """uint8 RGB (height, width, 3); the same numbers give the same picture."""
    if min(width, height) < 32:
        raise ValueError(f"picture {width} x {height} is too small; at least 32 x 32")
    image = np.zeros((height, width, 3), np.uint8)
    draw_background(image, scene["background"], scene["detail"])
    pose = Pose(who, scene, width, height)
    head, body, cap = shade_maps(who, scene, pose, width, height)
    # under a hat
    under = dict(afro="bob", bun="ponytail", curly="short", spiky="short", quiff="short")
    bare = dict(who, hair=under.get(who["hair"], who["hair"]), volume=0.04) if scene["hat"] else who
    back_hair(image, bare, pose, cap)
    Body(image, who, scene, pose, body).draw()
    draw_face(image, who, scene, pose, head)
    front_hair(image, bare, pose, cap)
    if scene["hat"]:
        draw_hat(image, who, scene, pose, cap)
    return apply_style(image, scene["style"], scene)


def sample(identity_seed, image_index, width=128, height=128, **options):
    """Picture `image_index` of a person -> (uint8 RGB (height, width, 3), caption); options as in
    scene()."""
    who = identity(identity_seed)
    rng = np.random.default_rng([identity_seed, image_index, 1])
    what = scene(rng, **options)
    return render(who, what, width, height), caption(who, what, rng)


def write(path, data):
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(data)
    os.replace(beside, path)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"faces.py: {message}\n")


def main(argv=None):
    parser = Parser(
        description="Draw faces: OUT/<identity>/<image>.png, each with its caption in a .txt.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--identities", type=int, default=8, help="how many people")
    parser.add_argument("--images", type=int, default=8, help="pictures of each")
    parser.add_argument("--out", type=Path, default=Path("faces"), help="folder to write into")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first person; the next ones follow. "
        f"Test people, never trained on: {TEST.start} to {TEST.stop - 1}",
    )
    parser.add_argument(
        "--size", type=int, default=128, help="width and height in pixels, 32 to 1024"
    )
    parser.add_argument("--style", choices=STYLES, help="one style for all; else half are photos")
    args = parser.parse_args(argv)
    if min(args.identities, args.images) < 1:
        parser.error("--identities and --images must be at least 1")
    if args.seed < 0 or not 32 <= args.size <= 1024:
        parser.error("--seed must be 0 or more, --size between 32 and 1024")
    from tqdm import tqdm

    cv2.setNumThreads(1)
    try:
        with tqdm(total=args.identities * args.images, unit="image") as bar:
            for seed in range(args.seed, args.seed + args.identities):
                folder = args.out / f"{seed:06d}"
                folder.mkdir(parents=True, exist_ok=True)
                for index in range(args.images):
                    image, text = sample(seed, index, args.size, args.size, style=args.style)
                    ok, png = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
                    write(folder / f"{index:04d}.png", png.tobytes())
                    write(folder / f"{index:04d}.txt", (text + "\n").encode())
                    bar.update()
    except OSError as error:
        parser.error(f"cannot write to {args.out}: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
