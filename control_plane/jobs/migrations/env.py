"""Runs migrations on the connection that ``control_plane.jobs.database`` hands over."""

from alembic import context

from control_plane.jobs.tables import metadata
from control_plane.nexus import tables  # noqa: F401  # which are part of the same metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
