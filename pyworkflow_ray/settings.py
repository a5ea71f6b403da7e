"""Settings of a process: arguments of `pw.init`, else the environment (`PYWORKFLOW_*`), else the defaults.

Imported by `pw.init` only, inside the function: pydantic-settings is slow to import. Fault: an environment variable
that can't be read as its setting; the error names the variable.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pyworkflow_ray.durations import parse_duration
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.options import nearest, shown

PREFIX = "PYWORKFLOW_"
RETAINED = ("completed", "failed", "cancelled")
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class Settings(BaseSettings):
    """Effective settings. `sources` tells where each came from: "argument", the variable's name, or "default"."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    storage: Path | str = Field(
        default=Path("~/.pyworkflow-ray"),
        description="Directory that holds runs and checkpoints, or the URL of a bucket: s3://bucket/prefix",
    )
    log_level: LogLevel = Field(default="INFO", description="Level of our own log lines")
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines of workers: text for people, json for machines"
    )
    allow_pickle: bool = Field(default=True, description="False refuses pickled values, on write and on read")
    codec: str | None = Field(
        default=None,
        description="What every stored value passes through, 'module:object': pyworkflow_ray.crypto:aes_gcm encrypts",
    )
    redact: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Names of arguments, keys and fields whose values are shown to nobody: password,token"
    )
    max_payload_bytes: int | None = Field(
        default=None, ge=1024, description="Largest value; None: 64 MiB, beside 8 GiB of buffers of arrays and tables"
    )
    pool_min: int = Field(default=1, ge=0, le=10_000, description="Warm run actors kept when nothing runs")
    pool_max: int | None = Field(default=None, ge=1, le=10_000, description="Most run actors; None: by the CPUs")
    max_pending: int | None = Field(
        default=None,
        ge=1,
        description="Most runs that may wait for a run actor; `start` refuses more. None: any number",
    )
    worker_wait_max: float = Field(
        default=1.0, ge=0, description="Longest wait that a worker sleeps itself, in seconds"
    )

    compact_after: float = Field(
        default=3600.0,
        ge=0,
        description="Ended runs move to Parquet so long after their end, in seconds; 0: only by `storage compact`",
    )
    compact_above: int = Field(
        default=256 * 2**20, ge=0, description="Younger ones too, once the journals of ended runs take more bytes"
    )
    compact_failed_after: float | None = Field(
        default=None,
        ge=0,
        description="Failed runs too, so long after their end; they can't be resumed then. None: never",
    )
    retain: Annotated[dict[str, float], NoDecode] = Field(
        default_factory=dict,
        description="How long runs are kept after their end, by status: completed=30d,failed=90d. Others: for ever",
    )

    alert_webhook: SecretStr | None = Field(
        default=None, description="URL that alerts are posted to as JSON; its path may hold a secret and is never shown"
    )
    alert_struggling_after: int = Field(
        default=3,
        ge=1,
        description="A run is struggling when a step has failed so often, or its owner was lost so often",
    )

    @field_validator("storage", mode="plain")
    @classmethod
    def _place(cls, value: Any) -> Path | str:
        from pyworkflow_ray.storage.directory import place_of

        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError("a path, or a URL such as s3://bucket/prefix")
        return place_of(value)

    @field_validator("alert_webhook", mode="after")
    @classmethod
    def _url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("http://", "https://")):
            raise ValueError("give an URL that begins with http:// or https://")
        return value

    @field_validator("codec", mode="before")
    @classmethod
    def _codec_name(cls, value: Any) -> Any:
        from pyworkflow_ray.storage.codec_mark import name_of

        return None if value is None else name_of(value)

    @field_validator("redact", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("retain", mode="before")
    @classmethod
    def _retention(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = dict(part.strip().partition("=")[::2] for part in value.split(",") if part.strip())
        if not isinstance(value, Mapping):
            raise ValueError("give a mapping of statuses to durations, or text such as completed=30d,failed=90d")
        for status in value:
            if status not in RETAINED:
                raise ValueError(f"no runs end as {status!r}.{nearest(str(status), RETAINED)} {', '.join(RETAINED)} do")
        return {status: parse_duration(age) for status, age in value.items()}

    @field_validator("worker_wait_max", "compact_after", "compact_failed_after", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str):
            try:
                return float(value)  # an environment variable is always text
            except ValueError:
                pass
        return parse_duration(value)

    @model_validator(mode="after")
    def _bounds(self) -> Settings:
        if self.pool_max is not None and self.pool_max < self.pool_min:
            raise ValueError(f"pool_max={self.pool_max} is below pool_min={self.pool_min}")
        return self


def load_settings(**given: Any) -> Settings:
    """The effective settings; `None` for a setting leaves it to the environment.

    Raises:
        ConfigurationError: a setting is unknown (the nearest name is given) or its value not allowed.
    """
    known = tuple(Settings.model_fields)
    for name, value in given.items():
        if name not in known:
            raise ConfigurationError(
                f"unknown setting {name}={shown(value)}.{nearest(name, known)} Settings: {', '.join(known)}"
            )
    arguments = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**arguments)
    except ValidationError as error:
        raise ConfigurationError("; ".join(_line(item, arguments) for item in error.errors())) from None
    except TypeError as error:
        raise ConfigurationError(f"settings: {error}") from None


def setting_sources(**given: Any) -> dict[str, str]:
    """Where each effective setting comes from: "argument", the environment variable, or "default"."""
    environment = {name.upper() for name, value in os.environ.items() if value}
    sources = {}
    for name in Settings.model_fields:
        variable = f"{PREFIX}{name.upper()}"
        sources[name] = (
            "argument" if given.get(name) is not None else variable if variable in environment else "default"
        )
    return sources


def _line(item: Any, arguments: dict[str, Any]) -> str:
    name = str(item["loc"][0]) if item["loc"] else "settings"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return message
    shown_as = name if name in arguments else f"{PREFIX}{name.upper()}"
    return f"{shown_as}={shown(item['input'])} is not allowed: {message}"
