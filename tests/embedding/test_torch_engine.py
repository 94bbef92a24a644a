"""The torch engine against sentence-transformers' own ``encode``, on models that the tests make and a real one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.embedding.choice import Engines
from common.embedding.torch_engine import TorchEmbedder, find_model
from common.errors import Canceled, DeviceFailed, EmbeddingFailed, InvalidRequest
from common.frames.build import frames
from common.graph.canonical import canonical
from common.graph.read import read_graph

torch = pytest.importorskip("torch")
sentence_transformers = pytest.importorskip("sentence_transformers")

from common.embedding.torch_model import Loaded, Pack, Runner  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MINILM = "all-MiniLM-L6-v2"
CPU = Engines(devices=("cpu",))
ODD = ["", " ", "\n\t", "🙂", "\0", "e\u0301", "日本語のテキスト", "[CLS] [SEP] [PAD]", "a", "def f(): ..."]
WORDS = ["def", "class", "return", "parse", "handler", "request", "token", "graph", "node", "edge", "the", "of", "to"]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def texts(real_graphs: dict[str, Path]) -> list[str]:
    """Texts of a real graph, odd ones, and one beyond what the models read."""
    graph = canonical(read_graph(real_graphs["memvid-export.graph.ndjson.gz"]))
    made = [frame.text[:400] for frame in frames(graph, generated_at="2026-01-02T00:00:00.000Z", layout="static-v2")]
    chosen = [*made[:: len(made) // 60], *ODD, "word " * 700]
    random.Random(3).shuffle(chosen)
    return chosen


@pytest.fixture(scope="module")
def minilm() -> Iterator[TorchEmbedder]:
    """The real model, on the CPU."""
    embedder = TorchEmbedder(MINILM, CPU, layout="code-v1")
    yield embedder
    embedder.close()


def save_model(folder: Path, kind: str, pooling: str = "mean", *, dense: int = 0, **more: Any) -> Path:
    """Write a tiny model with random weights, as sentence-transformers writes models. ``more`` goes into its config."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS, "read"])}
    for character in map(chr, range(33, 127)):
        vocabulary.setdefault(character, len(vocabulary))
        vocabulary.setdefault(f"##{character}", len(vocabulary))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=90,
        model_input_names=["input_ids", "attention_mask"],
    )
    torch.manual_seed(7)
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 120,
        "pad_token_id": 1,
        "initializer_range": 0.4,
        **more,
    }
    configs = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
        "modernbert": (transformers.ModernBertConfig, transformers.ModernBertModel),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2Model),
        "mpnet": (transformers.MPNetConfig, transformers.MPNetModel),
    }
    config, model = configs[kind]
    raw = folder / "raw"
    model(config(**sizes)).save_pretrained(raw)
    fast.save_pretrained(raw)
    modules: list[Any] = [Transformer(str(raw)), Pooling(32, pooling)]
    if dense:
        modules.append(Dense(32, dense))
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / kind))
    return folder / kind


def encode(folder: Path, texts: list[str], precision: str = "float32", device: str = "cpu") -> NDArray[np.float32]:
    """Unit vectors as sentence-transformers makes them."""
    model = sentence_transformers.SentenceTransformer(
        str(folder), device=device, model_kwargs={"dtype": getattr(torch, precision)}
    )
    made = model.encode(texts, convert_to_tensor=True).float().cpu()
    return torch.nn.functional.normalize(made, dim=1).numpy()


