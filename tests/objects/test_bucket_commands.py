"""What a person does with a bucket: compacts and verifies it, has it encrypted; and the controller's process for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.object_server import Message, TinyS3, environment
from pyworkflow_ray.cli.main import cli
from pyworkflow_ray.crypto import AesGcm
from pyworkflow_ray.engine.events import RunCompleted
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.codec_mark import check_mark, is_marked, make_mark, refuse_clear
from pyworkflow_ray.storage.compact import Rules
from pyworkflow_ray.storage.objects import storage as storages
from pyworkflow_ray.storage.objects.storage import ObjectStorage
from pyworkflow_ray.storage.verify import verify
from tests.journals import created
from tests.objects.compacting import FORGOTTEN, URL, check, everything, run_compaction, write_run

HERE = f"{__name__}:"
SECRET = "a secret of forty bytes, as plain as can be"


def first_key() -> AesGcm:
    return AesGcm({"old": bytes(32)})


def next_key() -> AesGcm:
    return AesGcm({"old": bytes(32), "new": bytes([1] * 32)}, digest_key=first_key().digest_key)


def other_key() -> AesGcm:
    return AesGcm({"other": bytes([2] * 32)})


class KillingS3(TinyS3):
    """Kills a process at one of its requests, which it has done or has not."""

    def __init__(self) -> None:
        self.pid, self.left, self.after = 0, -1, False
        super().__init__()

    async def handle(self, request: Message) -> Message:
        if self.pid:
            self.left -= 1
            if self.left < 0:
                if self.left == -1 and self.after:
                    await super().handle(request)
                if self.left == -1:
                    os.kill(self.pid, signal.SIGKILL)
                return Message("HTTP/1.1 503 Slow Down", {}, b"")
        return await super().handle(request)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KillingS3]:
    server = KillingS3()
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storages, "_buckets", {})
    yield server
    server.close()


def command(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, [*words, "--storage", URL])
    assert result.exit_code == code, result.output
    return result.output


def test_commands_compact_and_verify_a_bucket(server: KillingS3) -> None:
    write_run(ObjectStorage.open(URL), "run", at=1.0)
    assert "would move 1 run, 6 events" in command("storage", "compact", "--dry-run")
    told = command("storage", "compact")
    assert "1 run, 6 events moved into 4 Parquet files" in told
    assert "slots of 1 run in Parquet stay for an hour" in told
    assert "1 run read, 0 with a torn tail, 0 errors" in command("storage", "verify")
    assert "completed" in command("runs", "show", "run")
    assert json.loads(command("storage", "compact", "--json"))["waiting"] == 1
    key = next(key for key in server.objects if "/runs-" in key)
    data, at = server.objects[key]
    server.objects[key] = data[:-1], at
    assert "runs-" in command("storage", "verify", code=1)


KILL = (
    "import sys; from tests.objects.compacting import *\n"
    "storage = ObjectStorage.open(URL, create=False); print('go', flush=True); sys.stdin.readline()\n"
    "run_compaction(storage)"
)


def kill_at(server: KillingS3, request: int, *, after: bool) -> None:
    """A process that compacts, dead at that request of its compaction."""
    process = subprocess.Popen([sys.executable, "-c", KILL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    server.left, server.after, server.pid = request, after, process.pid
    process.communicate("go\n", timeout=60)
    server.pid = 0
    assert process.returncode == -signal.SIGKILL, "the fault did not strike"


@pytest.mark.parametrize(
    "requests", [pytest.param((40,), id="one"), pytest.param(range(0, 88, 5), id="many", marks=pytest.mark.slow)]
)
def test_kill_9_at_a_request_loses_and_doubles_nothing(server: KillingS3, requests: Any) -> None:
    written = everything(ObjectStorage.open(URL))
    before = dict(server.objects)
    for number in requests:
        server.objects.clear()
        server.objects.update(before)
        kill_at(server, number, after=bool(number % 2))
        check(URL, written, FORGOTTEN)
        for _ in range(3):
            run_compaction(ObjectStorage.open(URL))
        check(URL, written)


def test_the_controller_s_process_compacts_a_bucket(server: KillingS3) -> None:
    from pyworkflow_ray.runtime import upkeep
    from pyworkflow_ray.runtime.messages import RuntimeConfig

    storage = ObjectStorage.open(URL)
    write_run(storage, "run", at=1.0)
    over, told = threading.Event(), []

    def start(given: list[str]) -> Any:
        process = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=60)
        told.append((process.returncode, out or err))
        over.set()

        class Done:
            returncode = process.returncode

            def communicate(self) -> tuple[bytes, bytes]:
                return out, err

        return Done()

    config = RuntimeConfig(storage=URL, storage_id=storage.storage_id, compact_after_s=0.001)
    upkeep.Upkeep(config, start)
    assert over.wait(60)
    assert told[0][0] == 0, told
    assert (json.loads(told[0][1])["runs"], json.loads(told[0][1])["waiting"]) == (1, 1)
    assert ObjectStorage.open(URL).is_retired("run")


# Encryption ---------------------------------------------------------------------------------------------------------


def test_a_bucket_is_encrypted_whole_or_not_at_all(server: KillingS3) -> None:
    storage = ObjectStorage.open(URL)
    assert not is_marked(storage)
    refuse_clear(storage, None)
    make_mark(storage, HERE + "first_key")
    make_mark(storage, HERE + "first_key")
    assert is_marked(ObjectStorage.open(URL))
    with pytest.raises(ConfigurationError, match="no codec is set here"):
        refuse_clear(storage, None)
    with pytest.raises(ConfigurationError, match="another key"):
        make_mark(ObjectStorage.open(URL), HERE + "other_key")
    make_mark(storage, HERE + "next_key")
    check_mark(storage, AesGcm({"new": bytes([1] * 32)}, digest_key=first_key().digest_key))


def test_a_bucket_with_clear_runs_takes_no_codec(server: KillingS3) -> None:
    storage = ObjectStorage.open(URL)
    storage.create_run(created("run", storage.storage_id))
    with pytest.raises(ConfigurationError, match="not encrypted, and a codec is set"):
        make_mark(storage, HERE + "first_key")
    assert not is_marked(storage)
    gets = server.requests["GET"]
    refuse_clear(storage, None)  # such a storage never gets one, so nobody asks again
    assert server.requests["GET"] == gets


def test_no_object_holds_a_secret_before_and_after_compaction(server: KillingS3) -> None:
    storage = ObjectStorage.open(URL)
    make_mark(storage, HERE + "first_key")
    codec = StorageCodec(storage, hook=first_key())
    small, large = codec.at("other").encode([SECRET]), codec.at("run").encode([SECRET * 10_000])
    storage.create_run(created("run", storage.storage_id))
    journal, _ = storage.activate("run", "", first=True)
    journal.append([RunCompleted(seq=1, at=1.0, result=large)]).result()
    storage.unlist_finished("run")
    storage.create_run(created("other", storage.storage_id))
    journal, _ = storage.activate("other", "", first=True)
    journal.append([RunCompleted(seq=1, at=1.0, result=small)]).result()
    storage.unlist_finished("other")
    for compacted in (False, True):
        assert storage.is_retired("run") == compacted
        history = storage.read_run("run")
        assert isinstance(history.events[1], RunCompleted)
        assert codec.at("run").decode(history.events[1].result) == [SECRET * 10_000]
        assert not [key for key, (data, _) in server.objects.items() if SECRET.encode() in data]
        assert len([key for key in server.objects if "/blobs/" in key]) == 1
        run_compaction(storage, Rules())
    (key,) = [key for key in server.objects if "/blobs/" in key]
    assert verify(storage).damaged == []
    data, at = server.objects[key]
    server.objects[key] = data[:-1] + bytes([data[-1] ^ 1]), at
    assert [one.run_id for one in verify(storage, codec).damaged] == ["run"]
    assert key.rpartition("/")[2] in verify(storage).damaged[0].path
