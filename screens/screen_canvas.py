"""Drawing the parts of a phone's screen with pillow: text, bars, rows, buttons, switches and icons."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 336, 728
"""Of a screen in pixels: 12 x 26 squares of 28, which GLM-4.1V makes a token each of."""
STATUS_BAR, TITLE_BAR = 24, 52
MARGIN = 14
COLORS = 12
FONT = Path(__file__).parent / "NotoSansSC-screens.otf"

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, right and bottom beyond the last."""


@dataclass(frozen=True)
class Theme:
    """Colours of a screen."""

    page: str
    card: str
    ink: str
    faint: str
    accent: str


THEMES = (
    Theme("#f2f3f7", "#ffffff", "#1c1c1e", "#8a8a8f", "#2f6fde"),
    Theme("#fbf7f0", "#ffffff", "#2b2118", "#9b8f80", "#c2571a"),
    Theme("#eef5f0", "#ffffff", "#16261c", "#7f9186", "#1f8a52"),
    Theme("#15171c", "#24272e", "#f1f2f5", "#8d929c", "#7aa2ff"),
)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The one font, in a size. The basic layout engine gives the same glyph places everywhere."""
    return ImageFont.truetype(str(FONT), size, layout_engine=ImageFont.Layout.BASIC)


def width_of(text: str, size: int) -> int:
    """The width of a line in pixels."""
    return round(font(size).getlength(text))


@dataclass
class Canvas:
    """A screen that is being drawn; `elements` are the boxes of what can be tapped, by name."""

    theme: Theme
    elements: dict[str, Box] = field(default_factory=dict)
    image: Image.Image = field(init=False)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, HEIGHT), self.theme.page)
        self._draw = ImageDraw.Draw(self.image)

    def add(self, name: str, box: Box) -> Box:
        """Give a box a name, so that it can be tapped."""
        self.elements[name] = box
        return box

    def text(self, place: tuple[int, int], text: str, size: int, color: str, anchor: str = "lm") -> None:
        """A line of text; `anchor` says which of its points is at the place, as pillow does."""
        self._draw.text(place, text, fill=color, font=font(size), anchor=anchor)

    def rectangle(self, box: Box, color: str, radius: int = 0, outline: str | None = None) -> None:
        """A filled rectangle with round corners."""
        left, top, right, bottom = box
        self._draw.rounded_rectangle((left, top, right - 1, bottom - 1), radius, fill=color, outline=outline)

    def line(self, left: int, right: int, y: int) -> None:
        """A thin line between rows."""
        self._draw.line((left, y, right, y), fill=self.theme.page)

    def status_bar(self, clock: str, battery: int) -> None:
        """Time, signal and battery at the top."""
        ink = self.theme.ink
        self.text((MARGIN, STATUS_BAR // 2), clock, 11, ink)
        for number in range(4):
            left = WIDTH - 66 + 5 * number
            self.rectangle((left, 16 - 2 * number, left + 3, 18), ink)
        self.rectangle((WIDTH - 38, 8, WIDTH - 14, 18), self.theme.page, 2, outline=ink)
        self.rectangle((WIDTH - 36, 10, WIDTH - 36 + max(1, battery * 20 // 100), 16), ink)

    def title_bar(self, title: str, back: bool = True) -> None:
        """The name of the page, and an arrow to go back."""
        middle = STATUS_BAR + TITLE_BAR // 2
        if back:
            left, top, _, bottom = self.add("back", (4, STATUS_BAR + 6, 44, STATUS_BAR + TITLE_BAR - 6))
            x, y = left + 20, (top + bottom) // 2
            self._draw.line((x + 5, y - 8, x - 4, y, x + 5, y + 8), fill=self.theme.ink, width=2)
        self.text((48 if back else MARGIN, middle), title, 18, self.theme.ink)

    def button(self, name: str, box: Box, label: str, filled: bool = True) -> None:
        """A button with its label in the middle."""
        left, top, right, bottom = self.add(name, box)
        face, ink = (self.theme.accent, self.theme.card) if filled else (self.theme.card, self.theme.accent)
        self.rectangle(box, face, 10, outline=self.theme.accent)
        self.text(((left + right) // 2, (top + bottom) // 2), label, 14, ink, "mm")

    def switch(self, box: Box, on: bool) -> None:
        """A switch."""
        left, top, right, bottom = box
        self.rectangle(box, self.theme.accent if on else self.theme.faint, (bottom - top) // 2)
        start = right - (bottom - top) if on else left
        self._draw.ellipse((start + 2, top + 2, start + bottom - top - 3, bottom - 3), fill=self.theme.card)

    def entry(self, name: str, box: Box, text: str, hint: str, focused: bool) -> None:
        """An input with what is in it, or a hint; a focused one has a cursor."""
        left, top, _, bottom = self.add(name, box)
        self.rectangle(box, self.theme.card, 8, outline=self.theme.accent if focused else self.theme.faint)
        middle = (top + bottom) // 2
        self.text((left + 10, middle), text or hint, 14, self.theme.ink if text else self.theme.faint)
        if focused:
            cursor = left + 12 + (width_of(text, 14) if text else 0)
            self._draw.line((cursor, top + 9, cursor, bottom - 10), fill=self.theme.accent, width=2)

    def icon(self, box: Box, number: int) -> None:
        """One of a few simple pictures on a coloured tile."""
        left, top, right, bottom = box
        size = right - left
        color = ("#2f6fde", "#d9534f", "#1f8a52", "#e0a12e", "#7d5bd0", "#2aa0a8")[number % 6]
        self.rectangle(box, color, size // 4)
        a, b = left + size // 4, top + size // 4
        c, d = right - size // 4 - 1, bottom - size // 4 - 1
        middle = (a + c) // 2
        shapes = (
            lambda: self._draw.ellipse((a, b, c, d), fill="white"),
            lambda: self._draw.rectangle((a, b, c, d), fill="white"),
            lambda: self._draw.polygon((middle, b, c, d, a, d), fill="white"),
            lambda: self._draw.line((a, d, middle, b, c, d), fill="white", width=3),
            lambda: self._draw.ellipse((a, b, c, d), outline="white", width=3),
        )
        shapes[number // 6 % len(shapes)]()

    def keyboard(self) -> None:
        """Keys at the bottom, as they are there while an input is focused."""
        top = HEIGHT - 190
        self.rectangle((0, top, WIDTH, HEIGHT), self.theme.faint)
        for line, keys in enumerate(("qwertyuiop", "asdfghjkl", "zxcvbnm")):
            start = (WIDTH - 33 * len(keys)) // 2
            for number, key in enumerate(keys):
                left, upper = start + 33 * number + 2, top + 10 + 44 * line
                self.rectangle((left, upper, left + 29, upper + 38), self.theme.card, 4)
                self.text((left + 14, upper + 19), key, 14, self.theme.ink, "mm")
        self.rectangle((80, top + 144, WIDTH - 80, top + 180), self.theme.card, 4)

    def reduced(self) -> Image.Image:
        """The image with few colours, so that its file is small."""
        return self.image.quantize(COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
