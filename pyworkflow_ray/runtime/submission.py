"""`execution.submission`, for the controller and the api."""

from __future__ import annotations

from pyworkflow_ray.execution.submission import difference, make_created

__all__ = ["difference", "make_created"]
