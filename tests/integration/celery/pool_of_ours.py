"""A pool that is not Celery's, as those are that await coroutines; named by CELERY_CUSTOM_WORKER_POOL."""

from celery.concurrency.solo import TaskPool as Solo


class TaskPool(Solo):  # type: ignore[misc] # Celery is untyped
    """The start of a worker looks at nothing but where it comes from."""
