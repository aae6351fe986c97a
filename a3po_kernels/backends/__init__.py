"""Where a computation runs. A backend is a folder; all speak the same functions, file by file."""

from .choice import BACKENDS, INTERPRETED, check_backend, choose

__all__ = ["BACKENDS", "INTERPRETED", "check_backend", "choose"]
