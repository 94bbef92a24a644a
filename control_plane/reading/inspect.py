"""What lies in a capsule on disk, and whether it is whole: the work behind ``inspect`` and ``verify``."""
