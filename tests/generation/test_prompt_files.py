"""Files of prompts are read as spreadsheets and other programs write them; nothing is taken for something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sora_train.core.cli import InputError
from sora_train.generation.options import Options, jobs_of
from sora_train.generation.prompt_files import read_rows

KNOWN = ["prompt", "seed", "steps", "out"]
ONE, TWO = {"prompt": "a, b"}, {"prompt": "c", "seed": "2"}


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.csv", 'prompt,seed\n"a, b",\nc,2\n', [ONE, TWO]),
        ("a.csv", "Prompt ; Seed\r\na, b;\r\nc;2\r\n", [ONE, TWO]),
        ("a.csv", 'prompt\tseed\na, b\t\n"c"\t2\n', [ONE, TWO]),
        ("a.tsv", "prompt\tseed\na, b\t\nc\t2\n", [ONE, TWO]),
        ("a.CSV", '\ufeffprompt,seed\r"a, b",\rc,2\r', [ONE, TWO]),
        ("a.json", '[{"prompt": "a, b", "seed": null}, {"prompt": "c", "seed": "2"}]', [ONE, TWO]),
        ("a.txt", "a\u2028b\x85\r\n\r\n # c\n", [{"prompt": "a\u2028b\x85"}, {"prompt": " # c"}]),
        ("a.txt", "a\rb\r", [{"prompt": "a"}, {"prompt": "b"}]),
        ("a.csv", "prompt\na; b\n", [{"prompt": "a; b"}]),
        ("a.csv", "sep=;\r\nprompt;seed\r\na, b;\r\n;\r\n\r\nc;2\r\n", [ONE, TWO]),
        ("a.csv", ',prompt,seed,\n0,"a, b",,\n1,c,2,\n', [ONE, TWO]),
        ("a.json", '["a, b", {"prompt": "c", "seed": "2"}]', [ONE, TWO]),
        ("a.jsonl", '"a, b"\n\n{"prompt": "c", "seed": "2"}\n', [ONE, TWO]),
    ],
)
def test_files_as_programs_write_them(tmp_path: Path, name: str, text: str, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / name
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes(text.removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding))
        assert read_rows(str(path), KNOWN) == rows, encoding


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"prompt": "a"}', "is not a JSON list of objects"), ("a.json", "[", "is not JSON"),
        ("a.yaml", "- a", r"must be a \.txt, \.csv, \.tsv, \.jsonl, \.json file"),
        ("a.csv", "prompt,seed\na,one\n", r"a\.csv: row 1: seed=one must be a whole number"),
        ("a.csv", "prompt,seed,prompt\na,1,b\n", "has 2 columns 'prompt'; leave one of them"),
        ("a.csv", "prompt,\na red ring, blue\n", "row 1 has ' blue' in a column without a name"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1 is not JSON: 'prompt' comes twice in an object"),
        ("a.jsonl", '{"prompt": "a\\u0000"}', "row 1: prompt has a zero byte at character 1"),
        ("a.jsonl", '{"prompt": "a", "out": "b\\u0000"}', "row 1: out has a zero byte"),
        ("a.csv", "prompt,out\na,x\nb,x.mp4\n", "2 rows have out=x; each needs a name of its own, suffix aside"),
        ("a.csv", f"prompt,out\na,{'x' * 300}\n", r"row 1: out=x{20}\.\.\. is longer than 200 bytes"),
        ("a.csv", "promt\na\n", "row 1 has 'promt', which no single sample has; did you mean 'prompt'"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_its_file_and_row(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        jobs_of(Options(run_dir="run", prompts=str(path)))
