"""Files that commit 05ece55 wrote are read, and compute what they computed.

``files/expected.json`` holds what that commit computed of them; ``make.py`` says how they were
written. A format may change, but a change that can no longer read these files needs a decision
of its own.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import megatron.core
import pytest
from safetensors.torch import load_file, save_file

from tests.end_to_end.lives import context, free_port, live
from tests.formats.reading import ALL_STEPS, PROMPT, TRAIN, logits_of, loss_of, program, text_of

STORED = Path(__file__).parent / "files"
EXPECTED = json.loads((STORED / "expected.json").read_text())
CLOSE = 1e-5  # fp32 on another processor or under another version of torch
NORM_CLOSE, RATIO_CLOSE = 5e-4, 1e-3  # as between layouts
LINES = ["megatron_core_0_16"]
if tuple(map(int, megatron.core.__version__.split(".")[:2])) >= (0, 19):
    LINES.append("megatron_core_0_19")  # the older line cannot read the newer one's


def run_of(line: str) -> str:
    return f"checkpoints/{line}/run/checkpoints/step_00000002"


def expected_loss(name: str) -> dict[str, float]:
    """Both lines trained and imported the same model."""
    found: dict[str, float] = EXPECTED["loss"][name.replace("core_0_19", "core_0_16")]
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the stored files, since programs write beside what they read."""
    return shutil.copytree(STORED, tmp_path_factory.mktemp("formats") / "files")


@pytest.fixture(autouse=True)
def inside(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(files)
    yield


CHECKPOINTS = [f"checkpoints/{line}/imported" for line in LINES] + [run_of(line) for line in LINES]


@pytest.mark.parametrize(
    "name", [*CHECKPOINTS, *(name for name in EXPECTED["loss"] if "megatron_core" not in name)]
)
def test_a_checkpoint_or_an_export_has_the_loss_it_had(name: str, tmp_path: Path) -> None:
    wanted = expected_loss(name)
    assert abs(wanted["in_place"] - wanted["off"]) > 1e-3, "fast weights not alive"
    assert loss_of(name, tmp_path) == pytest.approx(wanted, rel=CLOSE)


def test_one_changed_weight_is_noticed(tmp_path: Path) -> None:
    shutil.copytree("exported/qwen3_package", tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.ttt_conv.weight"][0, 0, 3] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    found, wanted = (
        loss_of(f"hf:{tmp_path}/changed", tmp_path),
        expected_loss("hf:exported/qwen3_package"),
    )
    assert found["off"] == pytest.approx(wanted["off"], rel=CLOSE)
    assert found["in_place"] != pytest.approx(wanted["in_place"], rel=CLOSE)


def live_in(folder: str, words: list[str], log: str) -> None:
    """The whole life of a run of one rank that is started in a folder."""
    os.chdir(folder)
    environment = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    live(words, log, {**environment, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, None)


@pytest.mark.parametrize("line", LINES)
def test_a_run_goes_on_from_its_checkpoint(line: str, files: Path, tmp_path: Path) -> None:
    """Weights, optimizer, data position: losses as they went on at the time."""
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(files / "checkpoints" / line / "run", folder)
    words = [*TRAIN, f"run.dir={folder}", f"train.steps={ALL_STEPS}"]
    process = context().Process(target=live_in, args=(str(files), words, str(log)))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0, log.read_text()
    assert "step_00000002 at step 2" in log.read_text()
    rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, wanted in zip(rows, EXPECTED["steps"], strict=True):
        assert row["step"] == wanted["step"]
        assert row["consumed_tokens"] == wanted["consumed_tokens"]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=CLOSE)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=NORM_CLOSE)
        for key in (key for key in wanted if key.startswith("ttt/")):
            assert 0.03 < wanted[key] < 0.3, "fast weights not alive"
            assert row[key] == pytest.approx(wanted[key], rel=RATIO_CLOSE)


@pytest.mark.parametrize("model", EXPECTED["logits"])
def test_an_export_has_the_logits_it_had(model: str) -> None:
    for found, wanted in zip(logits_of(model), EXPECTED["logits"][model], strict=True):
        assert found == pytest.approx(wanted, rel=0, abs=1e-4)


@pytest.mark.parametrize("model", EXPECTED["text"])
def test_a_model_generates_what_it_generated(model: str) -> None:
    assert text_of(model, "--prompt", PROMPT) == EXPECTED["text"][model]


@pytest.mark.parametrize("name", EXPECTED["states"])
def test_a_session_or_a_memory_goes_on_as_it_did(name: str, tmp_path: Path) -> None:
    model = "exported/qwen3_package" if "exported" in name else run_of("megatron_core_0_16")
    if name.endswith(".session"):
        copy = shutil.copy(name, tmp_path)
        found = text_of(model, "--prompt", " and then", "--session", copy)
        alone = text_of(model, "--prompt", " and then")
    else:
        found = text_of(model, "--prompt", "of", "--memory", name)
        alone = text_of(model, "--prompt", "of")
    assert found == EXPECTED["states"][name]
    assert found != alone


def test_results_of_an_evaluation_are_compared() -> None:
    wanted = json.loads(Path("results/perplexity.json").read_text())["readings"]["in_place"]
    printed = program("tools/compare.py", "results/perplexity.json")
    assert f"{wanted['loss']:.4f}" in printed
    assert "warning: 1 of 1 results have no text_sha256" in printed
