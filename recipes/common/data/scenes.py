"""Color scenes rendered from a seed, any number of any size, with masks of what they show.

A scene is an object, or a few, of ten kinds (five shapes with two textures) on a cluttered ground or on a piece of one
of the two photographs that scikit-learn includes. Color, position, area and rotation are random, and both textures have
two tones in equal shares, so none of these tells the kind.

Lengths are drawn relative to the shorter side, so a scene looks the same at every resolution. Arrays go through
elementary operations only (+ − × ÷ √ and comparisons), which IEEE 754 rounds alike everywhere, so all machines with the
same JPEG decoder render the same bits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from common.randomness import seed_of

import numpy as np
from PIL import Image

SHAPES = ("disc", "ring", "square", "star", "triangle")
TEXTURES = ("dots", "stripes")
KINDS = tuple(f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES)
STUFF = ("smooth", "slats", "grain")

_SQUARE = math.sqrt(math.pi) / 2  # half a side; the area of every shape is π
_TRIANGLE = math.sqrt(math.pi / 27**0.5)  # radius of the inscribed circle
_STAR = math.sqrt(math.pi / (20 * math.sin(math.pi / 5)))  # of the circle inscribed in its inner pentagon
_RING, _RING_WIDTH = 3**0.5 / 2, 12**-0.5  # mean radius and half the width: the hole is half as wide as the ring
_DOT = math.sqrt(0.5 / math.pi)  # radius, for dots one apart that cover half the area


@dataclass(frozen=True)
class Look:
    """How difficult the scenes are.

    Args:
        noise: standard deviation of the pixel noise, of values from 0 to 1.
        rotation: largest rotation of an object in radians, in both directions.
        contrast: difference between the two tones of an object, relative to a bright and a dark one.
        radius: range of the radius of a disc, relative to the shorter side; other shapes have the same area.
        clutter: number of plain patches on a ground that is not a photograph.
        photographs: share of the scenes on a photograph.
        hue_tied: whether the kind of an object determines its hue, and the ground is gray.
    """

    noise: float = 0.02
    rotation: float = 0.5
    contrast: float = 1.0
    radius: tuple[float, float] = (0.18, 0.28)
    clutter: int = 8
    photographs: float = 0.5
    hue_tied: bool = False


LEVELS = (
    Look(clutter=0, photographs=0.0, hue_tied=True),
    Look(),
    Look(noise=0.05, rotation=math.pi, contrast=0.6, radius=(0.13, 0.26), clutter=16, photographs=0.7),
)


@dataclass(frozen=True)
class Thing:
    """An object in a scene.

    Args:
        kind: index in `KINDS`.
        mask: its visible pixels, bool of shape (H, W).
        outline: corners (x, y) in pixels, if the outline is a polygon, inside the image and not covered by any object.
    """

    kind: int
    mask: np.ndarray
    outline: np.ndarray | None

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The tight box of the mask: left column, top row, width and height in pixels."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Args:
        image: uint8 of shape (3, H, W).
        things: the visible objects, from front to back.
        stuff: index of the ground in `STUFF`, uint8 of shape (H, W); None if the ground is of another sort.
    """

    image: np.ndarray
    things: list[Thing]
    stuff: np.ndarray | None


class Draws:
    """Random numbers that depend only on a key and their order: `draw(low, high)` is one between two bounds.

    Args:
        key: numbers and words that are hashed to the seed.
    """

    def __init__(self, *key: int | str) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed_of("shapes", *key)))

    def __call__(self, low: float, high: float) -> float:
        return low + (high - low) * self._generator.random()

    def whole(self, count: int) -> int:
        """Draw a number from 0 to `count` − 1."""
        return int(count * self._generator.random())

    def array(self, *shape: int) -> np.ndarray:
        """Draw float32 values from −1 to 1."""
        return self._generator.random(shape, dtype=np.float32) * 2 - 1

    def color(
        self, saturation: tuple[float, float], value: tuple[float, float], hue: float | None = None
    ) -> np.ndarray:
        """Draw a color of shape (3, 1, 1), by default of any hue."""
        hue = self(0, 1) if hue is None else hue
        wheel = np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
        return _floats(self(*value) * (1 - self(*saturation) * (1 - wheel.clip(0, 1))))[:, None, None]


