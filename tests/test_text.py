"""Splitting identifiers."""

from __future__ import annotations

import pytest

from common.text import split_identifier


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("getUserById", "get user by id"),
        ("HTTPServer2", "http server 2"),
        ("max_snippet_chars", "max snippet chars"),
        ("__init__", "init"),
        ("XMLHttpRequest", "xml http request"),
        ("userIDs", "user ids"),
        ("v1Beta", "v 1 beta"),
        ("src/foo-bar/x.py", "src foo bar x py"),
        ("ÄpfelBaum", "äpfel baum"),
        ("数据Base", "数据 base"),
        ("", ""),
        ("->*", ""),
        ("aB" * 300, " ".join(["a", *["ba"] * 299, "b"])),
    ],
)
def test_an_identifier_is_split_into_lower_case_words(name: str, words: str) -> None:
    assert split_identifier(name) == words
