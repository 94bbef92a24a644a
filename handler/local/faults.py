"""Faults on request: what the platform does on a bad day, when it is asked to.

A fault strikes at one kind of moment:

- a public request: ``http-429`` and ``http-500`` (refused, nothing done), ``http-500-after`` and ``cut-connection``
  (done, but the answer is an error, or ends in its middle), ``slow-status`` (answered ``seconds`` late, 2 by default);
- a submission: ``ttl-passed`` (the job is gone ``seconds`` later, as if its ttl had passed), ``no-workers`` (none
  takes a job for ``seconds``, 5 by default);
- a job that a worker takes: ``delivered-twice`` (another worker gets it too), ``worker-death`` (SIGKILL, ``seconds``
  later);
- a progress update: ``late-progress`` (it is applied ``seconds`` later, after newer ones; without them after the
  result, whose output it replaces);
- a result: ``lost-result`` (thrown away: the job stays in progress until its time limit), ``forgotten-result`` (thrown
  away with the job: its status is 404), ``no-output`` (COMPLETED without output), ``delivered-again`` (the finished
  job goes to a worker once more);
- a worker's start: ``cold-start`` (it gets no job for ``seconds``, 5 by default).

``no-workers``, ``worker-death`` and ``ttl-passed`` strike at once where no probability is given and there is something
to strike.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from common.errors import InvalidRequest

FaultName = Literal[
    "http-429",
    "http-500",
    "http-500-after",
    "cut-connection",
    "slow-status",
    "ttl-passed",
    "no-workers",
    "delivered-twice",
    "worker-death",
    "late-progress",
    "lost-result",
    "forgotten-result",
    "no-output",
    "delivered-again",
    "cold-start",
]
Route = Literal["run", "runsync", "status", "cancel", "retry", "health", "purge-queue"]

HTTP_ROUTES = ("run", "status", "cancel")
"""Where faults of requests strike that name no route."""
MAX_FAULTS = 1_000

T = TypeVar("T")


class Fault(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One fault that was asked for. Without ``count`` and ``probability`` it strikes once."""

    fault: FaultName
    count: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """It strikes so often, and is gone then."""
    probability: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    match: str | None = None
    """Only for this job."""
    route: Route | None = None
    """Only for this request."""
    seconds: Annotated[float, msgspec.Meta(ge=0, le=3_600)] | None = None


class Faults:
    """The faults that are asked for now, and how often each has struck."""

    def __init__(self, probabilities: Mapping[str, float], seed: int | None) -> None:
        """Raises InvalidRequest for a name or a probability that there is not."""
        self._random = random.Random(seed)  # noqa: S311 - chance, not secrets
        self._faults: list[Fault] = []
        self._struck: Counter[str] = Counter()
        for name, probability in probabilities.items():
            try:
                fault = msgspec.convert({"fault": name, "probability": probability}, Fault)
            except msgspec.ValidationError as error:
                names = ", ".join(get_args(FaultName))
                message = f"{name}={probability}: no such fault; there are {names}, with a probability up to 1"
                raise InvalidRequest(message, field="fault") from error
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Raises InvalidRequest where there are ``MAX_FAULTS`` already."""
        if len(self._faults) >= MAX_FAULTS:
            raise InvalidRequest(f"more than {MAX_FAULTS:,} faults", field="fault")
        if fault.count is None and fault.probability is None:
            fault.count = 1
        self._faults.append(fault)

    def remove(self, fault: Fault) -> None:
        """Take back one fault; none if it is gone."""
        self._faults = [other for other in self._faults if other is not fault]

    def clear(self) -> None:
        """Take back all."""
        self._faults.clear()

    def strike(self, name: FaultName, *, job: str | None = None, route: str | None = None) -> Fault | None:
        """The fault that strikes now, if one does."""
        for fault in self._faults:
            if fault.fault != name or (fault.match is not None and fault.match != job):
                continue
            if route is not None and (route != fault.route if fault.route else route not in HTTP_ROUTES):
                continue
            if fault.probability is not None and self._random.random() >= fault.probability:
                continue
            self.struck(fault)
            return fault
        return None

    def struck(self, fault: Fault) -> None:
        """Count a strike of this fault."""
        self._struck[fault.fault] += 1
        if fault.count is not None:
            fault.count -= 1
            if fault.count == 0:
                self.remove(fault)

    def standing(self, name: FaultName) -> bool:
        """A fault of this name is there that strikes as long as it is."""
        return any(fault.fault == name and fault.probability is None for fault in self._faults)

    def within(self, seconds: float) -> float:
        """A moment at random, seconds from now."""
        return self._random.uniform(0, seconds)

    def one_of(self, things: list[T]) -> T | None:
        """One at random, None of nothing."""
        return self._random.choice(things) if things else None

    def view(self) -> dict[str, Any]:
        """``{faults: [what is asked for], struck: {name: times}}``."""
        return {"faults": self._faults, "struck": dict(self._struck)}
