"""``python -m handler.local CONFIG`` (a LocalConfig as JSON, whose ``env`` is added to this process's environment)."""

from __future__ import annotations

import os
import sys

import msgspec

from handler.local import LocalConfig, serve, worker_environment

if __name__ == "__main__":
    given = msgspec.json.decode(sys.argv[1], type=LocalConfig)
    serve(msgspec.structs.replace(given, env=worker_environment(os.environ, given.env)))
