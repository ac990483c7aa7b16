"""Cartoon cats and dogs: a small semi-supervised data set, drawn with Pillow.

The species shows only in shapes and their details: ears, muzzle, nose, eyes, whiskers, tail. Coat,
background, pose and light are drawn from the same distributions for both, so that a handful of
labels leaves much open while many unlabeled pictures still show what the pets have in common.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SPECIES = ("cat", "dog")
# RGB, both species: ginger, grey, charcoal, white, cream, brown, chocolate, slate
COATS = np.array([(226, 142, 62), (150, 150, 152), (66, 62, 68), (240, 236, 230),
                  (232, 204, 158), (164, 112, 70), (104, 70, 52), (112, 126, 146)])  # fmt: skip
EYES = np.array([(120, 180, 80), (222, 176, 60), (110, 160, 210), (150, 96, 50)])
INK, PINK, WHITE = (38, 30, 34), (238, 150, 156), (255, 255, 255)
CIRCLE = np.exp(2j * np.pi * np.arange(28) / 28)


def oval(center, rx, ry, tilt=0.0):
    """Outline of an ellipse: (28,) complex points x + iy, y pointing down, tilt in radians."""
    return center + np.exp(1j * tilt) * (rx * CIRCLE.real + 1j * ry * CIRCLE.imag)


def curve(start, pull, end):
    """Quadratic Bezier curve: (12,) complex points."""
    t = np.linspace(0, 1, 12)
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * pull + t**2 * end


def xy(points):
    """(n,) complex points as the list of (x, y) pairs that ImageDraw takes."""
    return list(zip(points.real.tolist(), points.imag.tolist()))


def color(rgb):
    return tuple(int(c) for c in np.clip(rgb, 0, 255))


def draw_background(rng, side):
    """A cloudy gradient of two colors with clutter on it: (side, side) RGB image."""
    first, second = rng.uniform(170, 230, (2, 1)) + rng.uniform(-45, 45, (2, 3))
    x, y = np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 24))
    angle = rng.uniform(0, 2 * np.pi)
    mix = 0.5 + 0.4 * (x * np.cos(angle) + y * np.sin(angle))
    mix = (mix + rng.uniform(0, 0.12) * rng.standard_normal(mix.shape))[..., None]
    pixels = np.clip(first * mix + second * (1 - mix), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 5)):  # blobs and shards, some as pointed as an ear
        center = complex(*rng.uniform(0, side, 2))
        shape = oval(center, *rng.uniform(0.03, 0.16, 2) * side, rng.uniform(0, np.pi))
        if rng.random() < 0.6:
            shape = rng.choice(shape, 3, replace=False)
        draw.polygon(xy(shape), fill=color(rng.uniform(30, 255, 3)))
    return image


def draw_coat(rng, side, unit):
    """Plain, striped or spotted fur all over a (side, side) RGB image, and its (3,) base color."""
    base = COATS[rng.integers(len(COATS))] + rng.normal(0, 8, 3)
    mark = color(rng.uniform(0.6, 0.85) * base if rng.random() < 0.7 else 0.4 * base + 150)
    coat = Image.new("RGB", (side, side), color(base))
    draw = ImageDraw.Draw(coat)
    pattern = rng.choice(("plain", "stripes", "spots"))
    if pattern == "stripes":
        slope, gap = rng.uniform(-0.8, 0.8) * side, rng.uniform(0.3, 0.5) * unit
        for x in np.arange(-side, 2 * side, gap):
            draw.line([(x, 0), (x + slope, side)], fill=mark, width=int(0.35 * gap))
    elif pattern == "spots":
        for x, y, r in rng.uniform((0, 0, 0.1 * unit), (side, side, 0.45 * unit), (40, 3)):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=mark)
    return coat, base


def draw_pet(species, rng, size=96):
    """One "cat" or "dog" in a random pose and scene: a (size, size) RGB image."""
    cat = species == "cat"
    side = 2 * size  # drawn at twice the size and shrunk at the end, for smooth edges
    unit = side * rng.uniform(0.22, 0.3)  # half the width of the head, in pixels
    image = draw_background(rng, side)
    coat, base = draw_coat(rng, side, unit)
    light = color(0.35 * base + 165)  # belly, muzzle and paws
    draw = ImageDraw.Draw(image)

    # Shapes are in units around the center of the head; the head tilts further than the body.
    origin = complex(*rng.uniform((0.42, 0.38), (0.58, 0.47))) * side
    mirror, angle = rng.random() < 0.5, rng.normal(0, 0.25)

    def pixels(shape):
        shape = shape * np.exp(1j * angle)
        return xy(origin + unit * (-shape.conj() if mirror else shape))

    def stroke(path, paint=INK, width=0.07):
        draw.line(pixels(path), paint, max(1, round(width * unit)), joint="curve")

    def fill(shape, paint=None, edge=True):
        """Fill a closed shape with a color, or with fur where paint is None."""
        if paint is None:
            mask = Image.new("L", (side, side))
            ImageDraw.Draw(mask).polygon(pixels(shape), fill=255)
            image.paste(coat, mask=mask)
        else:
            draw.polygon(pixels(shape), fill=paint)
        if edge:
            stroke(np.append(shape, shape[:2]))

    # Body: sitting upright, or lying with the rump to one side.
    sitting = rng.random() < 0.6
    middle, rx, ry, paws = (1.6j, 0.8, 1.0, 2.5j) if sitting else (0.9 + 1.1j, 1.3, 0.7, 1.75j)
    rump = middle + (0.6 + 0.5j if sitting else 1.1 - 0.1j)
    sway = rng.uniform(0.7, 1.3)
    if cat:  # a long thin tail, its tip curling outwards
        bend, thick = rump + sway * (0.9 - 0.6j), 0.26
        tip = curve(bend, bend - 0.1 - 0.7j, bend + 0.4 - 0.8j)
        tail = np.append(curve(rump, rump + 1.0, bend), tip)
    else:  # a short thick one, wagging
        tail, thick = curve(rump, rump + 0.6, rump + sway * (0.75 - 0.5j)), 0.4
    stroke(tail, INK, thick + 0.14)
    stroke(tail, color(base), thick)
    fill(oval(middle, rx, ry))
    if sitting:
        fill(oval(middle + 0.1j, 0.45, 0.65), light, edge=False)
    for x in (-0.32, 0.32):
        fill(oval(paws + x, 0.3, 0.2), light)
    if rng.random() < 0.35:  # a collar
        stroke(curve(-0.6 + 0.7j, 1.2j, 0.6 + 0.7j), color(rng.uniform(30, 255, 3)), 0.25)
    if rng.random() < 0.25:  # a ball
        spot = complex(rng.uniform(-1.5, 1.5), rng.uniform(1.4, 2.0))
        fill(oval(spot, 0.4, 0.4), color(rng.uniform(30, 255, 3)))
        stroke(curve(spot - 0.3, spot + 0.3j, spot + 0.3), WHITE)

    # Head: a cat's pointed ears stand behind it, a dog's floppy ones hang in front.
    angle += rng.normal(0, 0.15)
    ear = rng.uniform(0.8, 1.2)
    if cat:
        for s in (-1, 1):
            tip = s * 0.8 - (0.6 + 0.65 * ear) * 1j
            fill(np.array([s * 0.95 - 0.15j, tip, s * 0.2 - 0.75j]))
            fill(np.array([s * 0.8 - 0.4j, 0.85 * tip, s * 0.45 - 0.7j]), PINK, edge=False)
        fill(oval(0, 1.0, 0.85))
    else:
        fill(oval(0, 0.88, 0.92))
        for s in (-1, 1):
            root = s * 0.92 + 0.35j * (ear - 1)
            fill(oval(root, 0.27, 0.62 * ear, s * -0.3), color(0.7 * base))

    # Face: shifted within the head to where the pet looks.
    look = complex(rng.uniform(-0.2, 0.2), rng.uniform(-0.08, 0.12))
    asleep, iris = rng.random() < 0.2, color(EYES[rng.integers(len(EYES))])
    nose = 1.3 * look + 0.2j
    for s in (-1, 1):
        eye = look + s * 0.42 - 0.15j
        if asleep:
            stroke(curve(eye - 0.22, eye + 0.2j, eye + 0.22), width=0.1)
        elif cat:  # a wide almond with a slit
            fill(oval(eye, 0.26, 0.2, s * -0.35), iris)
            fill(oval(eye, 0.07, 0.19), INK, edge=False)
        else:  # round, nearly all pupil, with a glint
            fill(oval(eye, 0.19, 0.21), iris)
            fill(oval(eye, 0.13, 0.15), INK, edge=False)
            fill(oval(eye - 0.05 - 0.06j, 0.05, 0.05), WHITE, edge=False)
    if cat:
        for s in (-1, 1):
            fill(oval(nose + s * 0.16 + 0.18j, 0.22, 0.18), light, edge=False)
            stroke(curve(nose + 0.08j, nose + s * 0.05 + 0.35j, nose + s * 0.3 + 0.25j))
            for rise in (-0.2, 0.02, 0.24):  # whiskers
                hair = nose + s * 0.35 + (0.12 + rise / 3) * 1j
                stroke(np.array([hair, hair + s * 0.75 + rise * 1j]), width=0.05)
        fill(nose + np.array([-0.13 - 0.08j, 0.13 - 0.08j, 0.1j]), PINK)
    else:
        fill(oval(nose + 0.22j, 0.46, 0.4), light)
        if rng.random() < 0.4:  # the tongue out
            fill(oval(nose + 0.58j, 0.15, 0.22), PINK)
        stroke(curve(nose - 0.28 + 0.32j, nose + 0.52j, nose + 0.28 + 0.32j))
        stroke(np.array([nose, nose + 0.4j]))
        fill(oval(nose, 0.22, 0.15), INK)

    small = np.asarray(image.resize((size, size), Image.Resampling.BOX))
    exposure = rng.uniform(0.8, 1.1) * rng.uniform(0.96, 1.04, 3)  # with a slight tint
    return Image.fromarray(np.clip(small * exposure, 0, 255).astype(np.uint8))


def write_pets(folder, count_per_class, seed, size=96, layout="folders"):
    """Write count_per_class cats and as many dogs into folder, as (size, size) JPEG files.

    layout "folders" gives folder/cat/000.jpg and folder/dog/000.jpg on; "flat" gives
    folder/00000.jpg on in random order, so that no name tells the species.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(2 * count_per_class)
    for i in range(2 * count_per_class):
        species = SPECIES[i % 2]
        name = f"{order[i]:05d}.jpg" if layout == "flat" else f"{species}/{i // 2:03d}.jpg"
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_pet(species, rng, size).save(path, quality=90)


def draw_dataset(root, labeled_per_class=4, unlabeled=1600, val=200, test=200, size=96, seed=0):
    """Draw root/{labeled,train,val,test}, each half cats and half dogs; root must not exist yet.

    labeled/, val/ and test/ hold cat/ and dog/; train/ is flat and hides the labels. The counts
    unlabeled, val and test are of both species together, and even.
    """
    root = Path(root).resolve()
    if root.exists():
        raise FileExistsError(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    # Drawn aside and renamed at the end: an interruption leaves no half data set under root.
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as aside:
        draft = Path(aside, "draft")
        write_pets(draft / "labeled", labeled_per_class, (seed, 0), size)
        write_pets(draft / "train", unlabeled // 2, (seed, 1), size, layout="flat")
        write_pets(draft / "val", val // 2, (seed, 2), size)
        write_pets(draft / "test", test // 2, (seed, 3), size)
        os.replace(draft, root)
