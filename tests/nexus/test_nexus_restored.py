"""A job store that is put back from a backup, beside a graph that went on: both say the same again."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
from nexus.synced import DIMENSION, Synced, around, meanwhile, synced, tricky

from control_plane.nexus.store import EVERYTHING
from control_plane.operations.backup import backup

CENTRE = around(np.random.default_rng(1), np.zeros(DIMENSION), 1)


async def _looked(parts: Synced) -> None:
    """Sync, with the look that every replica begins with, until nothing is left to do."""
    begun = (await parts.store.state()).verified_at
    async with parts.running(), meanwhile(parts.verifier.run()):
        async with asyncio.timeout(30):
            while (state := await parts.store.state()).verified_at == begun or state.asked or state.progress:
                await asyncio.sleep(0.01)
        await parts.settled()


def test_after_an_older_backup_the_graph_loses_what_came_since_and_gets_back_what_was_there(tmp_path: Path) -> None:
    store, copy = tmp_path / "jobs.sqlite", tmp_path / "copy.sqlite"
    url, rng = f"sqlite+aiosqlite:///{store}", np.random.default_rng(2)

    def near() -> np.ndarray:
        return around(rng, CENTRE, 0.1)

    async def story() -> None:
        with tricky(tmp_path) as graph:
            async with synced(url, graph) as parts:
                notes = await parts.collection()
                await parts.write(notes, **{f"d{n}": (near(), f"see src/d{n}.py") for n in range(6)})
                await _looked(parts)
                backup(url, copy, lambda *_: None)
                saved = dict(parts.vectors), dict(parts.texts)
                await parts.write(notes, e=(near(), "src/d2.py by Ada Lovelace"))
                await parts.write(notes, d0=(-near(), "it is another one"))
                await parts.delete(notes, "d1")
                await parts.write(await parts.collection("later"), f=near())
                async with parts.running():
                    await parts.settled()
                parts.check()
            for path in tmp_path.glob("jobs.sqlite*"):
                path.unlink()
            shutil.copy(copy, store)
            async with synced(url, graph, replica="restored") as parts:
                parts.vectors, parts.texts = saved
                # Its row has a number that the graph knows for another document.
                [new] = (await parts.write(notes, new=-near())).values()
                assert new in graph.read([new])
                assert await parts.store.take_lease()
                await parts.verify()  # which leaves out what is pending, as this one is
                async with parts.running():
                    await parts.settled()
                parts.check()
                report = await parts.verify()
                assert (report.different, report.documents) == ({}, 7)
                assert [one.doc_id for one in await parts.store.get(notes, ["d1", "e"], EVERYTHING)] == ["d1"]

    asyncio.run(story())


def test_after_a_backup_of_before_there_were_documents_the_graph_is_empty_again(tmp_path: Path) -> None:
    store, copy = tmp_path / "jobs.sqlite", tmp_path / "copy.sqlite"
    url = f"sqlite+aiosqlite:///{store}"

    async def story() -> None:
        with tricky(tmp_path) as graph:
            async with synced(url, graph) as parts:
                backup(url, copy, lambda *_: None)
                await parts.write(await parts.collection(), a=(CENTRE, "see src/a.py"), b=CENTRE, c=CENTRE)
                await _looked(parts)
            for path in tmp_path.glob("jobs.sqlite*"):
                path.unlink()
            shutil.copy(copy, store)
            async with synced(url, graph) as parts:
                await parts.write(await parts.collection(), z=(-CENTRE, "see src/z.py"))
                assert await parts.store.take_lease()
                await parts.verify()
                async with parts.running():
                    await parts.settled()
                parts.check()

    asyncio.run(story())
