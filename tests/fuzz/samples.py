"""Small real samples of all that is read, and the ways in which they are damaged; the same for the same seed."""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import random
import sqlite3
import struct
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3

CAPSULE = "tiny-gitnexus-mem_capsule-2026-01-02.mv2"
SIDECAR = f"{CAPSULE}.index.v1.sqlite"
MANIFEST = f"{CAPSULE}.manifest.json"
PLAN = "plan.json"
FOOTER = b"MV2FOOT!"
"""Then u64 length of the table of contents before it, its BLAKE3, u64 generation."""
NUMBERS = (0, 1, -1, 127, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1)
ODD_TEXTS = (
    "",
    "\0",
    "\x7f\x1b[2J",
    "\u202eabc",
    "\ufffd\uffff",
    "é" * 300,
    "𝔘" * 70,
    "../../etc/passwd",
    "a" * 9_000,
    "'; DROP TABLE nodes; --",
    "null",
    "NaN",
    "1e999",
    "2026-13-45T99:99:99Z",
)
ODD_BYTES = (
    b"\xff\xfe",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\x00",
    b"\\ud800",
    b"\\u0000",
    b"\xef\xbb\xbf",
)

ODD_BLOBS = (b"", b"\xff" * 7, b"\xff" * 600, b"\0" * 12)
ODD_TOML = (
    *("-1", "0", "9" * 400, "9" * 5_000, "1e400", "nan", "inf", '""', '"\\u0000"', "[]", "{}", "true", "[" * 2_000),
    *("1979-05-27T07:32:00Z", "0x" + "f" * 5_000, '"mon-sun"', '"25-99"', '"../x"', "{a={a={a=1}}}", '"99999999-1"'),
)
KEYS = """# who may ask
[[keys]]
name = "build"
sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
scopes = ["export", "read"]
client = "team"
requests_per_minute = 600
burst = 20
active_jobs = 5
expires = 2030-01-01T00:00:00Z

[[keys]]
name = "desk"
sha256 = "5e884898da28047151d0e56f8dc6292773603d0d6aabbd62a11ef721d1542d8c"
scopes = ["admin"]
"""


def graph() -> dict[str, Any]:
    """A request with one of everything."""
    nodes: list[dict[str, Any]] = [
        {
            "id": f"Function:src/tiny.py:call_{n}",
            "label": "Function",
            "properties": {
                "name": f"call_{n}",
                "filePath": "src/tiny.py",
                "startLine": n,
                "endLine": n + 2,
                "content": f"def call_{n}(user):\n    return value_{n}",
                "communities": ["'comm_0'"],
                "cohesion": 0.5,
            },
        }
        for n in range(5)
    ]
    nodes += [
        {"id": "File:src/tiny.py", "label": "File", "properties": {"name": "tiny.py", "filePath": "src/tiny.py"}},
        {"id": "comm_0", "label": "Community", "properties": {"name": "Calls", "cohesion": 0.7, "symbolCount": 5}},
        {
            "id": "proc_0",
            "label": "Process",
            "properties": {
                "name": "call",
                "processType": "intra",
                "stepCount": 2,
                "entryPointId": "Function:src/tiny.py:call_0",
                "terminalId": "Function:src/tiny.py:call_1",
            },
        },
    ]
    edges = [(n, (n + 1) % 5, "CALLS") for n in range(5)]
    relationships: list[dict[str, Any]] = [
        {
            "id": f"Function:src/tiny.py:call_{a}_{kind}_Function:src/tiny.py:call_{b}",
            "sourceId": f"Function:src/tiny.py:call_{a}",
            "targetId": f"Function:src/tiny.py:call_{b}",
            "type": kind,
            "confidence": 0.9,
            "reason": None,
            "step": 0,
        }
        for a, b, kind in edges
    ]
    for n, (target, kind) in enumerate((("comm_0", "MEMBER_OF"), ("proc_0", "STEP_IN_PROCESS"), ("gone", "CALLS"))):
        source = "Function:src/tiny.py:call_0"
        relationships.append({"id": f"more_{n}", "sourceId": source, "targetId": target, "type": kind, "step": 1})
    return {
        "sessionId": "s",
        "projectName": "tiny",
        "source": {"type": "folder", "baseName": "tiny", "displayName": "Tiny"},
        "nodes": nodes,
        "relationships": relationships,
        "fileContents": {"src/tiny.py": "def call_0(user):\n    return value_0\n"},
        "options": {"semanticEnabled": True, "maxSnippetChars": 1400, "maxNodeFrames": 100, "maxRelationFrames": 100},
    }


