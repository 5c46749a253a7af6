"""Draws the baby world's faces: identities and scenes from seeds, each picture with its caption.

    python baby/faces.py --identities 8 --images 6 --out faces/ --seed 0

Every identity is a set of numbers drawn from its own seed; pose, light, clothing, background and style are
drawn apart from it, and captions name only those and the gender. Features lie on a 3-D ellipsoid that is
rotated and projected, so they shift against each other as the head turns; shading is computed small and
enlarged. Needs numpy and OpenCV only. Own drawing code; no pictures or data of real people are involved.
The order of the random draws is part of the format: an identity's seed is the identity.
"""
import argparse
import functools
import os
import sys
from pathlib import Path

import cv2
import numpy as np

# Seeds of identities, disjoint by purpose: pretraining, meta-training, choosing settings, final tests, and the networks
# that judge (baby/metrics.py).
BASE, META = range(0, 100_000), range(100_000, 110_000)
CHOOSE, TEST, METRIC = range(110_000, 111_000), range(111_000, 120_000), range(120_000, 140_000)

STYLES = {"photo": "a photo", "pencil drawing": "a pencil drawing", "oil painting": "an oil painting",
          "pop art": "a pop art picture", "black and white": "a black and white photo",
          "night": "a photo at night"}
BACKGROUNDS = {"red wall": "against a red wall", "blue wall": "against a blue wall",
               "green wall": "against a green wall", "yellow wall": "against a yellow wall",
               "grey wall": "against a grey wall", "beach": "on a beach", "forest": "in a forest",
               "city": "in a city", "snow": "in the snow", "night sky": "under a night sky",
               "sunset": "at sunset", "desert": "in a desert"}
CLOTHES = ("shirt", "sweater", "hoodie", "jacket", "suit")
HATS = ("cap", "beanie")
COLOURS = {"red": (205, 40, 45), "blue": (45, 85, 200), "green": (40, 140, 70), "yellow": (240, 205, 60),
           "white": (236, 236, 232), "black": (42, 42, 48), "purple": (125, 60, 165),
           "orange": (240, 130, 35)}
TEMPLATES = ("{style} of {who} in {wear}, {place}", "{style} of {who} {place}, wearing {wear}",
             "{who} wearing {wear} {place}, {style}", "{style} of {who} {place} in {wear}")
VOCABULARY = sorted(set(" ".join([*STYLES.values(), *BACKGROUNDS.values(), *CLOTHES, *HATS, *COLOURS,
                                  "a an of in wearing and man woman smiling"]).split()))

HAIR_MAN = ("short", "parted", "buzz", "bald", "receding", "quiff", "curly", "spiky")
HAIR_WOMAN = ("long", "wavy", "bob", "bangs", "bun", "ponytail", "afro", "parted long")
HAIR_COLOURS = ((28, 24, 26), (62, 40, 28), (105, 66, 38), (158, 112, 66), (222, 184, 110), (170, 70, 32),
                (112, 36, 34))
EYE_COLOURS = ((70, 42, 24), (110, 74, 36), (70, 120, 66), (60, 110, 175), (96, 112, 124))
SKIN = np.float32([(246, 214, 194), (238, 196, 166), (214, 160, 122), (170, 114, 78), (122, 80, 56),
                   (92, 60, 44)])
GLASSES = ("none", "round", "square")
GLASSES_COLOURS = ((25, 25, 30), (120, 60, 25), (30, 50, 140), (150, 30, 40))
RING = np.stack([f(np.arange(16) * np.pi / 8) for f in (np.cos, np.sin)], 1)        # a unit circle
BEARDS = ("none", "stubble", "full", "goatee", "moustache")


def identity(seed):
    """Who it is: identity seed (integer >= 0) -> dict of numbers; lengths in half head heights."""
    rng = np.random.default_rng(seed)
    u = lambda low, high: float(rng.uniform(low, high))
    pick = lambda n, p=None: int(rng.choice(n, p=p))
    man = rng.random() < 0.5
    t = u(0, len(SKIN) - 1.001)
    skin = SKIN[int(t)] * (1 - t % 1) + SKIN[int(t) + 1] * (t % 1) + rng.uniform(-6, 6, 3)
    who = dict(gender="man" if man else "woman", age=u(0, 1), skin=np.clip(skin, 0, 255).tolist(),
               head_width=u(0.72, 0.86) if man else u(0.68, 0.81), jaw=u(0.3, 1) if man else u(-0.3, 0.35),
               chin=u(0.3, 1) if man else u(-0.2, 0.4), chin_length=u(-0.04, 0.12), cheek=u(-0.03, 0.05),
               ear=u(0.13, 0.22), neck=u(0.46, 0.6) if man else u(0.34, 0.43))
    who.update(eye_width=u(0.155, 0.205), eye_height=u(0.065, 0.11) + (0 if man else 0.012),
               eye_space=u(0.31, 0.40), eye_y=u(-0.08, 0.04), eye_tilt=u(-0.18, 0.14),
               eye_colour=pick(len(EYE_COLOURS)), iris=u(0.075, 0.098))
    who.update(brow_thick=u(0.04, 0.085) if man else u(0.018, 0.042), brow_y=u(0.15, 0.25),
               brow_tilt=u(-0.2, 0.25), brow_arch=u(0, 0.05) if man else u(0.03, 0.1))
    who.update(nose_length=u(0.28, 0.46), nose_width=u(0.10, 0.2), nose_bridge=u(0.03, 0.075),
               nose_out=u(0.12, 0.28))
    who.update(mouth_width=u(0.2, 0.34), mouth_y=u(0.56, 0.66), lip_top=u(0.025, 0.06) + (0 if man else 0.02),
               lip_bottom=u(0.04, 0.085) + (0 if man else 0.02), lip_red=u(0, 0.3) if man else u(0.45, 1))
    who.update(hair=(HAIR_MAN if man else HAIR_WOMAN)[pick(8)], hair_colour=pick(7),
               grey=u(0, 1), hairline=u(0.46, 0.66), part=u(-0.45, 0.45), volume=u(0.04, 0.16),
               length=u(0.8, 1.0))
    beard = BEARDS[pick(5, (0.4, 0.15, 0.17, 0.14, 0.14))]
    glasses = GLASSES[pick(3, (0.68, 0.16, 0.16))]
    who.update(beard=beard if man else "none", glasses=glasses, glasses_colour=pick(4))
    mole, freckles = rng.random() < 0.25, rng.random() < 0.2
    who.update(mole=bool(mole), mole_x=u(-0.45, 0.45), mole_y=u(0.3, 0.75), freckles=bool(freckles),
               blush=u(0, 0.25) if man else u(0.2, 0.8))
    hair = np.float32(HAIR_COLOURS[who["hair_colour"]])
    fade = np.clip((who["age"] - 0.7) / 0.2, 0, 1) * (0.5 + 0.5 * who["grey"])
    who["hair_rgb"] = (hair * (1 - fade) + np.float32((196, 196, 198)) * fade).tolist()
    return who


