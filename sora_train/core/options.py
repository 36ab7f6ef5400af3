"""Options of commands, `key=value`.

The dataclass of a command's options defines the type of each value. Text is used exactly as typed and never parsed as
YAML, so a colon, a hash or the word "no" has no special meaning. Numbers must be finite and in their field's range.
A list is written `[a,b]`. An item with a comma needs quotes, unless the comma is inside brackets or braces of the item
(`[train-{0,1}.tar,val.tar]`). A single item needs no brackets, and a list's key may be given several times. A map is
written `{name: value, other: value}`. `null` sets an optional number or choice to None.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sora_train.core.cli import InputError, nearest

MAX_SEED = 2**62  # largest seed that a user may give; seeds derived by counting up must fit torch's 64 bits

Options = TypeVar("Options")
_MISSING = "???"  # marks a field without default, in configurations and in options
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_KEY = re.compile(r"[A-Za-z_]\w*")
_TEXTS = ("prompt", "negative")  # options that are no paths


def number(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """Dataclass field for a number, or a list of numbers, within a range.

    Args:
        default: Default value; without one the option is required.
        least: Smallest allowed value.
        above: Exclusive lower bound.
        most: Largest allowed value.
        below: Exclusive upper bound.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    return _field(default, {"limits": {name: limit for name, limit in limits.items() if limit is not None}})


def choice(names: tuple[str, ...], default: Any = dataclasses.MISSING) -> Any:
    """Dataclass field whose value must be one of `names`."""
    return _field(default, {"names": names})


def named(key: str, default: Any = dataclasses.MISSING) -> Any:
    """Dataclass field whose option has another name, `key`, because that is a Python keyword (`from`)."""
    return _field(default, {"key": key})


def options(
    schema: type[Options],
    usage: str | None,
    beneath: Callable[[Mapping[str, str]], Mapping[str, Any]] = lambda typed: {},
) -> Options:
    """Parse the command line, which consists of `key=value` only, into the dataclass `schema`.

    Args:
        schema: Dataclass of the options.
        usage: Text that `--help` prints.
        beneath: Function from the typed options to values of further options, which typed ones override.

    Raises:
        InputError: An unknown key (the message names the nearest), a wrong type, a value out of range, or a missing
            required option.
    """
    given, rest = _sorted_out(schema, usage)
    for argument in rest:
        _refuse(schema, argument)
    return read(schema, {**beneath(given), **given})


def options_and_paths(schema: type[Options], usage: str | None) -> tuple[Options, list[str]]:
    """Like `options`, for a command that also takes paths. Returns the options, and the paths in their order."""
    given, rest = _sorted_out(schema, usage)
    for argument in rest:
        if argument.startswith("-"):
            _refuse(schema, argument)
        key, equals, _ = argument.partition("=")
        if equals and _KEY.fullmatch(key) and "/" not in argument and not Path(argument).exists():
            _refuse(schema, argument)
    return read(schema, given), rest


def options_and_overrides(schema: type[Options], usage: str | None, run_dir: str) -> Options:
    """Like `options`, for a command whose other arguments are overrides for Hydra, which remain in `sys.argv`.

    `run_dir` is the value of that key if the command line doesn't set it; the command writes nothing there.
    """
    given, rest = _sorted_out(schema, usage)
    if not any(argument.startswith("run_dir=") for argument in rest):
        rest.append(f"run_dir={run_dir}")
    values = read(schema, given)
    sys.argv[1:] = rest
    return values


def read(schema: type[Options], given: Mapping[str, Any]) -> Options:
    """Build the dataclass from values by key: text as typed on a command line, or values of the right type from JSON.

    Raises InputError as `options` does.
    """
    fields, hints = _by_key(schema), get_type_hints(schema)
    for key in given:
        if key not in fields:
            raise InputError(f"there is no option {key!r}; {nearest(key, list(fields))}")
    missing = [key for key, field in fields.items() if key not in given and _required(field)]
    if missing:
        raise InputError(f"missing: {', '.join(f'{key}=...' for key in missing)}; --help shows what they mean")
    return schema(**{fields[key].name: _value(key, fields[key], hints[fields[key].name], given[key]) for key in given})


