"""Hosts that may be read from, and files of keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import InvalidSettings
from common.settings import Settings


def test_hosts_are_taken_apart_and_written_in_one_way(tmp_path: Path) -> None:
    hosts = " A.example, *.B.example ,[2001:db8::1],127.0.0.1,"
    settings = Settings.read({"MEMVID_EXPORT_FETCH_HOSTS": hosts}, dev=True)
    assert settings.fetch_hosts == ("a.example", "*.b.example", "[2001:db8::1]", "127.0.0.1")
    assert list(settings.storage(tmp_path).fetch_hosts) == list(settings.fetch_hosts)


@pytest.mark.parametrize(("content", "says"), [(b" \n", "the file is empty"), (b"\xff\xfe", "can be read")])
def test_a_file_without_a_key_in_it_stops_the_start(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(InvalidSettings, match=f"^MEMVID_EXPORT_API_KEY_FILE must .*{says}") as caught:
        Settings.read({"MEMVID_EXPORT_API_KEY_FILE": str(tmp_path / "key")})
    assert caught.value.details == {"field": "MEMVID_EXPORT_API_KEY_FILE"}
