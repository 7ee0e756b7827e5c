"""Draws the pictures of the documentation: ``python tools/draw.py method docs/method.svg``.

Needs nothing but Python. The same bytes come out every time; a test compares them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from svg import Canvas

INK, SOFT, FAINT = "#1f2933", "#52606d", "#cbd2d9"
PANEL = "#f7f9fb"
# Okabe and Ito's colours, told apart by colour-blind readers; the light ones are tints of them.
BLUE, BLUE_TINT = "#0072b2", "#d6eaf5"  # keys
ORANGE, ORANGE_TINT = "#d07c00", "#fcebcf"  # targets
GREEN, GREEN_TINT = "#009e73", "#c5eadf"  # document A and what it wrote
PINK, PINK_TINT = "#b5568f", "#f2d8e7"  # document B and what it wrote
RED = "#d55e00"  # the reset
RANKS = ("#8cc8ee", "#f0c766", "#c9b6e4", "#a8d5ba")

CELLS = 8  # tokens drawn per chunk
CELL = 26.0
COLUMN = 262.0  # distance between chunks
LEFT = 206.0  # left edge of the first chunk
SPANS = (0, 1, 2, 3, 3, 2, 1, 0)  # the rank of each span in zigzag order


def strip(
    canvas: Canvas, x: float, y: float, fills: list[str], *, height: float = 22, cell: float = CELL
) -> None:
    """A row of token cells."""
    for index, fill in enumerate(fills):
        canvas.rect(x + index * cell, y, cell - 3, height, fill=fill, rx=3)


def matrix(
    canvas: Canvas, x: float, y: float, *, written: int, colour: str, label: str, size: float = 62
) -> None:
    """A square matrix whose first ``written`` cells (in a scattered order) are filled."""
    rows = 6
    step = size / rows
    canvas.rect(
        x - 4, y - 4, size + 7, size + 7, fill="#ffffff", stroke=INK, stroke_width=1.3, rx=5
    )
    filled = {(7 * i + 3 * (i // 6)) % (rows * rows) for i in range(written)}
    for index in range(rows * rows):
        fill = colour if index in filled else "#e9edf1"
        row, column = divmod(index, rows)
        canvas.rect(x + column * step, y + row * step, step - 1.5, step - 1.5, fill=fill, rx=1.5)
    canvas.text(x + size / 2 + 9, y + size + 22, label, size=14)


def tile(
    canvas: Canvas, x: float, y: float, width: float, label: str, *, fill: str, stroke: str
) -> None:
    """A rounded box with a label in its middle."""
    canvas.rect(x, y, width, 36, fill=fill, stroke=stroke, stroke_width=1.3, rx=6)
    canvas.text(x + width / 2, y + 24, label, size=16, anchor="middle")


def row_label(canvas: Canvas, y: float, name: str, *notes: str) -> None:
    canvas.text(36, y, name, size=15, weight=600)
    for index, note in enumerate(notes):
        canvas.text(36, y + 19 * (index + 1), note, size=13, fill=SOFT)


def document_cells(chunk: int) -> list[bool]:
    """Which cells of a chunk belong to document A; B starts inside chunk 2."""
    return [chunk < 2 or (chunk == 2 and cell < 3) for cell in range(CELLS)]


def chunk_column(canvas: Canvas, chunk: int, *, state: tuple[int, str]) -> None:
    """One chunk from its tokens (below) to its outputs (above)."""
    x = LEFT + chunk * COLUMN
    key, target, node = x + 31, x + 165, x + 165
    is_a = document_cells(chunk)
    strip(canvas, x, 472, [GREEN_TINT if a else PINK_TINT for a in is_a])
    canvas.arrow((key, 468), (key, 432), stroke=BLUE)
    canvas.arrow((target, 468), (target, 432), stroke=ORANGE)
    tile(canvas, key - 36, 394, 72, f"$Z_{chunk}$", fill=BLUE_TINT, stroke=BLUE)
    tile(canvas, target - 36, 394, 72, f"$V_{chunk}$", fill=ORANGE_TINT, stroke=ORANGE)
    canvas.arrow((key, 390), (key, 268), stroke=BLUE)
    canvas.arrow((key, 352), (target - 46, 352), stroke=BLUE)
    canvas.arrow((target, 390), (target, 374), stroke=ORANGE)
    tile(canvas, target - 42, 334, 84, f"$V_{chunk}^T Z_{chunk}$", fill="#ffffff", stroke=INK)
    canvas.arrow((target, 330), (target, 244), stroke=INK)
    matrix(canvas, key - 31, 196, written=state[0], colour=state[1], label=f"$W_0 + ηS_{chunk}$")
    lane(canvas, chunk, start=key + 38, node=node)
    canvas.arrow((key, 188), (key, 151), stroke=INK)
    strip(canvas, x, 124, [GREEN if a else PINK for a in is_a])


def lane(canvas: Canvas, chunk: int, *, start: float, node: float) -> None:
    """The state's way from one chunk to the next; chunk 2 drops what it was carrying."""
    y = 229
    if chunk == 2:
        stop = (start + node) / 2
        canvas.line((start, y), (stop - 3, y), stroke=INK, width=2.2)
        canvas.line((stop, y - 17), (stop, y + 17), stroke=RED, width=4, stroke_linecap="round")
    else:
        canvas.arrow((start, y), (node - 14, y), stroke=INK, width=2.2)
    canvas.circle(node, y, 12, fill="#ffffff", stroke=INK, stroke_width=1.6)
    canvas.line((node - 6, y), (node + 6, y), stroke=INK, width=1.8)
    canvas.line((node, y - 6), (node, y + 6), stroke=INK, width=1.8)
    after = node + (90 if chunk < 3 else 57)  # the next matrix, or the name of the final state
    canvas.arrow((node + 13, y), (after, y), stroke=INK, width=2.2)


