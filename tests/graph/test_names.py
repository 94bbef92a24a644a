"""File names made from what clients call their source."""

from __future__ import annotations

import pytest

from common.graph import capsule_file_name, safe_base_name


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        ("runpod-python", "runpod-python"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\Users\\me\\repo", "C--Users-me-repo"),
        ("...hidden", "hidden"),
        ("a\nb\x00c\u202ed", "a-b-c-d"),
        ("über café", "über café"),
        ("trailing. ", "trailing"),
        ("\ud800", "graph"),
        ("", "graph"),
        ("///", "graph"),
        ("..", "graph"),
    ],
)
def test_a_base_name_becomes_safe(given: str, safe: str) -> None:
    assert safe_base_name(given) == safe
    assert safe_base_name(safe) == safe


def test_a_long_name_is_cut_between_characters() -> None:
    assert safe_base_name("ü" * 500) == "ü" * 60
    assert safe_base_name("x" + "ü" * 500) == "x" + "ü" * 59
    assert len(capsule_file_name("界" * 500, "2026-11-21").encode()) < 200


def test_a_capsule_is_named_by_base_name_and_day() -> None:
    expected = "a-b-gitnexus-mem_capsule-2026-11-21.mv2"
    assert capsule_file_name("a/b", "2026-11-21") == expected
    assert capsule_file_name("a/b", "2026-11-21T10:00:00.000Z") == expected
