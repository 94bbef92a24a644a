"""A Vectorizer server in memory, with the wire format and the ways of Vectorizer 3.5.0, for what its adapter asks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from nexus.told_server import Answer, Seen, ToldServer

from control_plane.nexus.records import Vector


def answer(body: object, status: int = 200) -> Answer:
    """As Vectorizer answers."""
    return Answer(status, json.dumps(body).encode())


def missing(name: str) -> Answer:
    """As it answers for a collection that is not there."""
    body = {
        "error_type": "collection_not_found",
        "message": f"Collection not found: {name}",
        "details": {"collection_name": name},
        "status_code": 404,
    }
    return answer(body, 404)


class Points:
    """A collection."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.vectors: dict[str, Vector] = {}
        self.payloads: dict[str, Any] = {}
        self.dead: list[Vector] = []
        """Vectors that were deleted or replaced: they take places among those that are found."""

    def put(self, one: str, vector: Vector, payload: Any) -> None:
        self.take_out(one)
        self.vectors[one] = vector / np.linalg.norm(vector)
        self.payloads[one] = payload

    def take_out(self, one: str) -> bool:
        if one not in self.vectors:
            return False
        self.dead.append(self.vectors.pop(one))
        del self.payloads[one]
        return True

    def search(self, vector: Vector, limit: int) -> list[dict[str, Any]]:
        several = [*self.vectors.values(), *self.dead]
        if not several:
            return []
        names = [*self.vectors, *[None] * len(self.dead)]
        scores = np.stack(several) @ (vector / np.linalg.norm(vector))
        best = np.argsort(-scores)[:limit].tolist()
        return [{"id": int(one), "score": float(scores[at])} for at in best if (one := names[at]) is not None]


class Twin(ToldServer):
    """The server; ``answer`` may be another one than ``usual``."""

    def __init__(self) -> None:
        super().__init__(self.usual)
        self.collections: dict[str, Points] = {}
        self.began = time.monotonic() - 3_600

    def usual(self, seen: Seen) -> Answer:
        """What a server that is well answers."""
        for pattern, act in self._routes.items():
            if found := re.fullmatch(pattern, f"{seen.method} {seen.path}"):
                body = seen.body if seen.raw else {}
                named = [*found.groups(), *([body["collection"]] if "collection" in body else [])]
                if named and named[0] not in self.collections and act not in self._makers:
                    return missing(named[0])
                return answer(act(self, body, *found.groups()))
        raise AssertionError(f"not a request of the adapter: {seen.method} {seen.path}")

    def restart(self) -> None:
        """A server that is started anew holds what it saved, in a new graph of neighbours."""
        self.began = time.monotonic()
        for one in self.collections.values():
            one.dead.clear()

    def _status(self, _: Any) -> object:
        up = int(time.monotonic() - self.began)
        return {"online": True, "version": "3.5.0", "uptime_seconds": up, "collections_count": len(self.collections)}

    def _list(self, _: Any) -> object:
        return {"collections": [{"name": one, "vector_count": 0} for one in self.collections]}

    def _show(self, _: Any, name: str) -> object:
        one = self.collections[name]
        return {"name": name, "dimension": one.dimension, "metric": "Cosine", "vector_count": len(one.vectors)}

    def _delete_collection(self, _: Any, name: str) -> object:
        del self.collections[name]
        return {"message": f"Collection '{name}' deleted successfully"}

    def _make(self, body: Any, name: str) -> object:
        assert body["vectors"]["distance"] == "Cosine"
        self.collections[name] = Points(body["vectors"]["size"])
        return "acknowledged"

    def _insert(self, body: Any) -> object:
        points = self.collections.setdefault(body["collection"], Points(512))
        results: list[dict[str, Any]] = []
        for index, one in enumerate(body["vectors"]):
            told = {"index": index, "client_id": one["id"]}
            if len(one["embedding"]) == points.dimension:
                points.put(one["id"], np.array(one["embedding"], np.float32), one["payload"])
                results.append(told | {"status": "ok", "vector_ids": [one["id"]]})
            else:
                error = f"Invalid embedding: embedding length {len(one['embedding'])} does not match"
                results.append(told | {"status": "error", "error": error, "error_type": "validation_error"})
        failed = sum(one["status"] == "error" for one in results)
        told = {"inserted": len(results) - failed, "failed": failed, "count": len(results)}
        return {"collection": body["collection"], **told, "results": results}

    def _delete(self, body: Any) -> object:
        points = self.collections.get(body["collection"], Points(0))
        gone = [points.take_out(one) for one in body["ids"]]
        results = [
            {"index": index, "id": one, "status": "ok"}
            if there
            else {"index": index, "id": one, "status": "error", "error": f"Vector not found: {one}"}
            for index, (one, there) in enumerate(zip(body["ids"], gone, strict=True))
        ]
        told = {"count": len(gone), "deleted": sum(gone), "failed": len(gone) - sum(gone)}
        return {"collection": body["collection"], **told, "results": results}

    def _points(self, body: Any, name: str) -> object:
        payloads = self.collections[name].payloads
        several = [str(one) for one in body["ids"]]
        found = [{"id": one, "vector": [], "payload": payloads[one]} for one in several if one in payloads]
        return {"result": found}

    def _search(self, body: Any, name: str) -> object:
        points = self.collections[name]
        several = [points.search(np.array(one["vector"], np.float32), one["limit"]) for one in body["searches"]]
        return {"result": [{"result": found} for found in several]}

    def _count(self, _: Any, name: str) -> object:
        return {"result": {"count": len(self.collections[name].vectors)}}

    _routes: ClassVar[dict[str, Callable[..., object]]] = {
        r"GET /status": _status,
        r"GET /collections": _list,
        r"GET /collections/([^/]+)": _show,
        r"DELETE /collections/([^/]+)": _delete_collection,
        r"PUT /qdrant/collections/([^/]+)": _make,
        r"POST /insert_vectors": _insert,
        r"POST /batch_delete": _delete,
        r"POST /qdrant/collections/([^/]+)/points": _points,
        r"POST /qdrant/collections/([^/]+)/points/search/batch": _search,
        r"POST /qdrant/collections/([^/]+)/points/count": _count,
    }
    _makers: ClassVar[list[Callable[..., object]]] = [_make, _insert, _delete]
    """Those that do not mind that a collection is not there."""