def check_home(arguments: Sequence[str]) -> None:
    """Raise InputError for a path that begins with `~/`: many shells don't expand it behind `key=`."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in _TEXTS and re.match(r"\[?\s*['\"]?~/", value):
            raise InputError(f"{argument}: the shell leaves ~ there as it is; write $HOME or the whole path")


def keys(schema: type) -> dict[str, str]:
    """Map from the name of every field to the key of its option."""
    return {field.name: key for key, field in _by_key(schema).items()}


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _by_key(schema: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.metadata.get("key", field.name): field for field in dataclasses.fields(schema)}


def _required(field: dataclasses.Field[Any]) -> bool:
    none = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    return none or field.default == _MISSING


def _sorted_out(schema: type, usage: str | None) -> tuple[dict[str, Any], list[str]]:
    """Split the command line into values of options by key, and all other arguments.

    If a key is given several times, the last value counts. For lists, the value is a tuple of all given texts, to be
    concatenated.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage)
        sys.exit(0)
    check_home(sys.argv[1:])
    given: dict[str, Any] = {}
    rest, known, hints = [], _by_key(schema), get_type_hints(schema)
    for argument in sys.argv[1:]:
        key, equals, value = argument.partition("=")
        if equals and key in known:
            is_list = get_origin(_without_none(hints[known[key].name])[0]) is list
            given[key] = (*given.get(key, ()), value) if is_list else value
        else:
            rest.append(argument)
    return given, rest


def _refuse(schema: type, argument: str) -> None:
    key, equals, _ = argument.partition("=")
    if not equals:
        raise InputError(f"{argument!r} is not of the form key=value; --help shows the keys")
    raise InputError(f"there is no option {key!r}; {nearest(key, list(_by_key(schema)))}")


def _value(key: str, field: dataclasses.Field[Any], hint: Any, given: Any) -> Any:
    """Convert a given value to the field's type, and check its range. Raises InputError."""
    kind, optional = _without_none(hint)
    is_text = kind is str and "names" not in field.metadata
    if optional and (given is None or (given == "null" and not is_text)):
        return None
    if get_origin(kind) is list:
        if isinstance(given, str):
            items: Any = list_items(key, given)
        else:
            items = [item for text in given for item in list_items(key, text)] if isinstance(given, tuple) else given
        if not isinstance(items, list):
            raise InputError(f"{key}={_shown(given)} must be a list, [a,b]")
        return [_one(key, field, get_args(kind)[0], item) for item in items]
    if get_origin(kind) is dict:
        entries = map_items(key, given) if isinstance(given, str) else given
        if not isinstance(entries, Mapping):
            raise InputError(f"{key}={_shown(given)} must be a map, {{name: value}}")
        return {name: _one(key, field, get_args(kind)[1], value) for name, value in entries.items()}
    return _one(key, field, kind, given)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Split a type hint into the type without None, and True if it allows None."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if len(kinds) != 1:
        raise TypeError(f"an option is of one type, not {hint}")
    return kinds[0], True


def _one(key: str, field: dataclasses.Field[Any], kind: Any, given: Any) -> Any:
    if kind is str:
        return _text(key, field, given)
    if kind is bool:
        return _boolean(key, given)
    if kind in (int, float):
        return _number(key, field, kind, given)
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = {str(member.value): member for member in kind}
        if given not in names:
            raise InputError(f"{key}={_shown(given)}; {nearest(str(given), list(names))}")
        return names[given]
    raise TypeError(f"no option can be a {kind}")