def write(folder: Path) -> dict[str, bytes]:
    """Make the samples, by the name of the door that reads them; ``folder`` then has the files that doors need."""
    import msgspec

    from common.capsule.gate import FrameDigest, FrameProbe, Gate, GatePlan, VectorProbe, WordProbe
    from common.capsule.reader import CapsuleReader
    from common.embedding.static import StaticEmbedder
    from common.graph.read import read_graph
    from common.pipeline import export

    plain = json.dumps(graph()).encode()
    with Gate() as gate:
        export(
            read_graph(io.BytesIO(plain)),
            out_dir=folder,
            gate=gate,
            generated_at="2026-01-02T03:04:05.000Z",
            embedder=StaticEmbedder(),
            on_progress=lambda _: None,
            should_stop=lambda: None,
        )
    with CapsuleReader(folder / CAPSULE) as reader:
        digest = FrameDigest()
        (frames,) = reader.all_frames()
        digest.add((frame.uri, frame.title, frame.track, frame.tags, frame.text) for frame in frames)
        found = reader.vectors()
        assert found is not None
        node = next(frame for frame in frames if frame.uri.endswith("call_0"))
        plan = GatePlan(
            path="",
            frames=len(frames),
            exact=True,
            vectors=len(found[0]),
            reader="sdk",
            frame_probes=[FrameProbe(node.uri, node.title, node.track, node.tags, node.text)],
            word_probes=[WordProbe("tiny", node.uri)],
            vector_probes=[VectorProbe(found[1][0].tolist(), frames[int(found[0][0])].uri)],
            frames_sha256=digest.hexdigest(),
            vectors_sha256=hashlib.sha256(found[1].data).hexdigest(),
        )
    (folder / PLAN).write_bytes(msgspec.json.encode(plan))
    lines = [{"type": "node", "data": node} for node in graph()["nodes"]]
    lines += [{"type": "relationship", "data": relation} for relation in graph()["relationships"]]
    capsule = (folder / CAPSULE).read_bytes()
    return {
        "json": plain,
        "gzip": gzip.compress(plain, mtime=0),
        "zstd": zstandard.compress(plain),
        "ndjson": b"".join(json.dumps(line).encode() + b"\n" for line in lines),
        "sidecar": (folder / SIDECAR).read_bytes(),
        "tools": (folder / SIDECAR).read_bytes(),
        "capsule": capsule,
        "gate": capsule,
        "manifest": (folder / MANIFEST).read_bytes(),
        "profiles": (Path(__file__).parents[2] / "examples" / "profiles.toml").read_bytes(),
        "keys": KEYS.encode(),
    }


def damaged(door: str, sample: bytes, chance: random.Random) -> bytes:
    """A case: the sample of a door after some damage that its format knows of, or any."""
    match door:
        case "json" | "manifest":
            known = _document
        case "gzip":
            known = _gzip
        case "zstd":
            known = _zstd
        case "ndjson":
            known = _lines
        case "sidecar" | "tools":
            known = _database
        case "capsule" | "gate":
            known = _sealed
        case _:
            known = _text
    return known(sample, chance) if chance.random() < 0.7 else _bytes(sample, chance)


