"""A queue of RabbitMQ that gives up a message after so many deliveries, for clients and workers alike."""

from kombu import Exchange, Queue


def limited_queue(name: str, deliveries: int) -> Queue:
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": deliveries}
    return Queue(name, Exchange(name), routing_key=name, queue_arguments=arguments)
