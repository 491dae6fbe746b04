"""Documents from files: which, in which order, and what is said about unreadable ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from trainer.config.problems import ConfigError, Problem
from trainer.data.config import SourceConfig
from trainer.data.sources import describe, read_documents, source_problems

PARSER: TypeAdapter[Any] = TypeAdapter(SourceConfig)


def read(**source: Any) -> list[str]:
    return list(read_documents(PARSER.validate_python(source), Counter()))


def refused(**source: Any) -> Problem:
    with pytest.raises(ConfigError) as caught:
        read(**source)
    (problem,) = caught.value.problems
    return problem


@given(lines=st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=700)))
def test_a_text_file_is_cut_at_line_ends_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    text = "\n".join(lines)
    file = tmp_path_factory.mktemp("text") / "file.txt"
    file.write_bytes(text.encode())
    documents = read(kind="text", paths=[str(file)], document_bytes=1024)
    assert "".join(documents) == text
    assert all(document and len(document.encode()) <= 2048 for document in documents)
    assert all("\n" not in document or document.endswith("\n") for document in documents[:-1])


def test_a_line_longer_than_a_document_is_cut_between_characters(tmp_path: Path) -> None:
    text = "日本🙂é" * 900
    (tmp_path / "long.txt").write_bytes(text.encode())
    documents = read(kind="text", paths=[str(tmp_path / "long.txt")], document_bytes=1024)
    assert "".join(documents) == text
    assert len(documents) > 5


def test_files_come_in_the_order_given_and_patterns_sorted(tmp_path: Path) -> None:
    for name in ("c.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert read(kind="text", paths=[str(tmp_path / "c.txt"), str(tmp_path / "a.txt")]) == ["c.txt", "a.txt"]
    assert read(kind="text", paths=[str(tmp_path / "*.txt")]) == ["a.txt", "b.txt", "c.txt"]


def test_line_ends_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r")
    assert read(kind="text", paths=[str(tmp_path / "dos.txt")]) == ["one\r\ntwo\r"]


def test_a_text_file_that_is_no_text_is_refused_with_the_place(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"x" * 3000 + b"\ncaf\xe9\n")
    problem = refused(kind="text", paths=[str(file)], document_bytes=1024)
    assert (problem.path, problem.value) == (str(file), "byte 0xe9 at offset 3004")
    assert "UTF-8" in problem.rule
    assert "iconv" in problem.fix


def jsonl(file: Path, *lines: str) -> str:
    file.write_text("".join(line + "\n" for line in lines))
    return str(file)


def test_jsonl_takes_the_named_key(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", '{"body": "one\\ntwo", "id": 1}', "", '{"id": 2, "body": "três"}')
    assert read(kind="jsonl", paths=[path], text_field="body") == ["one\ntwo", "três"]


@pytest.mark.parametrize(
    ("line", "rule", "fix"),
    [
        ('{"text": "x"', "must be a JSON object on one line", "correct or remove the line"),
        ('["x"]', "must be a JSON object", "correct or remove the line"),
        (
            '{"body": "x", "n": 1}',
            "must have text under the key 'text'",
            "set text_field to a key that holds text: body",
        ),
        ('{"text": 3}', "must have text under the key 'text'", "correct the line"),
    ],
)
def test_a_broken_jsonl_line_is_refused_with_its_number(
    tmp_path: Path, line: str, rule: str, fix: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", '{"text": "fine"}', line)
    problem = refused(kind="jsonl", paths=[path])
    assert (problem.path, problem.value) == (f"{path}:2", line)
    assert problem.rule.startswith(rule)
    assert problem.fix == fix


def test_what_is_no_text_or_empty_is_left_out_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", '{"text": ""}', '{"text": "half a pair: \\ud83d"}', '{"text": "fine"}')
    skipped: Counter[str] = Counter()
    assert list(read_documents(PARSER.validate_python({"kind": "jsonl", "paths": [path]}), skipped)) == [
        "fine"
    ]
    assert skipped == {"empty": 1, "not UTF-8 text": 1}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = ["b.py", "a.txt", "sub/c.py", "sub/deep/d.py", ".git/config", "sub/.hidden", "vendor/e.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    return tmp_path


def test_a_tree_is_read_in_a_fixed_order_without_hidden_and_binary_files(tree: Path) -> None:
    skipped: Counter[str] = Counter()
    source = PARSER.validate_python({"kind": "directory", "path": str(tree)})
    documents = list(read_documents(source, skipped))
    assert documents == ["a.txt", "b.py", "sub/c.py", "sub/deep/d.py", "vendor/e.py"]
    assert skipped == {"not UTF-8 text": 1}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.py"], [], ["b.py", "sub/c.py", "sub/deep/d.py", "vendor/e.py"]),
        (["*.py"], ["vendor/*"], ["b.py", "sub/c.py", "sub/deep/d.py"]),
        (["sub/*"], [], ["sub/.hidden", "sub/c.py", "sub/deep/d.py"]),
        (["*.py", "*.txt"], ["*/deep/*", "b.py"], ["a.txt", "sub/c.py", "vendor/e.py"]),
    ],
)
def test_a_tree_is_filtered_by_patterns(
    tree: Path, include: list[str], exclude: list[str], expected: list[str]
) -> None:
    assert read(kind="directory", path=str(tree), include=include, exclude=exclude) == expected


def test_the_standard_library_is_real_text_without_tests() -> None:
    documents = read(kind="python-stdlib", max_bytes=2_000_000)
    assert sum(len(document.encode()) for document in documents) > 1_500_000
    assert documents == read(kind="python-stdlib", max_bytes=2_000_000)
    assert any("class JSONEncoder" in document for document in read(kind="python-stdlib"))


def test_max_bytes_stops_before_the_document_that_would_exceed_it(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", *(json.dumps({"text": text}) for text in ("é" * 5, "b" * 10, "c" * 10))
    )
    assert read(kind="jsonl", paths=[path], max_bytes=20) == ["é" * 5, "b" * 10]
    assert read(kind="jsonl", paths=[path], max_bytes=19) == ["é" * 5]
    assert read(kind="jsonl", paths=[path], max_bytes=9) == []


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("x")
    paths = [str(tmp_path / name) for name in ("there.txt", "gone.txt", "*.md", ".")]
    problems = source_problems(PARSER.validate_python({"kind": "text", "paths": paths}))
    assert [(problem.path, problem.value) for problem in problems] == [
        ("data.source.paths", path) for path in paths[1:]
    ]
    assert "kind directory" in problems[-1].fix
    (missing,) = source_problems(PARSER.validate_python({"kind": "directory", "path": paths[1]}))
    assert (missing.path, missing.rule) == ("data.source.path", "must be an existing directory")
    assert source_problems(PARSER.validate_python({"kind": "python-stdlib"})) == []


def test_a_source_describes_itself() -> None:
    many = PARSER.validate_python({"kind": "text", "paths": [f"{number}.txt" for number in range(9)]})
    assert describe(many) == "text 0.txt, 1.txt, 2.txt and 6 more"
    assert describe(PARSER.validate_python({"kind": "directory", "path": "src"})) == "directory src"
    assert describe(PARSER.validate_python({"kind": "python-stdlib"})).startswith("standard library of ")