def _bytes(data: bytes, chance: random.Random) -> bytes:
    """Bits flipped, numbers put anywhere, pieces cut, doubled, moved, filled; once or a few times."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        if not out:
            return bytes(out)
        at = chance.randrange(len(out))
        length = min(chance.choice((1, 2, 4, 8, 64, 1_024)), len(out) - at)
        match chance.randrange(8):
            case 0:
                out[at] ^= 1 << chance.randrange(8)
            case 1:
                out[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                size = chance.choice((2, 4, 8))
                number = chance.choice(NUMBERS) % 2 ** (8 * size)
                out[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))
            case 3:
                del out[at:]
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + length] * chance.choice((1, 2, 100))
            case 6:
                there = chance.randrange(len(out))
                out[there : there + length] = out[at : at + length]
            case _:
                out[at:at] = chance.choice(ODD_BYTES)
    return bytes(out)


def _value(chance: random.Random) -> Any:
    """A JSON value that nobody expects there."""
    match chance.randrange(8):
        case 0:
            return chance.choice(NUMBERS)
        case 1:
            return chance.choice((1e308, -0.0, 1e-320, 0.5, 10 ** chance.choice((19, 30, 300, 4_000))))
        case 2:
            return chance.choice(ODD_TEXTS)
        case 3:
            return chance.choice((None, True, False, [], {}))
        case 4:
            value: Any = chance.choice((0, [], {}))
            for _ in range(chance.choice((10, 63, 64, 65, 150))):
                value = [value] if chance.random() < 0.5 else {"a": value}
            return value
        case 5:
            return [chance.choice(ODD_TEXTS)] * chance.choice((1, 100, 500))
        case 6:
            return {text: text for text in ODD_TEXTS}
        case _:
            return chance.choice(("Function", "CALLS", "src/tiny.py", "comm_0", "2026-01-02"))


def _document(data: bytes, chance: random.Random) -> bytes:
    """Values of a JSON document taken away, replaced, doubled, renamed; then perhaps its text is damaged too."""
    document = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        _change(document, chance)
    text = json.dumps(document, ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass")
    if chance.random() < 0.2:
        number = chance.choice(
            (b"NaN", b"-Infinity", b"1e400", b"1" * 400, b"1" * 5_000, b"[" * 5_000, b"00", b"-", b".5")
        )
        text = text.replace(chance.choice((b"0.9", b"0.5", b" 1,", b" 0}")), number, 1)
    return _bytes(text, chance) if chance.random() < 0.2 else text


def _change(document: Any, chance: random.Random) -> None:
    holders = [holder for holder in _holders(document) if holder]
    if not holders:
        return
    holder = chance.choice(holders)
    key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    match chance.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(ODD_TEXTS)] = holder.pop(key)
        case 2:
            holder[key] = copy.deepcopy(chance.choice(holders))
        case 3 if isinstance(holder, list):
            holder += [holder[key]] * chance.choice((1, 10))
        case _:
            holder[key] = _value(chance)


def _holders(value: Any) -> list[Any]:
    found = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            found.append(one)
            waiting += one.values() if isinstance(one, dict) else one
    return found


def _gzip(data: bytes, chance: random.Random) -> bytes:
    plain = _document(gzip.decompress(data), chance)
    return gzip.compress(plain, 1, mtime=0) + (gzip.compress(b" " * 10_000_000) if chance.random() < 0.02 else b"")


def _zstd(data: bytes, chance: random.Random) -> bytes:
    plain = _document(zstandard.decompress(data), chance)
    return zstandard.compress(plain) + (zstandard.compress(b" " * 40_000_000) if chance.random() < 0.02 else b"")


def _lines(data: bytes, chance: random.Random) -> bytes:
    """Records of a stream taken away, doubled, cut, replaced, changed."""
    lines = data.splitlines(keepends=True)
    for _ in range(chance.choice((1, 2, 5))):
        at = chance.randrange(len(lines))
        match chance.randrange(6):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(chance.randrange(len(lines)), lines[at])
            case 2:
                lines[at] = lines[at].rstrip(b"\n")
            case 3:
                odd = (
                    b"\n",
                    b"{}\n",
                    b"null\n",
                    b'{"type":"error","error":{}}\n',
                    b'{"type":"end"}\n',
                    b'{"type":[]}\n',
                )
                lines[at] = chance.choice(odd)
            case _ if _is_json(lines[at]):
                lines[at] = _document(lines[at], chance) + b"\n"
    return b"".join(lines)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _text(data: bytes, chance: random.Random) -> bytes:
    """Lines of a TOML file, and the values in them."""
    lines = data.decode().splitlines()
    for _ in range(chance.choice((1, 2, 5))):
        at = chance.randrange(len(lines))
        match chance.randrange(4):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(chance.randrange(len(lines)), lines[at])
            case _:
                name, equals, _ = lines[at].partition(" = ")
                lines[at] = name + equals + chance.choice(ODD_TOML)
    return "\n".join(lines).encode()


def _database(data: bytes, chance: random.Random) -> bytes:
    """Rows changed, taken away and added through SQL, so that the file itself is in order."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.deserialize(data)
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOTNULL")]
        if chance.random() < 0.3:  # what the schema forbids, as another program may have written it
            db.execute("PRAGMA writable_schema = ON")
            db.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '')")
            db.execute("PRAGMA writable_schema = RESET")
        for _ in range(chance.choice((1, 1, 2, 5))):
            with suppress(sqlite3.Error, OverflowError):  # the one before may have left no such table
                _statement(db, chance.choice(tables), chance)
        return db.serialize()