@dataclass(frozen=True)
class _Pose:
    """Where an object is: center and radius in pixels, rotation in radians, aspect."""

    x: float
    y: float
    radius: float
    angle: float
    aspect: float

    def _axes(self) -> tuple[float, float, float, float]:
        """Return the matrix from pixels to the coordinates of the object, a unit of which is the radius."""
        (cos, sin), aspect, radius = _direction(self.angle), self.aspect, self.radius
        return cos / aspect / radius, sin / aspect / radius, -sin * aspect / radius, cos * aspect / radius

    def coordinates(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the coordinates of pixels relative to the object."""
        a, b, c, d = map(np.float32, self._axes())
        x, y = x - np.float32(self.x), y - np.float32(self.y)
        return a * x + b * y, c * x + d * y

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Return points (u, v) of the object in pixels (x, y), of shape (n, 2)."""
        a, b, c, d = (entry * self.radius**2 for entry in self._axes())
        u, v = points.T
        return np.stack([d * u - b * v + self.x, a * v - c * u + self.y], axis=1)


def _floats(values: object) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def _direction(angle: float) -> tuple[float, float]:
    """Return cosine and sine, rounded, because the last bits differ between libraries."""
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def _along(u: np.ndarray, v: np.ndarray, *, sides: int, turn: float) -> list[np.ndarray]:
    """Return the coordinates of points along the normals of the sides of a regular polygon."""
    normals = (_direction(2 * math.pi * (i + turn) / sides) for i in range(sides))
    return [np.float32(sin) * u - np.float32(cos) * v for cos, sin in normals]


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - 1


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(_SQUARE)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum.reduce(_along(u, v, sides=3, turn=0.5)) - np.float32(_TRIANGLE)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A pentagram consists of the points that are beyond at most one of the five sides: the second largest counts."""
    largest, *others = _along(u, v, sides=5, turn=0)
    second = np.full_like(largest, -np.inf)
    for other in others:
        second = np.maximum(second, np.minimum(largest, other))
        largest = np.maximum(largest, other)
    return second - np.float32(_STAR)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - np.float32(_RING)) - np.float32(_RING_WIDTH)


@dataclass(frozen=True)
class _Geometry:
    """A shape of area π: distance from its outline, negative inside, and the radii of its corners at equal angles."""

    outside: Callable[[np.ndarray, np.ndarray], np.ndarray]
    corners: tuple[float, ...] = ()


_GEOMETRY = {
    "disc": _Geometry(_disc),
    "ring": _Geometry(_ring),
    "square": _Geometry(_square, (_SQUARE * 2**0.5,) * 4),
    "star": _Geometry(_star, (_STAR / math.cos(2 * math.pi / 5), _STAR / math.cos(math.pi / 5)) * 5),
    "triangle": _Geometry(_triangle, (_TRIANGLE * 2,) * 3),
}


def _outline(shape: str, pose: _Pose) -> np.ndarray | None:
    """Return the corners of a shape in pixels, of shape (n, 2); None if it is round."""
    corners = _GEOMETRY[shape].corners
    if not corners:
        return None
    angles = [2 * math.pi * (i + (shape == "square") / 2) / len(corners) for i in range(len(corners))]
    return pose.pixels(np.array([(r * math.sin(a), -r * math.cos(a)) for r, a in zip(corners, angles, strict=True)]))


def _cover(distance: np.ndarray) -> np.ndarray:
    """Return the share of each pixel that is covered, from the distance to the outline in pixels."""
    return (np.float32(0.5) - distance).clip(0, 1)


def _wave(phase: np.ndarray) -> np.ndarray:
    """Return a smooth wave of period 1 from −1 to 1."""
    ramp = np.abs(phase - np.floor(phase) - np.float32(0.5)) * 2
    return ramp * ramp * (6 - 4 * ramp) - 1


def _texture(name: str, draw: Draws, pose: _Pose, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the share of the first of two tones in each pixel, half of it on average."""
    per_radius = draw(1.0, 1.5)  # two or three periods per diameter
    (cos, sin), first, second, swapped = _direction(draw(0, 2 * math.pi)), draw(0, 1), draw(0, 1), draw.whole(2)
    cos, sin = np.float32(cos * per_radius), np.float32(sin * per_radius)
    s, t = cos * u + sin * v + np.float32(first), cos * v - sin * u + np.float32(second)
    s, t = (np.abs(phase - np.floor(phase) - np.float32(0.5)) for phase in (s, t))
    distance = s - np.float32(0.25) if name == "stripes" else np.sqrt(s * s + t * t) - np.float32(_DOT)
    tone = _cover(distance * np.float32(pose.radius / per_radius))
    return 1 - tone if swapped else tone


def _waves(draw: Draws, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a ground of one color with slow variations, of shape (3, H, W)."""
    side = min(x.size, y.size)
    ground = draw.color((0.05, 0.55), (0.35, 0.95)) + np.zeros_like(x + y)
    for _ in range(3):
        (cos, sin), period, phase = _direction(draw(0, 2 * math.pi)), draw(0.5, 1.5) * side, draw(0, 1)
        slope = np.float32(cos / period) * x + np.float32(sin / period) * y
        ground += draw.array(3, 1, 1) * np.float32(0.12) * _wave(slope + np.float32(phase))
    return ground


def _cluttered(draw: Draws, x: np.ndarray, y: np.ndarray, patches: int) -> np.ndarray:
    """Return a ground with elongated plain patches of any color, of shape (3, H, W)."""
    ground, side = _waves(draw, x, y), min(x.size, y.size)
    for _ in range(patches):
        center, radius = (draw(0, x.size), draw(0, y.size)), draw(0.04, 0.12) * side
        pose = _Pose(*center, radius, draw(0, 2 * math.pi), draw(1.4, 2.2))
        outside = (_disc, _square)[draw.whole(2)](*pose.coordinates(x, y))
        cover = _cover(outside * np.float32(radius / pose.aspect)) * np.float32(draw(0.5, 1))
        ground += cover * (draw.color((0.1, 0.9), (0.2, 1)) - ground)
    return ground


@lru_cache(1)
def _photographs() -> list[list[Image.Image]]:
    """Return scikit-learn's two photographs, each at three resolutions."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [[photograph, photograph.reduce(2), photograph.reduce(4)] for photograph in photographs]


def _photographic(draw: Draws, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a random piece of a photograph with other colors, of shape (3, H, W)."""
    levels = _photographs()[draw.whole(2)]
    (columns, rows), (width, height) = levels[0].size, (x.size, y.size)
    scale = draw(0.25, 1) * min(columns / width, rows / height)  # pixels of the photograph per pixel
    left, top = draw(0, columns - scale * width), draw(0, rows - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    level = min(2, max(0, math.frexp(scale)[1] - 1))  # at most two of its pixels per pixel: sharp, and quick
    smaller = tuple(edge / 2**level for edge in box)
    piece = levels[level].resize((width, height), Image.Resampling.BILINEAR, box=smaller)
    pixels = _floats(piece).transpose(2, 0, 1) / np.float32(255)
    pixels = pixels[:, :, :: 1 - 2 * draw.whole(2)]
    first, forward = draw.whole(3), 1 - 2 * draw.whole(2)  # any order of the channels
    pixels = pixels[[(first + forward * i) % 3 for i in range(3)]]
    gain, mean = 1 + np.float32(0.25) * draw.array(3, 1, 1), np.float32(draw(0.4, 0.6))
    return (pixels * gain - mean) * np.float32(draw(0.5, 1)) + mean


def _stuff(draw: Draws, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a ground of two sorts, divided by a tilted line, of shape (3, H, W), and the index of the sort."""
    (cos, sin), first = _direction(draw(-0.5, 0.5) + math.pi / 2 * draw.whole(2)), draw.whole(3)
    middle = np.float32(draw(0.3, 0.7) * x.size), np.float32(draw(0.3, 0.7) * y.size)
    beyond = np.float32(cos) * (x - middle[0]) + np.float32(sin) * (y - middle[1]) > 0
    sorts = np.where(beyond, first, (first + 1 + draw.whole(2)) % 3).astype(np.uint8)

    smooth, slats, grain = (_waves(draw, x, y) for _ in STUFF)
    (cos, sin), period = _direction(draw(0, math.pi)), draw(0.05, 0.08) * min(x.size, y.size)
    slats *= 1 + np.float32(0.2) * _wave(np.float32(cos / period) * x + np.float32(sin / period) * y)
    grain *= 1 + np.float32(0.3) * draw.array(1, y.size, x.size)
    return np.where(sorts == 0, smooth, np.where(sorts == 1, slats, grain)), sorts


@dataclass(frozen=True)
class _Paint:
    """An object before it is painted: distances from its outline in pixels, negative inside, and its colors."""

    kind: int
    distance: np.ndarray
    colors: np.ndarray
    outline: np.ndarray | None


def _object(kind: int, x: np.ndarray, y: np.ndarray, look: Look, draw: Draws) -> _Paint:
    """Draw pose, colors and texture of an object."""
    shape, texture = SHAPES[kind // len(TEXTURES)], TEXTURES[kind % len(TEXTURES)]
    side = min(x.size, y.size)
    radius = draw(*look.radius) * side
    margin = min(1.25 * radius, side / 2)  # the same for all shapes: the position must not tell the shape
    center = draw(margin, x.size - margin), draw(margin, y.size - margin)
    pose = _Pose(*center, radius, draw(-look.rotation, look.rotation), draw(0.92, 1.09))  # 0.85–1.18 as a ratio
    u, v = pose.coordinates(x, y)

    hue = (kind + draw(0.1, 0.9)) / len(KINDS) if look.hue_tied else draw(0, 1)
    bright, dark = draw.color((0.1, 0.7), (0.85, 1), hue), draw.color((0.5, 1), (0.2, 0.5), hue)
    middle, half = (bright + dark) / 2, (bright - dark) / 2 * np.float32(look.contrast)
    tone = 2 * _texture(texture, draw, pose, u, v) - 1
    light = 1 - np.float32(0.12 / radius) * (x - np.float32(pose.x) + y - np.float32(pose.y))  # from the upper left
    distance = _GEOMETRY[shape].outside(u, v) * np.float32(radius)
    return _Paint(kind, distance, (middle + half * tone) * light, _outline(shape, pose))


def _visible(paints: list[_Paint]) -> Iterator[tuple[_Paint, Thing]]:
    """Yield the objects of which a tenth or more is visible behind those in front of them."""
    free = True
    for paint in paints:
        whole = paint.distance < 0
        mask = whole & free
        if mask.any() and mask.sum() * 10 >= whole.sum():
            limits, corners = whole.shape[::-1], paint.outline
            inside = corners is not None and bool(((corners >= 0) & (corners <= limits)).all())
            yield paint, Thing(paint.kind, mask, corners if inside and mask.sum() == whole.sum() else None)
            free = free & ~whole


def render(
    kinds: Sequence[int],
    size: tuple[int, int],
    *,
    key: Sequence[int | str],
    look: Look = LEVELS[1],
    stuff: bool = False,
) -> Scene:
    """Render a scene.

    Args:
        kinds: indices in `KINDS` of its objects, from front to back; one of which others hide more than nine tenths is
            left out.
        size: H and W in pixels.
        key: what the random draws depend on, besides the other arguments.
        look: how difficult the scene is.
        stuff: whether the ground is divided into two regions of `STUFF`.
    """
    height, width = size
    x, y = _floats(range(width))[None] + np.float32(0.5), _floats(range(height))[:, None] + np.float32(0.5)
    draw, sorts = Draws("ground", *key), None
    photograph = draw(0, 1) < look.photographs
    if stuff:
        pixels, sorts = _stuff(draw, x, y)
    else:
        pixels = _photographic(draw, x, y) if photograph else _cluttered(draw, x, y, look.clutter)
    if look.hue_tied:
        pixels[:] = pixels[1]  # gray: the only hue is that of the objects

    visible = list(_visible([_object(kind, x, y, look, Draws("object", i, *key)) for i, kind in enumerate(kinds)]))
    for paint, _ in reversed(visible):
        pixels *= 1 - np.float32(0.3) * (1 - paint.distance / np.float32(0.08 * min(size))).clip(0, 1)  # its shadow
        pixels += _cover(paint.distance) * (paint.colors - pixels)
    pixels += np.float32(look.noise * math.sqrt(3)) * Draws("noise", *key).array(3, height, width)
    image = (pixels.clip(0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
    return Scene(image, [thing for _, thing in visible], sorts)
