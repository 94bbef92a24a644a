"""Where Runpod says that a job has ended: a hint and no more, since anybody could have sent it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from litestar import post
from litestar.handlers import HTTPRouteHandler

from control_plane.errors import JobNotFound
from control_plane.operations.auth import OPEN

if TYPE_CHECKING:
    from control_plane.backends.runpod_queue import RunpodQueue


def hook_route(queue: RunpodQueue) -> HTTPRouteHandler:
    """``POST /v1/hooks/runpod/{jobId}/{secret}``; the body is not read."""

    @post("/v1/hooks/runpod/{job_id:str}/{secret:str}", status_code=200, opt={OPEN: True}, include_in_schema=False)
    async def hook(job_id: str, secret: str) -> None:
        """Look at the job soon."""
        if not await queue.hook(job_id, secret):
            raise JobNotFound("There is no export of this id.")

    return hook
