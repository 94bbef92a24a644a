"""Graphs on this machine: one child process to a slot, bound to one device, with the engine loaded once."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from common.contract import JobInput, Progress, Report
from common.errors import RULES, DeadlineExceeded, DeviceFailed, ExportError, StorageFailed, WorkerLost
from common.storage import Storage
from control_plane.batch.slots import Kept, Plan, Work
from handler.job import MANIFEST_ENDING, files_of, published, ref_of
from handler.process import ChildProcess
from handler.protocol import ChildConfig, Done, Reported, Run


class LocalSlot:
    """A child that exports into ``scratch``; from there its files go to the destination."""

    def __init__(
        self,
        number: int,
        config: ChildConfig,
        plan: Plan,
        *,
        scratch: Storage,
        destination: Storage,
        prefix: str,
        deadline_seconds: float,
    ) -> None:
        """``config.engines`` names the device; the destination's prefix is ``prefix``."""
        self.label = f"worker {number}"
        self.device = ", ".join(config.engines.devices) or "cpu"
        self.strikes = 0
        self._config = config
        self._plan = plan
        self._scratch = scratch
        self._destination = destination
        self._prefix = prefix
        self._deadline = deadline_seconds
        self._child: ChildProcess | None = None

    async def ready(self) -> None:
        """Start a child unless there is one that takes another graph."""
        if self._child is not None and not (self._child.usable and self._child.lean):
            await self.close()
        if self._child is None:
            try:
                self._child = await ChildProcess.start(self._config)
            except (ExportError, OSError) as error:
                self.strikes += 1
                raise WorkerLost(f"{self.label} does not start: {error}") from error

    async def run(self, work: Work, tell: Callable[[Progress], None]) -> Callable[[], Kept]:
        """Run a graph to files in the scratch folder; a child that is not to be used again is ended."""
        child = self._child
        assert child is not None
        limit = self._deadline
        too_long = DeadlineExceeded(f"the export took longer than the {limit:g} seconds that it may", limit=limit)
        deadline = asyncio.get_running_loop().call_later(limit, child.kill, too_long)
        run_id = secrets.token_hex(8)
        made = (Path(self._config.scratch) / "made" / run_id).as_uri() + "/"
        job = JobInput(
            job_id=run_id,
            payload_ref=work.payload.path.as_uri(),
            payload_sha256=work.payload.sha256,
            payload_size=work.payload.size,
            output_prefix=made,
            options=self._plan.options,
            source=work.graph.origin,
        )
        done = False
        try:
            await child.send(Run(job=job, generated_at=self._plan.generated_at))
            while not isinstance(message := await child.receive(), Done):
                if isinstance(message, Reported):
                    tell(message.progress)
            done = True
        except ExportError as error:
            self.strikes = self.strikes + 1 if isinstance(error, DeviceFailed) else 0
            if RULES[error.retry].fresh:
                await self.close()
            raise
        finally:
            deadline.cancel()
            if not done:  # a child that was killed left its files
                await asyncio.to_thread(self._discard, run_id)
        self.strikes = 0
        report = msgspec.convert(message.output.metrics, Report)
        return partial(self._keep, work, made, report)

    def _keep(self, work: Work, made: str, report: Report) -> Kept:
        """Put the files to the destination, the manifest last. Manifests that are there go first: at no moment does one
        name files of another export."""
        try:
            found = published(self._scratch, made, "")
            if found is None:
                raise StorageFailed("the files of the export are gone from the scratch folder")
            folder = Path(self._config.scratch)
            below = f"{quote(work.graph.name)}/"
            prefix = self._prefix + below
            manifest = unquote(found.output.manifest_ref.rpartition("/")[2])
            files: dict[str, str | None] = {name: sha256 for name, _, sha256 in files_of(found.manifest)}
            for name in {manifest, *(work.before.files if work.before else ())}:
                if name.endswith(MANIFEST_ENDING):
                    self._destination.delete(ref_of(prefix, name))
            sizes = {}
            for name, sha256 in [*files.items(), (manifest, None)]:
                path = self._scratch.local(ref_of(made, name), folder)
                sizes[name] = self._destination.put(path, ref_of(prefix, name), sha256=sha256).size
            return Kept(below, sizes, report)
        finally:
            self._scratch.delete(made)

    def _discard(self, run_id: str) -> None:
        scratch = Path(self._config.scratch)
        for left in (scratch / f"{run_id}-1", scratch / "made" / run_id):
            shutil.rmtree(left, ignore_errors=True)

    async def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            await child.close()