def _text(key: str, field: dataclasses.Field[Any], given: Any) -> str:
    if not isinstance(given, str):
        raise InputError(f"{key}={_shown(given)} must be text")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{key} is not UTF-8 at character {error.start}") from error
    if "\0" in given:
        raise InputError(f"{key} has a zero byte at character {given.index(chr(0))}; leave it out")
    if not given.strip() and _required(field):
        raise InputError(f"{key}= is empty; --help shows what it means")
    names = field.metadata.get("names", ())
    if names and given not in names:
        raise InputError(f"{key}={_shown(given)}; {nearest(given, list(names))}")
    return given


def _boolean(key: str, given: Any) -> bool:
    if isinstance(given, bool):
        return given
    if not isinstance(given, str) or given.lower() not in _BOOLEANS:
        raise InputError(f"{key}={_shown(given)} must be true or false")
    return _BOOLEANS[given.lower()]


def _number(key: str, field: dataclasses.Field[Any], kind: type, given: Any) -> Any:
    limits = field.metadata.get("limits", {})
    wanted = ("a whole number" if kind is int else "a number") + _range(limits)
    try:
        if isinstance(given, bool) or (isinstance(given, float) and kind is int):
            raise ValueError
        if isinstance(given, str) and (not given.isascii() or "_" in given):  # which Python would accept
            raise ValueError
        value = kind(given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}={_shown(given)} must be {wanted}") from error
    within = (
        value >= limits.get("least", -math.inf) and value <= limits.get("most", math.inf)
        and value > limits.get("above", -math.inf) and value < limits.get("below", math.inf)
    )  # fmt: skip
    if not math.isfinite(value) or not within:
        raise InputError(f"{key}={_shown(given)} must be {wanted}")
    return value


def _range(limits: Mapping[str, float]) -> str:
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    return "".join(f"{' and' if n else ''} {words[name]} {limit:g}" for n, (name, limit) in enumerate(limits.items()))


def list_items(key: str, text: str) -> list[str]:
    """Parse a typed list into its items. Raises InputError."""
    inner = _unbracketed(text)
    if inner is None:
        return [text]
    items, item, depth, quote = [], "", 0, ""
    for character in inner:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and not item.strip():
            quote = character
        depth += (character in "[{(") - (character in "]})") if not quote else 0
        if character == "," and depth == 0 and not quote:
            items.append(item)
            item = ""
        else:
            item += character
    if quote:
        raise InputError(f"{key}={_shown(text)}: a quote is not closed")
    items += [item] if items or item.strip() else []
    stripped = [item.strip() for item in items]
    if not all(stripped):
        raise InputError(f"{key}={_shown(text)} has an empty item")
    return [item[1:-1] if item[0] in "\"'" and item[-1] == item[0] and len(item) > 1 else item for item in stripped]


def map_items(key: str, text: str) -> dict[str, str]:
    """Parse a typed map into its entries; values may contain colons. Raises InputError."""
    inner, entries = text.strip(), dict[str, str]()
    wrong = InputError(f"{key}={_shown(text)} must be a map with each name once, {{name: value, other: value}}")
    if inner[:1] != "{" or inner[-1:] != "}":
        raise wrong
    for item in list_items(key, f"[{inner[1:-1]}]"):
        name, _, value = (part.strip() for part in item.partition(":"))
        if not name or not value or name in entries:
            raise wrong
        entries[name] = value
    return entries


def _unbracketed(text: str) -> str | None:
    """Text between the outer brackets of a list; None if no pair of brackets encloses the complete text."""
    depth, quote, before = 0, "", ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and before in ("[", ","):
            quote = character
        else:
            depth += (character == "[") - (character == "]")
            if depth == 0:
                return text[1:-1] if place == len(text) - 1 and place > 0 else None
        before = character if character.strip() else before
    return text[1:-1] if quote and text.endswith("]") else None


def _shown(value: Any) -> str:
    """Format a value for a message: shortened, and on one line."""
    text = str(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if text.isprintable() else ascii(text)
