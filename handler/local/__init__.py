"""A local Runpod: the platform's public API and its side of the workers, over HTTP, for tests and for people without
an account. Workers and clients are the unmodified ``runpod`` package.

``server`` speaks HTTP, ``endpoint`` keeps the jobs (``job``), ``fleet`` the worker processes, ``faults`` says what
goes wrong on request. State is in memory and bounded. It needs the extra ``worker``.
"""

from handler.local.config import LocalConfig, worker_environment
from handler.local.server import LocalRunpod, serve

__all__ = ["LocalConfig", "LocalRunpod", "serve", "worker_environment"]
