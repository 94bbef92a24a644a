"""What the Dockerfiles promise, as far as it can be seen without a builder."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from images import Replay, Stage, Step, context, last, lineage, stages
from processes import REPOSITORY, free_port

from common.settings import Settings

FINAL = [("Dockerfile.api", "api"), ("Dockerfile.api", "local-runpod"), ("Dockerfile.gpu", "worker")]
DOCKERFILES = ["Dockerfile.api", "Dockerfile.gpu"]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
FOREIGN = re.compile(r"^(AWS_|HF_|PATH$|PYTHON|UV_)")
"""Variables of others that an image may set."""
SETTINGS = {str(field.validation_alias) for field in Settings.model_fields.values() if field.validation_alias}


def steps(dockerfile: str, name: str | None = None) -> list[Step]:
    return [step for stage in stages(dockerfile).values() for step in stage.steps if name is None or step.name == name]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_linter_of_dockerfiles_has_nothing_to_say(dockerfile: str) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [linter, "--no-color", "--failure-threshold", "style", REPOSITORY / dockerfile],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_every_base_is_a_full_version_or_a_stage(dockerfile: str) -> None:
    image = stages(dockerfile)
    bases = {stage.base for stage in image.values() if stage.base not in image}
    tags = {base: base.partition(":")[2] for base in bases}
    assert [base for base, tag in tags.items() if not re.match(r"^\d+\.\d+", tag) or "latest" in tag] == []


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_every_step_copies_what_the_builder_is_given(dockerfile: str) -> None:
    given = context()
    copied = [path for step in steps(dockerfile, "COPY") if "from" not in step.options for path in step.paths[:-1]]
    missing = [path for path in copied if not any(file.is_relative_to(path) for file in given)]
    assert copied
    assert missing == []


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_every_copy_from_a_stage_names_one_that_came_before(dockerfile: str) -> None:
    before: set[str] = set()
    for stage in stages(dockerfile).values():
        sources = {step.options["from"] for step in stage.steps if step.name == "COPY" and "from" in step.options}
        assert sources <= before
        before.add(stage.name)


def test_the_builder_is_given_sources_and_nothing_else() -> None:
    given = context()
    tops = {path.parts[0] for path in given}
    assert tops == {
        "LICENSE", "README.md", "common", "control_plane", "examples", "handler", "native", "pyproject.toml",
        "test_input.json", "uv.lock",
    }  # fmt: skip
    assert sum((REPOSITORY / path).stat().st_size for path in given) < 8 << 20
    assert [path for path in given if path.suffix in (".pyc", ".so", ".env", ".pem", ".key")] == []


@pytest.mark.parametrize(("dockerfile", "target"), FINAL)
def test_a_finished_image_runs_one_command_as_nobody_special(dockerfile: str, target: str) -> None:
    image = stages(dockerfile)
    words = last(image, target, "CMD").exec_form
    assert words[0] == "memvid-export"
    assert last(image, target, "USER").value == "10001:10001"
    assert last(image, target, "STOPSIGNAL").value == "SIGTERM"
    assert last(image, target, "HEALTHCHECK").value
    assert last(image, target, "WORKDIR").value.startswith("/")


@pytest.mark.parametrize(("dockerfile", "target"), FINAL)
def test_a_finished_image_is_labelled_as_this_version(dockerfile: str, target: str) -> None:
    image = stages(dockerfile)
    labels = last(image, target, "LABEL").value
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    arguments = [step.value for step in image[lineage(image, target)[0].name].steps if step.name == "ARG"]
    assert f"VERSION={PROJECT['project']['version']}" in arguments


@pytest.mark.parametrize(("dockerfile", "target"), FINAL)
def test_no_tool_of_the_build_reaches_a_finished_image(dockerfile: str, target: str) -> None:
    image = stages(dockerfile)
    for stage in lineage(image, target):
        assert not re.search(r"rust|uv:", stage.base)
        runs = " ".join(step.value for step in stage.steps if step.name == "RUN")
        assert not re.search(r"\b(apt-get|pip|uv|cargo|gcc|sudo|curl)\b", runs)
        taken = [
            path for step in stage.steps if step.name == "COPY" and "from" in step.options for path in step.paths[:-1]
        ]
        assert all(path.startswith("/opt/") for path in taken)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_is_locked_is_installed_before_our_own_code_is_copied(dockerfile: str) -> None:
    image = stages(dockerfile)
    names = [step.name + " " + step.value for stage in lineage(image, "program") for step in stage.steps]
    locked = next(n for n, text in enumerate(names) if "uv sync --frozen --no-dev --no-install-project" in text)
    ours = next(n for n, text in enumerate(names) if text == "COPY common common")
    assert locked < ours
    for stage in image.values():
        for step in stage.steps:
            if "uv sync" in step.value:
                assert "--frozen" in step.value
                assert "--no-dev" in step.value


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_no_variable_of_an_image_is_unknown_or_a_secret(dockerfile: str) -> None:
    names = {word.split("=")[0] for step in steps(dockerfile, "ENV") for word in step.value.split() if "=" in word}
    assert [name for name in sorted(names - SETTINGS) if not FOREIGN.match(name)] == []
    assert [name for name in names if re.search(r"KEY|SECRET|TOKEN|PASSWORD", name)] == []


def test_images_and_checkouts_are_made_by_the_same_tools() -> None:
    setup = (REPOSITORY / "scripts" / "setup").read_text(encoding="utf-8")
    found = re.search(r"^UV_VERSION=(.+)$", setup, re.MULTILINE)
    assert found
    crate = tomllib.loads((REPOSITORY / "native" / "Cargo.toml").read_text(encoding="utf-8"))["package"]
    maturin = next(line for line in PROJECT["tool"]["uv"]["build-constraint-dependencies"] if "maturin" in line)
    for dockerfile in DOCKERFILES:
        image = stages(dockerfile)
        assert image["uv"].base == f"ghcr.io/astral-sh/uv:{found[1]}"
        assert image["crate"].base.startswith(f"rust:{crate['rust-version']}-")
        assert f"maturin@{maturin.rpartition('=')[2]} " in last(image, "crate", "RUN").value


def test_both_images_build_the_crate_and_take_their_files_in_the_same_way() -> None:
    api, gpu = (stages(name) for name in DOCKERFILES)
    assert api["crate"] == gpu["crate"]
    assert _copies(api["program"]) == _copies(gpu["program"])


def _copies(stage: Stage) -> list[str]:
    return [step.value for step in stage.steps if step.name == "COPY"]


def test_the_model_is_named_by_revision_and_hash_and_never_fetched_at_run_time() -> None:
    image = stages("Dockerfile.gpu")
    arguments = dict(step.value.split("=") for step in image["model"].steps if step.name == "ARG")
    assert re.fullmatch(r"[0-9a-f]{40}", arguments["MODEL_REVISION"])
    assert re.fullmatch(r"[0-9a-f]{64}", arguments["MODEL_SHA256"])
    fetch = last(image, "model", "RUN").value
    assert '--revision "$MODEL_REVISION"' in fetch
    assert "sha256sum --check" in fetch
    assert "HF_HUB_OFFLINE=1" in last(image, "worker", "ENV").value


def test_the_gpu_extra_is_locked_for_linux_and_no_other_install_holds_torch() -> None:
    replay = Replay("Dockerfile.gpu", Path("/nowhere"))
    exports = {
        extras: subprocess.run(
            ["uv", "export", "--frozen", "--no-dev", "--no-hashes", "--no-emit-project", *extras],
            cwd=REPOSITORY,
            env=replay.env("dependencies"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extras in [(), ("--extra", "worker"), ("--extra", "worker", "--extra", "gpu")]
    }
    has = {extras: {name for name in ("torch", "runpod") if f"\n{name}==" in text} for extras, text in exports.items()}
    assert list(has.values()) == [set(), {"runpod"}, {"torch", "runpod"}]


# --- Dockerfile.api, its steps run by hand -------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """All that Dockerfile.api installs from the lock, but the crate, which scripts/check-images builds."""
    replay = Replay("Dockerfile.api", tmp_path_factory.mktemp("image"), without=frozenset({"crate"}))
    replay.build("program")
    return replay


@pytest.fixture
def server(installed: Replay, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``serve --dev`` out of the image's folder, with nothing of this checkout."""
    port = free_port()
    env = _clean(installed) | {
        "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{port}",
        "MEMVID_EXPORT_ROOT": str(tmp_path / "data"),
    }
    (tmp_path / "home").mkdir()
    command = [installed.here("/opt/memvid-export/bin/memvid-export"), "serve", "--dev"]
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path / "home", env=env, stdout=output, stderr=output)
    try:
        for _ in range(600):
            if process.poll() is not None or b"listens on" in log.read_bytes():
                break
            signal.sigtimedwait([], 0.05)
        assert process.poll() is None, log.read_text(encoding="utf-8")
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _clean(installed: Replay) -> dict[str, str]:
    """The variables of the image, and none of whoever runs the tests."""
    image = installed.env("api")
    names = ("PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
    return {name: image[name] for name in names} | {"HOME": "/nonexistent"}


def test_the_image_of_the_control_plane_imports_with_neither_torch_nor_runpod_nor_tests(installed: Replay) -> None:
    script = (
        "import control_plane.cli, control_plane.app, importlib.util as u; "
        "print([n for n in ('torch', 'runpod', 'pytest') if u.find_spec(n)], control_plane.__file__)"
    )
    done = subprocess.run(
        [installed.here("/opt/memvid-export/bin/python"), "-c", script],
        cwd="/",
        env=_clean(installed),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    found, where = done.stdout.strip().split(" ")
    assert found == "[]"
    assert Path(where).is_relative_to(installed.root)


def test_the_image_of_the_control_plane_shows_its_help(installed: Replay) -> None:
    command = [installed.here("/opt/memvid-export/bin/memvid-export"), "--help"]
    done = subprocess.run(command, cwd="/", env=_clean(installed), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_the_image_of_the_control_plane_answers_is_healthy_and_stops_in_order(
    installed: Replay, server: tuple[subprocess.Popen[bytes], str]
) -> None:
    process, url = server
    before = _written(installed)
    assert httpx.get(f"{url}/healthz").json()["ok"] is True
    assert "text/html" in httpx.get(f"{url}/").headers["content-type"]
    check = last(installed.image, "api", "HEALTHCHECK").value.partition("CMD ")[2]
    command = Step("CMD", check).exec_form
    healthy = _clean(installed) | {"MEMVID_EXPORT_BIND_ADDR": url.removeprefix("http://")}
    assert subprocess.run(command, env=healthy, check=False).returncode == 0
    sick = healthy | {"MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{free_port()}"}
    assert subprocess.run(command, env=sick, capture_output=True, check=False).returncode == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert _written(installed) == before


def _written(installed: Replay) -> set[tuple[str, int]]:
    tree = Path(installed.here("/opt/memvid-export"))
    return {(str(path), path.stat().st_mtime_ns) for path in tree.rglob("*") if path.is_file()}
