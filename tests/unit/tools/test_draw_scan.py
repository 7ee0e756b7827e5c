"""The pictures of ``docs/scan.md`` are what the programs do today."""

import subprocess
import sys
from pathlib import Path

from megatron_ttt.parallel.scan_algorithms import Algorithm

ROOT = Path(__file__).resolve().parents[3]


def test_pictures_are_what_the_program_draws(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "draw_scan.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    for algorithm in Algorithm:
        name = f"scan_{algorithm.value}.svg"
        assert (tmp_path / name).read_bytes() == (ROOT / "docs" / name).read_bytes()
