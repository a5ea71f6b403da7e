"""The machine's time zone, for people. Called by the command line and by what notebooks show."""

from __future__ import annotations

import datetime as dt
import time


class LocalZone(dt.tzinfo):
    """The machine's time zone, summer time included, for instants in UTC."""

    def fromutc(self, moment: dt.datetime) -> dt.datetime:
        local = time.localtime(moment.replace(tzinfo=dt.UTC).timestamp())
        return dt.datetime(
            *local[:6], moment.microsecond, tzinfo=dt.timezone(dt.timedelta(seconds=local.tm_gmtoff), local.tm_zone)
        )

    def utcoffset(self, moment: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(0)

    def dst(self, moment: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(0)

    def tzname(self, moment: dt.datetime | None) -> str:
        return time.tzname[0]
