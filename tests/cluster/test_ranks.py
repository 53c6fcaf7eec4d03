"""What ranks and Tune actor are told in a lane's mailbox, without Ray."""

import asyncio

import pytest

from cluster import ranks
from cluster.ranks import Broken, Mailbox, Raised, Reported, Returned, Silence
from tests.errand import errand
from trainables.job import Outcome, Result


def in_mailbox(workers, conversation):
    async def run():
        return await conversation(Mailbox(workers))

    return asyncio.run(run())


def test_all_ranks_get_the_same_job_even_if_one_was_given_up_before_they_asked():
    async def conversation(mailbox):
        first = asyncio.create_task(mailbox.take(0))
        given_up = await mailbox.submit(errand("a"))
        await mailbox.abandon(given_up)
        await mailbox.submit(errand("b"))
        await asyncio.sleep(0)
        return await asyncio.gather(first, mailbox.take(1))

    assert in_mailbox(2, conversation) == [(2, errand("b"))] * 2


BUG = Result(Outcome.BUG, error="e", traceback="t")


def test_ranks_that_disagree_break_the_lane():
    async def conversation(mailbox):
        number = await mailbox.submit(errand())
        await asyncio.gather(mailbox.take(0), mailbox.take(1))
        answers = await asyncio.gather(
            mailbox.meet(0, number, Reported({"epoch": 0})), mailbox.meet(1, number, Raised(BUG))
        )
        return answers, await mailbox.next_event(number, 1)

    assert in_mailbox(2, conversation) == (["broken", "broken"], Broken(BUG))


@pytest.mark.parametrize(
    ("event", "broken"),
    [
        (Raised(BUG), True),
        (Returned(Result(Outcome.INVALID, error="no weights here")), True),
        (Returned(Result(Outcome.INTERRUPTED, error="no time")), True),
        (Returned(Result(Outcome.FINISHED)), False),  # rank 0 still predicts
        (Returned(Result(Outcome.PRUNED)), False),
    ],
)
def test_a_rank_that_has_left_is_not_waited_for(event, broken, monkeypatch):
    """Before: one that returned early left the others in a collective for half an hour."""
    monkeypatch.setattr(ranks, "ALONE_S", 0.05)

    async def conversation(mailbox):
        number = await mailbox.submit(errand())
        await asyncio.gather(mailbox.take(0), mailbox.take(1))
        waiting = asyncio.create_task(mailbox.meet(1, number, event))
        await asyncio.sleep(0.1)
        told = await mailbox.next_event(number, 0.01)
        waiting.cancel()
        return told

    told = in_mailbox(2, conversation)
    assert (told == Broken(event.result)) == broken
    assert isinstance(told, Silence) != broken


def test_out_of_memory_on_any_rank_is_what_the_lane_reports():
    full = Result(Outcome.OUT_OF_MEMORY, error="e")

    async def conversation(mailbox):
        number = await mailbox.submit(errand())
        await asyncio.gather(mailbox.take(0), mailbox.take(1))
        answers = await asyncio.gather(
            mailbox.meet(0, number, Raised(Result(Outcome.BUG, error="peer gone"))),
            mailbox.meet(1, number, Raised(full)),
        )
        return answers, await mailbox.next_event(number, 1)

    assert in_mailbox(2, conversation) == (["broken", "broken"], Broken(full))


def test_ranks_still_busy_with_a_trial_that_was_given_up_hear_so_and_their_events_are_dropped():
    async def conversation(mailbox):
        old = await mailbox.submit(errand())
        await mailbox.take(0)
        await mailbox.abandon(old)
        new = await mailbox.submit(errand())
        answer = await mailbox.meet(0, old, Reported({"epoch": 5}))
        await mailbox.meet(0, old, Returned(Result(Outcome.PRUNED)))
        await mailbox.take(0)
        await mailbox.meet(0, new, Reported({"epoch": 0}))
        return answer, await mailbox.next_event(new, 1)

    assert in_mailbox(1, conversation) == ("abandon", Reported({"epoch": 0}))


@pytest.mark.parametrize("verdict", ["go on", "abandon"])
def test_ranks_wait_for_the_verdict_where_the_trial_may_be_stopped(verdict):
    async def conversation(mailbox):
        number = await mailbox.submit(errand())
        await asyncio.gather(mailbox.take(0), mailbox.take(1))
        waiting = [asyncio.create_task(mailbox.meet(rank, number, Reported({}, awaited=True))) for rank in (0, 1)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await (mailbox.proceed(number) if verdict == "go on" else mailbox.abandon(number))
        return await asyncio.gather(*waiting)

    assert in_mailbox(2, conversation) == [verdict] * 2
