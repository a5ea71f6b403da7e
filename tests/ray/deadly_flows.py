"""Ends the process of any worker of Ray that loads it."""

from __future__ import annotations

import os
import sys

import pyworkflow_ray as pw

if os.path.basename(sys.argv[0]) == "default_worker.py":
    os._exit(7)


@pw.workflow(max_recoveries=1)
async def flow() -> int:
    return 1
