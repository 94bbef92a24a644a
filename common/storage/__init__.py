"""Where payloads and artifacts lie: one port, and what stands behind it for each scheme of a ref."""

from common.storage.file import FileStorage
from common.storage.open import open_storage
from common.storage.port import Found, S3Config, Storage, StorageConfig, Stored

__all__ = ["FileStorage", "Found", "S3Config", "Storage", "StorageConfig", "Stored", "open_storage"]
