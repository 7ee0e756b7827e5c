"""The trial's machinery: what ends a stage, what is kept of it, what is not run again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ttt.trial import program
from megatron_ttt.trial.machine import peak_tflops
from megatron_ttt.trial.stage import Call, Cell, Record, Skipped, Stage, measured, run_stage
from megatron_ttt.trial.words import Size, StageName
from tools.gpu_trial import main


def call_in(folder: Path) -> Call:
    return Call(Size.toy, torch.device("cpu"), folder)


def two_cells(call: Call) -> Iterator[Cell]:
    yield Cell("first", "1 ms", {"ms": 1})
    yield Cell("second", "a | b", {})


def breaks(call: Call) -> Iterator[Cell]:
    yield Cell("first", "1 ms")
    raise RuntimeError("kernel launch\n\nno kernel image is available\n")


def lacks(call: Call) -> Iterator[Cell]:
    raise Skipped("one GPU")
    yield Cell("never", "")


def test_how_a_stage_ends(tmp_path: Path) -> None:
    noted: list[Cell] = []
    ends = {}
    for run in (two_cells, breaks, lacks):
        record = run_stage(Stage(StageName.layer, 9, run), call_in(tmp_path), noted.append)
        ends[run] = (record.status, record.reason, len(record.cells))
        assert Record.from_json(json.loads(json.dumps(record.as_json()))) == record
    assert ends == {
        two_cells: ("done", "", 2),
        breaks: ("failed", "RuntimeError: no kernel image is available", 1),
        lacks: ("skipped", "one GPU", 0),
    }
    assert [cell.case for cell in noted] == ["first", "second", "first"]


def test_what_does_not_fit_is_a_figure() -> None:
    def too_large() -> tuple[str, dict[str, object]]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 90 GiB")

    cell = measured("64k tokens", too_large)
    assert (cell.figure, cell.values) == ("out of memory", {"error": "Tried to allocate 90 GiB"})


def test_the_table_says_everything(tmp_path: Path) -> None:
    records = [
        run_stage(Stage(name, 9, run), call_in(tmp_path), lambda cell: None)
        for name, run in ((StageName.layer, two_cells), (StageName.steps, breaks))
    ]
    assert list(program.table(records))[2:] == [
        "| layer | first | 1 ms |",
        r"| layer | second | a \| b |",
        "| steps | first | 1 ms |",
        "| steps | failed | RuntimeError: no kernel image is available |",
    ]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of stages that were really run."""
    ran: list[str] = []

    def in_its_process(stage: Stage, call: Call) -> Record:
        ran.append(stage.name.value)
        return run_stage(Stage(stage.name, 9, two_cells), call, lambda cell: None)

    monkeypatch.setattr(program, "_in_its_process", in_its_process)
    return ran


def test_what_is_done_is_not_run_again(tmp_path: Path, counted: list[str]) -> None:
    call, both = call_in(tmp_path), [StageName.scan, StageName.versions]
    program.trial(both, call, again=False, say=lambda line: None)
    program.trial([StageName.scan, StageName.layer], call, again=False, say=lambda line: None)
    assert counted == ["versions", "scan", "layer"]
    program.trial([StageName.scan], call, again=True, say=lambda line: None)
    assert counted[3:] == ["scan"]
    # another size is another trial
    full = Call(Size.full, torch.device("cpu"), tmp_path)
    records = program.trial([StageName.scan], full, again=False, say=lambda line: None)
    assert counted[4:] == ["scan"] and [record.size for record in records] == ["full"]


def test_a_failed_stage_is_run_again(tmp_path: Path, counted: list[str]) -> None:
    call = call_in(tmp_path)
    failed = run_stage(Stage(StageName.scan, 9, breaks), call, lambda cell: None)
    program._write(failed, call)
    (record,) = program.trial([StageName.scan], call, again=False, say=lambda line: None)
    assert counted == ["scan"] and record.status == "done"


def test_a_stage_that_takes_too_long_keeps_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole process group is ended, and the cut last line of its cells is left out."""
    lines = json.dumps(vars(Cell("first", "1 ms"))) + '\n{"case": "sec'
    script = f"open({str(tmp_path / 'layer.cells.jsonl')!r}, 'w').write({lines!r})"
    monkeypatch.setattr(
        program.sys, "executable", _interpreter(tmp_path, f"{script}\nimport time\ntime.sleep(60)")
    )
    stage = Stage(StageName.layer, 2, two_cells)
    record = program._in_its_process(stage, call_in(tmp_path))
    assert (record.status, record.reason) == ("failed", "took longer than 2 s")
    assert [cell.case for cell in record.cells] == ["first"] and record.seconds < 30


def test_a_process_that_dies_says_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = _interpreter(tmp_path, "import sys\nprint('an illegal access')\nsys.exit(134)")
    monkeypatch.setattr(program.sys, "executable", dies)
    record = program._in_its_process(Stage(StageName.layer, 30, two_cells), call_in(tmp_path))
    assert record.reason == "the process ended with status 134: an illegal access"


def _interpreter(folder: Path, code: str) -> str:
    """A program that runs ``code`` whatever its arguments."""
    file = folder / "interpreter"
    file.write_text(f"#!{sys.executable}\n{code}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages=[layers]"], "stages=[layers]: must be a list of versions, tests, gradients, "),
        (["size=full", "device=cpu"], "size=full: takes days without a GPU: give size=toy"),
        (["size=small"], "size=small: must be one of full, toy"),
        (["output=README.md", "size=toy", "device=cpu"], "output=README.md: is not a folder"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "device=cpu size=toy runs the same programs without one" in capsys.readouterr().err


def test_peaks_by_name() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("Some Other Device") is None
