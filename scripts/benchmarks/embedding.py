"""Embedding: texts a second of the engines that run on this machine, beside sentence-transformers' ``encode``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.embedding.choice import Engines
from common.embedding.static import StaticEmbedder
from common.frames.build import frames
from common.frames.embed_text import CODE_V1
from common.graph.canonical import canonical
from common.graph.read import read_graph
from scripts.benchmarks.frames import DAY, graphs

MINILM = "all-MiniLM-L6-v2"
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense multiplications in half precision, FLOP/s, as NVIDIA states them (SXM)."""
BATCHES = (32, 64, 128, 256)


class Shape(NamedTuple):
    """A model, of random weights unless it is MiniLM, and how many texts it gets."""

    name: str
    texts: int
    peer_texts: int
    """The first of them, where the peer would take minutes."""
    kind: str = ""
    config: dict[str, Any] = {}  # noqa: RUF012


_BERT = {"vocab_size": 30_522, "max_position_embeddings": 512}
_BASE = _BERT | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3_072}
_LARGE = _BERT | {"hidden_size": 1_024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4_096}
_DECODER = {
    "vocab_size": 30_522,
    "max_position_embeddings": 4_096,
    "hidden_size": 1_536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8_960,
}
_TINY = _BERT | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
ON_GPU = (
    Shape(MINILM, 170_000, 170_000),
    Shape("shape of bge-base", 60_000, 15_000, "bert", _BASE),
    Shape("shape of bge-large", 30_000, 5_000, "bert", _LARGE),
    Shape("shape of a decoder of 1.5B", 8_000, 2_000, "qwen2", _DECODER),
)
ON_CPU = (Shape(MINILM, 384, 384),)
SHORT = (Shape(MINILM, 24, 24), Shape("tiny shape", 64, 64, "bert", _TINY))


