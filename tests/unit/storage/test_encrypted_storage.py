"""A storage that is written through a codec: who is refused, what damage is named, what a missing key does to a run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.crypto import AesGcm
from pyworkflow_ray.engine.commands import Append, Dispatch, Pause
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import CodeRef, Payload, RunActivated, RunCompleted
from pyworkflow_ray.errors import CodecKeyError, ConfigurationError, CorruptJournalError, PayloadError
from pyworkflow_ray.execution.submission import make_rerun
from pyworkflow_ray.settings import load_settings
from pyworkflow_ray.step import step
from pyworkflow_ray.storage import codec_mark
from pyworkflow_ray.storage.codec import SPILL_BYTES, StorageCodec
from pyworkflow_ray.storage.codec_mark import MARK, check_mark, load_hook, make_mark, name_of, refuse_clear, refuse_keys
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.storage.verify import verify
from pyworkflow_ray.testing.blobs import MemoryBlobs
from pyworkflow_ray.testing.simulator import START_AT, Simulator
from tests.journals import created, make_run

OLD, NEW, OWN = AesGcm({"old": bytes(32)}), AesGcm({"old": bytes(32), "new": bytes([1] * 32)}), bytes([2] * 32)
ONLY_NEW = AesGcm({"new": bytes([1] * 32)}, digest_key=OLD.digest_key)
HERE = f"{__name__}:"


def make() -> AesGcm:
    return AesGcm({"old": bytes(32)})


def no_hook() -> object:
    return object()


def breaks() -> None:
    raise OSError("no network")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "runs")


# The setting --------------------------------------------------------------------------------------------------------


def test_setting_takes_a_name_or_a_function_that_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(codec=make).codec == HERE + "make"
    monkeypatch.setenv("PYWORKFLOW_CODEC", "a.b:c.d")
    assert load_settings().codec == "a.b:c.d"
    for wrong in ("crypto", "a b:c", OLD, lambda: OLD, 7):
        with pytest.raises(ConfigurationError, match="codec="):
            load_settings(codec=wrong)
    with pytest.raises(ValueError, match="can't be sent"):
        name_of(OLD)


def test_hook_is_made_once_a_process_and_what_keeps_it_from_it_is_named() -> None:
    assert load_hook(HERE + "make") is load_hook(HERE + "make")
    assert load_hook(HERE + "OLD") is OLD
    for name, why in ((HERE + "breaks", "no network"), (HERE + "no_hook", "digest_key"), ("no_such:x", "No module")):
        with pytest.raises(ConfigurationError, match=why):
            load_hook(name)


def test_keys_in_a_runtime_env_are_refused() -> None:
    refuse_keys({"OTHER": "x", "PYWORKFLOW_CRYPTO_KEYS_FILE": "/keys"})
    with pytest.raises(ConfigurationError, match="records its runtime_env"):
        refuse_keys({"PYWORKFLOW_CRYPTO_KEYS": "k:secret"})


# The mark -----------------------------------------------------------------------------------------------------------


def test_storage_holds_to_its_first_codec(storage: Storage) -> None:
    make_mark(storage, None)
    make_mark(storage, HERE + "OLD")
    make_mark(storage, HERE + "make")  # another name of the same key
    for hook, why in (
        (None, "no codec is set"),
        (AesGcm({"old": OWN}), "another key"),
        (ONLY_NEW, "'old' is not among"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            check_mark(storage, hook)
    with pytest.raises(ConfigurationError, match="no codec is set"):
        refuse_clear(storage, None)  # a process that connected before the mark was made


def test_storage_in_clear_takes_no_codec(storage: Storage) -> None:
    make_run(storage)
    with pytest.raises(ConfigurationError, match="are not encrypted"):
        make_mark(storage, HERE + "OLD")
    assert not Path(storage.root, MARK).exists()


def test_mark_goes_over_to_the_newest_key_so_that_the_old_one_can_be_dropped(storage: Storage) -> None:
    make_mark(storage, HERE + "OLD")
    make_mark(storage, HERE + "NEW")
    check_mark(storage, ONLY_NEW)
    with pytest.raises(ConfigurationError, match="another key"):
        check_mark(storage, OLD)
    with pytest.raises(ConfigurationError, match="another digest key"):
        check_mark(storage, AesGcm({"new": bytes([1] * 32)}))


def test_two_that_make_the_mark_at_once_get_one(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_mark, "is_marked", lambda storage: False)  # both looked before either wrote
    make_mark(storage, HERE + "OLD")
    monkeypatch.setitem(codec_mark._hooks, "other:hook", AesGcm({"k": OWN}))
    with pytest.raises(ConfigurationError, match="another key"):
        make_mark(storage, "other:hook")
    check_mark(storage, OLD)


# Damage -------------------------------------------------------------------------------------------------------------


def encrypted_run(storage: Storage, value: Any) -> tuple[StorageCodec, Payload]:
    make_mark(storage, HERE + "OLD")
    codec = StorageCodec(storage, hook=OLD)
    payload = codec.at("order-1", "1").encode(value)
    return codec, payload


@pytest.mark.parametrize("size", [1, SPILL_BYTES])
def test_changed_or_moved_value_is_damage_that_names_run_position_and_file(storage: Storage, size: int) -> None:
    codec, payload = encrypted_run(storage, "secret" * size)
    data = storage.get_blob(payload.ref) if payload.ref else __import__("base64").b64decode(payload.data)
    changed = data[:-1] + bytes([data[-1] ^ 1])
    update: dict[str, Any] = {"ref": storage.put_blob(changed)} if payload.ref else {"data": _base64(changed)}
    file = storage.blobs.path(update["ref"]) if payload.ref else storage.directory("order-1")
    for place, given in ((("order-1", "1"), payload.model_copy(update=update)), (("order-1", "2"), payload)):
        with pytest.raises(CorruptJournalError, match=f"run 'order-1': a value of position {place[1]}") as raised:
            codec.at(*place).decode(given)
        assert raised.value.path in (file, storage.blobs.path(payload.ref) if payload.ref else file)
        assert raised.value.path in str(raised.value)


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


def test_value_in_clear_is_refused_where_all_is_encrypted(storage: Storage) -> None:
    codec, _ = encrypted_run(storage, "secret")
    forged = StorageCodec(storage).encode({1, 2})  # a pickle that somebody without the key put there
    with pytest.raises(CorruptJournalError, match="is not encrypted"):
        codec.at("order-1", "1").decode(forged)
    ref = storage.put_blob(b"code of somebody")
    with pytest.raises(CorruptJournalError, match="stored code"):
        codec.get_code(ref)


def test_verify_names_a_value_that_the_codec_refuses(storage: Storage) -> None:
    codec, payload = encrypted_run(storage, "secret")
    good = codec.at("good").encode(1)
    for run_id, result in (("good", good), ("order-1", payload)):  # the second lies at a step's place: it was moved
        storage.create_run(created(run_id, storage.storage_id))
        journal, _ = storage.activate(run_id, "", first=True)
        journal.append([RunCompleted(seq=1, at=1.0, result=result)]).result()
        journal.finish()
    assert verify(storage).damaged == []
    damaged = verify(storage, codec).damaged
    assert [(d.run_id, d.path) for d in damaged] == [("order-1", storage.directory("order-1"))]
    assert "codec refuses it" in damaged[0].error
    Path(storage.root, MARK).write_bytes(b"x" * 100)
    assert [Path(d.path).name for d in verify(storage).damaged] == [MARK]


def test_rerun_takes_its_arguments_to_its_own_place(storage: Storage) -> None:
    codec, _ = encrypted_run(storage, "secret")
    old = created("old", storage.storage_id, args=[codec.at("old").encode("secret")])
    new = make_rerun(old, codec)
    assert codec.at(new.run_id).decode(new.args[0]) == "secret"
    assert new.args[0].digest == old.args[0].digest


def test_missing_key_is_no_damage(storage: Storage) -> None:
    _, payload = encrypted_run(storage, "secret")
    for hook, why in ((None, "PYWORKFLOW_CODEC"), (ONLY_NEW, "'old' is not among")):
        with pytest.raises(CodecKeyError, match=why):
            StorageCodec(storage, hook=hook).at("order-1", "1").decode(payload)


# A run whose key is gone --------------------------------------------------------------------------------------------


@step
def work(n: int) -> int:
    return n


async def flow() -> int:
    try:
        return await work(1) + await work(2)
    except Exception:  # a missing key is not the workflow's failure
        return -1


def test_run_whose_key_is_gone_pauses_and_goes_on_with_it() -> None:
    simulator = Simulator(flow, {})
    blobs = MemoryBlobs()
    codec = StorageCodec(blobs, hook=OLD)

    def driver_of(codec: StorageCodec, events: list[Any], epoch: int) -> tuple[Driver, list[Any]]:
        driver, seen = Driver(flow, codec, rng=random.Random(0)), []
        cause: Any = "start" if epoch == 0 else "resume"
        driver.activate(list(events), RunActivated(epoch=epoch, cause=cause), START_AT)
        _drain(driver, events, seen)
        return driver, seen

    def _drain(driver: Driver, events: list[Any], seen: list[Any]) -> None:
        while effects := driver.effects():
            for effect in effects:
                seen.append(effect)
                if isinstance(effect, Append):
                    events.extend(effect.events)
                    driver.durable(effect.events[-1].seq, START_AT)

    from pyworkflow_ray.engine.calls import Outcome

    events = list(simulator.store.events())
    driver, seen = driver_of(codec, events, 0)
    call = next(e.call for e in seen if isinstance(e, Dispatch))
    result = codec.at(call.run_id, call.position).encode(1)
    driver.outcome(Outcome(call.position, call.dispatch, "completed", 1, result=result), START_AT)
    _drain(driver, events, seen)
    _, seen = driver_of(StorageCodec(blobs, hook=ONLY_NEW), events, 1)
    (pause,) = [e.event for e in seen if isinstance(e, Pause)]
    assert pause.reason == "environment"
    assert "'old' is not among" in pause.message
    _, seen = driver_of(codec, events, 2)
    assert [e.call.position for e in seen if isinstance(e, Dispatch)] == ["2"]


# Without pickles ----------------------------------------------------------------------------------------------------


def test_code_by_value_is_refused_without_pickles(storage: Storage) -> None:
    strict = StorageCodec(storage, allow_pickle=False)
    by_value = CodeRef(how="value", name="late", payload=Payload(enc="pickle", data="", py="3.11"))
    with pytest.raises(ConfigurationError, match="'late' can only travel by value"):
        strict.store_code(by_value)
    imported = CodeRef(how="import", name="f", module="m", qualname="f")
    assert strict.store_code(imported) is imported
    with pytest.raises(PayloadError):
        strict.encode({1, 2})
