"""What nobody is shown: secrets by type and by name, in previews, views, SQL and errors, though stored whole."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import CodeEnvironment, RunActivated, RunCompleted
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.submission import make_created
from pyworkflow_ray.observability.view import explain
from pyworkflow_ray.settings import load_settings
from pyworkflow_ray.storage.codec import SPILL_BYTES, StorageCodec
from pyworkflow_ray.storage.payload import same
from pyworkflow_ray.storage.revealing import revealed
from pyworkflow_ray.storage.sql import rows
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.testing.blobs import MemoryBlobs

HIDDEN = "4111-1111"


class Login(BaseModel):
    user: str
    password: str


class Account(BaseModel):
    user: str
    token: SecretStr


@dataclasses.dataclass
class Card:
    owner: str
    Number: str


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (SecretStr(HIDDEN), "[redacted]"),
        (SecretBytes(HIDDEN.encode()), "[redacted]"),
        ((1, [SecretStr(HIDDEN)]), "(1, [[redacted]])"),
        (Account(user="ann", token=SecretStr(HIDDEN)), "Account(user='ann', token=[redacted])"),
        ({"user": "ann", "PassWord": HIDDEN}, "{'user': 'ann', 'PassWord': [redacted]}"),
        ([{"deep": [{"password": HIDDEN}]}], "[{'deep': [{'password': [redacted]}]}]"),
        (Login(user="ann", password=HIDDEN), "Login(user='ann', password=[redacted])"),
        (Card("ann", HIDDEN), "Card(owner='ann', Number=[redacted])"),
        ({"password": HIDDEN * SPILL_BYTES}, "{'password': [redacted]}"),
        ([[[[[[{"password": HIDDEN}]]]]]], "[[[[...]]]]"),
    ],
)
def test_secret_parts_are_masked_and_the_value_comes_back_whole(value: Any, shown: str) -> None:
    codec = StorageCodec(MemoryBlobs(), redact=("password", "number"))
    payload = codec.encode(value)
    assert (payload.redacted, payload.preview) == (True, shown)
    assert same(codec.decode(payload), value)
    seen = codec.opened(payload)
    assert (seen.data, seen.preview) == (None, shown)


def test_what_holds_no_secret_is_left_as_it_was() -> None:
    marked, plain = StorageCodec(MemoryBlobs(), redact=("password",)), StorageCodec(MemoryBlobs())
    for value in (1, "text", {"user": "ann", "passwords": 1}, Login(user="a", password="b").user, {1, 2}, [None]):
        assert marked.encode(value) == plain.encode(value)
    assert not plain.encode({"password": HIDDEN}).redacted


def test_secret_deep_inside_an_object_is_found_while_it_is_pickled() -> None:
    class Client:
        def __init__(self) -> None:
            self.settings = {"auth": [SecretStr(HIDDEN)]}

    payload = StorageCodec(MemoryBlobs()).encode(Client())
    assert payload.redacted
    assert HIDDEN not in str(payload.preview)


def test_value_too_large_to_be_looked_through_counts_as_secret_where_names_are_marked() -> None:
    assert StorageCodec(MemoryBlobs(), redact=("password",)).encode(list(map(str, range(200_000)))).redacted


def test_names_of_parameters_count_and_attributes_of_such_names_are_refused(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "runs")
    codec = StorageCodec(storage, redact=("Card",))

    def made(*args: Any, **options: Any) -> Any:
        return make_created(
            buy.definition,
            args,
            {},
            run_id="r",
            attributes=options,
            storage_id=storage.storage_id,
            environment=CodeEnvironment(key="k", python="3.11"),
            codec=codec,
        )

    created = made("ann", HIDDEN)
    assert [payload.redacted for payload in created.args] == [False, True]
    assert explain([created], 0.0).input[1].text == "[redacted]"
    assert explain([created], 0.0).input[1].redacted
    with pytest.raises(ConfigurationError, match="attribute 'card' is not allowed"):
        made("ann", HIDDEN, card=HIDDEN)


@pw.workflow
async def buy(user: str, card: str) -> None: ...


@pw.step
def charge(card: int, *, token: str = "") -> None: ...


def test_arguments_of_a_step_carry_their_names() -> None:
    request = charge.request((1,), {"token": "t"})
    assert request.names == ("card",)


def test_views_and_sql_show_the_preview_alone(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "runs")
    codec = StorageCodec(storage, redact=("password",))
    from tests.journals import created

    storage.create_run(created("r", storage.storage_id, args=[codec.encode({"password": HIDDEN})]))
    journal, _ = storage.activate("r", "", first=True)
    result = codec.encode({"password": HIDDEN, "n": 1})
    events = [RunActivated(seq=1, at=1.0, epoch=0), RunCompleted(seq=2, at=2.0, result=result)]
    journal.append(events).result()
    journal.finish()
    history = storage.read_run("r").events
    view = explain(history, 3.0)
    assert HIDDEN not in view.model_dump_json()
    assert view.result == "{'password': [redacted], 'n': 1}"
    assert HIDDEN not in str(revealed("r", history, codec))
    for query in ("from runs", "from events", "select data from events where type = 'run_completed'"):
        assert HIDDEN not in str(rows(storage, query))
    assert rows(storage, "select data ->> 'redacted' from events where type = 'run_completed'")[1] == [("true",)]
    assert rows(storage, "select data ->> 'epoch' from events where type = 'run_activated'")[1] == [("0",)]


def test_validation_error_quotes_no_input_where_names_are_marked() -> None:
    try:
        charge.definition.validate((HIDDEN,), {})
    except ValidationError as error:
        clear = StorageCodec(MemoryBlobs()).encode_error(error, "permanent")
        info = StorageCodec(MemoryBlobs(), redact=("card",)).encode_error(error, "permanent")
    assert HIDDEN in clear.message
    assert HIDDEN not in info.message
    assert HIDDEN not in info.traceback
    assert "valid integer" in info.message


def test_secret_in_a_storage_without_a_codec_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    codec = StorageCodec(Storage.open(tmp_path / "runs"))
    with caplog.at_level(logging.WARNING, "pyworkflow_ray.storage"):
        for _ in range(3):
            codec.encode(SecretStr(HIDDEN))
    (record,) = caplog.records
    assert "clear text" in record.getMessage()
    assert HIDDEN not in record.getMessage()


def test_names_are_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYWORKFLOW_REDACT", "password, token")
    assert load_settings().redact == ("password", "token")
    assert load_settings(redact=["card"]).redact == ("card",)
