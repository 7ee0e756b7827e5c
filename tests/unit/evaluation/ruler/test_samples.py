"""Generated samples: as long as wanted with any tokenizer, and true."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from megatron_ttt.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ttt.evaluation.ruler.haystack import Haystack
from megatron_ttt.evaluation.ruler.puzzle import Match
from megatron_ttt.evaluation.ruler.sample import (
    RulerTask,
    Sample,
    TooShort,
    make_sample,
    sample_rng,
    smallest_length,
)
from megatron_ttt.evaluation.ruler.scoring import string_match
from megatron_ttt.evaluation.ruler.vocabulary import (
    ADJECTIVES,
    FIRST_NAMES,
    NOISE,
    NOUNS,
    SYLLABLES,
    TRADES,
)
from megatron_ttt.evaluation.ruler.words import coded_counts

LENGTH = 4096
TOKENIZERS = ("bytes", "bpe")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Bytes, and a small byte-pair encoding for which words are one to six tokens."""
    folder = tmp_path_factory.mktemp("bpe")
    backend = Backend(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=["<end>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join((NOISE, *ADJECTIVES[::2], *NOUNS[::2]))], trainer)
    backend.decoder = ByteLevelDecoder()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return {"bytes": load_tokenizer("bytes"), "bpe": load_tokenizer("huggingface", str(folder))}


def sample_of(
    task: RulerTask,
    tokenizer: Tokenizer,
    *,
    length: int = LENGTH,
    number: int = 0,
    depth: float | None = None,
    haystack: Haystack | None = None,
) -> Sample:
    return make_sample(
        task,
        tokenizer=tokenizer,
        length=length,
        rng=sample_rng(7, task, length, number),
        haystack=haystack or Haystack.noise(),
        depth=depth,
    )


def text_of(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(sample.prompt_ids)


def last_question(text: str) -> tuple[str, str]:
    """What lies before the last question, and the question; a worked example cut away."""
    context, question = text.rsplit("\n\nQuestion:", 1)
    return context.rsplit("\n\n", 1)[1], question


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("task", RulerTask)
def test_a_context_is_filled_and_holds_the_answers(
    tokenizers: dict[str, Tokenizer], kind: str, task: RulerTask
) -> None:
    tokenizer = tokenizers[kind]
    for length, number in ((2500, 0), (2501, 1), (LENGTH, 2), (16384, 3)):
        sample = sample_of(task, tokenizer, length=length, number=number)
        used = len(sample.prompt_ids) + sample.new_tokens
        assert 0.97 * length <= used <= length
        assert len(sample.answer_ids) <= sample.new_tokens
        context, _ = last_question(text_of(sample, tokenizer))
        assert all(answer in context for answer in sample.answers)
        answer = tokenizer.decode(sample.answer_ids)
        assert string_match(answer, sample.answers, sample.match) == 1.0
        whole = tokenizer.encode(text_of(sample, tokenizer) + " " + ", ".join(sample.answers))
        assert whole == sample.prompt_ids + sample.answer_ids


@pytest.mark.parametrize("task", RulerTask)
def test_a_sample_follows_from_its_number(
    tokenizers: dict[str, Tokenizer], task: RulerTask
) -> None:
    tokenizer = tokenizers["bpe"]
    assert sample_of(task, tokenizer, number=1) == sample_of(task, tokenizer, number=1)
    assert sample_of(task, tokenizer, number=1).answers != sample_of(task, tokenizer).answers


@pytest.mark.parametrize("task", RulerTask)
def test_the_shortest_length_is_named(tokenizers: dict[str, Tokenizer], task: RulerTask) -> None:
    tokenizer, length = tokenizers["bytes"], 100
    smallest = smallest_length(
        task,
        tokenizer=tokenizer,
        length=length,
        rng=sample_rng(7, task, length, 0),
        haystack=Haystack.noise(),
    )
    with pytest.raises(TooShort) as error:
        sample_of(task, tokenizer, length=length)
    assert error.value.smallest == smallest > length
    room = smallest + 50  # the sample of another length has other words
    assert len(sample_of(task, tokenizer, length=room).prompt_ids) <= room


@pytest.mark.parametrize(
    ("task", "needles", "asked", "answers"),
    [
        (RulerTask.niah_single, 1, 1, 1),
        (RulerTask.niah_multikey, 4, 1, 1),
        (RulerTask.niah_multivalue, 4, 1, 4),
        (RulerTask.niah_multiquery, 4, 4, 4),
    ],
)
def test_needles_belong_to_their_keys(
    tokenizers: dict[str, Tokenizer], task: RulerTask, needles: int, asked: int, answers: int
) -> None:
    tokenizer = tokenizers["bytes"]
    for number in range(5):
        sample = sample_of(task, tokenizer, number=number)
        context, question = last_question(text_of(sample, tokenizer))
        found = re.findall(r"An access code of ([a-z]+ [a-z]+) is (\d{7})\.", context)
        assert len(found) == needles and len({code for _, code in found}) == needles
        keys = [key for key in dict(found) if key in question]
        assert len(keys) == asked and len(sample.answers) == answers
        assert {code for key, code in found if key in keys} == set(sample.answers)
        words = [word for key in dict(found) for word in key.split()]
        assert len(set(words)) == len(words)  # no key is nearly another
        if asked > 1:  # answers stand in the order of the question
            assert list(sample.answers) == [
                dict(found)[key] for key in sorted(keys, key=question.index)
            ]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_needle_lies_where_it_is_put(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    seen = []
    for depth in (0.0, 0.1, 0.5, 0.9, 1.0):
        sample = sample_of(RulerTask.niah_single, tokenizer, depth=depth)
        context, question = last_question(text_of(sample, tokenizer))
        before, after = context.split("An access code")
        after = after.split(".", 1)[1]
        assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.02)
        assert before == "" or before.endswith(". ") or depth == 1.0
        seen.append((sample.answers, question))
    assert len(set(seen)) == 1  # the same needle at every depth


def test_a_haystack_is_read_from_a_file_and_repeated(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("A whale swam by.\nNobody saw it, or so they said. The sea closed again.\n")
    haystack = Haystack.from_file(str(path))
    sample = sample_of(RulerTask.niah_single, tokenizers["bpe"], haystack=haystack)
    text = text_of(sample, tokenizers["bpe"])
    assert text.count("A whale swam by.") > 20
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is UTF-16, not UTF-8"):
        Haystack.from_file(str(path))
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 3"):
        Haystack.from_file(str(path))
    path.write_text(" \n")
    with pytest.raises(ValueError, match="no words"):
        Haystack.from_file(str(path))


def test_variables_form_one_chain(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytes"]
    for number in range(5):
        sample = sample_of(RulerTask.variable_tracking, tokenizer, number=number)
        context, question = last_question(text_of(sample, tokenizer))
        values: dict[str, str] = {}
        for name, value in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", context):
            values[name] = values.get(value, value)
        assert tuple(values) == sample.answers and len(values) == 5
        (value,) = set(values.values())
        assert value.isdigit() and f"the value {value} in" in question


@pytest.mark.parametrize("length", [2500, LENGTH, 16384])
def test_common_words_are_the_most_common(tokenizers: dict[str, Tokenizer], length: int) -> None:
    sample = sample_of(RulerTask.common_words, tokenizers["bpe"], length=length)
    context, _ = last_question(text_of(sample, tokenizers["bpe"]))
    counts = Counter(re.findall(r"\d+\. (\S+)", context)).most_common()
    assert {word for word, _ in counts[:10]} == set(sample.answers)
    often = {count for _, count in counts[:10]}
    assert len(often) == 1 and often.pop() >= 5 * counts[10][1]


def test_frequent_words_are_the_most_frequent(tokenizers: dict[str, Tokenizer]) -> None:
    for number in range(3):
        sample = sample_of(RulerTask.frequent_words, tokenizers["bytes"], number=number)
        context, _ = last_question(text_of(sample, tokenizers["bytes"]))
        counts = Counter(context.split()).most_common()
        assert counts[0][0] == "...."
        assert tuple(word for word, _ in counts[1:4]) == sample.answers
        assert counts[1][1] == pytest.approx(counts[0][1] / 4, abs=1)
    for units in range(75, 400):  # the first three are always apart from each other and the rest
        first = coded_counts(units)[1:5]
        assert first == sorted(set(first), reverse=True)


def test_questions_have_one_answer_in_the_documents(tokenizers: dict[str, Tokenizer]) -> None:
    seen = set()
    for number in range(8):
        sample = sample_of(RulerTask.question_answering, tokenizers["bytes"], number=number)
        text = text_of(sample, tokenizers["bytes"])
        question = last_question(text)[1]
        born = dict(re.findall(r"(\w+ \w+) was born in (\w+)\.", text))
        teacher = dict(re.findall(r"The teacher of (\w+ \w+) was (\w+ \w+)\.", text))
        asked = re.search(r"Where was (the teacher of )?(\w+ \w+) born\?", question)
        assert asked is not None
        seen.add(asked[1])
        name = teacher[asked[2]] if asked[1] else asked[2]
        assert sample.answers == (born[name],)
        assert len(set(born.values())) == len(born) > 10
    assert len(seen) == 2  # questions of one hop and of two


def test_scores() -> None:
    answers = ("Alpha", "beta")
    assert string_match("it is BETA, then alpha.", answers, Match.ALL) == 1.0
    assert string_match("it is beta", answers, Match.ALL) == 0.5
    assert string_match("it is beta", answers, Match.ANY) == 1.0
    assert string_match("gamma", answers, Match.ALL) == string_match("", answers, Match.ANY) == 0.0


def test_no_word_contains_another() -> None:
    """A wrong word must not score, and two numbers must not give one invented name."""
    for words in (ADJECTIVES, NOUNS, FIRST_NAMES, TRADES, SYLLABLES):
        assert len(set(words)) == len(words)
    assert not [(a, b) for a in ADJECTIVES for b in ADJECTIVES if a != b and b.endswith(a)]
    assert not [(a, b) for a in NOUNS for b in NOUNS if a != b and b.startswith(a)]
    assert not [(a, b) for a in SYLLABLES for b in SYLLABLES if a != b and b.startswith(a)]


@pytest.mark.parametrize("task", RulerTask)
def test_a_prompt_begins_with_the_tokenizers_mark(
    tokenizers: dict[str, Tokenizer], task: RulerTask
) -> None:
    """And it counts: the sample is as long as the one without."""
    plain = tokenizers["bpe"]
    assert plain.identity.name is not None
    marked = load_tokenizer("huggingface", plain.identity.name, start=[0])
    for length in (LENGTH, 1500):
        sample, unmarked = (
            sample_of(task, marked, length=length),
            sample_of(task, plain, length=length),
        )
        assert sample.prompt_ids[0] == 0 and 0 not in sample.prompt_ids[1:]
        assert 0 not in sample.answer_ids
        assert len(sample.prompt_ids) + sample.new_tokens <= length
        assert text_of(sample, marked)[:40] == text_of(unmarked, plain)[:40]
    options = {"length": LENGTH, "haystack": Haystack.noise()}
    sizes = [
        smallest_length(task, tokenizer=tokenizer, rng=sample_rng(7, task, LENGTH, 0), **options)
        for tokenizer in (plain, marked)
    ]
    assert sizes[1] == sizes[0] + 1
