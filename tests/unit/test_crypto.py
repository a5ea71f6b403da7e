"""AES-GCM as a codec: what it reveals, what it refuses, and where its keys come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyworkflow_ray.crypto import KEYS, KEYS_FILE, AesGcm, aes_gcm, new_key
from pyworkflow_ray.errors import ConfigurationError

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
PLACE = b"order-1\x003"


def test_what_is_protected_is_revealed_at_its_place_only() -> None:
    hook = AesGcm({"k": OLD})
    stored = hook.protect(b"secret", PLACE)
    assert b"secret" not in stored
    assert hook.reveal(stored, PLACE) == b"secret"
    with pytest.raises(ValueError):
        hook.reveal(stored, b"order-1\x004")


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    hook = AesGcm({"k": OLD})
    stored = hook.protect(b"secret", PLACE)
    for number in range(8 * len(stored)):
        changed = bytearray(stored)
        changed[number // 8] ^= 1 << number % 8
        with pytest.raises((ValueError, LookupError)):
            hook.reveal(bytes(changed), PLACE)
    for size in range(len(stored)):
        with pytest.raises((ValueError, LookupError)):
            hook.reveal(stored[:size], PLACE)


def test_equal_data_are_equal_bytes_at_one_place_and_others_elsewhere() -> None:
    hook = AesGcm({"k": OLD})
    assert hook.protect(b"a", PLACE) == AesGcm({"k": OLD}).protect(b"a", PLACE)
    nonces = {hook.protect(data, place)[6:18] for data in (b"a", b"b", b"") for place in (PLACE, b"", b"x")}
    assert len(nonces) == 9
    assert hook.protect(b"ab", b"c")[6:18] != hook.protect(b"b", b"ca")[6:18]


def test_old_keys_still_read_and_the_last_one_writes() -> None:
    before, both = AesGcm({"old": OLD}), AesGcm({"old": OLD, "new": NEW})
    stored = before.protect(b"secret", PLACE)
    assert both.reveal(stored, PLACE) == b"secret"
    assert b"new" in both.protect(b"secret", PLACE)
    assert both.digest_key == before.digest_key
    with pytest.raises(LookupError, match="'old' is not among those given"):
        AesGcm({"new": NEW}).reveal(stored, PLACE)
    assert AesGcm({"new": NEW}, digest_key=b"d").digest_key == AesGcm({"old": OLD}, digest_key=b"d").digest_key


def test_keys_come_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = new_key("2025"), new_key("2026")
    monkeypatch.delenv(KEYS, raising=False)
    monkeypatch.delenv(KEYS_FILE, raising=False)
    monkeypatch.setenv(KEYS, f"{first}, {second}")
    hook = aes_gcm()
    assert repr(hook) == "<AesGcm, keys 2025, 2026>"
    path = tmp_path / "keys"
    path.write_text(f"{first}\n{second}\n")
    monkeypatch.setenv(KEYS_FILE, str(path))
    with pytest.raises(ConfigurationError, match="either"):
        aes_gcm()
    monkeypatch.delenv(KEYS)
    assert aes_gcm().reveal(hook.protect(b"x", PLACE), PLACE) == b"x"


@pytest.mark.parametrize("text", ["", "abc", "k:tooshort", "k:" + "A" * 44, "k!:x", "k:{0} k:{0}"])
def test_badly_written_keys_are_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv(KEYS_FILE, raising=False)
    monkeypatch.setenv(KEYS, text.format(new_key("k").partition(":")[2]))
    with pytest.raises(ConfigurationError) as raised:
        aes_gcm()
    assert "tooshort" not in str(raised.value)
    assert "AAAA" not in str(raised.value)


def test_keys_of_another_size_are_refused() -> None:
    for keys in ({}, {"k": b"short"}, {"k": "text"}, {"no id": OLD}):
        with pytest.raises(ConfigurationError):
            AesGcm(keys)  # type: ignore[arg-type]
