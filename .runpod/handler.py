"""Where Runpod's tools look for a worker: the same as ``memvid-export worker``."""

import sys

from control_plane.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["worker", *sys.argv[1:]]
    main()
