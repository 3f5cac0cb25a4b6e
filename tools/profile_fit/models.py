"""Architectures beside those of ``architecture``: the sizes an experiment scales over, and embedding models.

From the ``config.json`` that each model is published with. ``positions`` is the longest context the model was made for.
"""

from __future__ import annotations

from dataclasses import dataclass

from profile_fit.architecture import Architecture


@dataclass(frozen=True)
class TiedArchitecture(Architecture):
    """A decoder whose input and output embeddings are one matrix."""

    @property
    def parameters(self) -> int:
        """All weights, the embeddings once."""
        return super().parameters - self.vocab * self.hidden


LLAMA_31_70B = Architecture("meta-llama/Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256, 131072, True, True)
LLAMA_32_3B = TiedArchitecture("meta-llama/Llama-3.2-3B", 28, 3072, 24, 8, 128, 8192, 128256, 131072, True, True)
LLAMA_2_13B = Architecture("meta-llama/Llama-2-13b-hf", 40, 5120, 40, 40, 128, 13824, 32000, 4096, True, True)
QWEN_25_7B = Architecture("Qwen/Qwen2.5-7B-Instruct", 28, 3584, 28, 4, 128, 18944, 152064, 32768, True, True)
BGE_M3 = Architecture("BAAI/bge-m3", 24, 1024, 16, 16, 64, 4096, 250002, 8194, False, False)
