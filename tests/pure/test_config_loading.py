"""Loading configurations: merging, overrides, interpolation, and what is said about each kind of mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trainer.config.loading import load
from trainer.config.overrides import split_arguments
from trainer.config.problems import MISSING, ConfigError, Problem
from trainer.config.schema import editor_schema


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Adam(Section):
    kind: Literal["adam"]
    betas: tuple[float, float] = (0.9, 0.95)


class Sgd(Section):
    kind: Literal["sgd"]
    momentum: float = Field(default=0.0, ge=0, lt=1)


class Train(Section):
    steps: int = Field(ge=1)
    rate: float = 1e-3
    micro_batch: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    shard: int | Literal["auto"] = "auto"


class Source(Section):
    path: str
    weight: float = Field(default=1.0, gt=0)


class Data(Section):
    path: str = "data"
    shuffle: bool = True
    sources: tuple[Source, ...] = ()
    labels: dict[str, int] = {}

    @field_validator("path")
    @classmethod
    def _not_root(cls, path: str) -> str:
        if path == "/":
            raise ValueError("must not be the root directory")
        return path


class Preset(Section):
    preset: str | None = None
    layers: int

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "nobody":
            details = {"key": "preset", "value": "nobody", "fix": "choose tiny"}
            raise PydanticCustomError("unknown_preset", "must be a preset", details)
        return (
            {"layers": 4, **values} if isinstance(values, dict) and values.get("preset") == "tiny" else values
        )


class Config(Section):
    train: Train
    data: Data = Data()
    model: Preset = Preset(layers=2)
    optimizer: Annotated[Adam | Sgd, Field(discriminator="kind")] = Adam(kind="adam")
    extra: Data | None = None


GOOD = "train:\n  steps: 10\n"

Loader = Callable[..., Config]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Load YAML texts as files a.yaml, b.yaml, ... of the working directory."""
    monkeypatch.chdir(tmp_path)

    def read(*texts: str, set: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Config:
        files = [Path(f"{name}.yaml") for name, _ in zip("abcd", texts, strict=False)]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        return load(Config, files, set, env or {})

    return read


@pytest.fixture
def refused(loaded: Loader) -> Callable[..., dict[str, Problem]]:
    """The problems of a configuration that must be refused, by path."""

    def read(*texts: str, **options: Any) -> dict[str, Problem]:
        with pytest.raises(ConfigError) as caught:
            loaded(*texts, **options)
        problems = {problem.path: problem for problem in caught.value.problems}
        assert len(problems) == len(caught.value.problems), "a path is reported twice"
        return problems

    return read


def test_files_merge_left_to_right(loaded: Loader) -> None:
    first = (
        "train: {steps: 10, rate: 0.5}\ndata:\n  sources: [{path: x}, {path: y}]\n  labels: {a: 1, b: 2}\n"
    )
    second = "train: {steps: 20}\ndata:\n  sources: [{path: z}]\n  labels: {b: 3}\n"
    config = loaded(first, second)
    assert (config.train.steps, config.train.rate) == (20, 0.5)
    assert [source.path for source in config.data.sources] == ["z"], "lists replace"
    assert config.data.labels == {"a": 1, "b": 3}, "mappings merge"


def test_a_merged_file_is_not_changed_by_what_is_laid_over_it(loaded: Loader) -> None:
    text = "train: &t {steps: 10}\ndata: {labels: &l {a: 1}}\nextra: {labels: *l}\n"
    config = loaded(text, set=("data.labels.a=2",))
    assert config.data.labels == {"a": 2}
    assert config.extra is not None
    assert config.extra.labels == {"a": 1}


def test_overrides_are_yaml_values(loaded: Loader) -> None:
    overrides = (
        "train.steps=1_000",
        "train.rate=3e-4",
        "train.micro_batch=null",
        "data.path=a=b:c",
        "data.shuffle=false",
        "data.sources=[{path: p}, {path: q}]",
        "data.sources.1.weight=2",
        "data.labels={x: 1}",
        "data.labels.y=2",
        "train.shard=4",
        "optimizer={kind: sgd, momentum: 0.5}",
    )
    config = loaded(GOOD, set=overrides)
    assert (config.train.steps, config.train.rate, config.train.shard) == (1000, 3e-4, 4)
    assert config.train.micro_batch is None
    assert config.data.path == "a=b:c"
    assert not config.data.shuffle
    assert [(source.path, source.weight) for source in config.data.sources] == [("p", 1.0), ("q", 2.0)]
    assert config.data.labels == {"x": 1, "y": 2}
    assert config.optimizer == Sgd(kind="sgd", momentum=0.5)


@given(st.floats(allow_nan=False) | st.integers(-(10**20), 10**20))
def test_every_number_comes_back(number: float) -> None:
    class One(BaseModel):
        x: float | int

    assert load(One, [], [f"x={json.dumps(number).replace('Infinity', '.inf')}"], {}).x == number


@given(st.text(st.characters(min_codepoint=32, max_codepoint=0xD7FF)))
def test_quoted_text_comes_back(text: str) -> None:
    class One(BaseModel):
        x: str

    quoted = json.dumps(text)
    assert load(One, [], [f"x={quoted}"], {}).x == text if "${" not in text else True


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e4", 1e4), ("1.", 1.0), (".5", 0.5), ("-.inf", float("-inf")), ("+1_000", 1000),
        ("0x1F", 31), ("0o17", 15), ("010", 10), ("~", None), ("True", True), ("yes", "yes"), ("off", "off"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"), ("'5'", "5"), ("e5", "e5"),
        ("=", "="),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    class One(BaseModel):
        x: Any

    found = load(One, [], [f"x={text}"], {}).x
    assert found == value
    assert type(found) is type(value)


def test_anchors_and_merge_keys(loaded: Loader) -> None:
    text = "data: &d\n  path: p\n  labels: {a: 1}\nextra:\n  <<: *d\n  path: q\ntrain: {steps: 1}\n"
    config = loaded(text)
    assert config.extra == Data(path="q", labels={"a": 1})


def test_interpolation(loaded: Loader) -> None:
    text = (
        "train: {steps: '${STEPS:7}'}\n"
        "data: {path: '${ROOT}/x/${NONE:}${USER:me}', labels: {a: '${A:3}'}, sources: [{path: '$${kept}'}]}\n"
    )
    config = loaded(text, env={"ROOT": "/data", "USER": "you"})
    assert config.train.steps == 7, "where no text may stand, the expanded text is read as YAML"
    assert config.data.path == "/data/x/you"
    assert config.data.labels == {"a": 3}
    assert config.data.sources[0].path == "${kept}"


def test_an_overridden_reference_need_not_be_set(loaded: Loader) -> None:
    assert loaded(GOOD + "data: {path: '${NOWHERE}'}\n", set=("data.path=here",)).data.path == "here"


def test_unset_variable(refused: Any) -> None:
    problem = refused(GOOD + "data:\n  path: ${NOWHERE}/x\n")["data.path"]
    assert "NOWHERE must be set" in problem.rule
    assert "${NOWHERE:default}" in problem.fix
    assert problem.origin == "a.yaml:4"


def test_unclosed_reference(refused: Any) -> None:
    assert "${NAME:default}" in refused(GOOD + "data: {path: '${OPEN'}\n")["data.path"].rule


def test_unknown_key_near_a_known_one(refused: Any) -> None:
    problem = refused(GOOD + "  micro_bach: 2\n")["train.micro_bach"]
    assert problem.rule == "is not a key of train"
    assert problem.fix == "did you mean train.micro_batch?"
    assert (problem.value, problem.origin) == (2, "a.yaml:3")


def test_unknown_key_that_exists_elsewhere(refused: Any) -> None:
    problem = refused(GOOD, set=("momentum=0.9",))["momentum"]
    assert problem.fix == "did you mean optimizer.momentum?"
    assert problem.rule == "is not a section of the configuration"
    assert problem.origin == "command line"


def test_unknown_key_like_no_other(refused: Any) -> None:
    assert (
        "the keys here are kind, betas"
        in refused(GOOD, set=("optimizer={kind: adam, zzz: 1}",))["optimizer.zzz"].fix
    )


@pytest.mark.parametrize(
    ("override", "path", "value", "rule", "fix"),
    [
        ("train.steps=many", "train.steps", "many", "an integer of at least 1", "train.steps: followed by"),
        ("train.steps='50'", "train.steps", "50", "an integer of at least 1", "write 50 without quotes"),
        ("train.steps=true", "train.steps", True, "an integer of at least 1", "followed by an integer"),
        ("train.steps=2.5", "train.steps", 2.5, "an integer of at least 1", "followed by an integer"),
        ("train.steps=0", "train.steps", 0, "an integer of at least 1", "followed by an integer"),
        ("train.steps=[1]", "train.steps", [1], "an integer of at least 1", "followed by an integer"),
        ("train.steps={x: 1}", "train.steps", {"x": 1}, "an integer of at least 1", "followed by an integer"),
        ("train.micro_batch=x", "train.micro_batch", "x", "an integer or null", "followed by"),
        ("train.shard=all", "train.shard", "all", "an integer or 'auto'", "followed by"),
        ("train.shard=autp", "train.shard", "autp", "an integer or 'auto'", "did you mean 'auto'?"),
        ("train.precision=bf61", "train.precision", "bf61", "'fp32' or 'bf16'", "did you mean 'bf16'?"),
        ("train=5", "train", 5, "a mapping with keys among steps", "followed by"),
        ("data.shuffle=yes", "data.shuffle", "yes", "true or false", "write true without quotes"),
        ("data.path=5", "data.path", 5, "text", "put the value in quotes"),
        ("data.labels.a=x", "data.labels.a", "x", "an integer", "followed by"),
        (
            "data.sources=[{path: p, weight: 0}]",
            "data.sources.0.weight",
            0,
            "a number of more than 0",
            "followed by",
        ),
        ("extra=3", "extra", 3, "a mapping with keys among", "followed by"),
        (
            "optimizer={kind: sgd, momentum: 1}",
            "optimizer.momentum",
            1,
            "at least 0 and less than 1",
            "followed by",
        ),
        (
            "optimizer.betas=[1]",
            "optimizer.betas.1",
            MISSING,
            "is required",
            "optimizer.betas.1: followed by a number",
        ),
        ("optimizer={kind: lion}", "optimizer.kind", "lion", "must be 'adam' or 'sgd'", "optimizer.kind"),
    ],
)
def test_wrong_values(refused: Any, override: str, path: str, value: object, rule: str, fix: str) -> None:
    text = GOOD + "optimizer: {kind: adam}\n"
    problems = refused(text, set=(override,))
    assert list(problems) == [path]
    assert problems[path].value == value
    assert rule in problems[path].rule
    assert fix in problems[path].fix
    assert problems[path].origin == "command line"


def test_a_scalar_over_a_mapping_is_named_with_its_file(refused: Any) -> None:
    problem = refused(GOOD, "\ntrain: 5\n")["train"]
    assert "must be a mapping" in problem.rule
    assert problem.origin == "b.yaml:2"


def test_missing_keys_and_sections(refused: Any) -> None:
    assert refused("data: {}\n")["train"].fix == "add a section train with steps"
    problem = refused("train: {rate: 1}\n")["train.steps"]
    assert problem.value is MISSING
    assert "train.steps=... on the command line" in problem.fix


def test_rules_of_a_model(refused: Any) -> None:
    assert refused(GOOD + "data: {path: /}\n")["data.path"].rule == "must not be the root directory"
    problem = refused(GOOD + "model: {preset: nobody}\n")["model.preset"]
    assert (problem.value, problem.rule, problem.fix) == ("nobody", "must be a preset", "choose tiny")


def test_presets_fill_required_keys(loaded: Loader) -> None:
    assert loaded(GOOD + "model: {preset: tiny}\n").model.layers == 4


def test_null_switches_an_optional_section_off(loaded: Loader) -> None:
    assert loaded(GOOD + "extra: {path: x}\n", set=("extra=null",)).extra is None


def test_everything_is_reported_at_once(refused: Any) -> None:
    text = "train:\n  rate: fast\ndta: {}\nmodel:\n  preset: nobody\n  layer: x\noptimizer: {kind: lion}\n"
    problems = refused(text, set=("data.path=${GONE}", "steps=5"))
    expected = {
        "train.rate",
        "train.steps",
        "dta",
        "model.preset",
        "model.layer",
        "optimizer.kind",
        "data.path",
        "steps",
    }
    assert set(problems) == expected
    assert problems["steps"].fix == "did you mean train.steps?"


@pytest.mark.parametrize(
    ("text", "place", "shown", "fix"),
    [
        ("train:\n  steps: 5: 3\n", "a.yaml:2:11", "  steps: 5: 3", "mend this line"),
        ("train: {steps: 5\n", "a.yaml:2:1", "^", "mend this line"),
        ("train:\n\tsteps: 5\n", "a.yaml:2:1", " steps: 5", "not with tabs"),
        ("train: *none\n", "a.yaml:1:8", "train: *none", "mend"),
        ("a: 1\n---\nb: 2\n", "a.yaml:2:1", "---", "mend"),
        ("a: \x07\n", "a.yaml:1:4", "special characters are not allowed", "mend"),
    ],
)
def test_syntax_errors_show_the_line(refused: Any, text: str, place: str, shown: str, fix: str) -> None:
    problems = refused(text)
    assert list(problems) == [place], "keys that could not be read are not reported as missing"
    assert shown in problems[place].rule
    assert fix in problems[place].fix


def test_syntax_error_beside_other_problems(refused: Any) -> None:
    assert set(refused("train: [\n", "tran: {}\n", set=("train.rate=x", "=3"))) == {
        "a.yaml:2:1",
        "tran",
        "train.rate",
        "=3",
    }


@pytest.mark.parametrize(
    ("text", "path", "rule"),
    [
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "train", "set twice in this mapping, first in line 1"),
        ("train:\n  steps: 1\n  steps: 2\n", "train.steps", "set twice in this mapping, first in line 2"),
        ("train: {1: 2}\n", "train", "keys that are text"),
        ("train: !!python/name:os.system x\n", "train", "has the tag"),
        ("train: {steps: !!int x}\n", "train.steps", "tagged as int"),
        ("train: &a {steps: *a}\n", "train.steps", "must not contain itself"),
        ("train: {<<: 3}\n", "train", "`<<` must name mappings"),
        ("", "a.yaml", "is empty"),
        ("# nothing\n", "a.yaml", "is empty"),
        ("- 1\n", "a.yaml", "must hold a mapping"),
    ],
)
def test_malformed_files(refused: Any, text: str, path: str, rule: str) -> None:
    problems = refused(text)
    assert list(problems) == [path]
    assert rule in problems[path].rule


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"a: \xff\n")
    files = [tmp_path / "none.yaml", tmp_path, tmp_path / "bad.yaml"]
    with pytest.raises(ConfigError) as caught:
        load(Config, files, [], {})
    assert [problem.path for problem in caught.value.problems] == [str(file) for file in files]
    assert [problem.rule.split(":")[0] for problem in caught.value.problems] == [
        "the file must exist",
        "must be readable",
        "must be UTF-8 text",
    ]