def sequence_panel(canvas: Canvas) -> None:
    """Four chunks of a packed sequence: read below, remembered in the middle, answered above."""
    canvas.text(36, 52, "A fast weight reads a sequence chunk by chunk", size=22, weight=600)
    canvas.text(
        36,
        84,
        "Apply   $O_i = Z_i (W_0 + ηS_i)^T$      Update   $S_{i+1} = γS_i + V_i^T Z_i$",
        size=17,
    )
    row_label(canvas, 140, "outputs $O_i$")
    row_label(
        canvas,
        216,
        "fast weight",
        "fixed during a chunk,",
        "coloured by document",
    )
    row_label(canvas, 357, "chunk summary")
    row_label(canvas, 410, "keys, targets", "from the same tokens")
    row_label(canvas, 488, "tokens")
    for chunk, state in enumerate(((0, GREEN), (11, GREEN), (23, GREEN), (8, PINK))):
        if chunk:
            wall = LEFT + chunk * COLUMN - (COLUMN - CELLS * CELL) / 2 - 1
            canvas.line((wall, 116), (wall, 188), stroke=FAINT, stroke_dasharray="3 5")
            canvas.line((wall, 300), (wall, 504), stroke=FAINT, stroke_dasharray="3 5")
        chunk_column(canvas, chunk, state=state)
        middle = LEFT + chunk * COLUMN + CELLS * CELL / 2
        canvas.text(middle, 542, f"chunk {chunk}", size=13, fill=SOFT, anchor="middle")
    reset = LEFT + 2 * COLUMN + 109.5
    canvas.text(reset, 184, "document start:", size=13, fill=RED, anchor="middle")
    canvas.text(reset, 201, "keep 0", size=13, fill=RED, anchor="middle")
    canvas.text(LEFT + 3 * COLUMN + 228, 234, "$S_4$", size=16)
    start_b = LEFT + 2 * COLUMN + 3 * CELL - 1.5
    canvas.line((start_b, 466), (start_b, 518), stroke=RED, width=2)
    canvas.text(start_b - 7, 515, "document A", size=13, fill=GREEN, anchor="end", weight=600)
    canvas.text(start_b + 7, 515, "document B", size=13, fill=PINK, weight=600)
    canvas.text(
        LEFT + 2 * COLUMN + 3 * CELL, 113, "rows of B apply $W_0$ alone", size=13, fill=PINK
    )


