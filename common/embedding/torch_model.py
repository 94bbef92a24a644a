"""A model of sentence-transformers on one device, run over packs of texts that lie side by side without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as fn
import transformers
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

PADDING_FREE = "memvid_packed"
"""Name of our attention among those of transformers."""
LEAST_TOKENS = 256
"""A pack on a CPU is filled up to so many tokens: MKL adds in another order below some 200 rows."""
_LIKE_BERT = ("bert", "roberta", "xlm-roberta", "camembert")
_HALF = (torch.bfloat16, torch.float16)
# How near the padding-free run must come to sentence-transformers' own, on texts that show a wrong position or mask.
_AGREES = {torch.float32: 0.9999, torch.bfloat16: 0.99, torch.float16: 0.99}
_SAMPLE = ("", "def parse(source: str) -> Tree:", "the quick brown fox " * 12, "class Handler: takes one job " * 90)


class Pack(NamedTuple):
    """Texts that run at once."""

    ids: NDArray[np.int32]
    """Token ids, text after text."""
    lengths: NDArray[np.int32]
    """Tokens of each text, the longest first."""


class _Places(NamedTuple):
    """Where the texts of a pack lie, filler included; on the device where it is a tensor."""

    lengths: list[int]
    bounds: Tensor
    """int32, shape (texts + 1,)."""

    def runs(self) -> Iterator[tuple[slice, int, int]]:
        """Neighbours of equal length: their tokens, how many texts, tokens of each."""
        start = at = 0
        while at < len(self.lengths):
            length, first = self.lengths[at], at
            while at < len(self.lengths) and self.lengths[at] == length:
                at += 1
            tokens = (at - first) * length
            yield slice(start, start + tokens), at - first, length
            start += tokens


class CannotPackError(Exception):
    """The model's attention is not one that runs over packs; it runs over padded batches instead."""


class Loaded(NamedTuple):
    """A model read from its folder, on the CPU."""

    model: Any
    tokenizer: Any
    """A fast tokenizer of transformers."""
    config: Any
    dimension: int
    max_tokens: int
    prompts: dict[str, str]
    default_prompt: str | None


def load(folder: Path, precision: str) -> Loaded:
    """Read a model. Raises OSError and ValueError for a folder that holds none."""
    quiet: Callable[[], None] = transformers.utils.logging.disable_progress_bar
    quiet()
    model: Any = SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": getattr(torch, precision)}
    ).eval()
    transformer = model[0]
    tokenizer, inner = getattr(transformer, "tokenizer", None), getattr(transformer, "model", None)
    if not isinstance(inner, transformers.PreTrainedModel) or not getattr(tokenizer, "is_fast", False):
        raise ValueError("it is not a transformer with a fast tokenizer")
    if any(isinstance(module, Pooling) and not module.include_prompt for module in model):
        raise ValueError("it leaves its prompt out of the mean, which is not done here")
    longest = getattr(inner.config, "max_position_embeddings", None)
    limits = [model.max_seq_length, longest - _first_position(inner) if longest else None]
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        config=inner.config,
        dimension=int(model.get_embedding_dimension()),
        max_tokens=min(limit for limit in limits if limit),
        prompts={name: text for name, text in model.prompts.items() if text},
        default_prompt=model.default_prompt_name,
    )


