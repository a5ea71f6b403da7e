"""Which file system a path lies on: network ones are refused, their caches may hide a newer epoch from its fence.

Called by `storage`; reads /proc/self/mounts and nothing else. Faults: no /proc (not Linux): nothing is refused.
"""

from __future__ import annotations

import os
import re
from typing import Final

_NETWORK: Final = frozenset(
    "nfs nfs4 cifs smb2 smb3 smbfs ncpfs 9p afs ceph glusterfs lustre gpfs beegfs orangefs ocfs2 gfs2 coda "
    "davfs s3fs fuse acfs vboxsf prl_fs".split()
)
_LOCAL_FUSE: Final = frozenset(("fuse.fuse-overlayfs", "fuse.lxcfs", "fuse.bindfs"))


def network_file_system(path: str, mounts: str | None = None) -> str | None:
    """Type of the network (or unknown user-space) file system that holds `path`, None where it is a local one.

    `path` need not exist: its nearest ancestor that does counts. `mounts` is text like /proc/self/mounts.
    """
    if mounts is None:
        try:
            with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
                mounts = file.read()
        except OSError:
            return None
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two mounts on one point the later hides the earlier
            best, kind = point, fields[2]
    if kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE):
        return kind
    return None
