"""What charts count, in one index by the time of the end: frames of completed jobs, error codes of failed ones."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, and fill them for jobs that have ended."""
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("frames", sa.BigInteger))
        table.add_column(sa.Column("error_code", sa.String(64)))
    if op.get_bind().dialect.name == "postgresql":
        op.execute("UPDATE jobs SET frames = CAST(CAST(manifest AS json) ->> 'frames' AS bigint)")
        op.execute("UPDATE jobs SET error_code = CAST(error AS json) ->> 'code'")
    else:
        op.execute("UPDATE jobs SET frames = json_extract(manifest, '$.frames')")
        op.execute("UPDATE jobs SET error_code = json_extract(error, '$.code')")
    op.create_index("ix_jobs_finished", "jobs", ["status", "finished_at", "frames", "error_code"])
