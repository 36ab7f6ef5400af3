"""Filters and weights: which samples may be used, and how often, as expressions over the columns of the index.

A filter is true or false, such as `duration >= 2 and height >= 240 or key in ["a", "b"]`; a weight is a number, such as
`score / 5`. Comparisons (chained ones too), `and or not`, `+ - * /`, `in` and `not in` with a list, numbers, text, and
names of columns; nothing else. The expression is parsed by Python and walked here, over whole columns at once; it is
never run.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sora_train.core.cli import InputError, nearest

_LONGEST = 2000  # characters
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
NUMBER, TEXT, TRUTH = "a number", "text", "true or false"


def both(one: str, other: str) -> str:
    """A filter that is true where both filters are; an empty filter is true everywhere."""
    return f"({one}) and ({other})" if one and other else one or other


class _Expression:
    """One parsed expression. Raises InputError for anything it doesn't know.

    Args:
        text: As written in the configuration.
        key: Where it was written, for errors.
    """

    kind, noun, example, otherwise = TRUTH, "filter", "duration >= 2 and height >= 240", ""

    def __init__(self, text: str, key: str) -> None:
        self.text, self.key = text, key
        try:
            if len(text) > _LONGEST:
                raise InputError(f"{key} is longer than {_LONGEST} characters")
            self._tree = ast.parse(text.strip() or "True", mode="eval").body
            self.columns = sorted({node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)})
            self._kind(self._tree, dict.fromkeys(self.columns))
        except SyntaxError as error:
            raise InputError(f"{key}={text!r} is no expression: {error.msg}; write e.g. {self.example}") from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"{key}={text[:60]!r}... is no expression: it can't be read ({error})") from error

    def check(self, columns: Mapping[str, np.ndarray]) -> None:
        """Raise InputError where the expression names a column that isn't there, or mixes text and numbers."""
        for name in self.columns:
            if name not in columns:
                close = nearest(name, list(columns))
                raise InputError(f"{self.key}={self.text!r}: the index has no column {name!r}; {close}")
        kinds = {name: TEXT if columns[name].dtype.kind in "OUST" else NUMBER for name in self.columns}
        if self._kind(self._tree, kinds) not in (self.kind, None):
            raise self._wrong(self._tree, f"is not {self.kind}{self.otherwise}")

    def __call__(self, column: Callable[[str], np.ndarray], count: int) -> np.ndarray:
        """Evaluate for some rows.

        Args:
            column: Gives a column's values at those rows.
            count: Number of rows.

        Returns:
            `(count,)`, bool of a filter, float64 of a weight.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.asarray(self._value(self._tree, column), dtype=bool if self.kind is TRUTH else np.float64)
            return np.broadcast_to(value, (count,))

    def _wrong(self, node: ast.expr, what: str) -> InputError:
        return InputError(f"{self.key}={self.text!r}: {ast.unparse(node)!r} {what}")

    def _kind(self, node: ast.expr, kinds: Mapping[str, str | None]) -> str | None:
        """NUMBER, TEXT or TRUTH; None for a column of unknown type. Raises InputError for other syntax."""
        match node:
            case ast.Constant(value=bool()):
                return TRUTH
            case ast.Constant(value=int() | float()):
                return NUMBER
            case ast.Constant(value=str()):
                return TEXT
            case ast.Name():
                return kinds[node.id]
            case ast.BoolOp():
                return self._all(node.values, TRUTH, kinds, "is not true or false")
            case ast.UnaryOp(op=ast.Not()):
                return self._all([node.operand], TRUTH, kinds, "is not true or false")
            case ast.UnaryOp(op=ast.USub()):
                return self._all([node.operand], NUMBER, kinds, "is not a number")
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return self._all([node.left, node.right], NUMBER, kinds, "is not a number")
            case ast.Compare():
                return self._comparison(node, kinds)
        allowed = "comparisons, and, or, not, + - * /, in [...] are"
        raise self._wrong(node, f"is not allowed in a {self.noun}: {allowed}")

    def _all(self, nodes: list[ast.expr], wanted: str, kinds: Mapping[str, str | None], what: str) -> str:
        for node in nodes:
            if self._kind(node, kinds) not in (wanted, None):
                raise self._wrong(node, what)
        return wanted

    def _comparison(self, node: ast.Compare, kinds: Mapping[str, str | None]) -> str:
        left = self._kind(node.left, kinds)
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                if not isinstance(right, ast.List | ast.Tuple) or not right.elts:
                    raise self._wrong(right, "is not a list; write name in [1, 2]")
                found = {self._kind(item, kinds) for item in right.elts if isinstance(item, ast.Constant)}
                if len(found) != 1 or not all(isinstance(item, ast.Constant) for item in right.elts):
                    raise self._wrong(right, "must hold numbers alone, or text alone")
                kind = found.pop()
            elif type(op) in _COMPARE:
                kind = self._kind(right, kinds)
            else:
                raise self._wrong(node, "compares with `is`; use ==")
            if left and kind and left != kind:
                raise self._wrong(node, f"compares {left} with {kind}")
            left = kind
        return TRUTH

    def _value(self, node: ast.expr, column: Callable[[str], np.ndarray]) -> Any:
        """The value of a node that `_kind` has passed."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return column(node.id)
            case ast.BoolOp():
                join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
                return join.reduce(np.broadcast_arrays(*(self._value(value, column) for value in node.values)))
            case ast.UnaryOp():
                value = self._value(node.operand, column)
                return np.logical_not(value) if isinstance(node.op, ast.Not) else -value
            case ast.BinOp():
                values = self._value(node.left, column), self._value(node.right, column)
                return _ARITHMETIC[type(node.op)](*(np.asarray(value, dtype=np.float64) for value in values))
            case ast.Compare():
                return self._compared(node, column)
        raise AssertionError(ast.dump(node))

    def _compared(self, node: ast.Compare, column: Callable[[str], np.ndarray]) -> Any:
        result: Any = True
        left = self._value(node.left, column)
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                assert isinstance(right, ast.List | ast.Tuple)
                among = [ast.literal_eval(item) for item in right.elts]
                found = np.isin(np.asarray(left), np.array(among, dtype=object if isinstance(among[0], str) else None))
                result = result & (found if isinstance(op, ast.In) else ~found)
            else:
                value = self._value(right, column)
                result = result & _COMPARE[type(op)](left, value)
                left = value
        return result


class Filter(_Expression):
    """Condition on samples; an empty expression passes everything."""

    otherwise = "; compare it with something"

    def __init__(self, text: str, key: str = "data.filter") -> None:
        super().__init__(text, key)


class Weight(_Expression):
    """Number of visits of a sample per epoch."""

    kind, noun, example = NUMBER, "weight", "score / 5"

    def __init__(self, text: str, key: str = "data.weight") -> None:
        super().__init__(text, key)
