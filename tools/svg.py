"""A small SVG canvas: shapes by coordinates, mathematics by a mark-up, the same bytes every time.

Lengths are pixels from the top left corner. Text between dollar signs is mathematics: letters
slanted, ``_i`` or ``_{i+1}`` lowered, ``^T`` raised. Numbers are rounded to 0.01, nothing depends
on the clock, the machine or a font that happens to be installed.
"""

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

SANS = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
SERIF = "'STIX Two Text', Cambria, 'Times New Roman', 'Liberation Serif', serif"


def number(value: float) -> str:
    """Writes a coordinate: two decimals at most, no trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def attributes(values: dict[str, object]) -> str:
    """``stroke_width=2`` becomes `` stroke-width="2"``; None is left out."""
    parts = []
    for name, value in values.items():
        if value is None:
            continue
        written = number(value) if isinstance(value, float | int) else escape(str(value))
        parts.append(f' {name.replace("_", "-")}="{written}"')
    return "".join(parts)


@dataclass(frozen=True)
class Run:
    """Characters that share a style; ``level`` is -1 lowered, 0, or 1 raised."""

    characters: str
    level: int
    slanted: bool
    math: bool


def math_runs(source: str) -> list[Run]:
    """Splits mathematics into runs: ``S_{i+1}`` is a slanted S and a lowered i+1."""
    runs: list[Run] = []
    position = 0
    while position < len(source):
        level = 0
        piece = source[position]
        if piece in "_^":
            level = -1 if piece == "_" else 1
            position += 1
            piece = source[position]
            if piece == "{":
                end = source.index("}", position)
                piece = source[position + 1 : end]
                position = end
        runs.extend(Run(c, level, c.isalpha(), True) for c in piece)
        position += 1
    return runs


def runs_of(text: str) -> list[Run]:
    """Parses a whole label; neighbours of one style are joined."""
    runs: list[Run] = []
    for index, part in enumerate(text.split("$")):
        runs.extend(math_runs(part) if index % 2 else [Run(part, 0, False, False)])
    joined: list[Run] = []
    for run in runs:
        if joined and (joined[-1].level, joined[-1].slanted, joined[-1].math) == (
            run.level,
            run.slanted,
            run.math,
        ):
            joined[-1] = Run(joined[-1].characters + run.characters, *list(vars(run).values())[1:])
        elif run.characters:
            joined.append(run)
    return joined


@dataclass
class Canvas:
    """Collects elements and writes one file; screen readers get ``title`` and ``description``."""

    width: float
    height: float
    title: str
    description: str
    elements: list[str] = field(default_factory=list)

    def add(self, tag: str, **values: object) -> None:
        self.elements.append(f"<{tag}{attributes(values)}/>")

    def rect(
        self, x: float, y: float, width: float, height: float, *, fill: str, **style: object
    ) -> None:
        self.add("rect", x=x, y=y, width=width, height=height, fill=fill, **style)

    def circle(self, x: float, y: float, radius: float, *, fill: str, **style: object) -> None:
        self.add("circle", cx=x, cy=y, r=radius, fill=fill, **style)

    def line(
        self, *points: tuple[float, float], stroke: str, width: float = 1.6, **style: object
    ) -> None:
        """A polyline through ``points``."""
        path = "M" + " L".join(f"{number(x)} {number(y)}" for x, y in points)
        self.add("path", d=path, fill="none", stroke=stroke, stroke_width=width, **style)

    def arrow(
        self, *points: tuple[float, float], stroke: str, width: float = 1.6, **style: object
    ) -> None:
        """A polyline whose last point carries a head."""
        (x0, y0), (x1, y1) = points[-2], points[-1]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        along = ((x1 - x0) / length, (y1 - y0) / length)
        size = 4.5 + width
        base = (x1 - size * along[0], y1 - size * along[1])
        half = 0.5 * size
        left = (base[0] - half * along[1], base[1] + half * along[0])
        right = (base[0] + half * along[1], base[1] - half * along[0])
        self.line(*points[:-1], base, stroke=stroke, width=width, **style)
        corners = " L".join(f"{number(x)} {number(y)}" for x, y in ((x1, y1), left, right))
        self.add("path", d=f"M{corners} Z", fill=stroke)

    def text(
        self,
        x: float,
        y: float,
        label: str,
        *,
        size: float = 15,
        fill: str = "#1f2933",
        anchor: str = "start",
        weight: int = 400,
    ) -> None:
        """``y`` is the base line. Mathematics is set a little larger than the text around it."""
        spans = []
        shift = 0.0
        for run in runs_of(label):
            base = size * (1.12 if run.math else 1.0)
            wanted = -0.26 * run.level * base * (1.35 if run.level > 0 else 1.0)
            spans.append(
                "<tspan"
                + attributes(
                    {
                        "dy": wanted - shift if wanted != shift else None,
                        "font_family": SERIF if run.math else None,
                        "font_style": "italic" if run.slanted else None,
                        "font_size": base * (0.72 if run.level else 1.0),
                    }
                )
                + f">{escape(run.characters)}</tspan>"
            )
            shift = wanted
        outer = attributes(
            {
                "x": x,
                "y": y,
                "font_family": SANS,
                "font_size": size,
                "font_weight": weight,
                "fill": fill,
                "text_anchor": anchor,
                "xml:space": "preserve",
            }
        )
        self.elements.append(f"<text{outer}>{''.join(spans)}</text>")

    def render(self) -> str:
        size = f"{number(self.width)} {number(self.height)}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<desc>{escape(self.description)}</desc>\n"
        )
        return head + "\n".join(self.elements) + "\n</svg>\n"
