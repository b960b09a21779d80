"""Tables of records that are made partitioned by the statements of docs/capacity.md."""

from sqlalchemy import Engine, NullPool, create_engine

from tests.documents.reading import REPOSITORY, blocks

PAGE = REPOSITORY / "docs/capacity.md"
PARTITIONED_BY = {"postgresql": "PARTITION BY HASH", "mysql": "PARTITION BY KEY"}


def partitioning(engine: Engine) -> list[str]:
    """The statements that the page shows for this kind of database, in their order."""
    shown = [block.text for block in blocks(PAGE.read_text()) if block.language == "sql"]
    [script] = [text for text in shown if PARTITIONED_BY[engine.dialect.name] in text]
    return [statement.strip() for statement in script.split(";") if statement.strip()]


def partition(url: str) -> None:
    """Have the records that are there partitioned."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        for statement in partitioning(engine):
            connection.exec_driver_sql(statement)
