"""Every damage that a disk, a file system or a person does to the files of a store. Pure: states in, damages out.

Called by `harness`; calls nobody. Rules:

* A state is the whole store: the path of each file, relative to the root, and its content. A damage says which files
  then have which content (None: gone).
* A *block* is what an engine or a disk writes at once: the lines of a file whose content is lines, sectors otherwise.
* Nothing here knows an engine. What it may be told: earlier states of the same store (stale files), the state of a
  store that was made alike elsewhere (foreign files).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

State = Mapping[str, bytes]

SECTOR: Final = 512
_MAX_LINES: Final = 400  # a file of more is taken in sectors


@dataclass(frozen=True, slots=True)
class Damage:
    """kind: what was done. file: to which file. detail: where in it, or with what."""

    kind: str
    file: str
    detail: str
    changes: Mapping[str, bytes | None]

    def __str__(self) -> str:
        return f"{self.kind} {self.file} {self.detail}".strip()


def flipped_bits(state: State, file: str, step: int = 1, first: int = 0) -> Iterator[Damage]:
    """Every `step`-th bit of the file turned over."""
    data = state[file]
    for bit in range(first, len(data) * 8, step):
        at, mask = divmod(bit, 8)
        changed = bytearray(data)
        changed[at] ^= 1 << mask
        yield Damage("bit", file, f"{at}.{mask}", {file: bytes(changed)})


def cuts(state: State, file: str, step: int = 1, first: int = 0) -> Iterator[Damage]:
    """The file cut to every `step`-th length that is shorter than it is."""
    for length in range(first, len(state[file]), step):
        yield Damage("cut", file, f"to {length}", {file: state[file][:length]})


def additions(state: State, file: str) -> Iterator[Damage]:
    """Something written behind the file's end: NULs, or what a wild write would leave."""
    data = state[file]
    for tail in (b"\0", b"\0" * 7, b"\0" * 8, b"\0" * 4096, b"\n", b"x", b"{}", data[-60:], data[:600]):
        yield Damage("added", file, f"{len(tail)} bytes {tail[:8]!r}", {file: data + tail})


def blocks(data: bytes) -> list[bytes]:
    lines = data.splitlines(keepends=True)
    if len(lines) <= _MAX_LINES and all(len(line) < 8 * SECTOR for line in lines) and b"\0" not in data:
        return lines
    return [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)]


def moved_blocks(state: State, file: str, others: Sequence[str], step: int = 1) -> Iterator[Damage]:
    """Blocks lost, repeated, exchanged, blanked, and written in the place of another file's block."""
    parts = blocks(state[file])

    def made(kind: str, detail: str, changed: Sequence[bytes]) -> Damage:
        return Damage(kind, file, detail, {file: b"".join(changed)})

    for n in range(0, len(parts), step):
        part, before, after = parts[n], parts[:n], parts[n + 1 :]
        yield made("dropped", f"block {n}", [*before, *after])
        yield made("repeated", f"block {n}", [*before, part, part, *after])
        for blank in (b"\0", b"\xff"):
            yield made("blanked", f"block {n} with {blank!r}", [*before, blank * len(part), *after])
        for other in range(n + 1, min(len(parts), n + 4)):
            exchanged = list(parts)
            exchanged[n], exchanged[other] = exchanged[other], exchanged[n]
            yield made("swapped", f"blocks {n} and {other}", exchanged)
        for other_file in others:
            theirs = blocks(state[other_file])
            if n < len(theirs) and theirs[n] != part:
                yield made("misdirected", f"block {n} of {other_file}", [*before, theirs[n], *after])


def removed(state: State) -> Iterator[Damage]:
    """Each file gone, and each directory."""
    for file in state:
        yield Damage("removed", file, "", {file: None})
    directories = {file[:at] for file in state for at in range(len(file)) if file[at] == "/"}
    for directory in sorted(directories):
        inside = {file: None for file in state if file.startswith(f"{directory}/")}
        if len(inside) > 1:
            yield Damage("removed", f"{directory}/", "", inside)


def misplaced_files(state: State) -> Iterator[Damage]:
    """Each file in the place of each other one, and the two exchanged."""
    for one, other in itertools.combinations(state, 2):
        if state[one] != state[other]:
            yield Damage("misplaced", other, f"has the content of {one}", {other: state[one]})
            yield Damage("misplaced", one, f"has the content of {other}", {one: state[other]})
            yield Damage("exchanged", one, f"with {other}", {one: state[other], other: state[one]})


def stale_files(history: Sequence[State]) -> Iterator[Damage]:
    """Each file as it was at some earlier time, or absent again; and one that was removed, back."""
    now = history[-1]
    seen: set[tuple[str, bytes | None]] = set()
    for number, then in enumerate(history[:-1]):
        for file in sorted({*then, *now}):
            content = then.get(file)
            if content == now.get(file) or (file, content) in seen or content is None:
                continue
            seen.add((file, content))
            yield Damage("stale", file, f"as of state {number}", {file: content})


def foreign_files(state: State, elsewhere: State) -> Iterator[Damage]:
    """Each file from a store that was made alike, somewhere else."""
    for file, content in state.items():
        if file in elsewhere and elsewhere[file] != content:
            yield Damage("foreign", file, "", {file: elsewhere[file]})


def copies(state: State, names: Mapping[str, Sequence[str]]) -> Iterator[Damage]:
    """Each file a second time, under a name that its engine might take for one of its own; and moved there."""
    for file, others in names.items():
        for other in others:
            if other not in state:
                yield Damage("copied", file, f"as {other}", {other: state[file]})
                yield Damage("renamed", file, f"to {other}", {other: state[file], file: None})
