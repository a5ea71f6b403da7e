"""The HTTP client of the demo's steps: one kept-open connection, failures as the exceptions a step should raise.

Made once a worker process by `checkout`'s `pw.resource`; calls the standard library and our errors only (the package
does not need an HTTP library, so neither does its demo). Not for two threads at once: a worker runs one step at a time.

Faults: ConnectionError (no server, dropped connection, 5xx), RetryableError (429, 408), CardDeclined (402), FatalError
(other 4xx), TimeoutError (no answer in time). After any of them the connection is made anew.
"""

from __future__ import annotations

import http.client
import json
from typing import Any

from pyworkflow_ray.errors import FatalError, RetryableError


class CardDeclined(FatalError):
    """The bank said no. Asking again would not change that."""


class ServicesClient:
    """POST JSON to the services at `host:port`."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self._timeout_s = timeout_s
        self._address = ""
        self._connection: http.client.HTTPConnection | None = None

    def post(self, address: str, path: str, body: dict[str, Any], *, key: str) -> dict[str, Any]:
        """The answer to `body`, sent under an idempotency key: sending it again has no further effect."""
        if address != self._address:
            self.close()
            self._address = address
        if self._connection is None:
            self._connection = http.client.HTTPConnection(address, timeout=self._timeout_s)
        try:
            headers = {"Content-Type": "application/json", "Idempotency-Key": key}
            self._connection.request("POST", path, json.dumps(body), headers)
            response = self._connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        except BaseException:  # a step's timeout may strike between request and answer: the connection is then no use
            self.close()
            raise
        if response.status != 200:
            _raise(response.status, f"{response.status} from {path}: {answer.get('error')}", response.headers)
        return answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _raise(status: int, message: str, headers: http.client.HTTPMessage) -> None:
    if status == 402:
        raise CardDeclined(message)
    if status in (408, 429):
        seconds = headers.get("Retry-After")
        raise RetryableError(message, retry_after=float(seconds) if seconds else None)
    if status >= 500:
        raise ConnectionError(message)
    raise FatalError(message)
