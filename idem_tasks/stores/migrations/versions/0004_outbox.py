"""The table of messages that wait to be sent."""

import sqlalchemy as sa
from alembic import context, op

from idem_tasks.stores.schema import OUTCOME, ByteText, Instant

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table and its index."""
    options = context.config.attributes
    schema, name = options["schema"], f"{options['prefix']}outbox"
    op.create_table(
        name,
        sa.Column("scope", ByteText(191), nullable=False),
        sa.Column("key", ByteText(255), nullable=False),
        sa.Column("fencing_token", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("to", sa.String(100), nullable=False),
        sa.Column("content", OUTCOME, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("due_at", Instant, nullable=False),
        sa.Column("owner", ByteText(64)),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("error_type", sa.String(255)),
        sa.PrimaryKeyConstraint("scope", "key", "fencing_token", "number"),
        schema=schema,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )
    op.create_index(f"{name}_due_at", name, ["due_at"], schema=schema)
