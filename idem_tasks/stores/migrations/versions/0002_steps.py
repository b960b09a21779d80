"""The journal of steps."""

import sqlalchemy as sa
from alembic import context, op

from idem_tasks.stores.schema import FILLFACTOR, OUTCOME, ByteText, Instant

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table."""
    options = context.config.attributes
    table = op.create_table(
        f"{options['prefix']}steps",
        sa.Column("scope", ByteText(191), nullable=False),
        sa.Column("key", ByteText(255), nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("name", ByteText(255), nullable=False),
        sa.Column("fencing_token", sa.BigInteger, nullable=False),
        sa.Column("outcome", OUTCOME),
        sa.Column("codec", sa.String(100)),
        sa.Column("not_kept", sa.String(20)),
        sa.Column("started_at", Instant, nullable=False),
        sa.Column("finished_at", Instant),
        sa.PrimaryKeyConstraint("scope", "key", "generation", "position"),
        schema=options["schema"],
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )
    if op.get_context().dialect.name == "postgresql":
        op.execute(FILLFACTOR.against(table))