def _statement(db: sqlite3.Connection, table: str, chance: random.Random) -> None:
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    if not columns:
        return
    column = chance.choice(columns)
    value = chance.choice((*NUMBERS[:-1], None, 0.5, 1e308, "1", *ODD_TEXTS, *ODD_BLOBS))
    where = "" if chance.random() < 0.3 else f" WHERE {column} = (SELECT {column} FROM {table} LIMIT 1)"
    update = f"UPDATE OR REPLACE {table} SET {column} ="
    what: tuple[tuple[str, tuple[Any, ...]], ...] = (
        (f"{update} ?{where}", (value,)),
        (f"{update} ?{where}", (value,)),
        (f"{update} {column} + ?{where}", (chance.choice((1, -1, 2**31)),)),
        (f"DELETE FROM {table}{where}", ()),
        (f"DROP TABLE {table}", ()),
        (f"ALTER TABLE {table} RENAME COLUMN {column} TO other", ()),
    )
    db.execute(*chance.choice(what))


def _sealed(data: bytes, chance: random.Random) -> bytes:
    """A capsule whose table of contents, or a payload that it names, was changed, with hashes that are right again."""
    end = data.rindex(FOOTER)
    (length,) = struct.unpack_from("<Q", data, end + 8)
    body, toc, rest = data[: end - length], bytearray(data[end - length : end]), data[end + 48 :]
    old = bytes(toc[-32:])
    if chance.random() < 0.25:
        first = next(at for at in range(len(body) // 2, len(body)) if body[at])  # behind the empty log
        at = chance.randrange(first, len(body))
        changed = body[:at] + bytes([body[at] ^ 1 << chance.randrange(8)]) + body[at + 1 :]
        _rehash(body, changed, at, toc)
        body = changed
    else:
        toc = bytearray(_bytes(bytes(toc[:-32]), chance)) + toc[-32:]
    if chance.random() < 0.7:
        toc[-32:] = bytes(32)
        toc[-32:] = blake3(bytes(toc)).digest()
        body = body.replace(old, bytes(toc[-32:]))
    return body + bytes(toc) + FOOTER + struct.pack("<Q", len(toc)) + blake3(bytes(toc)).digest() + rest


def _rehash(body: bytes, changed: bytes, place: int, toc: bytearray) -> None:
    """Put the new hash where the old one stood of each stretch that holds the change and that the table of contents
    names, as u64 offset and length."""
    for at in range(len(toc) - 16):
        offset, length = struct.unpack_from("<QQ", toc, at)
        if offset <= place < offset + length <= len(body):
            stood = toc.find(blake3(body[offset : offset + length]).digest())
            if stood >= 0:
                toc[stood : stood + 32] = blake3(changed[offset : offset + length]).digest()
