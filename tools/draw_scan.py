"""Draws the scan's four algorithms: ``python tools/draw_scan.py docs``.

Each picture is the journey of every message of the real program on four simulated zigzag ranks,
time running down. The same bytes come out every time; a test compares them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from draw import BLUE, FAINT, INK, ORANGE, PANEL, RANKS, SOFT
from svg import Canvas

from megatron_ttt.parallel.cost import Link, Topology
from megatron_ttt.parallel.layout import SequenceOrder, spans_of_rank
from megatron_ttt.parallel.scan_algorithms import Algorithm
from megatron_ttt.parallel.simulator import Trip, simulate

P = 4
ELEMENTS = 32
BLOCKS = 4
# A whole state takes 1, of which an eighth is latency.
LINK = Link(0.125, 0.875 / (4 * ELEMENTS))
LEFT, TOP, COLUMN = 76.0, 92.0, 96.0
SECOND = 62.0  # pixels
NOTES = {
    Algorithm.ALL_GATHER: "every summary to every rank",
    Algorithm.ALL_TO_ALL: "slices out, scanned, carries back",
    Algorithm.DOUBLING: "windows of 1, 2 and 4 nodes",
    Algorithm.RING: f"up the first spans, back down the second, {BLOCKS} blocks",
}


def journeys(algorithm: Algorithm) -> list[Trip]:
    """Every message of one forward scan."""
    trips: list[Trip] = []
    simulate(
        [torch.ones(2, 1, ELEMENTS) for _ in range(P)],
        torch.ones(2 * P, 1),
        order=SequenceOrder.ZIGZAG,
        algorithm=algorithm,
        topology=Topology(P, LINK, LINK),
        blocks=BLOCKS,
        trips=trips,
    )
    return trips


def draw(algorithm: Algorithm) -> Canvas:
    """Ranks side by side, time down, one arrow per message."""
    trips = journeys(algorithm)
    length = max(trip.end_s for trip in trips)
    bottom = TOP + length * SECOND + 14
    note = NOTES[algorithm]
    canvas = Canvas(
        LEFT + COLUMN * (P - 1) + 60,
        bottom + 18,
        f"The scan by {algorithm.value}",
        f"Messages between {P} zigzag ranks over time, {len(trips)} in all: {note}.",
    )
    canvas.rect(0, 0, canvas.width, canvas.height, fill=PANEL, rx=10)
    canvas.text(18, 26, algorithm.value, size=16, weight=600)
    canvas.text(18, 45, note, size=12.5, fill=SOFT)
    for rank in range(P):
        x = LEFT + rank * COLUMN
        canvas.line((x, TOP), (x, bottom), stroke=FAINT, width=2)
        canvas.rect(x - 25, TOP - 34, 50, 26, fill=RANKS[rank], rx=5)
        held = ", ".join(str(span) for span in spans_of_rank(rank, P, SequenceOrder.ZIGZAG))
        canvas.text(x, TOP - 16, held, size=13, anchor="middle")
    for tick in range(int(length) + 1):
        y = TOP + tick * SECOND
        canvas.line((LEFT - 34, y), (LEFT - 26, y), stroke=SOFT, width=1)
        canvas.text(LEFT - 40, y + 4, str(tick), size=11, fill=SOFT, anchor="end")
    for trip in trips:
        colour = BLUE if trip.to > trip.source else ORANGE
        start = (LEFT + trip.source * COLUMN, TOP + trip.begin_s * SECOND)
        end = (LEFT + trip.to * COLUMN, TOP + trip.end_s * SECOND)
        canvas.arrow(start, end, stroke=colour, width=1.2)
        canvas.circle(*start, 2, fill=INK)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the scan's algorithms as SVG.")
    parser.add_argument("folder", type=Path, help="where scan_<algorithm>.svg are written")
    folder = parser.parse_args().folder
    for algorithm in Algorithm:
        path = folder / f"scan_{algorithm.value}.svg"
        path.write_text(draw(algorithm).render(), encoding="utf-8")


if __name__ == "__main__":
    main()
