"""Batch jobs: many graphs become capsules, on the GPUs or processors of this machine or over a Runpod endpoint.

``python -m control_plane.batch`` (``scripts/batch``). ``sources`` lists and fetches graphs, ``run`` brings each to a
slot of ``local`` or ``runpod`` and keeps the ``journal``, ``board`` shows it.
"""
