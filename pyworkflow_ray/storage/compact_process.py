"""One compaction in a process of its own, for the controller's upkeep: rules as JSON in, what was done as JSON out.

Started by `runtime.upkeep`; calls `compact`, then has the catalogue take in what ended and what moved, and checks it
once a day. Faults: as `compact`; the error's text goes to stderr, and the exit code is 1.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.storage.catalogue_check import keep_right
from pyworkflow_ray.storage.compact import Rules, compact
from pyworkflow_ray.storage.port import open_storage
from pyworkflow_ray.storage.stocktaking import take_in
from pyworkflow_ray.storage.storage import Storage


def main(text: str) -> None:
    """Compact the storage that `text` names, by its rules."""
    given = json.loads(text)
    try:
        storage = open_storage(given.pop("storage"), create=False)
        done = compact(storage, Rules(**given))
        if isinstance(storage, Storage):  # a bucket has no catalogue
            take_in(storage)
            keep_right(storage)
    except PyWorkflowError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(dataclasses.asdict(done)))