def scene(rng, style=None, background=None, clothes=None, colour=None, yaw=None, size=None):
    """Everything but who: draws from an np.random.Generator; a named option overrides its own draw only.

    yaw, pitch, roll: degrees; size: head height / shorter side; x, y: shift of the head / shorter side."""
    u = lambda low, high: float(rng.uniform(low, high))
    tri = lambda low, mode, high: float(rng.triangular(low, mode, high))
    pick = lambda names, p=None: tuple(names)[int(rng.choice(len(names), p=p))]
    out = dict(style=pick(STYLES, (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)), background=pick(BACKGROUNDS),
               clothes=pick(CLOTHES), colour=pick(COLOURS), hat=None if rng.random() < 0.9 else pick(HATS))
    out.update(yaw=tri(-30, 0, 30), pitch=tri(-10, 0, 10), roll=tri(-9, 0, 9), size=tri(0.42, 0.55, 0.68),
               x=tri(-0.07, 0, 0.07), y=tri(-0.04, 0, 0.04), light=u(-1, 1), light_up=u(0.1, 0.6),
               smile=u(-0.25, 1), mouth_open=max(0.0, u(-0.5, 0.7)), brow_raise=u(-0.02, 0.05),
               eye_open=u(0.8, 1.1), gaze_x=tri(-0.5, 0, 0.5), gaze_y=tri(-0.25, 0, 0.25))
    out["detail"] = rng.random(8).tolist()                     # where the things of the background stand
    given = dict(style=style, background=background, clothes=clothes, colour=colour, yaw=yaw, size=size)
    for name, value in given.items():
        allowed = dict(style=STYLES, background=BACKGROUNDS, clothes=CLOTHES, colour=COLOURS).get(name)
        if value is not None and allowed is not None and value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; choose from: {', '.join(allowed)}")
        out[name] = out[name] if value is None else value
    return out


def caption(who, scene, rng):
    """Caption of <= 20 words of VOCABULARY: clothing, background, style; of `who` nothing but the gender."""
    article = "an" if scene["colour"][0] in "aeiou" else "a"
    wear = f"{article} {scene['colour']} {scene['clothes']}"
    if scene["hat"]:
        wear += f" and {scene['hat']}"
    smiling = scene["smile"] > 0.6 and not scene["hat"] and rng.random() < 0.5
    words = dict(style=STYLES[scene["style"]], place=BACKGROUNDS[scene["background"]], wear=wear,
                 who=f"a {'smiling ' if smiling else ''}{who['gender']}")
    if scene["style"] == "night":                               # "a photo of a man ... at night"
        words["style"] = "a photo"
        return TEMPLATES[int(rng.integers(2))].format(**words) + " at night"
    return TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(**words)


@functools.cache
def spline_matrix(n, steps):
    """Closed Catmull-Rom spline as one matrix (n * steps, n): the spline is linear in its points."""
    p = np.eye(n, dtype=np.float32)
    a, b, c = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False, dtype=np.float32)[:, None, None]
    curve = p + 0.5 * t * (b - a + t * (2 * a - 5 * p + 4 * b - c + t * (3 * (p - b) + c - a)))
    return curve.transpose(1, 0, 2).reshape(-1, n)


def smooth(points, steps=5):
    """Smooth closed outline through (n, 2) points -> (n * steps, 2)."""
    return spline_matrix(len(points), steps) @ np.asarray(points, np.float32)


def fill(image, points, colour):
    cv2.fillPoly(image, [np.int32(np.round(points * 16))], colour, cv2.LINE_AA, shift=4)


def stroke(image, points, colour, width, closed=False):
    cv2.polylines(image, [np.int32(np.round(points * 16))], closed, colour, max(1, round(width)), cv2.LINE_AA,
                  shift=4)


def paint(image, points, colour, shade):
    """Fills a polygon with colour * shade; shade: (height, width) float32."""
    height, width = image.shape[:2]
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    low = max(0, int(x0) - 2), max(0, int(y0) - 2)
    box = np.s_[low[1]:max(0, min(height, int(y1) + 3)), low[0]:max(0, min(width, int(x1) + 3))]
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


