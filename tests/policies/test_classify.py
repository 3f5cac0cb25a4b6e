"""The classifier's truth table: endpoint x body shape x model name."""

from __future__ import annotations

import pytest

from sage_core.classify import KNOWN_MAX, ClassificationError, RequestClassifier
from sage_core.units import RequestKind

CHAT, GENERATE, EMBEDDING, ERROR = *RequestKind, ClassificationError
MODELS = {"llama-3-8b": CHAT, "our-encoder": EMBEDDING, "embedded-chat-7b": GENERATE}

# endpoint, body keys, model -> kind
TABLE = [
    # The endpoint decides, with any model that can, and whatever stands before or after it.
    ("/v1/chat/completions", ("messages",), "llama-3-8b", CHAT),
    ("/v1/completions", ("prompt",), "llama-3-8b", GENERATE),
    ("/v1/embeddings", ("input",), "bge-m3", EMBEDDING),
    ("/v1/chat/completions", (), "", CHAT),
    ("/v1/completions", (), "", GENERATE),
    ("/v1/embeddings", (), "", EMBEDDING),
    ("/openai/deployments/x/chat/completions?api-version=1", ("messages",), "", CHAT),
    ("/proxy/v1/completions/", ("prompt",), "", GENERATE),
    # Unknown endpoint: the shape of the body decides.
    ("", ("messages", "model"), "llama-3-8b", CHAT),
    ("/generate", ("prompt",), "", GENERATE),
    ("/encode", ("input",), "", EMBEDDING),
    ("/v1/mycompletions", ("input",), "", EMBEDDING),
    # Neither: the model's name decides, the registry before the pattern.
    ("/run", ("text",), "llama-3-8b", CHAT),
    ("/run", ("text",), "our-encoder", EMBEDDING),
    ("/run", ("text",), "BAAI/bge-small-en", EMBEDDING),
    ("/run", ("text",), "intfloat/e5-large", EMBEDDING),
    ("/run", ("text",), "all-MiniLM-L6-v2", EMBEDDING),
    ("/run", ("text",), "text-embedding-3-small", EMBEDDING),
    ("/run", ("text",), "embedded-chat-7b", GENERATE),
    # Features that contradict each other.
    ("/v1/chat/completions", ("messages",), "bge-m3", ERROR),
    ("/v1/completions", ("prompt",), "our-encoder", ERROR),
    ("/v1/embeddings", ("input",), "llama-3-8b", ERROR),
    ("/v1/embeddings", ("messages",), "", ERROR),
    ("/v1/chat/completions", ("prompt",), "", ERROR),
    ("/v1/completions", ("messages",), "", ERROR),
    ("", ("messages", "prompt"), "", ERROR),
    ("", ("messages",), "bge-m3", ERROR),
    ("", ("input",), "llama-3-8b", ERROR),
    # A body that also has a key of another kind does not contradict an endpoint whose own key is there.
    ("/v1/chat/completions", ("messages", "prompt"), "", CHAT),
    # A registered model that generates does both LLM kinds; the registry overrides a telling name.
    ("/v1/completions", ("prompt",), "embedded-chat-7b", GENERATE),
    ("/v1/chat/completions", ("messages",), "embedded-chat-7b", CHAT),
    # Nothing says anything.
    ("/run", ("text",), "mystery", ERROR),
    ("", (), "", ERROR),
]


def outcome(endpoint, body, model, models=MODELS):
    try:
        return RequestClassifier(models).classify(endpoint, model, body)
    except ClassificationError:
        return ERROR


@pytest.mark.parametrize(("endpoint", "body", "model", "want"), TABLE)
def test_truth_table(endpoint, body, model, want):
    assert outcome(endpoint, body, model) == want


@pytest.mark.parametrize("removed", ["endpoint", "body", "model", "registry"])
def test_every_feature_decides_some_row(removed):
    without = {
        "endpoint": lambda e, b, m: outcome("", b, m),
        "body": lambda e, b, m: outcome(e, (), m),
        "model": lambda e, b, m: outcome(e, b, ""),
        "registry": lambda e, b, m: outcome(e, b, m, models={}),
    }[removed]
    changed = [row for row in TABLE if without(*row[:3]) != row[3]]
    assert changed


def test_all_kinds_are_reached():
    assert {row[3] for row in TABLE} == {*RequestKind, ERROR}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("/v1/chat/completions", "bge-m3", ("messages",)), ("/v1/chat/completions", "bge-m3")),
        (("/v1/embeddings", "", ("messages",)), ("/v1/embeddings", "messages")),
        (("", "", ("messages", "input")), ("messages", "input")),
        (("/run", "mystery", ("text",)), ("/run", "mystery", "text")),
    ],
)
def test_an_error_names_both_sides(arguments, named):
    with pytest.raises(ClassificationError) as caught:
        RequestClassifier(MODELS).classify(*arguments)
    assert all(name in str(caught.value) for name in named)


def test_a_mapping_is_a_body():
    assert RequestClassifier().classify("", "", {"input": ["a", "b"]}) is RequestKind.EMBEDDING


def test_a_hostile_client_cannot_fill_the_memory_of_a_classifier():
    classifier = RequestClassifier()
    for i in range(3 * KNOWN_MAX):
        assert classifier.classify("/v1/chat/completions", f"model-{i}") is RequestKind.LLM_CHAT
    assert len(classifier._known) <= KNOWN_MAX
