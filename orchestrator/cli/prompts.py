"""Files of prompts: one a line, or objects with the options' names. Every line that is wrong is named at once."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from protocol.errors import BadRequest

Row = tuple[str, dict[str, Any]]  # where it is from, and a request's fields
LINE = re.compile(r"\r\n|\n|\r")  # and nothing else: a prompt may hold other separators
OBJECT = 'an object such as {"prompt": "a red circle", "seed": 1}'
TEXTS = ("prompt", "negative_prompt", "id", "model", "controlnet", "refiner")  # columns of a table that are no numbers
MOST_NAMED = 20


def read_prompts(path: Path) -> list[Row]:
    """The prompts of a file, by its suffix; BadRequest."""
    suffix = path.suffix.lower()
    reader = READERS.get(suffix)
    if reader is None:
        raise BadRequest(
            f"The prompts file {str(path)!r} is of no known kind.", f"Name it with one of {', '.join(READERS)}."
        )
    rows: list[Row] = []
    bad: list[str] = []
    for number, fields in reader(text_of(path), path):
        if fields is None:
            bad.append(str(number))
        else:
            rows.append((f"{path}, line {number}: ", fields))
    if bad:
        named = ", ".join(bad[:MOST_NAMED]) + (" …" if len(bad) > MOST_NAMED else "")
        raise BadRequest(f"{str(path)!r} has lines that don't fit: {named}.", f"Each should be {OBJECT}.")
    return rows


def text_of(path: Path) -> str:
    """A text file in UTF-8, without a byte order mark; BadRequest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadRequest(f"The prompts file {str(path)!r} can't be read: {error.strerror}.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0\0\0\0" in (data[:8:2], data[1:8:2]):
        raise BadRequest(f"The prompts file {str(path)!r} is UTF-16 text.", "Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"The prompts file {str(path)!r} is not UTF-8 text.", "Save it as UTF-8.") from error


Numbered = Iterator[tuple[int, dict[str, Any] | None]]  # (line, a request's fields; None: it is wrong)


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that hold something, with their numbers."""
    for number, line in enumerate(LINE.split(text), 1):
        if line.strip():
            yield number, line.strip()


def plain(text: str, path: Path) -> Numbered:
    for number, line in lines(text):
        yield number, {"prompt": line}


def objects(text: str, path: Path) -> Numbered:
    for number, line in lines(text):
        try:
            yield number, fields_of(json.loads(line))
        except (ValueError, RecursionError):
            yield number, None


def one_list(text: str, path: Path) -> Numbered:
    """A JSON list, whose entries count as lines."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(
            f"{str(path)!r} is not valid JSON.", f"It should hold a list of prompts, each {OBJECT}."
        ) from error
    if not isinstance(found, list):
        raise BadRequest(f"{str(path)!r} holds no list.", f"It should hold a list of prompts, each {OBJECT}.")
    for number, entry in enumerate(found, 1):
        yield number, {"prompt": entry} if isinstance(entry, str) else fields_of(entry)


def table(text: str, path: Path) -> Numbered:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if "prompt" not in (reader.fieldnames or ()):
        raise BadRequest(f"{str(path)!r} has no column 'prompt'.", "Its first line should name the columns.")
    try:
        for row in reader:
            given = {name: value for name, value in row.items() if value not in (None, "")}
            yield reader.line_num, None if None in row else fields_of({n: cell(n, v) for n, v in given.items()})
    except csv.Error as error:
        raise BadRequest(f"{str(path)!r} is not a table that can be read: {error}.") from error


def cell(name: str, value: str) -> str | int | float:
    """A table's value: a number, where the column is one of numbers and it is written as one."""
    if name in TEXTS:
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def fields_of(found: object) -> dict[str, Any] | None:
    return found if isinstance(found, dict) and isinstance(found.get("prompt"), str) else None


READERS: dict[str, Callable[[str, Path], Numbered]] = {
    ".txt": plain, ".jsonl": objects, ".ndjson": objects, ".json": one_list, ".csv": table,
}  # fmt: skip
