"""Option types that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sandboxd.errors import PolicyError
from sandboxd.limits import LIMITS, UNLIMITED, parse

__all__ = ["ADDRESS", "DEFAULT_ADDRESS", "AddressType", "LimitType"]

if TYPE_CHECKING:
    LimitBase = click.ParamType[float | str]
    AddressBase = click.ParamType[str]
else:  # generic only in newer releases of click
    LimitBase = AddressBase = click.ParamType

DEFAULT_ADDRESS = "unix:/run/sandboxd/sandboxd.sock"


class LimitType(LimitBase):
    """The value of a limit, by the same rules as in a policy; a refusal names the allowed range.

    The value is a number in the limit's unit, or the word "unlimited" (None is left to mean that the option is absent).
    """

    def __init__(self, limit: str) -> None:
        self.limit = limit
        self.name = {"bytes": "size", "seconds": "seconds", "cpus": "number", "count": "number"}[LIMITS[limit].unit]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        given = _number(value) if isinstance(value, str) and value != UNLIMITED else value
        try:
            number = parse(self.limit, given)
        except PolicyError as error:
            self.fail(error.message.removeprefix(f"limits.{self.limit}: "), param, ctx)
        return UNLIMITED if number is None else number


def _number(text: str) -> int | float | str:
    """*text* as a number when it is one, else *text*."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class AddressType(AddressBase):
    """``unix:PATH``, the address of a daemon."""

    name = "unix:PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not isinstance(value, str) or not value.startswith("unix:") or len(value) <= len("unix:") or "\0" in value:
            self.fail(f"{value!r} is not an address; allowed: unix:PATH, such as {DEFAULT_ADDRESS}", param, ctx)
        return value


ADDRESS = AddressType()
