"""The table of how far the consumer groups of Kafka have come, for handlers whose effects are in this database."""

import sqlalchemy as sa
from alembic import context, op

from idem_tasks.stores.schema import ByteText, Instant

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the table."""
    options = context.config.attributes
    op.create_table(
        f"{options['prefix']}watermarks",
        sa.Column("topic", ByteText(249), nullable=False),
        sa.Column("partition", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("consumer_group", ByteText(255), nullable=False),
        sa.Column("next_offset", sa.BigInteger, nullable=False),
        sa.Column("updated_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("topic", "partition", "consumer_group"),
        schema=options["schema"],
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )
