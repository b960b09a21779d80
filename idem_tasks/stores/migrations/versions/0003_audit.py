"""The audit: what people, and functions given as `on_crash`, did to records."""

import sqlalchemy as sa
from alembic import context, op

from idem_tasks.stores.schema import AUDIT_ID, ByteText, Instant

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table and its index."""
    options = context.config.attributes
    schema, name = options["schema"], f"{options['prefix']}audit"
    op.create_table(
        name,
        sa.Column("id", AUDIT_ID, sa.Identity(), primary_key=True),
        sa.Column("at", Instant, nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("scope", ByteText(191), nullable=False),
        sa.Column("key", ByteText(255), nullable=False),
        sa.Column("state_before", sa.String(9)),
        sa.Column("state_after", sa.String(9)),
        sa.Column("token_before", sa.BigInteger),
        sa.Column("token_after", sa.BigInteger),
        sa.Column("reason", sa.Text),
        schema=schema,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )
    op.create_index(f"{name}_place", name, ["scope", "key"], schema=schema)
