"""Mutants of the modules on which the promises rest: how many do the tests notice?

A mutant is a module with one place changed by cosmic-ray: an operator, a number, a condition, a keyword, a decorator.
``scripts/mutation`` draws places by chance and one mutation of each, plants them in a copy of the tree and runs the
tests that are named here for the module. A mutant is killed when a test fails or runs past its time.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import queue
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import MutationVisitor, mutate_and_test
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.toml")
STORE = (
    *("tests/control_plane/test_store_questions.py", "tests/control_plane/test_store.py"),
    *("tests/control_plane/test_leases.py", "-k", "not postgresql and not driven_all_the_same and not taken_up_yet"),
)
SLOW_EXPORTS = (
    *("cancel_at_any_call", "every_form", "each_once", "shuffled", "next_writer", "full_disk", "made_again"),
    *("whom_progress", "replaces_the_set"),
)
"""Tests of the pipeline whose promise a quicker one holds too."""
MODULES: dict[str, tuple[str, ...]] = {
    "common/pipeline.py": (
        *("tests/test_pipeline_figures.py", "tests/test_pipeline.py"),
        *("-k", " and ".join(f"not {name}" for name in SLOW_EXPORTS)),
    ),
    "control_plane/jobs/transitions.py": STORE,
    "control_plane/jobs/store.py": STORE,
}
"""Each module with what pytest is told."""
LIMIT = 240.0
"""Seconds that a mutant's tests may take; without one they take less than 10 on one core that is free."""
KILLED = 0.85
"""The part of the mutants that has to be killed."""


@dataclass(frozen=True)
class Mutant:
    """One module with one place changed."""

    module: str
    spec: MutationSpec
    diff: str
    """Lines taken out and put in."""


@dataclass
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    survived: bool
    timed_out: bool


def mutants(tree: Path, count: int, seed: int) -> list[Mutant]:
    """So many mutants of all modules together, drawn by place: the same ones for the same code and seed."""
    chance = random.Random(seed)
    places: dict[tuple[str, tuple[int, int]], list[MutationSpec]] = {}
    for spec in _specs(tree):
        if not any(start <= spec.start_pos < end for start, end in _never_evaluated(spec.module_path)):
            places.setdefault((str(spec.module_path.relative_to(tree)), spec.start_pos), []).append(spec)
    drawn: list[Mutant] = []
    for place in chance.sample(sorted(places), len(places)):
        specs = sorted(places[place], key=lambda spec: (spec.operator_name, spec.occurrence))
        for spec in chance.sample(specs, len(specs)):
            diff = _diff(spec)
            if diff is not None and not _equivalent(mutant := Mutant(place[0], spec, diff)):
                drawn.append(mutant)
                break
        if len(drawn) == count:
            break
    return drawn


def _specs(tree: Path) -> list[MutationSpec]:
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/session.sqlite", WorkDB.Mode.create) as session:
        init([tree / module for module in MODULES], session, {})
        return [spec for item in session.work_items for spec in item.mutations]


