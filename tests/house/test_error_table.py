"""Every error says what another attempt may do about it, and the operator's page says the same."""

from __future__ import annotations

import pytest
from error_table import kinds, table
from processes import REPOSITORY

from common.errors import RULES, ExportError, Retry

PAGE = REPOSITORY / "docs" / "operations.md"
SECTION = "## Errors and retries"


def undecided(found: set[type[ExportError]]) -> list[str]:
    return [kind.__name__ for kind in found - {ExportError} if "code" in vars(kind) and "retry" not in vars(kind)]


def test_every_error_has_a_class_of_retry_that_its_code_alone_decides() -> None:
    assert undecided(kinds()) == []
    by_code: dict[str, set[Retry]] = {}
    for kind in kinds():
        by_code.setdefault(kind.code, set()).add(kind.retry)
    assert {code: found for code, found in by_code.items() if len(found) > 1} == {}


def test_a_new_error_without_a_decision_is_seen() -> None:
    class New(ExportError):
        code = "NEW"

    assert undecided({*kinds(), New}) == ["New"]


def test_whether_an_error_is_told_as_retryable_follows_from_the_table() -> None:
    assert {kind.code: kind.retryable for kind in kinds()} == {
        kind.code: RULES[kind.retry].retryable for kind in kinds()
    }
    with pytest.raises(TypeError, match=r"say retry = Retry"):
        type("Contrary", (ExportError,), {"code": "CONTRARY", "retryable": True})


def test_every_class_has_a_rule_and_an_error() -> None:
    assert set(RULES) == set(Retry) == {kind.retry for kind in kinds()}


def test_pauses_grow_and_are_bounded() -> None:
    for rule in RULES.values():
        for tries in (rule.here, rule.runpod, rule.batch, rule.client):
            waits = [tries.wait(failed) for failed in (1, 2, 3, 10, 10_000)]
            assert waits == sorted(waits)
            assert waits[-1] == tries.longest_wait


def test_the_operators_page_has_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    _, found, section = text.partition(SECTION)
    assert found, f"{PAGE.name} has no section {SECTION}"
    written = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert written == table().splitlines(), f"put there:\n{table()}"