def least_cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Of any two rows."""
    return float((ours.astype(np.float64) * theirs).sum(axis=1).min())


def test_vectors_of_minilm_equal_those_of_sentence_transformers(texts: list[str], minilm: TorchEmbedder) -> None:
    embedded = minilm.embed(texts)
    assert embedded.vectors.dtype == np.float32
    assert embedded.vectors.shape == (len(texts), 384)
    assert least_cosine(embedded.vectors, encode(find_model(MINILM, CPU), texts)) > 0.99999
    assert np.allclose(np.linalg.norm(embedded.vectors.astype(np.float64), axis=1), 1, atol=1e-6)
    assert [texts[place] for place in embedded.truncated] == [max(texts, key=len)]
    assert embedded.tokens == minilm.count_tokens(texts)
    assert embedded.batches > 1
    assert minilm.packed


def test_a_vector_depends_on_its_own_text_alone(texts: list[str], minilm: TorchEmbedder) -> None:
    together = minilm.embed(texts).vectors
    order = list(range(len(texts)))
    random.Random(5).shuffle(order)
    assert np.abs(minilm.embed([texts[place] for place in order]).vectors - together[order]).max() < 1e-6
    for size in (1, 7):
        some = texts[:21]
        parts = [minilm.embed(some[start : start + size]).vectors for start in range(0, len(some), size)]
        assert np.abs(np.concatenate(parts) - together[:21]).max() < 1e-6


@pytest.mark.parametrize(
    ("kind", "pooling", "more"),
    [
        ("bert", "mean", {}),
        ("bert", "weightedmean", {}),
        ("roberta", "cls", {}),
        ("modernbert", "cls", {"local_attention": 8, "num_hidden_layers": 4}),
        ("qwen2", "lasttoken", {"num_key_value_heads": 2}),
    ],
)
def test_a_model_of_any_architecture_runs_without_padding(
    tmp_path: Path, texts: list[str], kind: str, pooling: str, more: dict[str, Any]
) -> None:
    folder = save_model(tmp_path, kind, pooling, **more)
    embedder = TorchEmbedder(str(folder), CPU, layout="code-v1")
    assert embedder.packed
    embedded = embedder.embed(texts)
    assert least_cosine(embedded.vectors, encode(folder, texts)) > 0.99999
    alone = np.concatenate([embedder.embed([text]).vectors for text in texts[:20]])
    assert np.abs(alone - embedded.vectors[:20]).max() < 1e-6
    assert embedder.model.max_tokens == 90
    embedder.close()


def test_a_model_with_relative_positions_runs_padded(tmp_path: Path, texts: list[str]) -> None:
    folder = save_model(tmp_path, "mpnet")
    padded: list[int] = []

    def place(loaded: Loaded, device: str, dimension: int) -> Watched:
        return Watched(
            Runner(loaded, device, dimension), lambda pack: padded.append(len(pack.lengths) * int(pack.lengths[0]))
        )

    embedder = TorchEmbedder(str(folder), CPU, layout="code-v1", place=place)
    assert not embedder.packed
    embedded = embedder.embed(texts)
    assert max(padded) <= 2_048
    assert least_cosine(embedded.vectors, encode(folder, texts)) > 0.99999
    embedder.close()


def test_a_dense_layer_after_the_pooling_decides_the_dimension(tmp_path: Path, texts: list[str]) -> None:
    folder = save_model(tmp_path, "bert", dense=12)
    embedder = TorchEmbedder(str(folder), CPU, layout="code-v1")
    assert embedder.model.dimension == 12
    assert least_cosine(embedder.embed(texts).vectors, encode(folder, texts)) > 0.99999
    embedder.close()


def test_half_precision_stays_near_the_whole(texts: list[str], minilm: TorchEmbedder) -> None:
    engines = Engines(devices=("cpu",), precision="bfloat16")
    embedder = TorchEmbedder(MINILM, engines, layout="code-v1")
    assert embedder.model.precision == "bfloat16"
    assert least_cosine(embedder.embed(texts[:24]).vectors, minilm.embed(texts[:24]).vectors) > 0.9995
    embedder.close()


def test_a_query_gets_the_prompt_that_its_model_wants(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": {"query": "read the ", "document": ""}}))
    embedder = TorchEmbedder(str(folder), CPU, layout="code-v1")
    asked = embedder.embed(["graph"], purpose="query")
    assert asked.vectors.tobytes() == embedder.embed(["read the graph"]).vectors.tobytes()
    assert asked.tokens == 5
    assert embedder.count_tokens(["graph"]) == 3
    embedder.close()


def test_more_texts_than_a_group_keep_their_places(tmp_path: Path) -> None:
    embedder = TorchEmbedder(str(save_model(tmp_path, "bert")), CPU, layout="code-v1")
    texts = [f"{WORDS[number % 13]} {number}" for number in range(3 * embedder.group + 5)]
    texts[-1] = texts[embedder.group] = "graph " * 200
    embedded = embedder.embed(texts)
    assert embedded.truncated == [embedder.group, len(texts) - 1]
    for place in (0, embedder.group - 1, embedder.group, 2 * embedder.group + 1, len(texts) - 1):
        assert np.abs(embedder.embed([texts[place]]).vectors[0] - embedded.vectors[place]).max() < 1e-6
    assert embedder.count_tokens(texts) == embedded.tokens
    embedder.close()


def test_no_texts_give_an_empty_matrix(minilm: TorchEmbedder) -> None:
    embedded = minilm.embed([])
    assert embedded.vectors.shape == (0, 384)
    assert (embedded.tokens, embedded.truncated, embedded.batches) == (0, [], 0)


def test_two_threads_may_embed_at_once(texts: list[str], minilm: TorchEmbedder) -> None:
    halves = [texts[::2], texts[1::2]]
    found: dict[int, NDArray[np.float32]] = {}
    threads = [
        threading.Thread(target=lambda half=half: found.update({half: minilm.embed(halves[half]).vectors}))
        for half in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for half in (0, 1):
        assert np.abs(found[half] - minilm.embed(halves[half]).vectors).max() < 1e-6


def test_what_should_stop_raises_ends_the_call(tmp_path: Path) -> None:
    calls = []
    begun, go = threading.Event(), threading.Event()

    def stop() -> None:
        calls.append(None)
        if len(calls) > 2:
            raise Canceled("stop")

    def wait(pack: Pack) -> None:
        begun.set()
        go.wait(60)

    embedder, runner = opened(tmp_path, wait)
    with pytest.raises(Canceled):
        embedder.embed(["read the graph"] * 2_000, should_stop=stop)
    assert begun.is_set()
    go.set()
    runner.before = lambda pack: None
    assert embedder.embed(["read"]).vectors.shape == (1, 32)
    assert runner.packs == 2  # nothing of what was stopped ran on
    embedder.close()


class Watched:
    """The real model, on a device that fails when it is told to."""

    def __init__(self, runner: Runner, before: Callable[[Pack], None]) -> None:
        self._runner = runner
        self.packed = runner.packed
        self.before = before
        self.packs = 0
        self.after: Callable[[Any], Any] = lambda vectors: vectors

    def run(self, pack: Pack, fill: int = 0) -> Any:
        self.before(pack)
        self.packs += 1
        return self.after(self._runner.run(pack, fill))

    def close(self) -> None:
        self._runner.close()


def opened(folder: Path, before: Callable[[Pack], None]) -> tuple[TorchEmbedder, Watched]:
    """A tiny model whose device asks ``before`` ahead of each pack, from the first call on."""
    made: list[Watched] = []

    def place(loaded: Loaded, device: str, dimension: int) -> Watched:
        made.append(Watched(Runner(loaded, device, dimension), lambda pack: None))
        return made[0]

    embedder = TorchEmbedder(str(save_model(folder, "bert")), CPU, layout="code-v1", place=place)
    made[0].before = before
    made[0].packs = 0
    return embedder, made[0]


def test_too_little_memory_halves_the_packs_for_good(tmp_path: Path) -> None:
    sizes: list[int] = []

    def small(pack: Pack) -> None:
        sizes.append(len(pack.ids))
        if len(pack.ids) > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    embedder, runner = opened(tmp_path, small)
    texts = [f"read the graph {number}" * 6 for number in range(80)]
    vectors = embedder.embed(texts).vectors
    first = [size for size in sizes if size > 300]
    sizes.clear()
    again = embedder.embed(texts).vectors
    assert [sum(size <= limit for limit in (2_048, 1_024, 512)) for size in first] == [1, 2, 3]
    assert 200 < max(sizes) <= 256
    runner.before = lambda pack: None
    assert np.abs(vectors - again).max() < 1e-6
    assert least_cosine(vectors, encode(tmp_path / "bert", texts)) > 0.99999
    embedder.close()


def test_a_text_that_does_not_fit_alone_fails_the_call(tmp_path: Path) -> None:
    def full(pack: Pack) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    embedder, _ = opened(tmp_path, full)
    with pytest.raises(EmbeddingFailed, match="7 tokens does not fit"):
        embedder.embed(["read the graph to parse"])
    embedder.close()


@pytest.mark.parametrize(
    "failure",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_poisoned_device_fails_this_call_and_all_that_follow(tmp_path: Path, failure: RuntimeError) -> None:
    def broken(pack: Pack) -> None:
        raise failure

    embedder, runner = opened(tmp_path, broken)
    with pytest.raises(DeviceFailed, match="cannot be used"):
        embedder.embed(["read"])
    runner.before = lambda pack: None
    with pytest.raises(DeviceFailed):
        embedder.embed(["read"])
    assert runner.packs == 0
    embedder.close()


def test_another_failure_of_the_model_leaves_the_device_in_use(tmp_path: Path) -> None:
    def broken(pack: Pack) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    embedder, runner = opened(tmp_path, broken)
    with pytest.raises(EmbeddingFailed, match="shapes cannot be multiplied"):
        embedder.embed(["read"])
    runner.before = lambda pack: None
    assert embedder.embed(["read"]).vectors.shape == (1, 32)
    embedder.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_fails_with_the_place_of_its_text(tmp_path: Path, value: float) -> None:
    embedder, runner = opened(tmp_path, lambda pack: None)

    def spoil(vectors: Any) -> Any:
        vectors = vectors.clone()
        vectors[0, 3] = value
        return vectors

    runner.after = spoil
    with pytest.raises(EmbeddingFailed, match="first text 1") as caught:
        embedder.embed(["read", "the longest comes first", "graph"])
    assert caught.value.details["texts"] == [1]
    embedder.close()


def test_several_devices_share_the_texts_and_their_order_stays(tmp_path: Path, texts: list[str]) -> None:
    folder = save_model(tmp_path, "bert")
    usual = TorchEmbedder(str(folder), CPU, layout="code-v1")
    made: list[Watched] = []
    meet = threading.Barrier(2)

    def together(pack: Pack) -> None:
        if not all(runner.packs for runner in made):
            meet.wait(60)  # the first pack of each runs while the other's does

    def place(loaded: Loaded, device: str, dimension: int) -> Watched:
        made.append(Watched(Runner(loaded, device, dimension), lambda pack: None))
        return made[-1]

    shared = TorchEmbedder(str(folder), Engines(devices=("cpu", "cpu")), layout="code-v1", place=place)
    for runner in made:
        runner.packs, runner.before = 0, together
    many = texts * 4
    assert np.abs(shared.embed(many).vectors - usual.embed(many).vectors).max() < 1e-6
    assert all(runner.packs for runner in made)
    shared.close()
    usual.close()


def test_the_revision_follows_what_decides_vectors(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")

    def revision() -> str:
        embedder = TorchEmbedder(str(folder), CPU, layout="code-v1")
        embedder.close()
        return embedder.model.revision

    first = revision()
    assert first.startswith("sha256:")
    (folder / "README.md").write_text("other words")
    assert revision() == first
    path = folder / "1_Pooling" / "config.json"
    path.write_text(path.read_text().replace('"mean"', '"cls"'))
    assert revision() != first


def test_a_smaller_dimension_needs_a_model_trained_for_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    with pytest.raises(InvalidRequest, match="dimension 32, not 8") as caught:
        TorchEmbedder(str(folder), CPU, dimension=8, layout="code-v1")
    assert caught.value.details["field"] == "embedding_dimension"
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "matryoshka_dimensions": [8, 16]}))
    embedder = TorchEmbedder(str(folder), CPU, dimension=8, layout="code-v1")
    vectors = embedder.embed(["read the graph"]).vectors
    assert vectors.shape == (1, 8)
    whole = encode(folder, ["read the graph"])[:, :8]
    assert least_cosine(vectors, whole / np.linalg.norm(whole, axis=1, keepdims=True)) > 0.99999
    with pytest.raises(InvalidRequest):
        TorchEmbedder(str(folder), CPU, dimension=12, layout="code-v1")
    embedder.close()


def test_a_model_is_found_in_a_folder_before_the_package(tmp_path: Path) -> None:
    (tmp_path / MINILM).mkdir()
    (tmp_path / MINILM / "config.json").write_text("{}")
    assert find_model(MINILM, Engines(model_folders=(str(tmp_path),))) == tmp_path / MINILM
    assert (find_model(MINILM, Engines()) / "model.safetensors").is_file()


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=f"no model bge in {tmp_path}/bge") as caught:
        find_model("bge", Engines(model_folders=(str(tmp_path),)))
    assert caught.value.details["field"] == "embedding_model"
    with pytest.raises(InvalidRequest, match="/nowhere/at/all"):
        find_model("/nowhere/at/all", Engines())


@pytest.mark.parametrize("name", ["..", ".", "", "../secret", "a/b", "a\\b", "a\0b", "org/name@main"])
def test_a_name_with_a_path_in_it_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "inner").mkdir()
    for downloads in (False, True):
        with pytest.raises(InvalidRequest, match="is not the name of a model"):
            find_model(name, Engines(model_folders=(str(tmp_path / "inner"),), model_downloads=downloads))


def test_a_model_of_the_hub_is_refused_unless_downloads_are_allowed() -> None:
    with pytest.raises(InvalidRequest, match="is not the name of a model"):
        find_model("org/name@" + "0" * 40, Engines())


def test_a_hub_that_does_not_answer_is_told_as_a_model_that_is_not_here(tmp_path: Path) -> None:
    program = (
        "from common.embedding.choice import Engines\n"
        "from common.embedding.torch_engine import find_model\n"
        "from common.errors import InvalidRequest\n"
        "try:\n"
        f"    find_model('org/name@{'0' * 40}', Engines(model_downloads=True))\n"
        "except InvalidRequest as error:\n"
        "    print(error.message)\n"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("the Hugging Face hub did not give org/name@000"), done.stderr


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InvalidRequest, match="cannot be read"):
        TorchEmbedder(str(tmp_path), CPU, layout="code-v1")


def test_devices_that_are_not_here_are_refused() -> None:
    for devices in (("cuda:77",), ("cuda:77", "cpu"), ("tpu",)):
        with pytest.raises(InvalidRequest, match="cannot be used together here"):
            TorchEmbedder(MINILM, Engines(devices=devices), layout="code-v1")


@needs_cuda
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_on_a_gpu_vectors_equal_those_of_sentence_transformers(texts: list[str], precision: str) -> None:
    embedder = TorchEmbedder(MINILM, Engines(devices=("cuda",), precision=precision), layout="code-v1")
    assert embedder.packed
    bound = 0.99999 if precision == "float32" else 0.9995
    vectors = embedder.embed(texts).vectors
    assert least_cosine(vectors, encode(find_model(MINILM, CPU), texts, device="cuda")) > bound
    assert least_cosine(vectors, encode(find_model(MINILM, CPU), texts, precision, device="cuda")) > bound
    embedder.close()


@needs_cuda
@pytest.mark.parametrize(
    ("kind", "pooling", "more"),
    [
        ("roberta", "cls", {}),
        ("modernbert", "cls", {"local_attention": 8, "num_hidden_layers": 4}),
        ("qwen2", "lasttoken", {"num_key_value_heads": 2}),
    ],
)
def test_on_a_gpu_attention_of_varying_length_keeps_texts_apart(
    tmp_path: Path, texts: list[str], kind: str, pooling: str, more: dict[str, Any]
) -> None:
    folder = save_model(tmp_path, kind, pooling, **more)
    embedder = TorchEmbedder(str(folder), Engines(devices=("cuda",)), layout="code-v1")
    assert embedder.packed
    assert least_cosine(embedder.embed(texts).vectors, encode(folder, texts, device="cuda")) > 0.99
    embedder.close()


@needs_cuda
def test_on_a_gpu_a_text_has_the_same_bits_in_any_batch_from_any_thread(texts: list[str]) -> None:
    embedder = TorchEmbedder(MINILM, Engines(devices=("cuda",)), layout="code-v1")
    together = embedder.embed(texts * 3).vectors
    alone = np.concatenate([embedder.embed([text]).vectors for text in texts])
    assert together.tobytes() == np.concatenate([alone] * 3).tobytes()
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(embedder.embed(texts).vectors.tobytes())) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone.tobytes()] * 2
    embedder.close()
