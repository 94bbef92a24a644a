"""The table "Errors and retries" of docs/operations.md, made of the code: ``python tests/house/error_table.py``."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

from common.errors import RULES, ExportError, Retry, Tries

REPOSITORY = Path(__file__).parents[2]

HEAD = (
    "| class | codes | told as retryable | a job on this machine | a job on Runpod | a graph of a batch | "
    "a request of the command line | the process after it |"
)


_OURS = ("common", "handler", "control_plane")
_CLASS = re.compile(r"^class (\w+)\((\w+)\):", re.MULTILINE)


@cache
def _declaring() -> tuple[str, ...]:
    """The modules that declare errors, found by their text: others may need what is not installed here."""
    texts = {path: path.read_text(encoding="utf-8") for room in _OURS for path in (REPOSITORY / room).rglob("*.py")}
    errors, found = {"ExportError"}, {"common.errors"}
    while True:
        before = len(errors) + len(found)
        for path, text in texts.items():
            if new := {name for name, base in _CLASS.findall(text) if base in errors}:
                errors |= new
                found.add(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
        if len(errors) + len(found) == before:
            return tuple(sorted(found))


def kinds() -> set[type[ExportError]]:
    """Every error class of the project."""
    for module in _declaring():
        importlib.import_module(module)
    found, new = {ExportError}, [ExportError]
    while new:
        children = [kind for kind in new.pop().__subclasses__() if kind.__module__.split(".")[0] in _OURS]
        found.update(children)
        new += children
    return found


def table() -> str:
    """One line for each class of retry, with its codes and what each stage does."""
    codes: dict[Retry, set[str]] = {}
    before: dict[str, str] = {}
    for kind in kinds():
        codes.setdefault(kind.retry, set()).add(kind.code)
        if kind.before is not None:
            before[kind.code] = _times(kind.before, "")
    lines = [HEAD, "| --- " * 8 + "|"]
    for retry, rule in RULES.items():
        if not codes.get(retry):
            continue
        named = ", ".join(
            f"`{code}`" + (f" (the request was tried {before[code]})" if code in before else "")
            for code in sorted(codes[retry])
        )
        cells = [
            retry.value,
            named,
            "yes" if rule.retryable else "no",
            _times(rule.here, "`MEMVID_EXPORT_MAX_ATTEMPTS` attempts"),
            _times(rule.runpod, "`MEMVID_EXPORT_MAX_ATTEMPTS` attempts"),
            _times(rule.batch, "until it begins"),
            _times(rule.client, ""),
            "is replaced" if rule.fresh else "goes on",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _times(tries: Tries, unbound: str) -> str:
    text = unbound if not tries.most else "once" if tries.most == 1 else f"{tries.most} times"
    if tries.most == 1:
        return text
    if not tries.first_wait:
        return f"{text}, at once"
    if tries.longest_wait <= tries.first_wait:
        return f"{text}, after {tries.first_wait:g} s"
    return f"{text}, after {tries.first_wait:g} s, doubled up to {tries.longest_wait:g} s"


if __name__ == "__main__":
    print(table(), end="")
