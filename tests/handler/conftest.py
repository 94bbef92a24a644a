"""The S3 server that these tests share."""

from services import s3

__all__ = ["s3"]
