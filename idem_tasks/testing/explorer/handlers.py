"""What explored handlers do: an effect outside, or in steps; a row in a session; messages. Each can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from idem_tasks.asking import RERUN, Answer, Outcome
from idem_tasks.claims import Claim, DeadClaim, current_claim
from idem_tasks.testing.explorer.scenario import Behaviour, HandlerFailedError, RetryError
from idem_tasks.testing.stepped import Step

if TYPE_CHECKING:
    from idem_tasks.testing.explorer.processes import Actor
    from idem_tasks.testing.explorer.world import World

WORLD: ContextVar[World] = ContextVar("WORLD")
"""In which a delivery happens."""


def ask_provider(_dead: DeadClaim) -> Answer:
    """Tell whether the effect has happened, as an `on_crash` function does that asks a payment provider."""
    world = WORLD.get()
    happened = world.laws.effect_happened()
    world.laws.provider_answered(happened=happened)
    return Outcome("outcome that the provider tells") if happened else RERUN


def handler_of(world: World, actor: Actor) -> Callable[..., Coroutine[Any, Any, str]]:
    """Return the handler of one delivery."""
    scenario, name, laws = world.scenario, actor.name, world.laws

    async def stop(what: str) -> None:
        await actor.worker.reach(Step("handler", what, "before"))

    async def handler(session: list[str] | None = None) -> str:
        claim = actor.claim = current_claim()
        laws.handler_began(name, claim.fencing_token, taken_over=claim.taken_over, again=actor.has_run)
        actor.has_run = True
        run, behaviours = world.runs, scenario.behaviours
        world.runs += 1
        behaviour: Behaviour = behaviours[run] if run < len(behaviours) else "return"
        if behaviour == "raise before its effect":
            raise failure()
        if behaviour == "retry":
            await stop("publishes the message again")
            world.ready += 1
            raise RetryError
        for message in scenario.messages:
            claim.publish_message(message, to="mail")
        if session is not None:
            await stop("writes its row")
            session.append(name)
        if scenario.steps:
            for step in scenario.steps:
                await in_step(claim, step)
        elif session is None or scenario.policy.doubts:
            await stop("its effect")
            laws.effect(name)
        if behaviour == "raise":
            raise failure()
        await stop("returns")
        if session is None:  # or nothing of it has happened before the commit
            laws.handler_returned(name)
        actor.ran_until = actor.worker.ran_until = world.clock()
        return f"outcome of {name}"

    async def in_step(claim: Claim, step: str) -> None:
        async def fn() -> str:
            laws.step_runs(name, step)
            await stop(f"its effect, in step {step}")
            if step == scenario.steps[0]:
                laws.effect(name)
            return f"{step} by {name}"

        laws.step_returned(name, step, await claim.step(step, fn))

    def failure() -> HandlerFailedError:
        laws.handler_failed(name)
        actor.ran_until = world.clock()
        return HandlerFailedError(f"failure of {name}")

    return handler