def draw_background(image, name, detail):
    h, w = image.shape[:2]
    ramp = np.linspace(0, 1, h, dtype=np.float32)[:, None, None]
    rgb = lambda top, bottom: np.broadcast_to(np.float32(top) * (1 - ramp) + np.float32(bottom) * ramp,
                                              image.shape)
    rect = lambda x0, y0, x1, y1, c: cv2.rectangle(image, (round(x0 * w), round(y0 * h)),
                                                   (round(x1 * w), round(y1 * h)), c, -1)
    disc = lambda x, y, r, c: cv2.circle(image, (round(x * w * 16), round(y * h * 16)),
                                         round(r * min(w, h) * 16), c, -1, cv2.LINE_AA, 4)
    if name.endswith("wall"):
        tone = np.float32(dict(red=(196, 62, 58), blue=(82, 128, 205), green=(96, 168, 104),
                               yellow=(242, 212, 104), grey=(160, 162, 166))[name.split()[0]])
        across = np.linspace(-1, 1, w, dtype=np.float32)[None, :, None] * (0.24 * detail[0] - 0.12)
        image[:] = np.clip(tone * (1.1 - 0.25 * ramp + across), 0, 255)
    elif name == "beach":
        image[:] = rgb((120, 190, 240), (190, 225, 245))
        rect(0, 0.5, 1, 0.68, (38, 128, 178)), rect(0, 0.68, 1, 1, (236, 214, 160))
        disc(0.1 + 0.8 * detail[0], 0.12, 0.07, (255, 240, 170))
    elif name == "forest":
        image[:] = rgb((110, 170, 100), (50, 96, 48))
        for i in range(5):
            x = (i + 0.2 + 0.6 * detail[i]) / 5
            rect(x - 0.025, 0, x + 0.025, 1, (84, 60, 40))
            disc(x, 0.02 + 0.12 * detail[7 - i], 0.14, (44 + 14 * (i % 2), 116, 52))
    elif name == "city":
        image[:] = rgb((176, 204, 230), (222, 222, 222))
        for i in range(6):
            x, top = i / 6, 0.12 + 0.4 * detail[i]
            rect(x, top, x + 1 / 6, 1, (104 + 14 * (i % 3), 112 + 10 * (i % 3), 128))
            for row in range(6):
                rect(x + 0.05, top + 0.05 + 0.13 * row, x + 0.11, top + 0.1 + 0.13 * row, (232, 222, 160))
    elif name == "snow":
        image[:] = rgb((190, 206, 224), (222, 232, 242))
        disc(0.2 + 0.2 * detail[0], 1.05, 0.5, (248, 250, 252)), disc(0.9, 1.1, 0.5, (240, 245, 250))
        for i in range(16):
            y = (detail[(3 * i + 1) % 8] + i / 16) % 1
            disc(detail[i % 8] * 0.5 + 0.5 * (i // 8), y, 0.016, (255,) * 3)
    elif name == "night sky":
        image[:] = rgb((14, 18, 54), (44, 44, 104))
        disc(0.12 + 0.76 * detail[0], 0.14, 0.08, (244, 240, 206))
        for i in range(14):
            disc(detail[i % 8] * 0.5 + 0.5 * (i // 8), 0.8 * ((detail[(3 * i + 1) % 8] + i / 14) % 1), 0.009,
                 (235, 235, 255))
    elif name == "sunset":
        image[:] = rgb((120, 56, 128), (255, 150, 50))
        disc(0.1 + 0.8 * detail[0], 0.62, 0.13, (255, 226, 110)), rect(0, 0.78, 1, 1, (92, 44, 70))
    else:                                                       # desert
        image[:] = rgb((130, 196, 236), (236, 226, 196))
        fill(image, np.float32([(0, .62), (.3, .5), (.7, .66), (1, .52), (1, 1.1), (0, 1.1)]) * (w, h),
             (216, 152, 84))
        x = 0.06 + 0.1 * detail[0] + (0.72 if detail[1] > 0.5 else 0)
        rect(x, 0.3, x + 0.05, 0.8, (70, 124, 66)), rect(x + 0.05, 0.42, x + 0.11, 0.46, (70, 124, 66))
        rect(x + 0.08, 0.32, x + 0.11, 0.46, (70, 124, 66))


class Pose:
    """Head coordinates (x right, y down, z to the viewer; crown y = -1, chin y = 1) to pixels."""
    def __init__(self, who, scene, width, height):
        unit = min(width, height)
        yaw, pitch, roll = np.radians([scene["yaw"], scene["pitch"], scene["roll"]])
        cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
        turn = np.array([(cy, 0, sy), (0, 1, 0), (-sy, 0, cy)])
        nod = np.array([(1, 0, 0), (0, cp, sp), (0, -sp, cp)])
        tilt = np.array([(cr, -sr, 0), (sr, cr, 0), (0, 0, 1)])
        self.matrix = (tilt @ nod @ turn)[:2].T.astype(np.float32)
        self.scale, self.w, self.depth = unit * scene["size"] / 2, who["head_width"], 0.9
        self.centre = np.float32((width / 2 + scene["x"] * unit,
                                  unit * (0.45 + scene["y"]) + 0.25 * (height - unit)))
        # a turned ellipsoid is not narrower, a turned disc would be
        self.stretch = np.sqrt(cy ** 2 + (self.depth / self.w * sy) ** 2) / cy

    def at(self, points, z):
        """(n, 2) head points at depth z (number or (n,)) -> (n, 2) pixels."""
        p, z = np.asarray(points, np.float32), np.asarray(z, np.float32)[..., None]
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
    """Light on the head (Lambert plus soft shadow blobs) and on all else; float32 (height, width) each."""
    step = max(1, min(width, height) // 40)
    w, h = -(-width // step), -(-height // step)
    grid = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32) * step + step / 2
    n = (grid - pose.centre) / pose.scale / (who["head_width"] * 1.05, 1.12)
    z = np.sqrt(np.maximum(1 - (n ** 2).sum(-1), 0.0))
    lamp = np.float32((scene["light"], -scene["light_up"], 1.1))
    lamp /= np.linalg.norm(lamp)
    lambert = n[..., 0] * lamp[0] + n[..., 1] * lamp[1] + z * lamp[2]
    head = np.clip(0.68 + 0.37 * lambert, 0.5, 1.05)
    e, y, ny, side = who["eye_space"], who["eye_y"], who["nose_length"], np.sign(scene["light"])
    blobs = np.float32([(-e, y - 0.03, 0.24, 0.15, 0.22), (e, y - 0.03, 0.24, 0.15, 0.22),
                        (-side * 0.12, ny - 0.15, 0.08, 0.2, 0.2), (0, ny + 0.1, 0.2, 0.08, 0.24),
                        (0, who["mouth_y"] + 0.17, 0.17, 0.05, 0.16), (0, ny - 0.12, 0.07, 0.22, -0.10),
                        (-0.42, 0.34, 0.2, 0.16, -0.07), (0.42, 0.34, 0.2, 0.16, -0.07),
                        (-0.34, ny + 0.1, 0.05, 0.14, 0.05 + 0.12 * who["age"]),
                        (0.34, ny + 0.1, 0.05, 0.14, 0.05 + 0.12 * who["age"])])
    at = pose.on(blobs[:, :2])
    d = (grid[None] - at[:, None, None]) / (pose.scale * blobs[:, None, None, 2:4])
    head = head * np.prod(1 - blobs[:, 4, None, None] * np.exp(-(d ** 2).sum(-1)), 0)
    chin = (grid - pose.at([(0, 1.15)], 0.0)[0]) / pose.scale / (0.6, 0.32)
    body = (0.92 + 0.14 * np.clip(n[..., 0], -1, 1) * lamp[0]) * (1 - 0.35 * np.exp(-(chin ** 2).sum(-1)))
    cap = 0.8 + 0.3 * np.clip(lambert, 0, 1) + 0.28 * np.exp(-((n - (lamp[0] * 0.7, -0.75)) ** 2).sum(-1) * 9)
    return [cv2.resize(np.float32(m), (width, height)) for m in (head, body, cap)]    # bilinear


def draw_body(image, who, scene, pose, shade, width, height):
    """Shoulders, clothing and neck; the body does not turn with the head, only a little with the yaw."""
    s, neck = pose.scale, who["neck"]
    base = pose.at([(0, 0.9)], 0.1)[0]
    x, y = 0.75 * base[0] + 0.25 * pose.centre[0], pose.centre[1] + 1.36 * s
    put = lambda points: np.float32(points) * s + (x, y)
    mirror = lambda half: half + [(-a, b) for a, b in half[::-1]]
    broad, colour = (1.62 if who["gender"] == "man" else 1.3), np.float32(COLOURS[scene["colour"]])
    low, kind = (height - y) / s + 1, scene["clothes"]
    if kind == "hoodie":
        hood = put(mirror([(0, -.62), (neck + .3, -.5), (neck + .42, .05), (.3, .4)]))
        paint(image, smooth(hood), colour * 0.72, shade)
    torso = put([(0, -.1)] + [(neck, -.12), (neck + .35, .06), (broad * .85, .2), (broad, .42),
                              (broad * 1.06, .9), (broad * 1.08, low)]
                + [(-broad * 1.08, low), (-broad * 1.06, .9), (-broad, .42), (-broad * .85, .2),
                   (-neck - .35, .06), (-neck, -.12)])
    paint(image, torso, colour, shade)
    edge = (colour * 0.62).tolist()
    top = np.float32([base + (-neck * s, -.35 * s), base + (neck * s, -.35 * s)])
    skin = lambda points: paint(image, np.concatenate([top, points]), who["skin"], shade * 0.88)
    if kind == "sweater":                                       # a high round collar
        skin(put([(neck * 1.02, 0), (-neck * 1.02, 0)]))
        paint(image, smooth(put(mirror([(neck * .6, -.16), (neck + .08, -.2), (neck + .12, .08), (.2, .2)]))),
              colour * 0.85, shade)
    elif kind in ("shirt", "hoodie"):
        skin(put([(neck, -.06), (neck * .8, .1), (0, .3), (-neck * .8, .1), (-neck, -.06)]))
        if kind == "shirt":                                     # two collar wings and buttons
            for side in (-1, 1):
                wing = put([(side * neck, -.2), (side * (neck + .12), .05), (side * .26, .5), (0, .3)])
                paint(image, wing, np.minimum(colour * 1.15 + 12, 255), shade)
                stroke(image, wing, edge, s / 40, True)
            stroke(image, put([(0, .32), (0, low)]), edge, s / 30)
        else:
            for side in (-1, 1):
                stroke(image, put([(side * .2, .25), (side * .24, .75)]), (240, 240, 236), s / 16)
    else:                                                       # jacket over a shirt; a suit adds a tie
        blue = kind == "jacket" and scene["colour"] == "white"
        inner = (120, 150, 200) if blue else (240, 240, 238)
        v = .95 if kind == "suit" else 1.3
        paint(image, put([(neck, -.12), (0, v), (-neck, -.12)]), inner, shade)
        skin(put([(neck * .95, -.1), (0, .22), (-neck * .95, -.1)]))
        if kind == "suit":
            tie = (150, 30, 40) if scene["colour"] != "red" else (40, 40, 60)
            paint(image, put([(-.08, .2), (.08, .2), (.05, .32), (.12, .8), (0, v), (-.12, .8), (-.05, .32)]),
                  tie, shade)
        for side in (-1, 1):
            lapel = put([(side * neck, -.16), (side * (neck + .2), .1), (side * (neck + .12), .42), (0, v)])
            paint(image, lapel, colour * 0.8 + 8, shade)
            stroke(image, lapel, edge, s / 40, True)
        stroke(image, put([(0, v), (0, low)]), edge, s / 20)


def back_hair(image, who, scene, pose, shade):
    w, v, kind, colour = who["head_width"], who["volume"], who["hair"], np.float32(who["hair_rgb"])
    mirror = lambda half: half + [(-a, b) for a, b in half[:0:-1]]
    if kind in ("long", "wavy", "parted long", "bangs"):
        end = 1.05 + 0.6 * (who["length"] - 0.8) / 0.2
        half = [(0, -1.05 - v), (w * .9, -.75), (w + .06 + v, 0), (w + .14 + v, .6), (w + .1 + v, end),
                (.3, end)]
        if kind == "wavy":
            half = [(0, -1.1 - v), (w, -.8), (w + .14 + v, -.3), (w + .06 + v, .1), (w + .3 + v, .5),
                    (w + .14 + v, .9), (w + .3 + v, end), (.3, end + .1)]
        paint(image, smooth(pose.rim(mirror(half), -0.3)), colour * 0.72, shade)
    elif kind == "bob":
        end = 0.55 + 0.3 * (who["length"] - 0.8) / 0.2
        half = [(0, -1.05 - v), (w * .95, -.7), (w + .14 + v, 0), (w + .18 + v, end - .1), (w, end),
                (.3, end)]
        paint(image, smooth(pose.rim(mirror(half), -0.25)), colour * 0.72, shade)
    elif kind == "ponytail":
        side = 1 if who["part"] > 0 else -1
        tail = [(.3, -.9), (w + .35, -.85), (w + .55, -.1), (w + .4, .75), (w + .25, .1), (w * .8, -.4)]
        paint(image, smooth(pose.at([(side * a, b) for a, b in tail], -0.5)), colour * 0.8, shade)
    elif kind == "bun":
        angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        size = 0.28 + v
        paint(image, pose.at(np.stack([size * np.cos(angle), size * np.sin(angle) - 1.14 - v], 1), -0.25),
              colour * 0.9, shade)
    if kind in ("afro", "curly"):
        size = (0.34 + 1.2 * v) if kind == "afro" else 0.14 + v
        angle = np.linspace(-2.5, 2.5, 24) if kind == "afro" else np.linspace(-1.45, 1.45, 19)
        r = 1 + size * (1 + 0.16 * (np.arange(len(angle)) % 2))
        points = np.stack([np.sin(angle) * r * (w + .06), -np.cos(angle) * r * .95], 1)
        paint(image, smooth(pose.rim(points, -0.2)), colour * 0.85, shade)


def front_hair(image, who, scene, pose, shade):
    """The cap of hair between an outer arc behind the head's rim and the hairline on its surface."""
    w, v, kind, colour = who["head_width"], who["volume"], who["hair"], np.float32(who["hair_rgb"])
    h, part, woman = who["hairline"], who["part"], who["gender"] == "woman"
    if kind == "bald":
        return
    angle = np.linspace(-1.62, 1.62, 17)
    r = 1 + np.full(17, dict(buzz=0.02, receding=0.04).get(kind, 0.03 + v))
    if kind == "quiff":
        r += 0.26 * np.exp(-(angle - part) ** 2 * 3)
    if kind == "spiky":
        r += np.where(np.arange(17) % 2, 0.2, 0.0) * np.cos(angle * 0.9)
    round_ = lambda a: np.sign(a) * np.abs(a) ** .85             # fuller than an ellipse
    outer = np.stack([round_(np.sin(angle)) * r * w, -round_(np.cos(angle)) * r], 1)
    temple = -0.12 if woman else -0.2
    lines = dict(receding=[(.9, temple), (.84, -.45), (.58, -.84), (.3, -.74), (0, -.7)],
                 bangs=[(.96, .05), (.86, -.28), (.55, -.3), (.25, -.31), (0, -.31)],
                 buzz=[(.96, temple), (.8, -.36), (.62, -h), (.3, -h - .03), (0, -h - .03)])
    line = lines.get(kind, [(.96, temple), (.88, -.34), (.66, -h + .06), (.35, -h - .04), (0, -h - .06)])
    line = np.float32(line + [(-a, b) for a, b in line[-2::-1]])
    if kind in ("parted", "parted long", "bob", "long", "wavy"):     # hair falls from the parting
        line = np.float32([(.97, .1 if woman else temple), (.9, -.25), (.66, -.46), (.3, -.62), (0, -.76),
                           (-.3, -.62), (-.66, -.46), (-.9, -.25), (-.97, .1 if woman else temple)])
        line[1:8, 0] += part * 0.8 * (1 - np.abs(line[1:8, 0]))
    line[:, 0] *= w
    both = np.concatenate([pose.rim(outer, -0.1), pose.on(line)])
    if kind == "spiky":
        paint(image, both, colour, shade)
    else:
        paint(image, smooth(both, 3), colour, shade)
    if kind in ("long", "wavy", "parted long", "bangs", "bob"):     # locks before the ears
        end = dict(bob=0.62, bangs=0.9).get(kind, 1.15)
        for side in (-1, 1):
            lock = [(side * w * .9, -.5), (side * (w + .05 + v), -.2), (side * (w + .1 + v), end * .6),
                    (side * (w + .02), end), (side * w * .93, end * .6), (side * w * .9, .05)]
            paint(image, smooth(pose.rim(lock, 0.05)), colour * 0.9, shade)
    light = np.minimum(colour * 1.25 + 14, 255).tolist()
    if kind not in ("buzz", "receding", "spiky"):
        for shift in (part, -.4 * np.sign(part)):
            k = np.linspace(-1, 1, 7)
            arc = np.stack([w * (shift + .16 * k), -.9 - v * .2 + .09 * (k + shift) ** 2], 1)
            stroke(image, pose.at(arc, 0.3), light, pose.scale / 34)


def draw_hat(image, who, scene, pose, shade):
    w, v, colour = who["head_width"], 0.1, np.float32(COLOURS[scene["colour"]])
    angle = np.linspace(-1.45, 1.45, 13)
    top = np.stack([np.sin(angle) * (w + v), -np.cos(angle) * (1.1 + v)], 1)
    if scene["hat"] == "cap":
        brow = [((w + .02) * c, -.42 - .06 * np.cos(c * 1.5)) for c in (1, .5, 0, -.5, -1)]
        paint(image, np.concatenate([pose.rim(top, -0.1), pose.on(brow, 0.03)]), colour, shade)
        front = pose.on([(-.5 * w, -.42), (0, -.4), (.5 * w, -.42)], 0.45)
        peak = np.concatenate([pose.on(brow, 0.03), front])
        paint(image, smooth(peak, 3), colour * 0.7, shade)
    else:
        brow = [((w + .04) * c, -.4 - .05 * np.cos(c * 1.5)) for c in (1, .5, 0, -.5, -1)]
        band = [((w + .06) * c, -.66) for c in (-1, -.5, 0, .5, 1)]
        paint(image, np.concatenate([pose.rim(top, -0.1), pose.on(brow, 0.03)]), colour, shade)
        paint(image, np.concatenate([pose.on(brow, 0.06), pose.on(band, 0.06)]), colour * 0.78, shade)


def draw_face(image, who, scene, pose, shade):
    """Ears, head, brows, eyes, nose, mouth, beard, marks and glasses."""
    w, s, skin = who["head_width"], pose.scale, np.float32(who["skin"])
    hair, dark = np.float32(who["hair_rgb"]), (skin * 0.42).tolist()
    for side in (-1, 1):
        ear = RING * (.8 * who["ear"], 1.25 * who["ear"]) + (side * (w + .03), .1)
        paint(image, pose.rim(ear, -0.08), skin * 0.9, shade)
        dab(image, pose.rim(ear * .5 + np.mean(ear, 0) * .5, -0.05), skin * 0.68, shade)
    jaw, chin, c = .62 + .2 * who["jaw"], .30 + .14 * who["chin"], 1 + who["chin_length"]
    half = [(0, -1), (w * .62, -.86), (w * .95, -.46), (w, -.1), (w * .97 + who["cheek"], .25),
            (w * (jaw + .08), .62), (w * chin * 1.15, .93 * c), (0, c)]
    outline = np.float32(half + [(-a, b) for a, b in half[-2:0:-1]])
    paint(image, smooth(pose.rim(outline, np.clip(outline[:, 1], 0, 1) * 0.35)), skin, shade)
    my, mw, smile = who["mouth_y"], who["mouth_width"] * (1 + .12 * scene["smile"]), scene["smile"]
    ny, nw = who["nose_length"], who["nose_width"]

    draw_beard(image, who, pose, shade, my, mw, (jaw, chin, c))
    if who["freckles"]:
        for k in range(10):
            x, y = (-1) ** k * (.24 + .055 * (k // 2)), .2 + .16 * (k // 2 * 3 % 5) / 4
            spot = pose.on(RING * .018 + (x, y))
            fill(image, spot, (skin * 0.62).tolist())
    for side in (-1, 1):                                        # cheeks
        mask = pose.on([(side * .48, .36)])[0]
        box = image[max(0, int(mask[1] - .3 * s)):int(mask[1] + .3 * s), max(0, int(mask[0] - .3 * s)):
                    int(mask[0] + .3 * s)]
        if box.size:
            yy, xx = np.ogrid[-1:1:box.shape[0] * 1j, -1:1:box.shape[1] * 1j]
            soft = (.3 * who["blush"] * np.exp(-4 * (xx ** 2 + yy ** 2))).astype(np.float32)[..., None]
            box[:] = box + soft * (skin * (1.0, .62, .62) - box)
    draw_eyes(image, who, scene, pose, shade)

    draw_nose(image, who, scene, pose, shade)
    draw_mouth(image, who, scene, pose, shade, my, mw, smile)

    if who["beard"] in ("full", "moustache", "goatee"):
        y = my - who["lip_top"] - .03
        half = [(0, y - .07), (mw * .7, y - .02), (mw * 1.15, y + .1 - .06 * smile), (mw * .6, y + .045)]
        shape = half + [(0, y + .02)] + [(-a, b) for a, b in half[:0:-1]]
        paint(image, smooth(pose.on(shape, .08)), hair * 0.9, shade)
    if who["age"] > 0.6:                                        # folds beside the mouth
        for a in (-1, 1):
            fold = [(a * (nw + .05), ny), (a * (mw + .05), (ny + my) / 2), (a * (mw + .08), my)]
            stroke(image, pose.on(fold), (skin * 0.72).tolist(), s / 40)
    if who["mole"]:
        dab(image, pose.on(RING * .032 + (who["mole_x"], who["mole_y"])), skin * 0.34, shade)
    if who["glasses"] != "none":
        draw_glasses(image, who, pose)


def draw_beard(image, who, pose, shade, my, mw, outline):
    """Full beard, stubble or goatee; the moustache comes after the mouth."""
    jaw, chin, c = outline
    w, skin, hair = who["head_width"], np.float32(who["skin"]), np.float32(who["hair_rgb"])
    if who["beard"] in ("full", "stubble"):
        tone = hair * 0.9 if who["beard"] == "full" else skin * 0.72 + hair * 0.06
        rim = [(w * .98, .2), (w * (jaw + .1), .64), (w * chin * 1.2, .95 * c), (0, c + .03)]
        rim = np.float32(rim + [(-a, b) for a, b in rim[-2::-1]])
        inner = [(-.8 * w, .3), (-.5 * w, .52), (-mw * .8, my - .13), (0, my - .12), (mw * .8, my - .13),
                 (.5 * w, .52), (.8 * w, .3)]
        both = np.concatenate([pose.rim(rim, np.clip(rim[:, 1], 0, 1) * .35), pose.on(inner)])
        paint(image, smooth(both, 3), tone, shade)
    if who["beard"] == "goatee":
        paint(image, smooth(pose.on([(-mw * .9, my - .02), (0, my - .1), (mw * .9, my - .02), (.22, c - .06),
                                     (0, c + .04), (-.22, c - .06)])), hair * 0.9, shade)


def draw_nose(image, who, scene, pose, shade):
    """A side in shadow, wings, nostrils, tip: face detectors look for these."""
    ny, nw, s, skin = who["nose_length"], who["nose_width"], pose.scale, np.float32(who["skin"])
    side = -1 if scene["light"] > 0 else 1
    bridge, out = who["nose_bridge"], who["nose_out"]
    wing = [(side * bridge, who["eye_y"] + .06), (side * (bridge + .02), ny - .18), (side * nw, ny - .02)]
    under = [(side * nw * .8, ny + .05), (0, ny + .06)]
    nose = np.concatenate([pose.on(wing[:2], out * .3), pose.on(wing[2:] + under, out * .6),
                           pose.on([(side * .02, ny - .08)], out)])
    paint(image, smooth(nose, 4), skin * 0.84, shade)
    for a in (-1, 1):
        dab(image, pose.on(RING * (nw * .36, .035) + (a * nw * .52, ny + .025), out * .7), skin * 0.36, shade)
        curl = [(a * nw * .95, ny - .07), (a * nw * 1.05, ny), (a * nw * .85, ny + .045)]
        stroke(image, pose.on(curl, out * .5), (skin * 0.6).tolist(), s / 30)
    dab(image, pose.on(RING * (nw * .3, .05) + (-side * .02, ny - .06), out), skin * 1.05 + 5, shade)


def draw_glasses(image, who, pose):
    w = who["head_width"]
    colour, line = GLASSES_COLOURS[who["glasses_colour"]], pose.scale / 15
    e, y, r = who["eye_space"], who["eye_y"] + .02, min(.27, who["eye_space"] - .05)
    shape = np.sign(RING) * np.abs(RING) ** (1 if who["glasses"] == "round" else .45) * (r, r * .82)
    for a in (-1, 1):
        stroke(image, pose.on(shape + (a * e, y), .1), colour, line, True)
        stroke(image, np.concatenate([pose.on([(a * (e + r), y - .04)], .1), pose.rim([(a * w, 0)], .1)]),
               colour, line)
    stroke(image, pose.on([(-e + r, y - .03), (0, y - .07), (e - r, y - .03)], .14), colour, line)


def draw_eyes(image, who, scene, pose, shade):
    skin, hair, woman = np.float32(who["skin"]), np.float32(who["hair_rgb"]), who["gender"] == "woman"
    half, tall = who["eye_width"], who["eye_height"] * scene["eye_open"] * (1 - .12 * max(0, scene["smile"]))
    t = np.linspace(-1, 1, 9)
    upper, lower = -tall * 1.15 * (1 - t ** 2), tall * .75 * (1 - t ** 2)
    for side in (-1, 1):
        def on(x, y, out=0.0):                                  # eye coordinates, x outwards
            return pose.on(np.stack([side * (who["eye_space"] + np.asarray(x)),
                                     who["eye_y"] + np.asarray(y) + who["eye_tilt"] * np.asarray(x)], 1), out)
        lid = np.concatenate([on(t * half * 1.12, upper * 1.7 - .01), on(t[::-1] * half, upper[::-1])])
        dab(image, lid, skin * 0.84 if not woman else skin * (.80, .70, .74), shade)
        white = np.concatenate([on(t * half, upper), on(t[::-1] * half, lower[::-1])])
        dab(image, white, (275, 273, 268), shade)

        def disc(r, shift=(0, 0)):                              # clipped by the lids
            x = np.clip(side * scene["gaze_x"] * half * .55 + shift[0] + r * RING[:, 0], -half, half)
            y = scene["gaze_y"] * tall * .5 + shift[1] + r * RING[:, 1]
            open_ = 1 - (x / half) ** 2
            return on(x, np.clip(y, -tall * 1.15 * open_, tall * .75 * open_))
        fill(image, disc(who["iris"]), EYE_COLOURS[who["eye_colour"]])
        fill(image, disc(who["iris"] * .52), (14, 12, 14))
        fill(image, disc(who["iris"] * .24, (.03 * side, -.04)), (250, 250, 250))
        stroke(image, on(t * half * 1.03, upper - .005), (30, 22, 22), pose.scale * (.05 if woman else .035))
        stroke(image, on(t[1:-1] * half, lower[1:-1]), (skin * .55).tolist(), pose.scale / 50)
        if woman:
            for k in (.75, 1.0):
                lash = on([k * half, (k + .24) * half], [-tall * (1.15 - k), -tall * (1.7 - k)])
                stroke(image, lash, (30, 22, 22), 1)
        thick, y = who["brow_thick"], -who["brow_y"] - scene["brow_raise"]
        x = np.float32([-.85, -.2, .5, 1.15]) * half * 1.12
        ridge = y - np.float32([0, .7, 1, .1]) * who["brow_arch"] - who["brow_tilt"] * .35 * x
        brow = np.concatenate([on(x, ridge - thick * np.float32([.5, .55, .5, .1])),
                               on(x[::-1], (ridge + thick * np.float32([.55, .5, .4, .1]))[::-1])])
        dab(image, smooth(brow, 3), np.minimum(hair * .68 + skin * .05, skin * .62), shade)


def draw_mouth(image, who, scene, pose, shade, my, mw, smile):
    skin = np.float32(who["skin"])
    painted = skin * .35 + np.float32((112, 14, 32))
    red = skin * (.86, .62, .62) * (1 - who["lip_red"]) + who["lip_red"] * painted
    x = np.float32([-1, -.55, -.2, 0, .2, .55, 1])
    bend = -.11 * smile * x ** 2 + .05 * smile
    gap = scene["mouth_open"] * .11 * (1 - x ** 2)
    top = my + bend - who["lip_top"] * np.float32([0, .75, 1.1, .85, 1.1, .75, 0])
    bottom = my + bend + gap + who["lip_bottom"] * np.float32([0, .6, .95, 1, .95, .6, 0])
    on = lambda y: pose.on(np.stack([x * mw, y], 1), .05)
    upper, lower = on(my + bend), on(my + bend + gap)
    dab(image, np.concatenate([on(top), upper[::-1]]), red * .84, shade)
    dab(image, np.concatenate([lower, on(bottom)[::-1]]), red, shade)
    if scene["mouth_open"] > .12:
        fill(image, np.concatenate([upper, lower[::-1]]), (70, 20, 26))
        teeth = on(my + bend + np.minimum(gap * .55, .06))
        fill(image, np.concatenate([upper[1:-1], teeth[-2:0:-1]]), (240, 236, 228))
    else:
        stroke(image, upper, (red * .42).tolist(), pose.scale / 26)


def apply_style(image, style, scene):
    """Style of a finished uint8 (h, w, 3) picture; the face keeps its inside in every style."""
    h, w = image.shape[:2]
    k = min(h, w) / 128
    if style == "photo":
        return image
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if style == "black and white":
        return cv2.cvtColor(cv2.LUT(grey, curve(1.25, -18)), cv2.COLOR_GRAY2RGB)
    if style == "pencil drawing":                               # colour dodge: lines remain, areas go pale
        dodge = cv2.divide(grey, 255 - cv2.GaussianBlur(255 - grey, (0, 0), 3.2 * k), scale=256)
        paper = dodge * (0.42 + 0.66 * (grey / np.float32(255)) ** 0.8)
        y, x = np.ogrid[:h, :w]          # fades into cream paper around the head
        far = np.hypot((x - w / 2) / k - 128 * scene["x"], (y - h * .45) / k * .8) / 64
        fade = np.clip((far - .62) / .45, 0, .85)
        drawn = np.clip(paper, 0, 255) * (1 - fade) + 250 * fade
        return np.clip(drawn[..., None] * (1, .975, .91), 0, 255).astype(np.uint8)
    if style == "oil painting":                                 # wavering edges, flat dabs, warm rich colour
        y, x = np.mgrid[:h, :w].astype(np.float32) / k
        wave = np.sin(x * .55 + 2 * np.sin(y * .21)) + np.sin(y * .6 + 2 * np.sin(x * .17))
        moved = cv2.remap(image, x * k + k * wave * .55, y * k + k * .55 * np.roll(wave, 5, 1),
                          cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        moved = cv2.medianBlur(moved, 2 * round(k) + 1)
        rich = saturate(moved, 1.5) + 6 * np.sin((x + y) * .35 + 1.5 * wave)[..., None]
        return np.clip(rich * (1.04, .98, .80) + (8, 2, 0), 0, 255).astype(np.uint8)
    if style == "pop art":            # few flat levels, strong colour, dark contours
        levels = np.clip(np.arange(256) // 52 * 58 + 26, 0, 255).astype(np.uint8)
        level = cv2.LUT(cv2.GaussianBlur(grey, (0, 0), .7 * k), levels)
        ratio = (level.astype(np.float32) + 10) / (grey.astype(np.float32) + 10)
        strong = np.clip(saturate(image, 2.0) * np.clip(ratio, .6, 2)[..., None], 0, 255)
        wide, fine = (cv2.GaussianBlur(grey, (0, 0), r * k).astype(np.float32) for r in (2.0, .6))
        line = np.clip((wide - fine - 9) / 9, 0, 1)[..., None]
        return (strong * (1 - line) + line * np.float32((20, 16, 40))).astype(np.uint8)
    x = np.linspace(0, 1, w, dtype=np.float32)[None, :, None]   # night: two coloured lamps
    x = x if scene["light"] > 0 else 1 - x
    tint = np.float32((.25, .42, 1.05)) * (1 - x) + np.float32((1.0, .30, .72)) * x
    lit = 255 * ((image * .5 + grey[..., None] * .5) / np.float32(255)) ** .8   # lifts the dark of a face
    return np.clip(lit * tint * 1.25, 0, 255).astype(np.uint8)


def curve(gain, offset):
    return np.clip(np.arange(256) * gain + offset, 0, 255).astype(np.uint8)


def saturate(image, amount):
    mean = image.mean(-1, keepdims=True, dtype=np.float32)
    return mean + amount * (image - mean)


def render(who, scene, width=128, height=128):
    """identity(), scene() -> uint8 RGB (height, width, 3); the same numbers give the same picture."""
    if min(width, height) < 32:
        raise ValueError(f"picture {width} x {height} is too small; at least 32 x 32")
    image = np.zeros((height, width, 3), np.uint8)
    draw_background(image, scene["background"], scene["detail"])
    pose = Pose(who, scene, width, height)
    head, body, cap = shade_maps(who, scene, pose, width, height)
    # under a hat
    under = dict(afro="bob", bun="ponytail", curly="short", spiky="short", quiff="short")
    bare = dict(who, hair=under.get(who["hair"], who["hair"]), volume=0.04) if scene["hat"] else who
    back_hair(image, bare, scene, pose, cap)
    draw_body(image, who, scene, pose, body, width, height)
    draw_face(image, who, scene, pose, head)
    front_hair(image, bare, scene, pose, cap)
    if scene["hat"]:
        draw_hat(image, who, scene, pose, cap)
    return apply_style(image, scene["style"], scene)


def sample(identity_seed, image_index, width=128, height=128, **options):
    """Picture `image_index` of a person -> (uint8 RGB (height, width, 3), caption); options: scene()'s."""
    who, rng = identity(identity_seed), np.random.default_rng([identity_seed, image_index, 1])
    what = scene(rng, **options)
    return render(who, what, width, height), caption(who, what, rng)


def write(path, data):
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(data)
    os.replace(beside, path)


class Parser(argparse.ArgumentParser):
    def error(self, message):                                   # one line, without the usage
        self.exit(2, f"faces.py: {message}\n")


def main(argv=None):
    parser = Parser(description="Draw faces: OUT/<identity>/<image>.png, each with its caption in a .txt.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--identities", type=int, default=8, help="how many people")
    parser.add_argument("--images", type=int, default=8, help="pictures of each")
    parser.add_argument("--out", type=Path, default=Path("faces"), help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first person; the next ones follow. "
                        f"Test people, never trained on: {TEST.start} to {TEST.stop - 1}")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels, 32 to 1024")
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
