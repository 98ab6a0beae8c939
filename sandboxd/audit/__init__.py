"""The audit record: one JSON line for each event, each with the hash of the line before.

``log`` writes, ``record`` says what a line looks like and what of it is left out, ``reader`` checks and follows files.
Pure standard library: engine, dispatcher and command line use the same.
"""

from __future__ import annotations

from sandboxd.audit.log import AuditError, AuditLog

__all__ = ["AuditError", "AuditLog"]
