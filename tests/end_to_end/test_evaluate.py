"""``tools/evaluate.py`` from its command line: tables, files, mistakes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ttt.config.load import run_program
from megatron_ttt.evaluation.schema import EVALUATION
from tests.unit.hf.models import CHUNK, live_model
from tools.evaluate import evaluate

LENGTH = 6 * CHUNK
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A live model over bytes, and the folder it is exported to."""
    made = live_model(dtype=torch.float32, vocab_size=258)
    folder = tmp_path_factory.mktemp("model") / "exported"
    made.save_pretrained(folder)
    return made, str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five documents, one of them too short for a row."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(3)
    for number, size in enumerate((80, 90, 20, 100, 120)):
        words = [draw.choice(("red", "stone", "river", "of")) for _ in range(size)]
        (folder / f"{number}.txt").write_text(" ".join(words)[:size])
    return str(folder)


@pytest.fixture
def run(
    model: tuple[Any, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def call(*words: str, status: int = 0) -> str:
        """Standard output of a success, the lines of a mistake, which writes nothing."""
        given = {"checkpoint": f"hf:{model[1]}", "data.path": text, "data.tokenizer": "bytes"}
        given |= {"output": str(tmp_path / "out")}
        if not {"task=perplexity", "task=health"} & set(words):
            del given["data.path"]  # other tasks would say that they do not read it
        if "task=speed" in words:
            del given["data.tokenizer"]
        given |= dict(word.split("=", 1) for word in words)
        argv = [f"{key}={value}" for key, value in given.items()]
        assert run_program(EVALUATION, evaluate, argv) == status
        captured = capsys.readouterr()
        if status:
            assert not (tmp_path / "out").exists()
            return captured.err
        return captured.out

    return call


def test_perplexity_is_that_of_transformers(
    run: Callable[..., str], model: tuple[Any, str], text: str, tmp_path: Path
) -> None:
    printed = run(
        "task=perplexity",
        f"perplexity.length={LENGTH}",
        "perplexity.bins=3",
        f"perplexity.contexts=[{2 * CHUNK},{LENGTH}]",
        f"perplexity.scored={CHUNK}",
        "perplexity.batch_size=3",
    )
    found = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(PNG)
    assert found["rows"] == 4  # the short document is no row
    assert len(found["text_sha256"]) == 64
    rows = [
        list(path.read_bytes()[: LENGTH + 1])
        for path in sorted(Path(text).iterdir())
        if path.stat().st_size > LENGTH
    ]
    for mode, name in ((True, "in_place"), (False, "off")):
        reading = found["readings"][name]
        wanted = losses(model[0], rows, fast_weights=mode)
        by_bin = wanted.unflatten(1, (3, -1)).mean(dim=(0, 2)).tolist()
        assert reading["loss_by_position"] == pytest.approx(by_bin, rel=1e-4)
        short = losses(model[0], [row[-2 * CHUNK - 1 :] for row in rows], fast_weights=mode)
        by_context = [float(part[:, -CHUNK:].mean()) for part in (short, wanted)]
        assert reading["loss_by_context"] == pytest.approx(by_context, rel=1e-4)
        assert f"{reading['loss']:.4f}" in printed
    readings = found["readings"]
    assert abs(readings["in_place"]["loss"] - readings["off"]["loss"]) > 1e-3


def test_an_export_through_the_classes_that_serve_it(
    run: Callable[..., str], tmp_path: Path
) -> None:
    """The same figures as through Megatron's layers, under another rule as well."""
    words = ["task=perplexity", f"perplexity.length={LENGTH}", "perplexity.bins=3"]
    words.append("ttt.chunk_size=4")
    found = []
    for through in ("megatron", "transformers"):
        run(*words, f"through={through}", f"output={tmp_path / through}")
        file = tmp_path / through / "perplexity,ttt.chunk_size=4.json"
        found.append(json.loads(file.read_text())["readings"])
    for mode in ("in_place", "off"):
        for figure in ("loss_by_position", "loss_by_context"):
            assert found[0][mode][figure] == pytest.approx(found[1][mode][figure], rel=1e-5)
    assert abs(found[1]["in_place"]["loss"] - found[1]["off"]["loss"]) > 1e-3


def test_what_its_classes_cannot_do_is_refused(run: Callable[..., str]) -> None:
    said = run("task=speed", "through=transformers", status=2)
    assert "only perplexity runs through transformers" in said
    said = run("task=perplexity", "through=transformers", "data.rows=packed", status=2)
    assert "data.rows=packed: transformers' classes know no documents inside a row" in said


@torch.no_grad()
def losses(model: Any, rows: list[list[int]], *, fast_weights: bool) -> torch.Tensor:
    """``[N, T]`` through the transformers classes."""
    tokens = torch.tensor(rows)
    model.config.ttt_mode = fast_weights
    logits = model(tokens[:, :-1], use_cache=False).logits.double()
    model.config.ttt_mode = True
    return -logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]


def test_another_rule_is_another_result_in_a_file_of_its_own(
    run: Callable[..., str], tmp_path: Path
) -> None:
    words = ("task=perplexity", f"perplexity.length={LENGTH}", "perplexity.bins=1")
    run(*words, "ttt.mode=in_place")
    run(*words, "ttt.mode=in_place", "ttt.decay=0.5", "ttt.chunk_size=4")
    folder = tmp_path / "out"
    one, other = (
        json.loads((folder / f"{name}.json").read_text())["readings"]["in_place"]["loss"]
        for name in ("perplexity", "perplexity,ttt.chunk_size=4,ttt.decay=0.5")
    )
    assert abs(one - other) > 1e-4


def test_speed_counts_both_readings(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run(
        "task=speed",
        f"speed.lengths=[{2 * CHUNK + 3}]",
        "speed.batch_sizes=[1,2]",
        "speed.new_tokens=2",
        "speed.repeats=2",
    )
    assert "Prefill" in printed and "Decode" in printed
    found = json.loads((tmp_path / "out" / "speed.json").read_text())["measured"]
    assert [(cell["length"], cell["batch"]) for cell in found] == [(19, 1), (19, 2)]
    for cell in found:
        assert all(len(cell[mode]["decode_s"]) == 2 for mode in ("in_place", "off"))
        # two states of 32 x 48, in fp32, are held beside what the plain model holds
        extra = cell["in_place"]["prefill_peak"] - cell["off"]["prefill_peak"]
        assert extra > 2 * cell["batch"] * 32 * 48 * 4


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("ruler", ["ruler.tasks=[niah_single]", "ruler.lengths=[300,330]", "ruler.samples=2"]),
        ("needles", ["needles.lengths=[320]", "needles.depths=2", "needles.samples=1"]),
        ("health", [f"health.length={LENGTH}", "health.rows=2", "health.positions=2"]),
    ],
)
def test_other_tasks_print_both_readings_and_draw(
    run: Callable[..., str], tmp_path: Path, task: str, words: list[str]
) -> None:
    printed = run(f"task={task}", "beyond_positions=true", *words)
    assert "on" in printed and "off" in printed
    assert json.loads((tmp_path / "out" / f"{task}.json").read_text())["task"] == task
    assert (tmp_path / "out" / f"{task}.png").read_bytes().startswith(PNG)