class Compared(NamedTuple):
    """One model, ours and the peer in turn."""

    shape: Shape
    device: str
    precision: str
    packed: bool
    tokens_per_text: float
    ours: list[float]
    """Seconds of each round."""
    theirs: list[float]
    batch: int
    """The peer's best."""
    flop: float
    """Of one round of ours: multiplications and additions of the layers."""
    busy: float
    """Share of the time in which the device worked."""
    cosine: float
    """Least of any text."""

    @property
    def ratio(self) -> float:
        """Texts a second, turn by turn."""
        share = self.shape.texts / self.shape.peer_texts
        return statistics.median(b * share / a for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def flops(self) -> float:
        """FLOP/s of the median round."""
        return self.flop / statistics.median(self.ours)

    @property
    def peak(self) -> float | None:
        """Share of what the device can, where that is known."""
        known = [peak for name, peak in PEAKS.items() if name in self.device]
        return self.flops / known[0] if known and self.precision != "float32" else None


class Timed:
    """A model on a device that measures how long it works on packs: by events of CUDA, or by the clock on a CPU."""

    def __init__(self, runner: Any, device: str) -> None:
        self._runner = runner
        self._cuda = device != "cpu"
        self.packed = runner.packed
        self._spans: list[tuple[Any, Any]] = []

    def run(self, pack: Any, fill: int = 0) -> Any:
        """See ``torch_model.Runner``."""
        begun = self._mark()
        made = self._runner.run(pack, fill)
        self._spans.append((begun, self._mark()))
        return made

    def close(self) -> None:
        """See ``torch_model.Runner``."""
        self._runner.close()

    def seconds(self) -> float:
        """Since it was last asked."""
        spans, self._spans = self._spans, []
        return sum(begun.elapsed_time(ended) / 1e3 if self._cuda else ended - begun for begun, ended in spans)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def texts_of(layout: str, count: int) -> list[str]:
    """Texts as the engines get them, of the real graphs one after the other, then again under another name."""
    return list(islice(_texts(layout), count))


def _texts(layout: str) -> Iterator[str]:
    sources = [canonical(read_graph(path)) for path in graphs()]
    made = [
        frame.embed_text
        for graph in sources
        for frame in frames(graph, generated_at=DAY, layout=layout)
        if frame.embed_text is not None
    ]
    np.random.default_rng(7).shuffle(made)
    yield from made
    copy = 1
    while True:
        yield from (f"copy{copy} {text}" for text in made)
        copy += 1


def static_rate(*, short: bool) -> list[float]:
    """Texts a second of the static engine, each round."""
    texts = texts_of(StaticEmbedder.model.layout, 2_000 if short else 40_000)
    embedder = StaticEmbedder()
    embedder.embed(texts[:64])
    rates = []
    for _ in range(1 if short else 5):
        started = time.perf_counter()
        embedder.embed(texts)
        rates.append(len(texts) / (time.perf_counter() - started))
    return rates


def compare(folder: Path, *, short: bool) -> list[Compared]:
    """The torch engine against ``SentenceTransformer.encode``: the same model, texts, precision and device."""
    import torch

    on_gpu = torch.cuda.is_available()
    if short:
        shapes, rounds, batches = SHORT, 1, BATCHES[:1]
    elif on_gpu:
        shapes, rounds, batches = ON_GPU, 5, (*BATCHES, 512, 1_024)
    else:
        shapes, rounds, batches = ON_CPU, 5, BATCHES
    texts = texts_of(CODE_V1, max(shape.texts for shape in shapes))
    device = "cuda:0" if on_gpu else "cpu"
    return [
        _compare(folder, shape, texts[: shape.texts], device=device, rounds=rounds, batches=batches) for shape in shapes
    ]


def _compare(
    folder: Path, shape: Shape, texts: list[str], *, device: str, rounds: int, batches: Sequence[int]
) -> Compared:
    import torch
    from sentence_transformers import SentenceTransformer

    from common.embedding.torch_engine import TorchEmbedder, find_model
    from common.embedding.torch_model import Loaded, Runner

    engines = Engines(devices=(device,))
    path = _made(folder, shape) if shape.kind else find_model(shape.name, engines)
    timed: list[Timed] = []

    def place(loaded: Loaded, where: str, dimension: int) -> Timed:
        timed.append(Timed(Runner(loaded, where, dimension), where))
        return timed[-1]

    ours, theirs, worked = [], [], []
    with closing(TorchEmbedder(str(path), engines, layout=CODE_V1, place=place)) as embedder:
        dtype = getattr(torch, embedder.model.precision)
        peer = SentenceTransformer(str(path), device=device, model_kwargs={"dtype": dtype})
        sample = texts[: len(texts) // 8 if len(texts) > 64 else None]
        embedder.embed(sample)
        best = min(batches, key=lambda batch: _seconds(peer, sample[:4_096], batch))
        for runner in timed:
            runner.seconds()
        for _ in range(rounds):
            started = time.perf_counter()
            embedded = embedder.embed(texts)
            ours.append(time.perf_counter() - started)
            worked.append(sum(runner.seconds() for runner in timed))
            theirs.append(_seconds(peer, texts[: shape.peer_texts], best))
        wanted = peer.encode(texts[:1_000], batch_size=best, convert_to_tensor=True).float().cpu()
        wanted = torch.nn.functional.normalize(wanted, dim=1).numpy()
        return Compared(
            shape=shape,
            device=torch.cuda.get_device_name() if device != "cpu" else "CPU",
            precision=embedder.model.precision,
            packed=embedder.packed,
            tokens_per_text=embedded.tokens / len(texts),
            ours=ours,
            theirs=theirs,
            batch=best,
            flop=_flop(peer, embedder, texts, embedded.tokens),
            busy=sum(worked) / sum(ours),
            cosine=float((embedded.vectors[:1_000].astype(np.float64) * wanted).sum(axis=1).min()),
        )


def _seconds(peer: Any, texts: list[str], batch: int) -> float:
    started = time.perf_counter()
    peer.encode(texts, batch_size=batch, show_progress_bar=False)
    return time.perf_counter() - started


def _flop(peer: Any, embedder: Any, texts: list[str], tokens: int) -> float:
    """Two for each weight of a linear layer and token; for attention four for each pair of tokens and value, half of
    it where a token sees only those before. Squares of lengths are estimated from 500 texts."""
    import torch

    inner = peer[0].model
    layers = getattr(inner, "encoder", inner)
    weights = sum(module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Linear))
    lengths = np.array([embedder.count_tokens([text]) for text in texts[:500]], dtype=np.float64)
    pairs = float((lengths**2).mean()) * len(texts)
    seen = 0.5 if inner.config.model_type == "qwen2" else 1.0
    return 2.0 * weights * tokens + 4.0 * seen * pairs * inner.config.hidden_size * inner.config.num_hidden_layers


def _made(folder: Path, shape: Shape) -> Path:
    """Random weights, in bfloat16 to be small, with the tokenizer of MiniLM."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    from common.embedding.torch_engine import find_model

    path = folder / shape.name.replace(" ", "-")
    if path.exists():
        return path
    kinds = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2Model),
    }
    config, model = kinds[shape.kind]
    torch.manual_seed(7)
    raw = folder / "raw"
    model(config(**shape.config)).to(torch.bfloat16).save_pretrained(raw)
    transformers.AutoTokenizer.from_pretrained(find_model(MINILM, Engines()), model_max_length=512).save_pretrained(raw)
    pooling = Pooling(shape.config["hidden_size"], "lasttoken" if shape.kind == "qwen2" else "mean")
    SentenceTransformer(modules=[Transformer(str(raw)), pooling], device="cpu").save(str(path))
    return path
