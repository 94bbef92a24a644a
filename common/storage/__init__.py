"""Where payloads and artifacts lie: one port, and its implementation over files."""

from common.storage.file import FileStorage
from common.storage.port import Storage, Stored

__all__ = ["FileStorage", "Storage", "Stored"]
