"""Tables of pyarrow and polars in pickles, so that their columns are stored and shared without a copy.

Called by the pickler for objects of these packages; imports neither by itself. numpy, pandas and most of pyarrow do
this on their own. Two cases need help:

* a slice of an Arrow table pickles all of the table that it was cut from: ten rows of a gigabyte are a gigabyte. Where
  less than half is meant, it is written as an IPC stream, which holds no more than the slice;
* polars pickles a frame into one byte string. Its Arrow form has the same columns in the same memory; it is taken where
  it leads back to the same schema (not for Object columns).
"""

from __future__ import annotations

import pickle
import sys
from typing import Any

_SLICE_BYTES = 64 * 1024


def reduce_table(value: Any) -> Any:
    """How the pickler stores `value`; None: as it does by itself."""
    cls = type(value)
    if cls.__module__ == "pyarrow.lib" and cls.__name__ in ("Table", "RecordBatch"):
        total = value.get_total_buffer_size()
        if total >= _SLICE_BYTES and value.nbytes * 2 < total:
            return _read_stream, (cls.__name__, pickle.PickleBuffer(_stream_of(value)))
    elif cls.__module__ == "polars.dataframe.frame" and cls.__name__ == "DataFrame":
        return _reduce_frame(value)
    elif cls.__module__ == "polars.series.series" and cls.__name__ == "Series":
        reduced = _reduce_frame(value.to_frame())
        return None if reduced is None else (_series_of, reduced[1])
    return None


def _stream_of(value: Any) -> Any:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, value.schema) as writer:
        writer.write(value)
    return sink.getvalue()


def _read_stream(kind: str, data: Any) -> Any:
    import pyarrow as pa

    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        return reader.read_all() if kind == "Table" else reader.read_next_batch()


def _reduce_frame(value: Any) -> Any:
    polars = sys.modules["polars"]
    try:
        table = value.to_arrow(compat_level=polars.CompatLevel.newest())
        back = polars.from_arrow(table)
        if type(back) is not type(value) or back.schema != value.schema or back.height != value.height:
            return None
    except Exception:  # a column that Arrow has no type for
        return None
    return _frame_of, (table,)


def _frame_of(table: Any) -> Any:
    import polars

    return polars.from_arrow(table)


def _series_of(table: Any) -> Any:
    return _frame_of(table).to_series()
