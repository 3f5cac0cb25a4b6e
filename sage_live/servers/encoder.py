"""Texts to vectors, by sentence-transformers. Imported lazily: it brings torch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sage_core.errors import ConfigError


class Encoder(Protocol):
    """What the embedding server needs of a model. Called in one thread, never by two at once."""

    dimensions: int
    tokens_max: int  # of one text, special tokens included
    vocabulary: int  # token ids are below
    shortens: bool  # whether the first components of a vector are a vector too (matryoshka)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, not truncated."""

    def encode(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(len(batch), dimensions): unit vectors of texts given as token ids."""


class SentenceEncoder:
    """An :class:`Encoder`. Vectors are normalised, whether or not the model does that itself."""

    def __init__(self, model: str, device: str = "cpu", threads: int = 0) -> None:
        """``model``: a folder or a name on the hub. Raises ConfigError where it or its libraries are not to be had."""
        try:
            self._torch: Any = importlib.import_module("torch")
            library: Any = importlib.import_module("sentence_transformers")
        except ImportError as error:
            raise ConfigError(
                f"sentence-transformers cannot be imported ({error}): `pip install sentence-transformers`"
            ) from error
        if threads:
            self._torch.set_num_threads(threads)
        try:
            self._model: Any = library.SentenceTransformer(model, device=device)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"embedding model {model!r} on {device!r}: {str(error).splitlines()[0]}") from error
        self._model.eval()
        self._prompt: str = self._model.prompts.get(self._model.default_prompt_name or "", "")
        self._tokenizer: Any = self._model.tokenizer
        self._device = device
        config: Any = getattr(getattr(self._model[0], "auto_model", None), "config", None)
        self.tokens_max = int(self._model.max_seq_length or 512)
        self.vocabulary = len(self._tokenizer)
        self.shortens = bool(getattr(config, "matryoshka_dimensions", None) or getattr(config, "is_matryoshka", False))
        self.dimensions = self.encode(self.tokenize(["warm"])).shape[1]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        # Verbose: it would warn of texts that are too long; the server refuses them.
        ids: list[list[int]] = self._tokenizer(
            [self._prompt + text for text in texts], truncation=False, verbose=False
        )["input_ids"]
        return ids

    def encode(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        features = self._tokenizer.pad({"input_ids": [list(ids) for ids in batch]}, return_tensors="pt")
        with self._torch.inference_mode():
            moved = {key: value.to(self._device) for key, value in features.items()}
            vectors = self._model(moved)["sentence_embedding"].float()
            unit = self._torch.nn.functional.normalize(vectors, dim=1)
        array: NDArray[np.float32] = unit.cpu().numpy()
        return array