def target_panel(canvas: Canvas, x: float, y: float) -> None:
    """The target's five taps, inside a chunk and at its edge."""
    canvas.rect(x, y, 552, 300, fill=PANEL, rx=10)
    canvas.text(x + 24, y + 38, "The target looks ahead, and nothing leaks", size=18, weight=600)
    canvas.text(x + 24, y + 68, "$V$ = conv($U$) $W_{target}$, kernel 5, centred", size=15)
    cell, left = 41.0, x + 48
    top, bottom = y + 112, y + 196
    wall = left + 6 * cell - 3.5
    for index in range(12):
        position = left + index * cell + (7 if index >= 6 else 0)
        for height, fill, stroke in ((top, ORANGE_TINT, ORANGE), (bottom, "#e4e9ee", SOFT)):
            canvas.rect(position - 7, height, cell - 9, 26, fill=fill, stroke=stroke, rx=4)
    for centre in (2, 5):
        middle = left + centre * cell + 9.5
        canvas.rect(middle - 16.5, top, cell - 9, 26, fill=ORANGE, rx=4)
        for tap in range(-2, 3):
            token = centre + tap
            foot = left + token * cell + 9.5 + (7 if token >= 6 else 0)
            inside = token < 6
            canvas.line(
                (foot, bottom - 2),
                (middle, top + 29),
                stroke=ORANGE if inside else RED,
                width=2.0,
                stroke_dasharray=None if inside else "2 5",
            )
    canvas.line((wall, y + 92), (wall, y + 236), stroke=INK, width=2.2)
    canvas.text(left + 6 * cell + 16, y + 163, "beyond the edge: zeros", size=13, fill=RED)
    canvas.text(x + 20, top + 19, "$V$", size=15, anchor="middle")
    canvas.text(x + 20, bottom + 19, "$U$", size=15, anchor="middle")
    canvas.text(left - 7, y + 243, "one chunk", size=13, fill=SOFT)
    canvas.text(wall + 10, y + 243, "the next chunk", size=13, fill=SOFT)
    canvas.text(
        x + 24, y + 276, "What a chunk writes is read only by later chunks.", size=14, fill=INK
    )


def rank_panel(canvas: Canvas, x: float, y: float) -> None:
    """Eight spans on four ranks: summaries go in, the state entering each span comes out."""
    canvas.rect(x, y, 616, 300, fill=PANEL, rx=10)
    canvas.text(x + 24, y + 38, "One sequence on four ranks", size=18, weight=600)
    canvas.text(x + 24, y + 68, "zigzag order: each rank holds an early and a late span", size=15)
    cell, left = 71.0, x + 26
    for index, rank in enumerate(SPANS):
        position = left + index * cell
        middle = position + cell / 2 - 3
        canvas.rect(position, y + 92, cell - 6, 32, fill=RANKS[rank], rx=5)
        canvas.text(middle, y + 113, f"rank {rank}", size=13, anchor="middle")
        if index < len(SPANS) - 1:
            canvas.text(middle - 3, y + 146, f"$k_{index}, S_{index}$", size=13, anchor="middle")
            canvas.arrow((middle, y + 153), (middle, y + 172), stroke=SOFT)
        if index:
            canvas.arrow((middle, y + 214), (middle, y + 234), stroke=GREEN)
        canvas.rect(
            position,
            y + 238,
            cell - 6,
            16,
            fill=RANKS[rank],
            rx=4,
        )
    canvas.rect(left, y + 175, 8 * cell - 6, 36, fill="#ffffff", stroke=INK, stroke_width=1.3, rx=6)
    canvas.text(
        left + 4 * cell - 3,
        y + 199,
        "exclusive scan   $(k, S) · (k′, S′) = (k k′, k′ S + S′)$",
        size=15,
        anchor="middle",
    )
    canvas.text(
        x + 24, y + 282, "Each span starts from what every earlier span wrote.", size=14, fill=INK
    )


def method() -> Canvas:
    """The whole method in one picture."""
    canvas = Canvas(
        1280,
        900,
        "In-Place Test-Time Training",
        "Chunks of a sequence write summaries of keys and targets into the state of a fast weight, "
        "which later chunks read; a document start drops the state; the target is a short "
        "convolution inside the chunk; spans on several ranks are joined by an exclusive scan.",
    )
    canvas.rect(0, 0, canvas.width, canvas.height, fill="#ffffff", rx=12)
    sequence_panel(canvas)
    target_panel(canvas, 36, 572)
    rank_panel(canvas, 628, 572)
    return canvas


PICTURES: dict[str, Callable[[], Canvas]] = {"method": method}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a picture of the documentation as SVG.")
    parser.add_argument("picture", choices=sorted(PICTURES))
    parser.add_argument("path", type=Path, help="the SVG file to write")
    arguments = parser.parse_args()
    arguments.path.write_text(PICTURES[arguments.picture]().render(), encoding="utf-8")


if __name__ == "__main__":
    main()
