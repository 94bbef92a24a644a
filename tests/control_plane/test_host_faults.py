"""A short form of the campaign of ``scripts/faults host``: one of each fault."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from host_faults import HOUSES, run


def test_faults_of_the_host_and_of_what_is_stored_lose_nothing_and_serve_nothing_wrong(tmp_path: Path) -> None:
    outcomes = run(tmp_path, 1, seed=7, houses=HOUSES)
    assert [what for outcome in outcomes for what in outcome.broken] == []
    wanted = {"server SIGKILL", "stored file damaged", "job's row damaged", "S3 gone and back"}
    if os.geteuid() == 0:
        wanted |= {"disk full", "disk read-only"}
    if shutil.which("cc"):
        wanted |= {"clock a day ahead", "clock an hour back"}
    assert wanted <= {outcome.fault for outcome in outcomes}
    assert sum(outcome.ends["completed"] for outcome in outcomes) >= len(outcomes) // 2
