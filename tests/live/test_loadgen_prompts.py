"""Prompts: exactly as many tokens as asked, by the tokenizer's own count; shared where the load shares, and only there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError, DataError
from sage_core.load import Contents
from sage_live.loadgen.prompts import TAIL_TOKENS, Prompts, estimated, of_token_ids, with_tokenizer

tokenizers = pytest.importorskip("tokenizers")

SYLLABLES = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "on", "ul", "ar")]


def corpus() -> Iterator[str]:
    rng = np.random.default_rng(0)
    words = [SYLLABLES[i] + SYLLABLES[j] for i, j in rng.integers(len(SYLLABLES), size=(300, 2)).tolist()]
    for _ in range(3):
        for word in words:
            yield f"{word} {word} {word}. {word}, {word}"


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of each family that engines serve: GPT-2's, BERT's, Llama's; each cuts its input, as saved ones may."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[UNK]", "[CLS]", "[SEP]", "<s>"]
    if request.param == "bpe":
        of = Tokenizer(models.BPE())
        of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        of.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    elif request.param == "wordpiece":
        of = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        of.normalizer = normalizers.BertNormalizer()
        of.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    else:
        of = Tokenizer(models.BPE(unk_token="[UNK]"))
        of.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    of.train_from_iterator(corpus(), trainer)
    if request.param == "wordpiece":
        of.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[("[CLS]", of.token_to_id("[CLS]")), ("[SEP]", of.token_to_id("[SEP]"))],
        )
    if request.param == "metaspace":
        of.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", of.token_to_id("<s>"))]
        )
    of.enable_truncation(20)
    of.enable_padding(length=128)
    folder = tmp_path_factory.mktemp(request.param)
    of.save(str(folder / "tokenizer.json"))
    return folder


def counter(folder: Path) -> object:
    of = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    of.no_truncation()
    of.no_padding()
    return of


def test_counts_are_exact(tokenizer: Path) -> None:
    prompts = with_tokenizer(tokenizer, seed=1)
    of = counter(tokenizer)
    assert prompts.exact
    for request, tokens in enumerate((3, 4, 5, 17, 100, 1000, 5000, 70_000)):
        text, told = prompts.prompt(request, tokens)
        assert told == tokens
        assert len(of.encode(json.loads(text)).ids) == tokens  # type: ignore[attr-defined]


def test_a_known_overhead_counts_towards_the_tokens(tokenizer: Path) -> None:
    text, told = with_tokenizer(tokenizer, seed=1, overhead=30).prompt(0, 100)
    assert told == 100
    assert len(json.loads(text).split()) == 70
    text, told = with_tokenizer(tokenizer, seed=1, overhead=30).prompt(0, 10)
    assert (len(json.loads(text).split()), told) == (1, 31)  # shorter than that, no prompt can be


def test_token_ids_are_plain_and_as_many_as_asked(tokenizer: Path) -> None:
    prompts = of_token_ids(tokenizer, seed=1)
    of = counter(tokenizer)
    special = {of.token_to_id(t) for t in ("[UNK]", "[CLS]", "[SEP]", "<s>")}  # type: ignore[attr-defined]
    for request, tokens in enumerate((1, 2, 50, 3000)):
        text, told = prompts.prompt(request, tokens)
        ids = json.loads(text)
        assert len(ids) == told == tokens
        assert not special & set(ids)
        assert max(ids) < of.get_vocab_size()  # type: ignore[attr-defined]


def text_of(prompts: Prompts, request: int, tokens: int, contents: Contents | None = None) -> list[str]:
    text, told = prompts.prompt(request, tokens, contents)
    words = str(json.loads(text)).split(" ")
    assert told == prompts.overhead + len(words) == max(tokens, prompts.overhead + 1)
    return words


PLAIN = Prompts([f"w{i}" for i in range(500)], seed=3)


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(16, 300))
def test_prompts_differ_within_their_first_block(one: int, other: int, tokens: int) -> None:
    assert (text_of(PLAIN, one, tokens)[:16] == text_of(PLAIN, other, tokens)[:16]) == (one == other)


@given(
    blocks=st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True),
    equal=st.integers(0, 6),
    tokens=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    overhead=st.integers(0, 50),
)
def test_equal_blocks_are_equal_words_and_others_are_not(
    blocks: list[int], equal: int, tokens: tuple[int, int], overhead: int
) -> None:
    """In tokens of the whole prompt, with a template whose end is as long as it may be: the first ``overhead - TAIL``
    tokens are the template's, equal for all."""
    prompts = PLAIN.with_overhead(overhead)
    equal = min(equal, len(blocks))
    fork = [*blocks[:equal], *(block + 1 + 2**41 for block in blocks[equal:])]
    one = text_of(prompts, 1, tokens[0], Contents(16, tuple(blocks)))
    other = text_of(prompts, 2, tokens[1], Contents(16, tuple(fork)))
    head = max(overhead - TAIL_TOKENS, 0)
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert same + head >= min(16 * equal, len(one) + head, len(other) + head)
    if same < min(len(one), len(other)):  # they part, and do so in the tag that follows what is shared
        assert same + head < max(16 * equal, head) + 8


def test_a_block_is_the_same_whatever_stands_before_it() -> None:
    one = text_of(PLAIN, 1, 48, Contents(16, (5, 6, 7)))
    other = text_of(PLAIN, 2, 48, Contents(16, (9, 6)))
    assert one[16:32] == other[16:32]
    assert one[:16] != other[:16]


def test_seeds_make_other_prompts() -> None:
    assert text_of(estimated(seed=1), 0, 30) == text_of(estimated(seed=1), 0, 30)
    assert text_of(estimated(seed=1), 0, 30) != text_of(estimated(seed=2), 0, 30)
    assert not estimated(seed=1).exact


def test_a_hundred_thousand_prompts_cost_seconds() -> None:
    rng = np.random.default_rng(0)
    shared = [Contents(16, tuple(range(1000 * i, 1000 * i + 8))) for i in range(50)]
    tokens = rng.integers(200, 2000, 100_000).tolist()
    before = time.thread_time()
    for request, n in enumerate(tokens):
        PLAIN.prompt(request, n, shared[request % 50] if request % 2 else None)
    assert time.thread_time() - before < 20  # 0.3 s of CPU on an idle machine


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; expected"):
        with_tokenizer(tmp_path, seed=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        with_tokenizer(tmp_path / "tokenizer.json", seed=0)
    with pytest.raises(DataError, match="at least 16 words"):
        Prompts(["a"], seed=0)
    with pytest.raises(ConfigError, match="seed"):
        estimated(seed=-1)