@pytest.mark.parametrize(
    ("override", "path", "rule"),
    [
        ("train.steps", "train.steps", "form section.key=value"),
        ("train..steps=1", "train..steps=1", "form section.key=value"),
        ("train.steps=", "train.steps", "must have a value"),
        ("train.steps=[1", "train.steps", "must be a YAML value"),
        ("train.steps=@x", "train.steps", "must be a YAML value"),
        ("data.sources.5.path=x", "data.sources.5.path", "counted from 0"),
        ("data.sources.first=x", "data.sources.first", "must be the number of an item"),
    ],
)
def test_malformed_overrides(refused: Any, override: str, path: str, rule: str) -> None:
    problems = refused(GOOD + "data: {sources: [{path: x}]}\n", set=(override,))
    assert list(problems) == [path]
    assert rule in problems[path].rule


def test_arguments_are_told_apart() -> None:
    files, overrides = split_arguments(["a.yaml", "x.y=1", "dir=1/b.yaml", "dir/c=d.yaml", "p=/x/y=z"])
    assert files == [Path("a.yaml"), Path("dir/c=d.yaml")]
    assert overrides == ["x.y=1", "dir=1/b.yaml", "p=/x/y=z"]


def test_the_printed_form() -> None:
    problems = [
        Problem("train.steps", 0, "must be at least 1", "raise it", "a.yaml:3"),
        Problem("b.yaml", MISSING, "two\nlines", "mend"),
    ]
    assert str(ConfigError(problems)) == (
        "2 problems in the configuration:\n\n"
        "train.steps (a.yaml:3)\n  value: 0\n  rule:  must be at least 1\n  fix:   raise it\n\n"
        "b.yaml\n  rule:  two\n         lines\n  fix:   mend"
    )
    assert str(ConfigError(problems[0])).startswith("1 problem in the configuration:")


def test_editor_schema_asks_for_nothing_but_tags() -> None:
    schema = json.loads(editor_schema(Config))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    assert "required" not in schema["$defs"]["Train"]
    assert schema["$defs"]["Sgd"]["required"] == ["kind"]
