"""The effects that handlers had: a table with one row for each."""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections import Counter
from typing import Any

from sqlalchemy import Engine, String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.consumers.plan import REFUSED


class Table(DeclarativeBase):
    pass


class Effect(Table):
    __tablename__ = "effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(100), index=True)
    pid: Mapped[int]


class RefusedError(Exception):
    """What a handler raises for a message that can never be handled."""


def effect(key: str, session: Any) -> str:
    """The whole work of a handler that is a plain function."""
    time.sleep(_pause(key))
    return _written(key, session)


async def async_effect(key: str, session: Any) -> str:
    """The whole work of a handler that is a coroutine function."""
    await asyncio.sleep(_pause(key))
    return _written(key, session)


def _written(key: str, session: Any) -> str:
    if key.startswith(REFUSED):
        raise RefusedError
    session.add(Effect(key=key, pid=os.getpid()))
    return f"handled {key}"


def _pause(key: str) -> float:
    """Seconds: one in ten takes its time, so that kills find handlers at work."""
    return 0.3 if zlib.crc32(key.encode()) % 10 == 0 else 0.0


def effects(engine: Engine) -> Counter[str]:
    """How many effects each key had."""
    with Session(engine) as session:
        rows = session.execute(select(Effect.key, func.count().label("number")).group_by(Effect.key))
        return Counter({row.key: row.number for row in rows})


def handled(engine: Engine) -> int:
    """How many keys had an effect so far."""
    with Session(engine) as session:
        return session.scalar(select(func.count(Effect.key.distinct()))) or 0
