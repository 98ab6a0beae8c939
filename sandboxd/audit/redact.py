"""Leaving secrets out of records of the audit: what stands under named keys, and the same text wherever else it is.

Callers choose the secrets as well as the texts in which they are sought, and the search holds up every thread of the
program that records. So its work is bounded before it is begun, and what is beyond the bounds is left out as a whole:
never searched, never kept. It is ``str.find`` and ``str.replace`` throughout, never a regular expression made of texts.
"""

from __future__ import annotations

import bisect
import json
import re
from typing import TYPE_CHECKING, Any, Final

from sandboxd.audit.record import CAPPED, CHUNK, REDACTED, Excerpt, excerpted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Redactor"]

SHORT: Final = 4
"""A secret with fewer characters is only replaced where it stands alone: "1" is in every other word."""
MOST_SECRETS: Final = 32
MOST_CHARACTERS: Final = 8 << 10
"""Of all secrets of a record together; a private key has 3,000."""
MOST_WORK: Final = 4 << 20
"""Comparisons in the record of a tool call: about the characters in it times those of the secrets."""
LONG: Final = 100
"""``str.find`` compares up to so many characters at each place; longer words it seeks by another algorithm."""
STEP: Final = 100
"""What it costs to begin a search, in comparisons."""
CUT: Final = 8
"""So much of a secret's beginning, or end, is taken for a part of it where messages may have cut it."""

_OURS: Final = frozenset(
    {
        "time",
        "event",
        "id",
        "client",
        "policy",
        "isolation",
        "usage",
        "timings",
        "limits",
        "stdout",
        "stderr",
        "refused",
    }
)
"""Fields in which nothing stands that a caller could choose; a client's name is the user's."""
_CUT: Final = frozenset({"result", "error", "failure"})
"""Fields that hold messages, which show the beginning of a value, or beginning and end of a long text."""
_PLAIN: Final = {"tool_called": ("tool", "caller", "code"), "run_ended": ("status",), "run_started": ("language",)}
"""What is kept of a record that is left out as a whole, where it is a name."""
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_MARKS: Final = "".join(map(chr, (*range(1, 9), *range(14, 32))))
"""One that a text does not hold stands for what was replaced in it, until all is: no secret is found in it."""


