"""Filters: the right rows, one clear line for a mistake, and nothing that could run."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.data.order.filters import Filter

COLUMNS = {
    "duration": np.array([1.0, 2.0, 5.0, 0.0]),
    "height": np.array([240, 480, 1080, 64], dtype=np.int32),
    "width": np.array([426, 854, 1920, 64], dtype=np.uint16),
    "key": np.array(["a", "b", "c", "d"], dtype=object),
}


def passing(text: str) -> list[int]:
    chosen = Filter(text)
    chosen.check(COLUMNS)
    return np.flatnonzero(chosen(COLUMNS.__getitem__, 4)).tolist()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("duration >= 2", [1, 2]),
        ("duration >= 2 and height >= 1000", [2]),
        ("duration < 2 or height == 1080", [0, 2, 3]),
        ("not duration >= 2", [0, 3]),
        ("1 <= duration < 5", [0, 1]),
        ("width * height >= 400000", [1, 2]),
        ("width / height > 1.7", [0, 1, 2]),
        ("width - height == 0", [3]),
        ("1 / duration > 0.4", [0, 1, 3]),
        ("-height < -500", [2]),
        ('key == "b"', [1]),
        ('key in ["a", "d", "z"]', [0, 3]),
        ('key not in ["a", "d"]', [1, 2]),
        ("height in (240, 64)", [0, 3]),
        ("True", [0, 1, 2, 3]),
        ("", [0, 1, 2, 3]),
        ("1 > 2", []),
        ("60000 * width > 0", [0, 1, 2, 3]),
    ],
)
def test_the_right_rows_pass(text: str, rows: list[int]) -> None:
    assert passing(text) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("durration > 2", "the index has no column 'durration'; did you mean 'duration'?"),
        ("duration >", "data.filter='duration >' is no expression"),
        ("duration", "'duration' is not true or false; compare it"),
        ("duration and True", "'duration' is not true or false"),
        ("duration > 'x'", "compares a number with text"),
        ("key > 3", "compares text with a number"),
        ("key + height == 3", "'key' is not a number"),
        ("key in 'abc'", "is not a list"),
        ("height in [240, 'a']", "numbers alone, or text alone"),
        ("height in [duration]", "numbers alone, or text alone"),
        ("duration is 3", "use =="),
        ("__import__('os').system('true')", "is not allowed in a filter"),
        ("key.upper() == 'A'", "is not allowed in a filter"),
        ("[x for x in (1,)] == 1", "is not allowed in a filter"),
        ("(lambda: 1)() == 1", "is not allowed in a filter"),
        ("2 ** 9 ** 9 > 1", "is not allowed in a filter"),
        ("height[0] > 1", "is not allowed in a filter"),
        ("(y := 3) > 1", "is not allowed in a filter"),
        ("f'{height}' == 'a'", "is not allowed in a filter"),
        ("(" * 900 + "1" + ")" * 900, "is no expression"),
        ("height > 1 and " * 200 + "True", "longer than 2000 characters"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        passing(text)
    assert str(raised.value).startswith("data.filter") and "\n" not in str(raised.value)
