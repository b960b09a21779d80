"""The table of records."""

import sqlalchemy as sa
from alembic import context, op

from idem_tasks.stores.schema import FILLFACTOR, OUTCOME, ByteText, Instant

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the table and its indexes."""
    options = context.config.attributes
    schema, name = options["schema"], f"{options['prefix']}records"
    table = op.create_table(
        name,
        sa.Column("scope", ByteText(191), nullable=False),
        sa.Column("key", ByteText(255), nullable=False),
        sa.Column("state", sa.String(9), nullable=False),
        sa.Column("fencing_token", sa.BigInteger, nullable=False),
        sa.Column("owner", ByteText(64), nullable=False),
        sa.Column("fingerprint", sa.String(128)),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.Column("lease_expires_at", Instant, nullable=False),
        sa.Column("outcome", OUTCOME),
        sa.Column("codec", sa.String(100)),
        sa.Column("not_kept", sa.String(20)),
        sa.Column("error_type", sa.String(255)),
        sa.Column("error_message", sa.Text),
        sa.Column("holder", sa.String(255), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("updated_at", Instant, nullable=False),
        sa.Column("completed_at", Instant),
        sa.Column("expires_at", Instant, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("attention", sa.String(8)),
        sa.Column("traceparent", sa.String(55)),
        sa.PrimaryKeyConstraint("scope", "key"),
        schema=schema,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )
    if op.get_context().dialect.name == "postgresql":
        op.execute(FILLFACTOR.against(table))
    is_set = sa.column("attention").is_not(None)
    op.create_index(
        f"{name}_attention", name, ["attention"], schema=schema, postgresql_where=is_set, sqlite_where=is_set
    )
    op.create_index(f"{name}_expires_at", name, ["expires_at"], schema=schema)
