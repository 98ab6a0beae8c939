"""``@tool``: from an annotated function to something that a model may call."""

from __future__ import annotations

import copy
import functools
import inspect
import keyword
import math
import re
import sys
import typing
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, overload

from sandboxd.tools.pipeline.rates import Rate
from sandboxd.tools.schema import docstrings
from sandboxd.tools.schema.signature import Arguments, Returns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

P = ParamSpec("P")
R = TypeVar("R")

Caller = Literal["model", "code"]
CALLERS: frozenset[str] = frozenset(("model", "code"))

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


class Tool:
    """A function that may be called through a Dispatcher; calling it calls the plain function.

    *arguments_schema* and *result_schema* are JSON Schema 2020-12; the latter is None when the function says nothing
    of its result. *timeout* is in seconds. *read_only*, *destructive*, *idempotent* are hints for whoever asks a person
    (None: not said); nothing here depends on them.
    """

    # More than 15 attributes: the decorator's arguments, and the two schemas that follow from the signature.

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        callers: Iterable[str] = ("model", "code"),
        approval: bool = False,
        rate: str | None = None,
        timeout: float | None = None,
        max_result_bytes: int | None = None,
        read_only: bool | None = None,
        destructive: bool | None = None,
        idempotent: bool | None = None,
        namespace: dict[str, Any] | None = None,
    ) -> None:
        """As ``tool``; *namespace* holds further names that annotations may use. Raises TypeError."""
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            raise TypeError(f"A tool is made from a function, and {function!r} is none.")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__name__} is a generator; a tool returns its whole result.")
        self.name = function.__name__ if name is None else name
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name) or keyword.iskeyword(self.name):
            raise TypeError(
                f"{self.name!r} cannot be a tool's name: it takes a letter and then up to 63 letters, digits and "
                "underscores, all ASCII, and no keyword of Python."
            )
        self.callers = _callers(callers, self.name)
        self.approval = approval
        self.rate = None if rate is None else Rate.parse(rate)
        self.timeout = _positive(timeout, f"The timeout of {self.name}", "seconds")
        if max_result_bytes is not None and (type(max_result_bytes) is not int or max_result_bytes < 1):
            raise TypeError(f"max_result_bytes of {self.name} must be a positive int, not {max_result_bytes!r}.")
        self.max_result_bytes = max_result_bytes
        self.read_only = read_only
        self.destructive = destructive
        self.idempotent = idempotent
        self.function = function
        self.is_async = inspect.iscoroutinefunction(function)
        # What ``acall`` awaits; a synchronous function may have a second form for it.
        self.function_async: Callable[..., Any] | None = function if self.is_async else None
        self.description, described = docstrings.split(function.__doc__)
        hints = _hints(function, namespace, self.name)
        annotations, defaults = _parameters(function, hints, self.name)
        self._arguments = Arguments(self.name, annotations, described, defaults)
        self._returns = Returns(self.name, hints["return"]) if "return" in hints else None
        self.arguments_schema = self._arguments.schema
        self.result_schema = None if self._returns is None else self._returns.schema
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Tool {self.name}>"

    def replaced(self, **attributes: Any) -> Tool:
        """A copy with other values of some attributes."""
        other = copy.copy(self)
        for name, value in attributes.items():
            if not hasattr(other, name):
                raise AttributeError(name)
            setattr(other, name, value)
        return other


if TYPE_CHECKING:

    class TypedTool(Tool, Generic[P, R]):
        """To type checkers: a Tool that is called as its function is."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


@overload
def tool(function: Callable[P, R], /) -> TypedTool[P, R]: ...


@overload
def tool(
    *,
    callers: Iterable[Caller] = ...,
    approval: bool = ...,
    rate: str | None = ...,
    timeout: float | None = ...,
    name: str | None = ...,
    max_result_bytes: int | None = ...,
    read_only: bool | None = ...,
    destructive: bool | None = ...,
    idempotent: bool | None = ...,
) -> Callable[[Callable[P, R]], TypedTool[P, R]]: ...


def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a tool of an annotated function, synchronous or asynchronous; ``@tool`` or ``@tool(...)``.

    *callers*: who may call it, "model" (in a message) and "code" (in the sandbox). *approval*: every call asks the
    Dispatcher's ``approve`` first. *rate*: "10/s", "100/min", "5/hour". *timeout*: seconds; with one, a synchronous
    function runs in a thread of its own, which is abandoned when time is up. *max_result_bytes*: of the result's JSON.

    The docstring describes the tool; per-argument texts are taken from it (Google, NumPy and Sphinx style) or from
    pydantic's ``Field(description=...)``. Raises TypeError where the function cannot be one.
    """
    # Annotations of a function in a function may name what stands there.
    namespace = dict(sys._getframe(1).f_locals)  # pyright: ignore[reportPrivateUsage]
    if function is not None:
        return Tool(function, namespace=namespace)

    def decorate(function: Callable[..., Any]) -> Tool:
        return Tool(function, namespace=namespace, **options)

    return decorate


def _callers(callers: Iterable[str], name: str) -> frozenset[str]:
    given = frozenset((callers,) if isinstance(callers, str) else callers)
    if not given or not given <= CALLERS:
        raise TypeError(f'The callers of {name} are some of "model" and "code", not {sorted(given)!r}.')
    return given


def _positive(value: Any, what: str, unit: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise TypeError(f"{what} must be a positive number of {unit}, not {value!r}.")
    return float(value)


def _hints(function: Callable[..., Any], namespace: dict[str, Any] | None, name: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, localns=namespace, include_extras=True)
    except NameError as error:
        raise TypeError(f"An annotation of {name} names {error.name!r}, which is not defined there.") from None


def _parameters(
    function: Callable[..., Any], hints: dict[str, Any], name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    annotations: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        what = f"Argument {parameter.name} of {name}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{what} takes any number of values; a tool names each of its arguments.")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{what} is positional only; arguments of a tool are given by name.")
        if parameter.name.startswith("_"):
            raise TypeError(f"{what} begins with an underscore.")
        if parameter.name not in hints:
            if parameter.name in ("self", "cls") and not annotations:
                raise TypeError(f"{name} is a method; a tool is made of one that has its object: tool(thing.{name}).")
            raise TypeError(f"{what} has no annotation.")
        annotations[parameter.name] = hints[parameter.name]
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
    return annotations, defaults
