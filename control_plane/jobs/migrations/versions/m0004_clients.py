"""Whose a job is, what it belongs to, who reads it, what was found wrong with it; and who did what."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Jobs of before belong to ``default``, the client of the one key that there was."""
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("client", sa.String(64), nullable=False, server_default="default"))
        table.add_column(sa.Column("trace", sa.String(55), nullable=False, server_default=""))
        table.add_column(sa.Column("retry_of", sa.String(36)))
        table.add_column(sa.Column("read_until", sa.BigInteger, nullable=False, server_default="0"))
        table.add_column(sa.Column("damage", sa.Text))
    op.create_index("ix_jobs_client_created", "jobs", ["client", "created_at", "id"])
    op.create_index("ix_jobs_retry_of", "jobs", ["retry_of"], unique=True)
    op.rename_table("idempotency_keys", "old_idempotency_keys")
    op.drop_index("ix_idempotency_keys_job", "old_idempotency_keys")
    op.create_table(
        "idempotency_keys",
        sa.Column("client", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("job_id", sa.String(36), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("body_sha256", sa.String(64), nullable=False),
    )
    op.execute(
        "INSERT INTO idempotency_keys (client, key, job_id, body_sha256) "
        "SELECT 'default', key, job_id, body_sha256 FROM old_idempotency_keys"
    )
    op.drop_table("old_idempotency_keys")
    op.create_index("ix_idempotency_keys_job", "idempotency_keys", ["job_id"])
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("ts", sa.BigInteger, nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("client", sa.String(64), nullable=False),
        sa.Column("address", sa.String(64), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("outcome", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(36)),
        sa.Column("trace", sa.String(32), nullable=False),
    )
    op.create_index("ix_audit_ts", "audit", ["ts", "id"])