@cache
def _never_evaluated(module: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations stand, which are text to Python (``from __future__ import annotations``)."""
    nodes = list(ast.walk(ast.parse(module.read_text())))
    parts = [part for node in nodes for name in ("annotation", "returns") if (part := getattr(node, name, None))]
    return [((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)) for part in parts]


def _diff(spec: MutationSpec) -> str | None:
    """What the mutation changes; None where Python does not read it (``f(a, &, b)``) or warns of it (``x is "a"``), and
    where it changes only how a function may be called."""
    before = spec.module_path.read_text()
    after = MutationVisitor.mutate_code(before, get_operator(spec.operator_name)(), spec.occurrence)
    with warnings.catch_warnings(action="error"):
        try:
            compile(after, spec.module_path, "exec")
        except SyntaxError:
            return None
    if "BinaryOperator" in spec.operator_name and _operators(before) == _operators(after):
        return None  # the mark in a signature: f(a, *, b)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def _operators(source: str) -> Counter[str]:
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.BinOp | ast.AugAssign))
    return Counter(type(node.op).__name__ for node in found)


@cache
def _known() -> list[dict[str, Any]]:
    return list(tomllib.loads(EQUIVALENT.read_text())["mutant"])


def _equivalent(mutant: Mutant) -> bool:
    """Whether it is listed, with a reason, as one that no test can notice."""
    lines = [line.strip() for line in mutant.diff.splitlines()]
    before = next(line[1:].strip() for line in lines if line.startswith("-"))
    after = next((line[1:].strip() for line in lines if line.startswith("+")), "")
    return any(
        known["file"] == mutant.module and known["line"] == before and known.get("becomes", after) == after
        for known in _known()
    )


class Campaign:
    """Runs mutants, each in a copy of the tree that no other uses meanwhile."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.tree = folder / "tree"
        for name in _files():
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, self.tree / name)
        self._trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            self._trees.put(Path(shutil.copytree(self.tree, folder / f"tree{number}")))

    def check(self, modules: Iterable[str]) -> None:
        """Raise unless the tests of these modules pass where nothing was planted."""
        for arguments in dict.fromkeys(MODULES[module] for module in modules):
            subprocess.run(shlex.split(_command(self.tree, arguments)), check=True, timeout=LIMIT * 4)

    def run(self, mutant: Mutant) -> Outcome:
        """Plant a mutant and run its tests."""
        tree = self._trees.get()
        spec = MutationSpec(
            module_path=tree / mutant.module,
            operator_name=mutant.spec.operator_name,
            occurrence=mutant.spec.occurrence,
            start_pos=mutant.spec.start_pos,
            end_pos=mutant.spec.end_pos,
        )
        result = mutate_and_test([spec], _command(tree, MODULES[mutant.module]), LIMIT)
        self._trees.put(tree)
        if result.worker_outcome != WorkerOutcome.NORMAL:
            raise RuntimeError(f"{mutant.module}: {mutant.diff}\n{result.output}")
        return Outcome(mutant, result.test_outcome == TestOutcome.SURVIVED, result.output == "timeout")


def _files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _command(tree: Path, arguments: tuple[str, ...]) -> str:
    """The tests by the tree's own code: also for the processes that they start."""
    # Most plugins take longer to import than the tests take.
    environment = ["env", "-C", str(tree), f"PYTHONPATH={tree}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1"]
    python = [sys.executable, "-m", "pytest", "-p", "pytest_timeout", "-p", "no:cacheprovider", "-q", "-x", "--tb=no"]
    return shlex.join([*environment, *python, *arguments])


def _table(outcomes: list[Outcome]) -> str:
    lines = [f"{'file':<36}{'mutants':>9}{'killed':>9}{'survived':>10}{'timeouts':>10}{'rate':>9}"]
    for name in (*MODULES, "all"):
        of = [outcome for outcome in outcomes if name in (outcome.mutant.module, "all")]
        survived, late = sum(outcome.survived for outcome in of), sum(outcome.timed_out for outcome in of)
        rate = f"{1 - survived / len(of):9.1%}" if of else f"{'-':>9}"
        lines.append(f"{name:<36}{len(of):>9}{len(of) - survived:>9}{survived:>10}{late:>10}{rate}")
    return "\n".join(lines)


def main() -> None:
    """Draw, plant, run; print the survivors and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=150, help="mutants, of all modules together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once")
    parser.add_argument("--only", choices=tuple(MODULES), help="of the sample those of one module")
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    os.environ.pop("PYTEST_ADDOPTS", None)
    with tempfile.TemporaryDirectory(prefix="memvid-export-mutants-") as folder:
        campaign = Campaign(Path(folder), options.jobs)
        campaign.check([options.only] if options.only else MODULES)
        drawn = [m for m in mutants(campaign.tree, options.sample, options.seed) if options.only in (None, m.module)]
        with ThreadPoolExecutor(options.jobs) as pool:
            for number, outcome in enumerate(pool.map(campaign.run, drawn), start=1):
                outcomes.append(outcome)
                word = "survived" if outcome.survived else "late" if outcome.timed_out else "killed"
                print(f"{number:>4}/{len(drawn)} {word:<9}{outcome.mutant.module}", file=sys.stderr, flush=True)
                if outcome.survived:
                    print(f"survived: {outcome.mutant.module} {outcome.mutant.diff}\n", flush=True)
    print(f"{options.sample} mutants by places drawn with seed {options.seed}\n{_table(outcomes)}")
    if sum(outcome.survived for outcome in outcomes) > len(outcomes) * (1 - KILLED):
        sys.exit(1)


if __name__ == "__main__":
    main()
