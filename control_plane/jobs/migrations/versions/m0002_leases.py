"""Who drives a job and until when, what a platform calls it, and how often it was tried again."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; jobs that exist are driven by nobody."""
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("profile", sa.String(64), nullable=False, server_default="default"))
        table.add_column(sa.Column("base_name", sa.Text, nullable=False, server_default=""))
        table.add_column(sa.Column("owner", sa.String(36)))
        table.add_column(sa.Column("lease_until", sa.BigInteger))
        table.add_column(sa.Column("available_at", sa.BigInteger, nullable=False, server_default="0"))
        table.add_column(sa.Column("retries", sa.Integer, nullable=False, server_default="0"))
        table.add_column(sa.Column("timeouts", sa.Integer, nullable=False, server_default="0"))
        table.add_column(sa.Column("told", sa.Integer, nullable=False, server_default="0"))
        table.add_column(sa.Column("runpod_id", sa.String(128)))
        table.add_column(sa.Column("submitted_at", sa.BigInteger))
        table.add_column(sa.Column("secret", sa.String(64), nullable=False, server_default=""))
        table.create_index("ix_jobs_owner_status", ["owner", "status"])
