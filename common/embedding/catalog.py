"""The models that are known here: what they cost, take and give. Figures as their makers stated them, each with its
source; looked up on 2026-11-21. Prices are list prices in US dollars without free allowances or batch discounts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.embedding.choice import Mode, Provider, Tier
from common.errors import InvalidRequest
from common.frames.embed_text import CODE_V1, STATIC_V2


class KnownModel(NamedTuple):
    """One model of one provider."""

    provider: Provider
    name: str
    dimension: int
    """Without asking for another."""
    dimensions: Sequence[int]
    """All that may be asked for."""
    max_tokens: int
    """Of one text."""
    request_texts: int
    request_tokens: int
    """The most that one request may hold."""
    price: float | None
    """US dollars per million tokens; None: not known here."""
    layout: str = CODE_V1
    prefixes: tuple[str, str] = ("", "")
    """What the model was trained to see before a document and before a query, where its API does not add it."""


def _openai(name: str, dimension: int, price: float, *, shorter: bool = True) -> KnownModel:
    # platform.openai.com/docs/api-reference/embeddings/create: 8,192 tokens a text (8,191 for ada-002), 2,048 texts
    # and 300,000 tokens a request; ``dimensions`` for text-embedding-3 and later. platform.openai.com/docs/pricing.
    dimensions = range(1, dimension + 1) if shorter else (dimension,)
    return KnownModel("openai", name, dimension, dimensions, 8_191, 2_048, 300_000, price)


def _nvidia(name: str, dimension: int, max_tokens: int, *shorter: int) -> KnownModel:
    # docs.nvidia.com/nim/nemo-retriever/text-embedding/latest (support-matrix, reference) for tokens and dimensions;
    # build.nvidia.com/nvidia/nv-embed-v1 for that one. The hosted API states no bound of a request: NVIDIA's own
    # integration (llama-index-embeddings-nvidia) refuses more than 259 texts; the tokens are ours, 256 texts of 512. It
    # sells no tokens: its use is bounded by requests per minute, and by a licence where a NIM runs elsewhere.
    return KnownModel("nvidia", name, dimension, (*shorter, dimension), max_tokens, 259, 131_072, 0.0)


def _voyage(name: str, request_tokens: int, price: float) -> KnownModel:
    # docs.voyageai.com/docs/embeddings for context and dimensions, docs.voyageai.com/reference/embeddings-api for the
    # bounds of a request, docs.voyageai.com/docs/pricing.
    return KnownModel("voyage", name, 1_024, (256, 512, 1_024, 2_048), 32_000, 1_000, request_tokens, price)


def _ollama(
    name: str, dimension: int, max_tokens: int, *shorter: int, prefixes: tuple[str, str] = ("", "")
) -> KnownModel:
    # ollama.com/library for dimensions and the context that its files set. docs/api.md of github.com/ollama/ollama
    # states no bound of a request; ours keeps one within a minute on a slow machine.
    return KnownModel("ollama", name, dimension, (*shorter, dimension), max_tokens, 64, 16_384, 0.0, prefixes=prefixes)


_MODELS = (
    KnownModel("static", "wordllama-l2-supercat-256", 256, (256,), 4_096, 1_024, 4_194_304, 0.0, STATIC_V2),
    KnownModel("torch", "all-MiniLM-L6-v2", 384, (384,), 256, 1_024, 262_144, 0.0),
    _openai("text-embedding-3-small", 1_536, 0.02),
    _openai("text-embedding-3-large", 3_072, 0.13),
    _openai("text-embedding-ada-002", 1_536, 0.10, shorter=False),
    _nvidia("nvidia/nv-embed-v1", 4_096, 32_768),
    _nvidia("nvidia/nv-embedqa-e5-v5", 1_024, 512),
    _nvidia("nvidia/llama-3.2-nv-embedqa-1b-v2", 2_048, 8_192, 384, 512, 768, 1_024),
    _nvidia("nvidia/llama-nemotron-embed-1b-v2", 2_048, 8_192, 384, 512, 768, 1_024),  # the one above, since renamed
    _voyage("voyage-code-3", 120_000, 0.18),
    _voyage("voyage-3-large", 120_000, 0.18),
    _voyage("voyage-3.5", 320_000, 0.06),
    _voyage("voyage-3.5-lite", 1_000_000, 0.02),
    _voyage("voyage-4-large", 120_000, 0.12),
    _voyage("voyage-4", 320_000, 0.06),
    _voyage("voyage-4-lite", 1_000_000, 0.02),
    # huggingface.co/nomic-ai/nomic-embed-text-v1.5 for its shorter vectors and prefixes.
    _ollama("nomic-embed-text", 768, 2_048, 64, 128, 256, 512, prefixes=("search_document: ", "search_query: ")),
    _ollama("all-minilm", 384, 256),
    # huggingface.co/mixedbread-ai/mxbai-embed-large-v1 for its prefix.
    _ollama(
        "mxbai-embed-large",
        1_024,
        512,
        prefixes=("", "Represent this sentence for searching relevant passages: "),
    ),
    _ollama("bge-m3", 1_024, 8_192),
)

MODELS: dict[tuple[Provider, str], KnownModel] = {(model.provider, model.name): model for model in _MODELS}

DEFAULTS: dict[Provider, str] = {
    "static": "wordllama-l2-supercat-256",
    "torch": "all-MiniLM-L6-v2",
    "openai": "text-embedding-3-large",
    "nvidia": "nvidia/nv-embed-v1",
    "voyage": "voyage-code-3",
    "ollama": "nomic-embed-text",
}
"""The model of a provider where neither a model nor a tier is named."""

TIERS: dict[Provider, dict[Tier, str]] = {
    "static": {"speed": "wordllama-l2-supercat-256", "quality": "wordllama-l2-supercat-256"},
    "torch": {"speed": "all-MiniLM-L6-v2", "quality": "all-MiniLM-L6-v2"},
    "openai": {"speed": "text-embedding-3-small", "quality": "text-embedding-3-large"},
    "nvidia": {"speed": "nvidia/nv-embedqa-e5-v5", "quality": "nvidia/nv-embed-v1"},
    "voyage": {"speed": "voyage-3.5-lite", "quality": "voyage-code-3"},
    "ollama": {"speed": "all-minilm", "quality": "nomic-embed-text"},
}

MODE_TIERS: dict[Mode, dict[Tier, Provider]] = {
    "local_cpu": {"speed": "static", "quality": "torch"},
    "runpod_gpu": {"speed": "static", "quality": "torch"},
}
"""The provider that a tier means where a mode names none; ``external_api`` always wants one named: it costs money."""


def find_model(provider: Provider, name: str, dimension: int | None = None) -> KnownModel:
    """The model of this name. One that is not known here needs its dimension said, gets the bounds of its provider's
    narrowest model, and has no known price. An Ollama name may carry a tag (``bge-m3:567m``).

    Raises InvalidRequest with the field ``embedding_model`` or ``embedding_dimension``.
    """
    known = MODELS.get((provider, name))
    if known is None and provider == "ollama":
        known = MODELS.get((provider, name.partition(":")[0]))
        known = known and known._replace(name=name)
    if known is None:
        return _unknown(provider, name, dimension)
    if dimension is not None and dimension not in known.dimensions:
        allowed = known.dimensions
        raise InvalidRequest(
            f"{name} has no vectors of dimension {dimension}",
            field="embedding_dimension",
            allowed=f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(str, allowed)),
        )
    return known


def _unknown(provider: Provider, name: str, dimension: int | None) -> KnownModel:
    others = [model for model in _MODELS if model.provider == provider]
    if not name or len(name) > 200 or not name.isprintable():
        raise InvalidRequest("the name of a model is 1 to 200 printable characters", field="embedding_model")
    if dimension is None or not 1 <= dimension <= 65_536:
        raise InvalidRequest(
            f"{name} is not a model of {provider} that is known here: its dimension must be said, 1 to 65536",
            field="embedding_dimension" if dimension is not None else "embedding_model",
            allowed=", ".join(model.name for model in others),
        )
    return KnownModel(
        provider,
        name,
        dimension,
        (dimension,),
        max_tokens=min(model.max_tokens for model in others),
        request_texts=min(model.request_texts for model in others),
        request_tokens=min(model.request_tokens for model in others),
        price=0.0 if all(model.price == 0.0 for model in others) else None,
    )
