"""A resume tries the failed step again, and executes nothing a second time that had completed after it failed."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

import pyworkflow_ray as pw

RAN: Counter[str] = Counter()
STATE = {"mended": False}


@pytest.fixture(autouse=True)
def fresh():
    RAN.clear()
    STATE["mended"] = False


@pw.step
async def works(name: str, s: float = 0.0) -> str:
    RAN[name] += 1
    await asyncio.sleep(s)
    return name


@pw.step
async def breaks() -> str:
    RAN["breaks"] += 1
    if not STATE["mended"]:
        raise ValueError("broken")
    return "mended"


@pw.workflow
async def beside_a_failure() -> list[str]:
    async def tidy() -> str:
        try:
            return await breaks()
        finally:
            await works("cleanup", 10)

    async def sibling() -> str:
        return await works("first") + await works("second") + await works("third")

    return list(await asyncio.gather(tidy(), sibling()))


async def test_what_a_sibling_completed_after_the_failure_is_not_executed_again(workflow_env):
    with pytest.raises(ValueError, match="broken"):
        await workflow_env.run(beside_a_failure)
    before = dict(RAN)
    assert before == {"breaks": 1, "first": 1, "second": 1, "third": 1, "cleanup": 1}
    STATE["mended"] = True
    assert await workflow_env.get_run().resume() == ["mended", "firstsecondthird"]
    assert dict(RAN) == {**before, "breaks": 2}


async def test_a_crash_in_the_middle_of_a_resume_executes_none_of_it_again_either(workflow_env):
    with pytest.raises(ValueError, match="broken"):
        await workflow_env.run(beside_a_failure)
    handle = workflow_env.get_run()
    failed = len(handle.events())
    STATE["mended"] = True
    for n in range(1, 12):  # each resume crashes after one more of its events
        STATE["mended"] = False
        with pytest.raises(ValueError, match="broken"):
            await workflow_env.run(beside_a_failure.options(run_id=f"r-{n}"))
        RAN.clear()
        STATE["mended"] = True
        again = workflow_env.get_run(f"r-{n}")
        again._owner.crash_at = failed + n
        assert await again.resume() == ["mended", "firstsecondthird"]
        assert again.crashes == 1
        assert set(RAN) == {"breaks"}


async def test_another_call_at_the_same_place_is_executed(workflow_env):
    @pw.workflow
    async def flow() -> list[str]:
        async def tidy() -> str:
            try:
                return await breaks()
            finally:
                await asyncio.sleep(10)

        async def sibling() -> str:
            await asyncio.sleep(1)
            return await works("mended" if STATE["mended"] else "not yet")

        return list(await asyncio.gather(tidy(), sibling()))

    with pytest.raises(ValueError, match="broken"):
        await workflow_env.run(flow)
    STATE["mended"] = True
    assert await workflow_env.get_run().resume() == ["mended", "mended"]
    assert RAN == {"breaks": 2, "not yet": 1, "mended": 1}