class Runner:
    """A model on one device. One thread at a time may run it; on a GPU it only asks for the work."""

    packed: bool
    """False: padded to the longest text of a pack, for an architecture whose attention cannot be told of bounds."""

    def __init__(self, loaded: Loaded, device: str, dimension: int) -> None:
        """Moves the model of ``loaded`` to the device."""
        self._device = torch.device(device)
        self._dimension = dimension
        model = loaded.model.to(self._device)
        self._pad = loaded.tokenizer.pad_token_id or 0
        self._types = "token_type_ids" in loaded.tokenizer.model_input_names
        self._transformer, *modules = model
        self._modules = [module.to(torch.float32) for module in modules]
        self._dtype = self._transformer.model.dtype
        self._max_tokens = loaded.max_tokens
        self._forward: Callable[[Tensor, Tensor, _Places], Tensor] | None = None
        self.packed = self._pack(loaded.tokenizer)

    @torch.inference_mode()
    def run(self, pack: Pack, fill: int = 0) -> Tensor:
        """Unit vectors of shape (texts, dimension), float32, on the device; rows that have no direction are NaN.

        ``fill`` tokens that nobody reads follow the texts up to that number: kernels of equal shape round alike, and
        so a text's vector does not depend on what it shares the pack with.
        """
        whole = self._run_packed(pack, fill) if self.packed else self._run_padded(pack)
        made = whole[:, : self._dimension].float()
        norms: Tensor = torch.linalg.vector_norm(made, dim=1, keepdim=True)
        return made / norms

    def close(self) -> None:
        """Drop the weights."""
        self._forward = self._transformer = None
        self._modules = []

    def _pack(self, tokenizer: Any) -> bool:
        """Whether the padding-free run gives what sentence-transformers' own does; sets it up if so."""
        inner = self._transformer.model
        if not getattr(inner, "is_backend_compatible", lambda: False)():
            return False
        texts = [tokenizer(text, truncation=True, max_length=self._max_tokens)["input_ids"] for text in _SAMPLE]
        texts = sorted(filter(None, texts), key=len, reverse=True)
        lengths = np.array([len(ids) for ids in texts], dtype=np.int32)
        pack = Pack(np.concatenate(texts).astype(np.int32), lengths)
        self.packed = False
        wanted = self.run(pack)
        usual = inner.config._attn_implementation
        try:
            self._forward = _Bert(inner) if _is_like_bert(inner) else _Packed(inner)
            self.packed = True
            agrees = fn.cosine_similarity(self.run(pack), wanted).min().item() >= _AGREES[self._dtype]
        except CannotPackError:
            agrees = False
        if not agrees:
            inner.set_attn_implementation(usual)
            self._forward = None
        elif isinstance(self._forward, _Bert):
            self._transformer = None  # its weights were taken over
        return agrees

    def _run_packed(self, pack: Pack, fill: int) -> Tensor:
        assert self._forward is not None
        texts, tokens = len(pack.lengths), len(pack.ids)
        longest = min(max(int(pack.lengths[0]), 128), self._max_tokens)
        lengths = [*pack.lengths.tolist(), *_filler(max(fill, self._least()) - tokens, longest)]
        bounds = np.cumsum([0, *lengths], dtype=np.int32)
        total = int(bounds[-1])
        # One copy to the device: ids, positions, bounds.
        sent = torch.empty(2 * total + len(bounds), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        host = sent.numpy()
        host[:tokens] = pack.ids
        host[tokens:total] = self._pad
        np.subtract(np.arange(total, dtype=np.int32), np.repeat(bounds[:-1], lengths), out=host[total : 2 * total])
        host[2 * total :] = bounds
        there = sent.to(self._device, non_blocking=True)
        ids, positions, cuts = there[:total], there[total : 2 * total], there[2 * total :]
        places = _Places(lengths, cuts)
        features: dict[str, Any] = {"token_embeddings": self._forward(ids, positions, places)[:tokens][None]}
        own = _Places(lengths[:texts], cuts[: texts + 1])
        for module in self._modules:
            if isinstance(module, Pooling):
                features["sentence_embedding"] = _pool(module, features["token_embeddings"][0], own)
            else:
                features = module(features)
        made: Tensor = features["sentence_embedding"]
        return made

    def _least(self) -> int:
        return LEAST_TOKENS if self._device.type == "cpu" else 0

    def _run_padded(self, pack: Pack) -> Tensor:
        lengths = torch.from_numpy(pack.lengths).long()
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        ids = torch.full(mask.shape, self._pad, dtype=torch.long)
        ids[mask] = torch.from_numpy(pack.ids).long()
        features: dict[str, Any] = {
            "input_ids": ids.to(self._device, non_blocking=True),
            "attention_mask": mask.long().to(self._device, non_blocking=True),
        }
        if self._types:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        features = self._transformer(features)
        for module in self._modules:
            if isinstance(module, Pooling):
                features["token_embeddings"] = features["token_embeddings"].float()
            features = module(features)
        made: Tensor = features["sentence_embedding"]
        return made


def _filler(tokens: int, longest: int) -> list[int]:
    """Lengths of texts that nobody reads."""
    whole, rest = divmod(max(tokens, 0), longest)
    return [longest] * whole + [rest] * (rest > 0)


def _pool(module: Any, tokens: Tensor, places: _Places) -> Tensor:
    """Shape (texts, dimension), float32: text by text, in an order of adding that does not depend on the others."""
    starts, ends = places.bounds[:-1], places.bounds[1:]
    if module.pooling_mode == "cls":
        return tokens[starts].float()
    if module.pooling_mode == "lasttoken":
        return tokens[ends - 1].float()
    if module.pooling_mode == "mean":
        if tokens.device.type == "cpu":
            return torch.cat(
                [tokens[run].view(texts, length, -1).float().mean(1) for run, texts, length in places.runs()]
            )
        return torch.segment_reduce(tokens.float(), "mean", lengths=(ends - starts).long(), axis=0, unsafe=True)
    features = {"token_embeddings": tokens.float()[None], "cu_seq_lens_q": places.bounds.long()}
    made: Tensor = module(features)["sentence_embedding"]
    return made


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: _Places,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Attention of each text to itself. All of shape (tokens, heads, size); ``window``: so many neighbours that way,
    the token itself included."""
    grouped = key.shape[1] != query.shape[1]
    if query.is_cuda and _has_varlen(query.device, query.dtype, query.shape[-1]):
        left, right = (window - 1, window - 1) if window else (-1, -1)
        longest = max(places.lengths)
        made: Any = varlen_attn(
            query,
            key,
            value,
            places.bounds,
            places.bounds,
            longest,
            longest,
            scale=scale,
            window_size=(left, 0 if causal else right),
            enable_gqa=grouped,
            num_splits=1,  # or the split, and with it the rounding, hangs on the longest text of the pack
        )
        seen: Tensor = made
        return seen
    out = torch.empty_like(query)
    for run, texts, length in places.runs():
        q, k, v = (part[run].view(texts, length, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
        mask = _band(length, window, causal, query.device) if window and window < length else None
        made = fn.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
        )
        out[run] = made.transpose(1, 2).reshape(-1, *query.shape[1:])
    return out


@cache
def _has_varlen(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether flash attention has kernels for this GPU (Ampere and later), precision and size of a head."""
    return dtype in _HALF and size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def _band(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    at = torch.arange(length, device=device)
    away = at[:, None] - at[None]
    return (away < window) & (away >= 0 if causal else away > -window)


def _attention_of_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packing: _Places | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls for a model that runs over packs; shapes (1, heads, tokens, size)."""
    if packing is None or any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise CannotPackError(type(module).__name__)
    made = _attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packing,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=bool(getattr(module, "is_causal", False) if is_causal is None else is_causal),
        window=sliding_window,
    )
    return made[None], None


@cache
def _register() -> None:
    transformers.AttentionInterface.register(PADDING_FREE, _attention_of_transformers)


def _first_position(inner: Any) -> int:
    """Where positions begin: RoBERTa and its like count on from the number of the padding token."""
    for module in inner.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0


class _Packed:
    """Any model whose attention transformers lets us choose."""

    def __init__(self, inner: Any) -> None:
        _register()
        self._inner = inner
        self._first = _first_position(inner)
        inner.set_attn_implementation(PADDING_FREE)

    def __call__(self, ids: Tensor, positions: Tensor, places: _Places) -> Tensor:
        try:
            made = self._inner(
                input_ids=ids[None],
                position_ids=(positions.long() + self._first)[None],
                packing=places,
                use_cache=False,
            )
        except TypeError as error:
            raise CannotPackError(str(error)) from error
        hidden: Tensor = made.last_hidden_state[0]
        return hidden


def _is_like_bert(inner: Any) -> bool:
    config = inner.config
    return (
        config.model_type in _LIKE_BERT
        and config.hidden_act == "gelu"
        and not config.is_decoder
        and not getattr(config, "add_cross_attention", False)
    )


class _Layer(NamedTuple):
    """Weights of one layer: (weight, bias) pairs."""

    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    out_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    down_norm: tuple[Tensor, Tensor]


class _Bert:
    """BERT and RoBERTa with what costs memory traffic taken out: one multiplication for query, key and value, sums in
    place and, in half precision on a GPU, the activation in the multiplication before it."""

    def __init__(self, inner: Any) -> None:
        embeddings, config = inner.embeddings, inner.config
        self._heads, self._eps = config.num_attention_heads, config.layer_norm_eps
        self._words = embeddings.word_embeddings.weight
        first = _first_position(inner)
        places = embeddings.position_embeddings.weight[first:] + embeddings.token_type_embeddings.weight[0]
        self._places = places.detach()
        self._norm = _weights(embeddings.LayerNorm)
        self._layers = [_layer(layer) for layer in inner.encoder.layer]
        self._fused = self._words.is_cuda and self._words.dtype in _HALF

    def __call__(self, ids: Tensor, positions: Tensor, places: _Places) -> Tensor:
        hidden = fn.embedding(ids, self._words).add_(fn.embedding(positions, self._places))
        hidden = self._normed(hidden, self._norm)
        for layer in self._layers:
            tokens, width = hidden.shape
            size = width // self._heads
            query, key, value = fn.linear(hidden, *layer.qkv).view(tokens, 3, self._heads, size).unbind(1)
            seen = _attend(query, key, value, places, scale=size**-0.5).view(tokens, width)
            hidden = self._normed(fn.linear(seen, *layer.out).add_(hidden), layer.out_norm)
            hidden = self._normed(fn.linear(self._up(hidden, layer), *layer.down).add_(hidden), layer.down_norm)
        return hidden

    def _normed(self, hidden: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return fn.layer_norm(hidden, norm[0].shape, *norm, self._eps)

    def _up(self, hidden: Tensor, layer: _Layer) -> Tensor:
        weight, bias = layer.up
        if self._fused:  # GELU by tanh, in cuBLASLt's epilogue: off by less than the rounding to half precision
            return torch._addmm_activation(bias, hidden, weight.t(), use_gelu=True)
        return fn.gelu(fn.linear(hidden, weight, bias))


def _weights(*modules: Any) -> tuple[Tensor, Tensor]:
    weights, biases = ([getattr(module, name).detach() for module in modules] for name in ("weight", "bias"))
    return (weights[0], biases[0]) if len(modules) == 1 else (torch.cat(weights), torch.cat(biases))


def _layer(layer: Any) -> _Layer:
    attention = layer.attention
    return _Layer(
        qkv=_weights(attention.self.query, attention.self.key, attention.self.value),
        out=_weights(attention.output.dense),
        out_norm=_weights(attention.output.LayerNorm),
        up=_weights(layer.intermediate.dense),
        down=_weights(layer.output.dense),
        down_norm=_weights(layer.output.LayerNorm),
    )


def dimensions_allowed(config: Any) -> Sequence[int] | None:
    """Dimensions below its own at which a model may be cut (Matryoshka training); None: at any."""
    found = getattr(config, "matryoshka_dimensions", None)
    if found:
        return [int(value) for value in found]
    return None if getattr(config, "is_matryoshka", False) else []
