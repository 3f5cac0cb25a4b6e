"""Prompts of exact token counts, for the price of slicing a string.

A prompt is a run of words that the model's tokenizer keeps whole: each is one token with a space before it and one
without, so n words are n tokens, whatever stands next to what. Words are drawn once into a long text; a prompt is a
*tag* that spells its id in words, then a piece of that text. The tag makes every prompt differ within its first block
of tokens, so an engine's prefix cache finds nothing that the load did not mean to share.

Shared beginnings (``sage_core.load.Contents``) are built the same way, block by block: equal ids give equal words.

The same with decimal token ids for words and commas for spaces gives prompts of token ids. Without a tokenizer the words
are common English ones, which most vocabularies hold whole, and the count is an estimate.
"""

from __future__ import annotations

import copy
import json
from itertools import accumulate
from pathlib import Path

from sage_core.errors import ConfigError, DataError
from sage_core.load import Contents
from sage_core.rng import Streams

TEXT_WORDS = 1 << 16
WORDS_MAX = 4096
TRIAL_WORDS = 32
TAIL_TOKENS = 8
"""A chat template adds tokens before the text and after it, and only their sum can be measured. Ends of known templates
are 1 to 8 tokens; assuming the most shares at least the blocks that the load shares, and less than one block more."""

_STEP = 40_503  # odd, so ids spread over the text without repeating before TEXT_WORDS of them
_PREFIXES_KEPT = 4096


class Prompts:
    """Prompts of one model, as JSON values.

    words: at least 16 distinct ones of one token each. overhead: tokens that the server adds to each prompt (template,
    BOS, [CLS] and [SEP]); they count towards the tokens asked for. exact: counts are the tokenizer's, not an estimate.
    Give each run against the same engine a ``seed`` of its own, or its prefix cache answers from the run before.
    """

    def __init__(
        self, words: list[str], *, seed: int, overhead: int = 0, exact: bool = True, token_ids: bool = False
    ) -> None:
        if len(words) < 16:
            raise DataError(f"prompts: expected at least 16 words that are one token each, got {len(words)}")
        self.overhead = overhead
        self.exact = exact
        self._open, self._space, self._close = (b"[", b",", b"]") if token_ids else (b'"', b" ", b'"')
        rng = Streams(seed).stream("prompts")
        self._words = [words[i].encode() for i in rng.permutation(len(words))]
        drawn = [self._words[i] for i in rng.integers(len(words), size=TEXT_WORDS).tolist()]
        self._text = self._space.join(drawn) + self._space
        self._starts = [0, *accumulate(len(word) + 1 for word in drawn)]
        self._tag_words = 1
        while len(words) ** self._tag_words < 1 << 48:  # beyond any id of a request or block
            self._tag_words += 1
        self._shared: dict[tuple[Contents, int], bytes] = {}

    def with_overhead(self, overhead: int) -> Prompts:
        """The same prompts for a server that adds ``overhead`` tokens."""
        other = copy.copy(self)
        other.overhead = overhead
        other._shared = {}
        return other

    def prompt(self, request: int, tokens: int, contents: Contents | None = None) -> tuple[bytes, int]:
        """The prompt of ``request`` as JSON, and the tokens it makes: ``tokens``, or one word more than the overhead."""
        words = max(tokens - self.overhead, 1)
        shared = b""
        unshared = words
        if contents is not None:
            # Never more than the prompt: one that is shared to its end is the beginning of the shared text.
            length = len(contents.blocks) * contents.block_tokens - self._head_tokens
            length = min(max(length, 0), words)
            shared, unshared = self._prefix(contents, length), words - length
        text = shared + self._piece(2 * request, unshared)
        return self._open + text[:-1] + self._close, self.overhead + words

    @property
    def _head_tokens(self) -> int:
        return max(self.overhead - TAIL_TOKENS, 0)

    def _prefix(self, contents: Contents, words: int) -> bytes:
        """The first ``words`` words of the shared text, each followed by a space; the template stands in for its head."""
        key = contents, words
        text = self._shared.get(key)
        if text is None:
            if len(self._shared) >= _PREFIXES_KEPT:
                self._shared.clear()
            pieces = [self._piece(2 * block + 1, contents.block_tokens) for block in contents.blocks]
            whole = b"".join(pieces).split(self._space)
            text = self._shared[key] = b"".join(word + self._space for word in whole[self._head_tokens :][:words])
        return text

    def _piece(self, key: int, words: int) -> bytes:
        """``words`` words that no other ``key`` begins with, each followed by a space."""
        tag = []
        number = key
        for _ in range(min(self._tag_words, words)):
            number, digit = divmod(number, len(self._words))
            tag.append(self._words[digit])
        parts = [self._space.join(tag) + self._space] if tag else []
        rest = words - len(tag)
        start = key * _STEP % TEXT_WORDS
        while rest > 0:
            end = min(start + rest, TEXT_WORDS)
            parts.append(self._text[self._starts[start] : self._starts[end]])
            rest -= end - start
            start = 0
        return b"".join(parts)


