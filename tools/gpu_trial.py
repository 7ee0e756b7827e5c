#!/usr/bin/env python3
"""Ask a machine with GPUs everything that was written without one, stage by stage.

python tools/gpu_trial.py                                  # all stages, one GPU or more
python tools/gpu_trial.py stages=[layer,steps] again=true  # some of them once more
python tools/gpu_trial.py size=toy device=cpu              # the same programs without a GPU

Each stage runs in a process of its own for at most ten minutes and leaves STAGE.json, STAGE.log and
its rows in table.md. A stage that is done is not run again. docs/gpu-trial.md describes them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from megatron_ttt.config.command import Command, run_command
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.trial.words import Device, Size, StageName


@dataclass
class Trial:
    """Run stages of the trial and print one table."""

    stages: list[StageName] = field(default_factory=lambda: list(StageName))
    output: Path = Path("outputs/gpu_trial")  # folder
    size: Size = Size.full  # full, or toy: the same programs in seconds
    device: Device = Device.cuda  # cuda or cpu
    again: bool = False  # also run stages that are done


def run_trial(keys: Trial) -> int:
    """Run and print; 1 if a stage failed."""
    check(keys)
    from megatron_ttt.training.quiet import quiet_libraries

    quiet_libraries()
    import torch

    if keys.device is Device.cuda and not torch.cuda.is_available():
        message = "there is no GPU here; device=cpu size=toy runs the same programs without one"
        raise ConfigError([Fault("device", keys.device.value, message)])
    from megatron_ttt.trial.program import table, trial
    from megatron_ttt.trial.stage import Call, Status

    console = Console(soft_wrap=True)
    call = Call(keys.size, torch.device(keys.device.value), keys.output)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    records = trial(keys.stages, call, again=keys.again, say=say)
    for line in table(records):
        say(line)
    say(f"written to {keys.output / 'table.md'}")
    names = {stage.value for stage in keys.stages}
    ran = [record for record in records if record.stage in names]
    return int(any(record.status == Status.FAILED.value for record in ran))


def check(keys: Trial) -> None:
    """Refuse values that mean nothing.

    Raises:
        ConfigError: one fault per mistake.
    """
    faults = []
    if keys.size is Size.full and keys.device is Device.cpu:
        faults.append(Fault("size", "full", "takes days without a GPU: give size=toy"))
    if keys.output.exists() and not keys.output.is_dir():
        faults.append(Fault("output", keys.output, "is not a folder"))
    if faults:
        raise ConfigError(faults)


def main(argv: list[str]) -> int:
    """Run the trial; 2 for a mistake of the user, in one line."""
    return run_command(argv, Command(Trial, run_trial), __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
