"""The public benchmark harness on an exported model: what it reports is what the model computes.

Every figure is computed a second time from the method's equations (``transcribed_logits``), row by
row without padding, caches or the classes under test. Tokens are bytes, so that the harness'
requests can be written down here.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_ttt.hf.auto_map import write_auto_map
from tests.unit.hf.models import CHUNK, live_model, transcribed_logits

POSITIONS = 96
NEW = 2 * CHUNK + 3
BATCH = 3  # rows of different lengths: padded right to be scored, left to generate
QUESTIONS = [
    "A fast weight is",
    "What has been read is written into the down projection, chunk by chunk, and read",
    "Layers count from",
    "The target looks",
    "Padding takes no place on the chunk grid, and a row past its end",
]
CHOICES = ["zero", "a matrix that learns", "back later"]
TEXTS = [
    "short",
    "A text that is longer than three of the chunks, and no longer than the model.",
    "This one has more tokens than the model has positions, so that it is read in two windows: "
    * 2,
]
TASKS = ("choose", "perplexity", "continue")


@dataclass
class Report:
    """What the harness says: the answers to each task's requests, in order, and the results."""

    answers: dict[str, list[Any]]
    results: dict[str, dict[str, Any]]


def write_tokenizer(folder: Path) -> None:
    """Bytes, and an end of text that is also the padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|end|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, model_max_length=POSITIONS
    ).save_pretrained(folder)


def write_tasks(folder: Path, *, until: str) -> None:
    """A task of each kind over a local file, as a user writes his own."""
    folder.mkdir()
    questions = [
        {"question": question, "choices": CHOICES, "gold": row % len(CHOICES)}
        for row, question in enumerate(QUESTIONS)
    ]
    kinds: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "choose": (
            questions,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{gold}}",
                "metric_list": [{"metric": "acc"}],
            },
        ),
        "perplexity": (
            [{"text": text} for text in TEXTS],
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "byte_perplexity"}],
            },
        ),
        "continue": (
            questions,
            {
                "output_type": "generate_until",
                "doc_to_text": "{{question}}",
                "doc_to_target": "{{choices[gold]}}",
                "generation_kwargs": {"until": [until], "max_gen_toks": NEW, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}],
            },
        ),
    }
    for task, (documents, keys) in kinds.items():
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        description = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": f"{folder}/cache"},
            "test_split": "test",
            **keys,
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(description))


class Expected:
    """The harness' answers, computed from the equations.

    Attributes:
        model: its ``ttt_lr`` decides whether there are fast weights.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The log-likelihood of ``continuation``, and whether it is the likeliest.

        What the model has no positions for is cut on the left; the last token is only predicted.
        """
        row = torch.tensor([*context, *continuation])[-POSITIONS - 1 :]
        log_probs = self.logits(row[:-1])[-len(continuation) :].log_softmax(dim=-1)
        wanted = row[-len(continuation) :]
        chosen = log_probs.gather(1, wanted[:, None])
        return float(chosen.sum()), bool((log_probs.argmax(dim=-1) == wanted).all())

    def choices(self, question: str) -> list[tuple[float, bool]]:
        ids = self.tokenizer.encode
        return [self.score(ids(question), ids(f" {choice}")) for choice in CHOICES]

    def rolling(self, text: str) -> float:
        """Windows of as many tokens as the model has; the last one reaches back to be full."""
        ids = [self.tokenizer.eos_token_id, *self.tokenizer.encode(text)]
        total, done = 0.0, 1
        while done < len(ids):
            end = min(len(ids), done + POSITIONS)
            first = 0 if done == 1 else end - POSITIONS - 1
            total += self.score(ids[first:done], ids[done:end])[0]
            done = end
        return total

    @torch.no_grad()
    def greedy(self, question: str) -> str:
        ids = self.tokenizer.encode(question)[-(POSITIONS - NEW) :]
        for _ in range(NEW):
            ids.append(int(self.logits(torch.tensor(ids))[-1].argmax()))
        return str(self.tokenizer.decode(ids[-NEW:]))

    def logits(self, row: Tensor) -> Tensor:
        return transcribed_logits(self.model, row)

    def check(self, found: Report, *, until: str) -> None:
        """The answers are these."""
        close = {"rel": 1e-9, "abs": 1e-9}
        for question, answers in zip(QUESTIONS, found.answers["choose"], strict=True):
            wanted = self.choices(question)
            assert [float(score) for score, _ in answers] == pytest.approx(
                [score for score, _ in wanted], **close
            )
            assert [str(likeliest) for _, likeliest in answers] == [str(yes) for _, yes in wanted]
        rolled = [self.rolling(text) for text in TEXTS]
        answers = [float(score) for (score,) in found.answers["perplexity"]]
        assert answers == pytest.approx(rolled, **close)
        perplexity = math.exp(-sum(rolled) / sum(len(text) for text in TEXTS))
        assert found.results["perplexity"]["byte_perplexity,none"] == pytest.approx(perplexity)
        generated = [text for (text,) in found.answers["continue"]]
        assert generated == [self.greedy(question).split(until)[0] for question in QUESTIONS]


def by_command_line(folder: Path, tasks: Path, output: Path) -> Report:
    """In a process that does not import this package, without a network."""
    words = [
        "run", "--model", "hf", "--tasks", ",".join(TASKS), "--include_path", str(tasks),
        "--model_args", f"pretrained={folder},dtype=float64,trust_remote_code=True",
        "--batch_size", str(BATCH), "--device", "cpu",
        "--output_path", str(output), "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=output,
        env={**os.environ, **offline},
    )
    assert done.returncode == 0, done.stderr
    (results,) = output.rglob("results_*.json")
    answers = {}
    for task in TASKS:
        (samples,) = output.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        answers[task] = answers_of(rows)
    return Report(answers, json.loads(results.read_text())["results"])


def in_this_process(folder: Path, tasks: Path) -> Report:
    """With the registered classes, as a script would."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    report = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float64"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=BATCH,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    answers = {task: answers_of(report["samples"][task]) for task in TASKS}
    return Report(answers, report["results"])


def answers_of(samples: list[dict[str, Any]]) -> list[Any]:
    """The answers to each document's requests, in the documents' order."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [[answer for (answer,) in sample["resps"]] for sample in ordered]


def test_the_harness_reports_what_the_model_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tasks, output = tmp_path / "exported", tmp_path / "tasks", tmp_path / "output"
    model = live_model(vocab_size=257, max_position_embeddings=POSITIONS, pad_token_id=256)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    write_auto_map(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = Expected(model, tokenizer)
    # A letter that one row generates, so that it ends before the others.
    until = next(letter for letter in expected.greedy(QUESTIONS[1])[3:] if letter.isprintable())
    write_tasks(tasks, until=until)
    output.mkdir()

    found = by_command_line(folder, tasks, output)
    expected.check(found, until=until)

    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "ttt_mode": False}))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    off = in_this_process(folder, tasks)
    model.config.ttt_lr = 0.0
    expected.check(off, until=until)
    for task in TASKS:
        assert found.answers[task] != off.answers[task], f"{task}: fast weights change nothing"


def test_the_harness_prints_headings() -> None:
    """An old pytablewriter, which some resolutions of versions end with, prints A, B, C and D."""
    from lm_eval.utils import make_table

    scores = {"alias": "task", "acc,none": 0.5, "acc_stderr,none": 0.1}
    printed = make_table(
        {
            "results": {"task": scores},
            "versions": {"task": 1},
            "n-shot": {"task": 0},
            "higher_is_better": {"task": {"acc": True}},
        }
    )
    assert printed.splitlines()[0].split("|")[1].strip() == "Tasks"