def estimated(*, seed: int, overhead: int = 0) -> Prompts:
    """Prompts of common English words, one token each by estimate."""
    return Prompts(_ENGLISH.split(), seed=seed, overhead=overhead, exact=False)


def with_tokenizer(path: Path, *, seed: int, overhead: int | None = None) -> Prompts:
    """Prompts of exact counts for the tokenizer in ``path`` (``tokenizer.json``, or the model's folder).

    overhead: default is what the tokenizer adds to any text (BOS, [CLS]); of a chat template it knows nothing, so give
    that of the served model (``sage_live.loadgen.overhead``).
    """
    tokenizer = _Tokenizer(path)
    added = tokenizer.count([""])[0]
    return Prompts(_whole_words(tokenizer, added), seed=seed, overhead=added if overhead is None else overhead)


def of_token_ids(path: Path, *, seed: int) -> Prompts:
    """Prompts of token ids, for ``/v1/completions``: exact by construction, nothing is added to them."""
    return Prompts([str(i) for i in _Tokenizer(path).plain_ids()], seed=seed, token_ids=True)


class _Tokenizer:
    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ConfigError(
                "prompts of exact token counts need the package tokenizers: pip install tokenizers"
            ) from None
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"{file}: no such file; expected the tokenizer.json of the served model")
        try:
            self._of = Tokenizer.from_file(str(file))
        except Exception as error:  # the binding raises Exception itself
            raise DataError(f"{file}: not a tokenizer.json: {error}") from None
        # A saved tokenizer may cut or pad, which would falsify every count.
        self._of.no_truncation()
        self._of.no_padding()
        self._special = {
            token["content"] for token in json.loads(file.read_text(encoding="utf-8")).get("added_tokens", ())
        }

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text, with what the tokenizer adds."""
        return [len(encoding) for encoding in self._of.encode_batch_fast(texts)]

    def words(self) -> list[str]:
        """Vocabulary entries that are plain lower-case words, in order."""
        vocabulary: dict[str, int] = self._of.get_vocab()
        decoded = {
            token.lstrip("\u0120\u2581") for token in vocabulary if token not in self._special
        }  # Ġ and ▁: a space
        return sorted(word for word in decoded if word.isascii() and word.isalpha() and word.islower())

    def plain_ids(self) -> list[int]:
        """Ids that are not special tokens."""
        vocabulary: dict[str, int] = self._of.get_vocab()
        return sorted(i for token, i in vocabulary.items() if token not in self._special)


def _whole_words(tokenizer: _Tokenizer, added: int) -> list[str]:
    """Words of one token wherever they stand; checked, not assumed."""
    words = tokenizer.words()
    alone = tokenizer.count(words)
    after = tokenizer.count([f"{word} {word}" for word in words])
    whole = [w for w, one, two in zip(words, alone, after, strict=True) if one == added + 1 and two == added + 2]
    rng = Streams(0).stream("prompts/words")
    whole = [whole[i] for i in sorted(rng.permutation(len(whole))[:WORDS_MAX].tolist())]
    if len(whole) >= 16:
        trials = [[whole[i] for i in rng.integers(len(whole), size=TRIAL_WORDS).tolist()] for _ in range(256)]
        counts = tokenizer.count([" ".join(trial) for trial in trials])
        if any(count != added + TRIAL_WORDS for count in counts):
            raise DataError(
                "prompts: this tokenizer joins words across spaces, so counts cannot be composed; use token-id prompts"
            )
    return whole


_ENGLISH = """
the and for not you this that with from have they will one all would there what about which when make can like time just
him know take people into year your good some could them see other than then now look only come its over think also back
after use two how our work first well way even new want because any these give day most us
"""