class Redactor:
    """Leaves out secrets: what stands under one of *names*, and that same text wherever else it occurs in a record.

    *names* are those of environment variables and of keys in arguments and results; "*" stands for anything, case does
    not matter. *env* is the environment of the run that the records are about.
    """

    def __init__(self, names: Iterable[str] = (), env: Mapping[str, str] | None = None) -> None:
        self.names = tuple(names)
        folded = [name.casefold() for name in self.names]
        self._exact = frozenset(name for name in folded if "*" not in name)
        self._patterns = [name.split("*") for name in folded if "*" in name]
        self._env = _Secrets()
        for name, value in (env or {}).items():
            if self._is_secret(name):
                self._env.add(value)

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def seeks(self) -> bool:
        """Whether every text of every record is searched."""
        return bool(self._env.found)

    def _is_secret(self, name: str) -> bool:
        folded = name.casefold()
        if folded in self._exact:
            return True
        for parts in self._patterns:  # noqa: SIM110 (a generator costs more than most searches)
            if _matches(folded, parts):
                return True
        return False

    def __call__(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """*record* without the secrets; one in which something was replaced says so: ``redacted`` is true."""
        if not self.names:
            return record
        try:
            return self._clean(record)
        except RuntimeError:
            # Too deep, or changed meanwhile: nobody can tell what is in there, so nothing of it is kept.
            return _closed(record)

    def _clean(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        secrets = self._env.copy()
        given = dict(record)
        for key in CAPPED:
            if key in given:
                # What would be cut is cut now, and not searched; and a text is what could not be read as arguments.
                given[key] = excerpted(given[key], always=key == "arguments" and isinstance(given[key], str))
                self._collect(given[key], False, secrets)
        if secrets.too_many:
            return _closed(record)
        if not secrets.named and not secrets.found:
            return record
        blind = any(type(given.get(key)) is Excerpt for key in ("tool", "arguments"))
        replacing = _Replacing(secrets, self._is_secret, blind)
        if record.get("event") == "tool_called" and replacing.work(secrets) > MOST_WORK:
            return _closed(record)
        clean = {key: value if key in _OURS else replacing.field(key, value) for key, value in given.items()}
        return {**clean, "redacted": True} if replacing.count else record

    def _collect(self, value: Any, secret: bool, secrets: _Secrets) -> None:
        """Add to *secrets* every text that stands under a secret name in *value*, and count what is to be searched."""
        if isinstance(value, str):
            secrets.texts += 1
            secrets.characters += len(value)
            if secret:
                secrets.add(value)
        elif isinstance(value, Excerpt):
            secrets.named = True
        elif isinstance(value, dict):
            secrets.texts += len(value)
            for key, item in value.items():
                name = str(key)
                secrets.characters += len(name)
                if secret or self._is_secret(name):
                    secrets.named = True
                    self._collect(item, True, secrets)
                else:
                    self._collect(item, False, secrets)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._collect(item, secret, secrets)
        elif secret and isinstance(value, (int, float)) and not isinstance(value, bool):
            secrets.add_number(value)


class _Secrets:
    """What is sought, and how much there is to be searched."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.numbers: set[int | float] = set()
        self.named = False  # something stands under a secret name, or nobody can tell
        self.too_many = False
        self.texts = 0
        self.characters = 0
        self._sought = 0

    def copy(self) -> _Secrets:
        made = _Secrets()
        made.found, made.too_many, made._sought = set(self.found), self.too_many, self._sought
        return made

    def add(self, value: str) -> None:
        """*value* is a secret."""
        if not value or self.too_many or value in self.found:
            return
        self._sought += len(value)
        self.found.add(value)
        if len(self.found) > MOST_SECRETS or self._sought > MOST_CHARACTERS:
            self.too_many = True

    def add_number(self, value: float) -> None:
        """A number is a secret, also where it stands as one, unless it is as short as any."""
        try:
            text = json.dumps(value)
        except ValueError:
            return  # of more digits than anybody writes
        if len(text) >= SHORT:
            self.numbers.add(value)
            self.add(text)


class _Replacing:
    """The replacement in one record. *blind*: its secrets are not all known."""

    def __init__(self, secrets: _Secrets, is_secret: Any, blind: bool) -> None:
        self.count = 0
        self._is_secret = is_secret
        self._blind = blind
        self._whole = frozenset(secrets.found)
        self._numbers = frozenset(secrets.numbers)
        spelled: set[str] = set()
        for value in self._whole:
            if len(value) >= SHORT:
                spelled |= _spelled(value)
        self._words = sorted(spelled, key=lambda word: (-len(word), word))
        # What a text must hold to be worth a closer look, where it is whole and where it may be cut.
        self._signs = (self._words, [sign for word in self._words for sign in {word[:CUT], word[-CUT:]}])
        self._starts = frozenset(word[:n] for word in spelled for n in range(SHORT - 1, min(CUT, len(word))))

    def work(self, secrets: _Secrets) -> int:
        """How many comparisons the search can take."""
        once = sum(min(len(word), LONG) + STEP // CUT for word in self._words)
        return secrets.characters * once + secrets.texts * len(self._words) * STEP

    def field(self, key: str, value: Any) -> Any:
        """The field *key* of the record."""
        if key == "result" and self._blind and isinstance(value, str | dict | list | tuple):
            # It may say again what the arguments held.
            return Excerpt(value, text=self._gone()) if type(value) is Excerpt else self._gone()
        return self._within(value, key in CAPPED, key in _CUT)

    def _within(self, value: Any, by_key: bool, cut: bool) -> Any:
        """*value* without the secrets; *by_key*: also what stands under their names; *cut*: also parts of them."""
        if isinstance(value, str):
            return self._text(value, cut)
        if type(value) is Excerpt:
            # What stands under a secret name in there cannot be told, nor what the cut went through.
            return Excerpt(value, text=self._gone()) if by_key or self._whole else value
        if isinstance(value, dict):
            return {
                self._text(str(key), cut): self._gone()
                if by_key and item is not None and self._is_secret(str(key))
                else self._within(item, by_key, cut)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._within(item, by_key, cut) for item in value]
        if self._numbers and isinstance(value, (int, float)) and value in self._numbers:
            return self._gone()
        return value

    def _gone(self) -> str:
        self.count += 1
        return REDACTED

    def _text(self, text: str, cut: bool) -> str:
        if text in self._whole:
            return self._gone()
        if len(text) < SHORT - 1:
            return text
        for sign in self._signs[cut]:
            if sign in text:
                break
        else:
            if not cut or "..." not in text or not self._starts:
                return text
        mark = next((one for one in _MARKS if one not in text), "")
        clean, words = text, self._words
        if not mark:
            # Who puts all of them into a text does not get out of its being kept and searched.
            mark = _MARKS[0]
            clean, words = clean.replace(mark, "\ufffd"), [word.replace(mark, "\ufffd") for word in words]
        before = clean
        for word in words:
            if len(word) <= len(clean):
                clean = _replaced(clean, word, mark)
        if cut:
            clean = _without_beginnings(clean, words, mark)
            clean = _without_beginnings(clean[::-1], [word[::-1] for word in words], mark)[::-1]
        if cut and "..." in clean:
            clean = self._without_rests(clean, mark)
        if clean is before or clean == before:
            return text
        self.count += 1
        return clean.replace(mark, REDACTED)

    def _without_rests(self, text: str, mark: str) -> str:
        """*text* without what is left of a secret just before "...", where it was cut after a few characters."""
        *parts, last = text.split("...")
        for at, part in enumerate(parts):
            for length in range(min(CUT - 1, len(part)), SHORT - 2, -1):
                if part[-length:] in self._starts:
                    parts[at] = part[:-length] + mark
                    break
        return "...".join([*parts, last])


def _matches(name: str, parts: list[str]) -> bool:
    """Whether *name* is *parts* with anything between them; in linear time, for callers choose the names of keys."""
    first, *middle, last = parts
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    at, end = len(first), len(name) - len(last)
    for part in middle:
        at = name.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


def _spelled(value: str) -> set[str]:
    """*value*, and as a traceback, a printed object or a message shows it."""
    if value.isascii() and value.isprintable() and not {"'", '"', "\\"} & set(value):
        return {value}
    text = json.dumps(value, ensure_ascii=False)[1:-1]
    return {value, repr(value)[1:-1], json.dumps(value)[1:-1], text, _readable(text), _readable(value)}


def _readable(text: str) -> str:
    """As the tools' messages escape it."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def _replaced(text: str, word: str, mark: str) -> str:
    """*text* with *mark* for each *word*; other threads have their turn in between when it is long."""
    if len(text) <= CHUNK:
        return text.replace(word, mark)
    parts: list[str] = []
    done = at = 0
    while at < len(text):
        found = text.find(word, at, at + CHUNK + len(word) - 1)
        if found < 0:
            at += CHUNK
        else:
            parts += (text[done:found], mark)
            done = at = found + len(word)
    return "".join([*parts, text[done:]]) if parts else text


def _without_beginnings(text: str, words: Iterable[str], mark: str) -> str:
    """*text* with *mark* for as much of the beginning of one of *words* as stands anywhere, if that is enough."""
    alike: dict[str, list[str]] = {}  # words that begin alike: what counts is which of them goes on for longest
    for word in sorted(words):
        if len(word) > CUT:
            alike.setdefault(word[:CUT], []).append(word)
    for start, those in alike.items():
        found, longest = text.find(start), max(map(len, those))
        parts: list[str] = []
        done = 0
        while found >= 0:
            parts += (text[done:found], mark)
            # In the order of the alphabet it is one of the two between which the text belongs.
            place = bisect.bisect(those, text[found : found + longest])
            done = found + max(_in_common(text, found, word) for word in those[max(0, place - 1) : place + 1])
            found = text.find(start, done)
        if parts:
            text = "".join([*parts, text[done:]])
    return text


def _in_common(text: str, at: int, word: str) -> int:
    """How many characters of *word*, the first CUT of which stand at *at*, do."""
    low, high = CUT, min(len(word), len(text) - at)
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(word[:middle], at):
            low = middle
        else:
            high = middle - 1
    return low


def _closed(record: Mapping[str, Any]) -> dict[str, Any]:
    """*record* without anything that a caller could have chosen, but for the names of what happened."""
    plain = _PLAIN.get(str(record.get("event")), ())
    made: dict[str, Any] = {}
    for key, value in record.items():
        name = key in plain and isinstance(value, str) and _NAME.fullmatch(value) is not None
        kept = key in _OURS or name or value is None or isinstance(value, int | float)
        made[key] = value if kept else Excerpt(value, text=REDACTED) if type(value) is Excerpt else REDACTED
    return {**made, "redacted": True}
