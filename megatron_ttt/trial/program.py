"""The trial: every stage in a process of its own, its record in JSON, one table of all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from megatron_ttt.files import replacing
from megatron_ttt.trial import layers, machine, models
from megatron_ttt.trial.stage import Call, Cell, Record, Stage, Status, last_line, run_stage
from megatron_ttt.trial.words import Size, StageName

STAGES = (
    Stage(StageName.versions, 120, machine.versions),
    Stage(StageName.tests, 590, machine.device_tests),
    Stage(StageName.gradients, 590, models.gradients),
    Stage(StageName.layer, 590, layers.fast_weight_layers),
    Stage(StageName.attention, 300, layers.attention_kernels),
    Stage(StageName.steps, 590, models.steps),
    Stage(StageName.decoding, 590, layers.decoding_speed),
    Stage(StageName.scan, 300, layers.scan),
    Stage(StageName.profile, 300, models.profile),
)


def trial(
    names: Sequence[StageName], call: Call, *, again: bool, say: Callable[[str], None]
) -> list[Record]:
    """Run the named stages, each in a process of its own; return the records of all that ever ran.

    A stage that is done for this size and device is not run again, unless asked.
    """
    call.folder.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in STAGES if stage.name in names]
    for stage in chosen:
        name = stage.name.value
        known = None if again else _known(name, call)
        if known is not None and known.status == Status.DONE.value:
            say(f"{name}: done before ({_file(name, call)})")
            continue
        say(f"{name}: at most {stage.limit_s} s")
        record = _in_its_process(stage, call)
        _write(record, call)
        said = f": {record.reason}" if record.reason else ""
        say(f"{name}: {record.status} in {record.seconds:.0f} s{said}")
    known_ones = (_known(stage.name.value, call) for stage in STAGES)
    records = [record for record in known_ones if record is not None]
    with replacing(call.folder / "table.md") as path:
        path.write_text("\n".join(table(records)) + "\n", encoding="utf-8")
    return records


def table(records: Sequence[Record]) -> Iterator[str]:
    """Yield one Markdown table of every cell, and of why there are none."""
    yield "| stage | case | figure |"
    yield "|---|---|---|"
    for record in records:
        for cell in record.cells:
            yield f"| {record.stage} | {_escaped(cell.case)} | {_escaped(cell.figure)} |"
        if record.status != Status.DONE.value:
            yield f"| {record.stage} | {record.status} | {_escaped(record.reason)} |"


def child(name: str, size: str, device: str, folder: str) -> int:
    """Run one stage here; its cells are written one by one, the record in the end."""
    call = Call(Size(size), torch.device(device), Path(folder))
    with _cells_file(name, call).open("w", encoding="utf-8") as file:

        def note(cell: Cell) -> None:
            file.write(json.dumps(vars(cell)) + "\n")
            file.flush()
            print(f"{cell.case}: {cell.figure}", flush=True)

        stage = next(stage for stage in STAGES if stage.name.value == name)
        record = run_stage(stage, call, note)
    _write(record, call)
    return 0


def _in_its_process(stage: Stage, call: Call) -> Record:
    name = stage.name.value
    for file in (_file(name, call), _cells_file(name, call)):
        file.unlink(missing_ok=True)
    words = [name, call.size.value, call.device.type, str(call.folder)]
    program = [sys.executable, "-m", "megatron_ttt.trial.child", *words]
    log = call.folder / f"{name}.log"
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            program, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=stage.limit_s)
            reason = f"the process ended with status {status}: {last_line(log.read_text())}"
        except subprocess.TimeoutExpired:
            reason = f"took longer than {stage.limit_s} s"
        except KeyboardInterrupt:
            _kill(process)
            raise
    _kill(process)
    record = _known(name, call)
    if record is not None:
        return record
    cells = list(_cells(_cells_file(name, call)))
    seconds, size, device = time.monotonic() - started, call.size.value, call.device.type
    return Record(name, size, device, Status.FAILED.value, reason, seconds, cells)


def _cells(file: Path) -> Iterator[Cell]:
    """Yield what a stage that did not come to its end has measured; its last line may be cut."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        try:
            known = json.loads(line)
        except json.JSONDecodeError:
            return
        yield Cell(**known)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what the stage has started as well."""
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _known(name: str, call: Call) -> Record | None:
    file = _file(name, call)
    if not file.exists():
        return None
    record = Record.from_json(json.loads(file.read_text(encoding="utf-8")))
    fits = (record.size, record.device) == (call.size.value, call.device.type)
    return record if fits else None


def _write(record: Record, call: Call) -> None:
    with replacing(_file(record.stage, call)) as path:
        path.write_text(json.dumps(record.as_json(), indent=2) + "\n", encoding="utf-8")


def _file(name: str, call: Call) -> Path:
    return call.folder / f"{name}.json"


def _cells_file(name: str, call: Call) -> Path:
    return call.folder / f"{name}.cells.jsonl"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
