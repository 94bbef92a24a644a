"""The SQLite index beside a capsule: exact and full-text look-ups without opening the capsule."""