MISTAKES = {
    "no task": ((), "task=???: must be given: one of health, needles, perplexity, ruler, speed"),
    "unknown task": (("task=perplexty",), "task=perplexty: did you mean perplexity? must be one"),
    "unknown kind": (
        ("task=ruler", "ruler.tasks=[niah]"),
        "ruler.tasks=[niah]: must be a list of niah_single, niah_multikey, ",
    ),
    "tasks longer than the model": (
        ("task=ruler", "ruler.tasks=[niah_single]", "ruler.lengths=[100,300]"),
        "ruler.lengths=300: exported has 256 positions; beyond_positions=true reads on",
    ),
    "needles longer than the model": (
        ("task=needles", "needles.lengths=[512]"),
        "needles.lengths=512: exported has 256 positions",
    ),
    "a length too short for a task": (
        ("task=ruler", "ruler.tasks=[niah_multiquery]", "ruler.lengths=[100]"),
        "ruler.lengths=100: niah_multiquery takes about",
    ),
    "health of rows of one chunk": (
        ("task=health", "health.length=8"),
        "health.length=8: is no longer than a chunk",
    ),
    "unknown key": (("task=speed", "speed.length=[4]"), "speed.length=[4]: no such key; did you"),
    "no checkpoint": (("task=speed", "checkpoint=nowhere"), "nowhere"),
    "no such run": (("task=speed", "checkpoint=no*where"), "checkpoint=no*where: no folder has"),
    "bad rule": (("task=speed", "ttt.decay=2"), "ttt.decay=2.0: must lie in (0, 1]"),
    "empty list": (("task=speed", "speed.lengths=[]"), "speed.lengths=[]: is empty"),
    "beyond positions": (
        ("task=speed", "speed.lengths=[300]"),
        "speed.lengths=364: exported has 256 positions; beyond_positions=true reads on",
    ),
    "rows beyond positions": (
        ("task=perplexity", "perplexity.length=512"),
        "perplexity.length=512: exported has 256 positions",
    ),
    "no length": (("task=perplexity",), "perplexity.length=null: "),
    "too long for the text": (
        ("task=perplexity", "perplexity.length=128"),
        "no text of 129 tokens (data.rows=documents): the longest has 120",
    ),
    "no data": (
        ("task=perplexity", "perplexity.length=48", "data.path=null"),
        "names no data of its own: give files, or .bin/.idx",
    ),
    "no tokenizer": (
        ("task=perplexity", "perplexity.length=48", "data.tokenizer=null"),
        "data.tokenizer=null: ",
    ),
    "ranks": (
        ("task=speed", "parallel.cp=2", "speed.lengths=[19]"),
        "world_size=1: parallel.tp=1 * cp=2 * pp=1 = 2 does not divide it",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(run: Callable[..., str], name: str) -> None:
    words, said = MISTAKES[name]
    lines = run(*words, status=2).strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines
