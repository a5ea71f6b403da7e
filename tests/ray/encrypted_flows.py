"""Workflows whose every value, error and line of code holds a secret, and the codec that hides it. See
test_encryption; `python encrypted_flows.py STORAGE` runs them all on the cluster of RAY_ADDRESS."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import numpy as np

import pyworkflow_ray as pw
from pyworkflow_ray.crypto import AesGcm

SECRET = "open-sesame-4711-" + "x" * 12
OLD, NEW = bytes(range(32)), bytes(range(32, 64))


def codec() -> AesGcm:
    return AesGcm({"old": OLD})


def rotated() -> AesGcm:
    return AesGcm({"old": OLD, "new": NEW})


def only_new() -> AesGcm:
    return AesGcm({"new": NEW})


class Refused(Exception):
    """Of this module: it is rebuilt from its recipe."""

    def __init__(self, text: str, account: str) -> None:
        super().__init__(text)
        self.account = account


@pw.step
def echo(value: Any) -> Any:
    return value


@pw.step(max_retries=1, retry_delay=2)
def refuse_once(secret: str) -> str:
    """Its second attempt is so far off that the worker is given back: it learns of the first from the journal."""
    step = pw.current_step()
    if step.attempt == 1:
        raise ConnectionError(f"no answer for {secret}")
    return step.previous[0].message


@pw.step
def refuse(secret: str) -> None:
    raise Refused(f"refused {secret}", account=secret)


@pw.step
def item(value: str) -> str:
    if value.endswith("0"):
        raise ValueError(f"not {value}")
    return value * 2


@pw.step
def undo(secret: str) -> str:
    return secret


@pw.workflow
async def all_ways(secret: str, more: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"echo": await echo((secret, more))}
    found["large"] = await echo(secret * 10_000)
    found["array"] = await echo(np.frombuffer((secret * 20_000).encode(), dtype=np.uint8))
    found["previous"] = await refuse_once(secret)
    try:
        await refuse(secret)
    except Refused as error:
        found["error"] = [str(error), error.account, type(error).__name__]
    batch = await item.map([f"{secret}{n}" for n in range(3)], chunk_size=2)
    found["items"] = [str(result) for result in batch.results]
    return found


@pw.workflow
async def fails(secret: str) -> None:
    pw.current_run().on_failure(undo, secret)
    await refuse(secret)


def main(storage: str) -> None:
    secret = SECRET

    @pw.step
    def by_value(text: str) -> str:  # its closure holds the secret
        return text + secret

    @pw.workflow
    async def by_snapshot() -> str:
        return await by_value("-") + await by_value.options(retry_on=lambda error: secret in str(error))("+")

    pw.init(storage=storage, codec="encrypted_flows:codec", redact=["secret"], pool_min=1)
    found = pw.run(all_ways.options(run_id="all"), SECRET, {"inner": [SECRET]})
    handle = pw.start(fails.options(run_id="fails"), SECRET)
    with contextlib.suppress(Exception):
        handle.result()
    again = pw.rerun("fails")
    with contextlib.suppress(Exception):
        again.result()
    code = pw.run(by_snapshot.options(run_id="code"))
    array = bytes(found.pop("array").tobytes()).decode() == SECRET * 20_000
    large = found.pop("large") == SECRET * 10_000
    same = pw.start(all_ways.options(run_id="all"), SECRET, {"inner": [SECRET]}).run_id
    try:
        pw.start(all_ways.options(run_id="all"), SECRET + "!", {"inner": [SECRET]})
        other = "accepted"
    except pw.errors.RunExistsError as error:
        other = str(error)
    print(json.dumps([found, array, large, code, same, other, again.run_id, type(again.exception()).__name__]))


if __name__ == "__main__":
    main(sys.argv[1])
