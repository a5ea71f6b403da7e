"""A content-addressed blob store in memory. Used by WorkflowEnv, the simulator and tests in place of the storage."""

from __future__ import annotations

import hashlib


class MemoryBlobs:
    """Keeps spilled payloads and snapshots by their SHA-256; to a handle it is the run's storage."""

    storage_id = "memory"
    root = "memory"

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def put_blob(self, data: bytes) -> str:
        sha = hashlib.sha256(data).hexdigest()
        self.blobs[sha] = bytes(data)
        return sha

    def get_blob(self, sha: str) -> bytes:
        """The bytes of `sha`. Raises KeyError where nothing has been stored under it."""
        return self.blobs[sha]
