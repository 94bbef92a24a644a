"""The tables of jobs, events, idempotency keys and the audit log; JSON lies in text columns, times are milliseconds."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("backend", String(20), nullable=False),
    Column("status", String(10), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("progress", Integer, nullable=False),
    Column("stage_progress", Integer, nullable=False),
    Column("message", Text, nullable=False),
    Column("last_seq", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("lost", Integer, nullable=False),
    Column("weight", BigInteger, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("project_name", Text, nullable=False),
    Column("payload_ref", Text, nullable=False),
    Column("payload_sha256", String(64), nullable=False),
    Column("payload_size", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("expires_at", BigInteger),
    Column("error", Text),
    Column("output", Text),
    Column("manifest", Text),
    Column("profile", String(64), nullable=False),
    Column("base_name", Text, nullable=False),
    Column("owner", String(36)),
    Column("lease_until", BigInteger),
    Column("available_at", BigInteger, nullable=False),
    Column("retries", Integer, nullable=False),
    Column("timeouts", Integer, nullable=False),
    Column("told", Integer, nullable=False),
    Column("runpod_id", String(128)),
    Column("submitted_at", BigInteger),
    Column("secret", String(64), nullable=False),
    Column("frames", BigInteger),
    Column("error_code", String(64)),
    Column("client", String(64), nullable=False),
    Column("trace", String(55), nullable=False),
    Column("retry_of", String(36)),
    Column("read_until", BigInteger, nullable=False),
    Column("damage", Text),
    Index("ix_jobs_status_created", "status", "created_at", "id"),
    Index("ix_jobs_created", "created_at", "id"),
    Index("ix_jobs_owner_status", "owner", "status"),
    Index("ix_jobs_finished", "status", "finished_at", "frames", "error_code"),
    Index("ix_jobs_client_created", "client", "created_at", "id"),
    Index("ix_jobs_retry_of", "retry_of", unique=True),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(36), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("ts", BigInteger, nullable=False),
    Column("type", String(20), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("progress", Integer, nullable=False),
    Column("stage_progress", Integer, nullable=False),
    Column("message", Text, nullable=False),
    Column("meta", Text, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("client", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("job_id", String(36), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("body_sha256", String(64), nullable=False),
    Index("ix_idempotency_keys_job", "job_id"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("ts", BigInteger, nullable=False),
    Column("key", String(64), nullable=False),
    Column("client", String(64), nullable=False),
    Column("address", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("outcome", String(64), nullable=False),
    Column("job_id", String(36)),
    Column("trace", String(32), nullable=False),
    Index("ix_audit_ts", "ts", "id"),
)
