"""Dockerfiles as data, what the builder would be given, and the build steps run by hand in a folder of their own."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dockerfile_parse import DockerfileParser
from processes import REPOSITORY

UV = REPOSITORY / ".cache" / "uv" / "bin" / "uv"
PYTHON = next(
    path for path in (Path("/usr/bin/python3.11"), Path(sys.base_prefix, "bin", "python3.11")) if path.exists()
)
"""The one that stands in for the image's: the system's, which every user may run, where there is one."""
PLACES = re.compile(r"(?<![\w.])/(build|wheels|opt)(?=/|\s|$)")
"""Folders of an image that steps write to; run by hand they lie under another root."""
SLOW = {"UV_NO_CACHE", "UV_LINK_MODE", "UV_COMPILE_BYTECODE"}
"""What an image wants and a check does not: everything downloaded, copied and compiled again."""


class Step(NamedTuple):
    """One instruction; lines that a backslash continues are one."""

    name: str
    value: str

    @property
    def exec_form(self) -> list[str]:
        """The words of a CMD in its exec form; raises ValueError for another form."""
        words = json.loads(self.value)
        if not isinstance(words, list):
            raise ValueError(self.value)
        return [str(word) for word in words]

    @property
    def options(self) -> dict[str, str]:
        """``--from=crate`` and its like."""
        return dict(re.findall(r"--([a-z-]+)=(\S+)", self.value))

    @property
    def paths(self) -> list[str]:
        """Of a COPY: the sources and, last, where they go."""
        return [word for word in self.value.split() if not word.startswith("--")]


class Stage(NamedTuple):
    """``FROM base AS name`` and what follows."""

    name: str
    base: str
    steps: list[Step]


def stages(name: str) -> dict[str, Stage]:
    """The stages of a Dockerfile of this repository, in order."""
    source = io.BytesIO((REPOSITORY / name).read_bytes())
    found: dict[str, Stage] = {}
    steps: list[Step] = []
    for line in DockerfileParser(fileobj=source, env_replace=False).structure:
        if line["instruction"] == "COMMENT":
            continue
        if line["instruction"] == "FROM":
            base, _, stage = line["value"].partition(" AS ")
            steps = []
            found[stage] = Stage(stage, base, steps)
        else:
            steps.append(Step(line["instruction"], line["value"]))
    return found


def lineage(image: Mapping[str, Stage], name: str) -> list[Stage]:
    """A stage and the stages it grows from, the oldest first."""
    stage = image[name]
    return [*(lineage(image, stage.base) if stage.base in image else []), stage]


def environment(image: Mapping[str, Stage], name: str) -> dict[str, str]:
    """What a stage's ENV instructions set."""
    values: dict[str, str] = {}
    for stage in lineage(image, name):
        for step in stage.steps:
            if step.name == "ENV":
                values |= dict(word.split("=", 1) for word in shlex.split(step.value))
    return values


def last(image: Mapping[str, Stage], name: str, instruction: str) -> Step:
    """The instruction that counts in a stage; raises LookupError where there is none."""
    found = [step for stage in lineage(image, name) for step in stage.steps if step.name == instruction]
    if not found:
        raise LookupError(instruction)
    return found[-1]


def context() -> list[Path]:
    """Files that the builder is given, sorted: .dockerignore leaves everything out, then lets some paths in again, then
    leaves out some names wherever they are. Raises ValueError where it is written in another way."""
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    everything, *patterns = [line for line in lines if line and not line.startswith("#")]
    kept = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    names = [pattern.removeprefix("**/") for pattern in patterns[len(kept) :]]
    if [everything, *patterns] != ["*", *(f"!{path}" for path in kept), *(f"**/{name}" for name in names)]:
        raise ValueError(patterns)
    found = [file for path in kept for file in (REPOSITORY / path, *(REPOSITORY / path).rglob("*")) if file.is_file()]
    given = [file.relative_to(REPOSITORY) for file in found]
    return sorted(
        file for file in given if not any(fnmatch.fnmatchcase(part, name) for part in file.parts for name in names)
    )


class Replay:
    """Runs the COPY and RUN steps of stages as a builder would, under ``root`` in place of ``/``.

    It takes uv, Python and cargo of this machine for those of the images, and uv's cache; what base images and
    apt-get bring is not checked. ``without`` names stages that are left out with all that is copied from them.
    """

    def __init__(self, dockerfile: str, root: Path, *, without: frozenset[str] = frozenset()) -> None:
        self.image = stages(dockerfile)
        self.root = root
        self._without = without | {"uv"}
        self._files = context()
        self._work: dict[str, Path] = {}

    def build(self, name: str) -> None:
        """Run a stage after those that it needs. Raises CalledProcessError with the step's output."""
        for stage in lineage(self.image, name):
            if stage.name not in self._work:
                self._work[stage.name] = self._run(stage, self._work.get(stage.base, self.root))

    def here(self, text: str) -> str:
        """Paths of the image, as they are on this machine."""
        return PLACES.sub(lambda match: f"{self.root}/{match[1]}", text)

    def env(self, name: str) -> dict[str, str]:
        """The environment of a stage, as it is on this machine."""
        path = f"{UV.parent}:{os.environ['PATH']}"
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PYTHON", "VIRTUAL_"))}
        mine |= {"PATH": path, "UV_PYTHON": str(PYTHON)}
        given = {key: self.here(value).replace("$PATH", path) for key, value in environment(self.image, name).items()}
        return mine | {key: value for key, value in given.items() if key not in SLOW}

    def _run(self, stage: Stage, work: Path) -> Path:
        for step in stage.steps:
            if step.name == "WORKDIR":
                work = Path(self.here(step.value))
                work.mkdir(parents=True, exist_ok=True)
            elif step.name == "COPY" and "from" in step.options:
                if step.options["from"] not in self._without:
                    self.build(step.options["from"])
                    if not all(Path(self.here(source)).exists() for source in step.paths[:-1]):
                        raise FileNotFoundError(step.value)
            elif step.name == "COPY":
                *sources, to = step.paths
                for source in sources:
                    self._copy(Path(source), work, to)
            elif step.name == "RUN" and not self._skipped(step):
                command = self.here(step.value)
                done = subprocess.run(
                    ["sh", "-ec", command],
                    cwd=work,
                    env=self.env(stage.name),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(f"RUN {command}\n{done.stdout[-4000:]}")
        return work

    def _skipped(self, step: Step) -> bool:
        return step.value.startswith("apt-get ") or ("crate" in self._without and "/wheels/" in step.value)

    def _copy(self, source: Path, work: Path, to: str) -> None:
        files = [file for file in self._files if file == source or source in file.parents]
        if not files:
            raise FileNotFoundError(f"COPY {source}: the builder is not given it")
        target = work / to
        for file in files:
            inside = file.relative_to(source) if file != source else Path(file.name)
            # A file copied to a name without a slash at its end gets that name.
            path = target if file == source and not to.endswith("/") and not target.is_dir() else target / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / file, path)
