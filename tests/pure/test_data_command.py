"""`atoll data`: what it prints and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.data_command import app
from trainer.data.dataset import open_dataset


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.jsonl").write_text(
        "".join(f'{{"body": "the story of number {number}, told again"}}\n' for number in range(200))
    )
    return tmp_path / "corpus.jsonl"


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `atoll data ...`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def built(corpus: Path, *options: object) -> Path:
    out = corpus.parent / "tokens"
    status, _, error = call("build", out, "--jsonl", corpus, "--text-field", "body", *options)
    assert status == 0, error
    return out


def test_build_prints_what_it_made(corpus: Path) -> None:
    out = corpus.parent / "tokens"
    options = [
        "--tokenizer",
        "bpe",
        "--vocab-size",
        300,
        "--eval-fraction",
        0.25,
        "--seed",
        3,
        "--shard-tokens",
        500,
    ]
    status, output, _ = call("build", out, "--jsonl", corpus, "--text-field", "body", *options)
    assert status == 0
    manifest = open_dataset(out).manifest
    assert output.startswith(f"built {out} in ")
    lines = {line.split()[0]: line.split() for line in output.splitlines()}
    for name, split in (("train", manifest.train), ("eval", manifest.eval)):
        counts = [f"{count:,}" for count in (split.documents, split.tokens, split.text_bytes)]
        assert lines[name][1:] == [*counts, f"{split.tokens_per_byte:.3f}", str(len(split.shards))]
    assert f"bpe, {manifest.tokenizer.vocab_size} tokens, stored as uint16" in output
    assert "0.25 of the documents, seed 3" in output
    assert len(manifest.train.shards) > 1


def test_inspect_shows_a_sample_as_text(corpus: Path) -> None:
    out = built(corpus)
    status, output, _ = call("inspect", out, "--split", "eval", "--sample", 1, "--sequence", 20)
    assert status == 0
    split = open_dataset(out).split("eval", 20)
    assert f"eval sample 1 of {split.windows}, 20 tokens:" in output
    assert open_dataset(out).tokenizer().decode(split.sample(1)) in output


def test_inspect_shortens_the_sequence_to_the_split(corpus: Path) -> None:
    status, output, _ = call("inspect", built(corpus), "--split", "eval", "--sequence", 10**6)
    assert status == 0
    assert "eval sample 0 of 1, " in output


def test_inspect_beyond_the_last_sample(corpus: Path) -> None:
    status, _, error = call("inspect", built(corpus), "--sample", 10**6)
    assert status == 2
    assert "--sample" in error
    assert "samples of 256 tokens" in error


def test_verify_says_that_all_is_well(corpus: Path) -> None:
    out = built(corpus)
    status, output, _ = call("verify", out)
    assert status == 0
    assert output.startswith(f"{out}: 2 shards, ")


def test_verify_names_every_damaged_file_and_fails(corpus: Path) -> None:
    out = built(corpus)
    (out / "eval-00000.bin").unlink()
    data = bytearray((out / "train-00000.bin").read_bytes())
    data[100] ^= 1
    (out / "train-00000.bin").write_bytes(data)
    status, output, error = call("verify", out)
    assert (status, output) == (1, "")
    assert "train-00000.bin" in error
    assert "it is corrupt" in error
    assert "eval-00000.bin" in error
    assert "it is missing" in error


@pytest.mark.parametrize(("command", "status"), [("verify", 1), ("inspect", 2)])
def test_a_directory_without_a_dataset(tmp_path: Path, command: str, status: int) -> None:
    found, output, error = call(command, tmp_path / "nothing")
    assert (found, output) == (status, "")
    assert error.startswith(str(tmp_path / "nothing" / "manifest.json"))
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give exactly one of --text, --jsonl, --directory and --python-stdlib"),
        (["--text", "a", "--python-stdlib"], "give exactly one of"),
        (["--text", "a", "--tokenizer", "bpe"], "--vocab-size: is required"),
        (["--text", "a", "--vocab-size", "300"], "--vocab-size: does not apply"),
        (["--text", "a", "--text-field", "b"], "--text-field: does not apply"),
        (["--text", "a", "--eval-fraction", "1"], "--eval-fraction: Input should be less than 1"),
        (["--text", "a", "--max-bytes", "some"], "--max-bytes"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: list[str], message: str) -> None:
    status, _, error = call("build", tmp_path / "tokens", *options)
    assert status == 2
    assert message in error
    assert not (tmp_path / "tokens").exists()


def test_an_error_is_one_block_without_a_traceback(corpus: Path) -> None:
    out = built(corpus)
    status, output, error = call("build", out, "--jsonl", corpus, "--text-field", "body")
    assert (status, output) == (2, "")
    assert error.splitlines()[0] == "data.path"
    assert "must not hold a dataset yet" in error
    assert "Traceback" not in error


def test_text_and_directories_can_be_built_too(corpus: Path) -> None:
    tree = corpus.parent / "tree"
    tree.mkdir()
    for number in range(40):
        (tree / f"{number}.txt").write_text(f"file {number}")
    (tree / "notes.md").write_text("left out")
    options = ["--include", "*.txt", "--exclude", "1*", "--eval-fraction", 0.2]
    status, output, error = call("build", tree.parent / "a", "--directory", tree, *options)
    assert status == 0, error
    assert sum(int(line.split()[1]) for line in output.splitlines()[-2:]) == 29
    big = corpus.parent / "big.txt"
    big.write_text("one line\n" * 10000)
    options = ["--document-bytes", 1024, "--max-bytes", 50000]
    status, _, error = call("build", tree.parent / "b", "--text", big, *options)
    assert status == 0, error
    manifest = open_dataset(tree.parent / "b").manifest
    assert 48000 < manifest.train.text_bytes + manifest.eval.text_bytes <= 50000
