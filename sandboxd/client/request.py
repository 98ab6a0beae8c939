"""What a caller asks for: one run, checked at the client's edge before anything is sent.

``RunRequest`` is the public model; ``header`` and ``lead`` are its wire form, which the engine reads with
``sandboxd.protocol.run_header.parse_header`` and checks again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator, ValidationError

from sandboxd.errors import InvalidRequest
from sandboxd.limits import shown
from sandboxd.policy import Limits
from sandboxd.protocol import run_header
from sandboxd.protocol.run_header import check_guest_path

__all__ = ["RunRequest", "check_guest_path", "check_limits", "check_stdin"]


def _sizes(files: object) -> dict[str, int]:
    if not isinstance(files, dict):
        raise InvalidRequest("files", f"it must map guest paths to sizes, not {type(files).__name__}")
    return dict(run_header.check_files(cast("dict[object, object]", files).items()))


def check_stdin(stdin: object) -> bytes | None:
    """What the program reads; None is empty input. Raises InvalidRequest."""
    if stdin is None or isinstance(stdin, bytes):
        return stdin
    if isinstance(stdin, bytearray | memoryview):
        return bytes(cast("bytearray | memoryview", stdin))
    raise InvalidRequest("stdin", f"it must be bytes or None, not {type(stdin).__name__}")


def check_limits(limits: object) -> object:
    """Limits or None. Raises InvalidRequest."""
    if limits is None or isinstance(limits, Limits):
        return limits
    raise InvalidRequest("limits", f"it must be sandboxd.Limits or None, not {type(limits).__name__}")


class RunRequest(BaseModel):
    """One run. Raises InvalidRequest that names the argument, PolicyError for limits.

    *code* is text, or bytes in UTF-8, of at most 16 MiB. *filename* is the name that tracebacks show. *files* maps
    paths below /workspace to sizes in bytes; the contents follow on the wire in the same order. *stdin* None is empty
    input. *limits* may only narrow those of the sandbox. *results* asks for the last expression's value, *stream* for
    output as it comes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    code: Annotated[str | bytes, PlainValidator(run_header.check_code)]
    language: Annotated[str, PlainValidator(run_header.check_language)] = "python"
    filename: Annotated[str, PlainValidator(run_header.check_filename)] = "main.py"
    args: Annotated[tuple[str, ...] | list[str], PlainValidator(run_header.check_args)] = ()
    env: Annotated[dict[str, str], PlainValidator(run_header.check_env)] = {}
    files: Annotated[dict[str, int], PlainValidator(_sizes)] = {}
    stdin: Annotated[bytes | None, PlainValidator(check_stdin)] = None
    limits: Annotated[Limits | None, BeforeValidator(check_limits)] = None
    results: bool = False
    stream: bool = False

    if not TYPE_CHECKING:  # type checkers take the signature from the fields

        def __init__(self, /, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise _refusal(error) from None
            run_header.check_env(self.env, self.args)  # together they have a bound that neither has alone

    def header(self) -> dict[str, Any]:
        """The JSON header of the wire form; the payload is ``lead()`` and then the contents of ``files`` in order."""
        code = self.code
        assert isinstance(code, str)  # noqa: S101 (check_code's promise, for the type checker)
        return run_header.build_header(
            code_bytes=len(code) if code.isascii() else len(code.encode()),
            stdin_bytes=None if self.stdin is None else len(self.stdin),
            files=self.files.items(),
            args=self.args,
            env=self.env,
            limits={} if self.limits is None else self.limits.plain(),
            language=self.language,
            filename=self.filename,
            stream=self.stream,
            results=self.results,
        )

    def lead(self) -> bytes:
        """The head of the payload: the source text and stdin."""
        code = self.code
        assert isinstance(code, str)  # noqa: S101 (check_code's promise, for the type checker)
        return code.encode() if self.stdin is None else b"".join((code.encode(), self.stdin))


def _refusal(error: ValidationError) -> InvalidRequest:
    detail = error.errors(include_url=False)[0]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):
        return cause
    field = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return InvalidRequest(field, f"a run has no such argument; it has {', '.join(RunRequest.model_fields)}")
    if detail["type"] == "missing":
        return InvalidRequest(field, "it is required")
    wanted = "it must be true or false" if detail["type"] == "bool_type" else detail["msg"]
    return InvalidRequest(field, f"{shown(detail['input'])} is not allowed; {wanted}")
