"""Run by Alembic: applies the revisions to the connection, schema and prefix that `upgrade` gave."""

from alembic import context

options = context.config.attributes
context.configure(
    connection=options["connection"],
    # One of our own, so that the application's alembic_version is left alone.
    version_table=f"{options['prefix']}schema",
    version_table_schema=options["schema"],
)
with context.begin_transaction():
    context.run_migrations()
