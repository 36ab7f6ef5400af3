"""Interface of a stage: it maps an item to the same item with more fields, or to a drop with its reason.

Items are maps of JSON values. A stage declares the fields it reads and gets only those, so its result depends on
nothing else, and the ledger can reuse the result of an earlier run for the same fields, parameters and code.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Item = dict[str, Any]
Outcome = dict[str, Any]  # {"kept": fields}, {"dropped": [reason, detail]} or {"failed": [cause, detail]}
Work = Callable[[Item, Mapping[str, Any], Path], Item]
_PLACES = ("path",)  # fields on a file's location, which don't change the result


class Drop(Exception):
    """An item is left out: `reason` is a category for counting, `detail` explains it to the reader."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Fail(Drop):
    """An item couldn't be processed now; the same command tries it again."""


@dataclass(frozen=True)
class Stage:
    """A stage of curation.

    Args:
        name: Names its ledger and its folder of files.
        work: The function: item, parameters and the folder for its files to the fields that it adds. Raises Drop.
        reads: Fields of an item that it depends on.
        modules: Modules whose code its result depends on.
        parameters: JSON values.
        files: Fields of its result that name files in its folder.
    """

    name: str
    work: Work
    reads: tuple[str, ...]
    modules: tuple[str, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def inputs(self, item: Item) -> Item:
        """The fields of an item that the stage reads."""
        return {name: item[name] for name in self.reads}

    def digest(self, item: Item) -> str:
        """Hash of everything that the result for an item depends on."""
        asked = {name: value for name, value in self.inputs(item).items() if name not in _PLACES}
        return digest_of([self.name, asked, dict(self.parameters), code_version(self.modules)])


def digest_of(value: Any) -> str:
    """Hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@cache
def code_version(modules: tuple[str, ...]) -> str:
    """Hash of the code of modules, by their import names. Docstrings, comments and line breaks don't count."""
    found = []
    for name in modules:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None, name
        tree = ast.parse(Path(spec.origin).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        found.append(ast.dump(tree))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def attempt(stage: Stage, item: Item, folder: Path) -> Outcome:
    """Run a stage on one item. All exceptions except a full disk become outcomes.

    Decoders raise exceptions of any kind, and one film must not stop the others.
    """
    try:
        return {"kept": stage.work(stage.inputs(item), stage.parameters, folder)}
    except Fail as fail:
        return {"failed": [fail.reason, fail.detail]}
    except Drop as drop:
        return {"dropped": [drop.reason, drop.detail]}
    except FileNotFoundError as error:
        return {"failed": ["gone", str(error)]}
    except OSError as error:
        if is_full(error):
            return {"full": str(error)}
        return {"failed": ["unreadable", str(error)]}
    except MemoryError:
        return {"failed": ["memory", "not enough memory"]}
    except Exception as error:  # see above
        return {"failed": ["error", f"{type(error).__name__}: {error}".splitlines()[0][:300]]}


def is_full(error: OSError) -> bool:
    """Tell whether an error means that the disk, or the quota, is full."""
    import errno

    return error.errno in (errno.ENOSPC, errno.EDQUOT)
