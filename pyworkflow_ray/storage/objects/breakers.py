"""A circuit breaker's states in a bucket; see `storage.breaker_states`, whose format this is.

Called by the breaker's actor through `storage.port`. One actor writes an object, and it is replaced as a whole.
"""

from __future__ import annotations

import logging

from pyworkflow_ray.errors import CorruptJournalError, StorageError
from pyworkflow_ray.storage.breaker_states import States, decode_states, encode_states, states_file
from pyworkflow_ray.storage.objects.bucket import BucketError
from pyworkflow_ray.storage.objects.loop import current_loop
from pyworkflow_ray.storage.objects.storage import open_bucket

log = logging.getLogger("pyworkflow_ray.storage")


class ObjectBreakerStates:
    """The states of one breaker in one bucket."""

    def __init__(self, url: str, name: str) -> None:
        self._bucket = open_bucket(url)
        self._name = name
        self._key = f"breakers/{states_file(name)}"
        self.path = f"{url}/{self._key}"

    def save(self, states: States, at: float) -> None:
        """Replace what is kept. at: UNIX time.

        Raises:
            OSError: the bucket can't be written.
        """
        try:
            current_loop().run(self._bucket.put(self._key, encode_states(self._name, states, at)))
        except BucketError as error:
            raise OSError(f"{self.path}: {error}") from None

    def load(self) -> tuple[States, float] | None:
        """What was kept and when; None where nothing was, or it can't be read (which is logged)."""
        try:
            found = current_loop().run(self._bucket.get(self._key))
            return None if found is None else decode_states(self._name, found.data, self.path)
        except (BucketError, CorruptJournalError, StorageError, KeyError, TypeError, ValueError) as error:
            log.error("circuit breaker %r begins closed, its kept state can't be read: %s", self._name, error)
            return None
