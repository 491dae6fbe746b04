"""The configuration reference, written from the models that read a configuration.

`docs/configuration.md` is the output of `python -m trainer.config.reference`: an introduction that is kept here, the
tables of all keys, and the presets. Types are told in the words that a problem report uses for them, and the report
that the introduction shows is made while the page is written, so the page cannot say anything but what the program
does.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.problems import ConfigError
from trainer.config.rules import resolve
from trainer.config.run import RunConfig, load_config
from trainer.config.schema import Shape
from trainer.models.config import PRESETS, ModelConfig
from trainer.models.partition import unit_parameters

_INTRODUCTION = """\
<!-- Written by `make docs` from trainer/config/reference.py and the models of the configuration; change those. -->

# Configuration

One YAML file describes a run. [`examples/quickstart.yaml`](../examples/quickstart.yaml) is a complete one; the tables
below have every key. `atoll check FILE` shows what a configuration comes to, all defaults included, without training.

An editor with a YAML language server completes and checks keys in files that begin with

```yaml
# yaml-language-server: $schema=./atoll.schema.json
```

where the path leads to [`examples/atoll.schema.json`](../examples/atoll.schema.json), which is what `atoll schema`
prints.

## Files, overrides, environment

```console
$ atoll check examples/quickstart.yaml fast.yaml train.steps=50 data.path='${MY_DATA:data}/python-stdlib'
```

1. **Files** merge from left to right: mappings key by key, while lists and scalars replace what was there. So a second
   file may hold only what differs, such as this `fast.yaml`:

   ```yaml
   # fast.yaml
   train: {eval_every: 10}
   optimizer: {learning_rate: {warmup_steps: 5}}
   ```

2. **Overrides** are `section.key=value` and win over all files. The value is YAML: `optimizer.betas='[0.9, 0.99]'`,
   `checkpoint.every=null`.
3. **`${NAME:default}`** in a text value is the environment variable `NAME`, or `default` where it is not set.
   `${NAME}` must be set. `$${` is a literal `${`.

YAML is read by the rules of version 1.2: `3e-4` is a number, and `yes`, `on` and `off` are text. Relative paths count
from the directory in which the command runs.

## The batch equation

    global_batch = micro_batch x gradient_accumulation x data_shard x data_replicate

Give two of `train.global_batch`, `train.micro_batch` and `train.gradient_accumulation`; the third follows and is
printed when the run starts. `gradient_accumulation` is also the number of micro-batches that the pipeline schedule
orders.

## When something is wrong

Unknown keys, wrong types and broken rules are refused before a process group exists, all that are found at once: where
it was written, the value, the rule, and the fix. This file

```
@FILE@```

gives, with exit code 2,

```
@REPORT@
```

and once its keys and types are right, the rules between sections are checked, on 6 ranks for instance:

```
@RULES@
```
"""

_ABOUT_PRESETS = """\
## Presets

`model.preset` gives the other sizes their defaults; a key given beside it wins. Where the published sizes come from
stands in [`trainer/models/config.py`](../trainer/models/config.py). `gpt2-*` and `gpt3-*` are those sizes in this
decoder (RMSNorm, rotary positions, no biases), so their counts differ a little from the published ones.
"""

_BAD_FILE = """\
run: {directory: runs/mine, ranks: 6}
model: {preset: tiny, hiden: 256}
data:
  path: data/python-stdlib
  source: {kind: python-stdlib}
train: {steps: "200", sequence: 256, global_batch: 30, micro_batch: 4}
parallel: {pipeline: {stages: 3, schedule: 1F1B}}
"""


def page() -> str:
    """The whole of docs/configuration.md."""
    report, rules = _reports(_BAD_FILE)
    introduction = _INTRODUCTION.replace("@FILE@", _BAD_FILE).replace("@REPORT@", report).replace("@RULES@", rules)
    return f"{introduction}\n{reference(RunConfig)}\n{presets()}"


def reference(model: type[BaseModel]) -> str:
    """Markdown with one table for each section of the configuration `model` and for each kind that a section has."""
    tables = "\n".join(_section(path, each) for path, each in sections(model))
    return f"## All keys\n\nA required key must be given, by a file, an override or, in `model`, a preset.\n\n{tables}"


def presets() -> str:
    """Markdown table of the named model sizes and their exact numbers of parameters."""
    keys = ("hidden", "layers", "heads", "kv_heads", "ffn_hidden", "vocab", "activation", "tied_embeddings")
    rows = []
    for name in PRESETS:
        model = ModelConfig.model_validate({"preset": name})
        rows.append((f"`{name}`", *(_value(getattr(model, key)) for key in keys), f"{parameter_count(model):,}"))
    table = _table(("`model.preset`", *keys, "parameters"), rows)
    return f"{_ABOUT_PRESETS}\n{table}"


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the unsharded model: matrices, two norms a block (four with qk_norm) and the last norm."""
    norms = model.hidden * (2 * model.layers + 1) + (2 * model.layers * model.head_dim if model.qk_norm else 0)
    return sum(unit_parameters(model).values()) + norms


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below `model` with its dotted path; those of a list are `path[]`."""
    for key, field in model.model_fields.items():
        below = f"{path}.{key}" if path else key
        for inner in _models(field.annotation):
            place = f"{below}[]" if _is_list(field) else below
            yield place, inner
            yield from sections(inner, place)


def _section(path: str, model: type[BaseModel]) -> str:
    """Heading, first line of the docstring and table of one section."""
    kind = _kind(model)
    title = f"### {path}, kind: {kind}" if kind else f"### {path}"
    shape = Shape.of(model)
    rows = [
        (f"`{key}`", _type(field, shape, key, path), _default(field), field.description or "")
        for key, field in model.model_fields.items()
    ]
    described = (model.__doc__ or "").strip().splitlines()[0]
    return f"{title}\n\n{described}\n\n{_table(('key', 'type', 'default', 'meaning'), rows)}"


def _type(field: FieldInfo, shape: Shape, key: str, path: str) -> str:
    """The expected value in words; sections are linked."""
    inner = _models(field.annotation)
    if not inner:
        expected = shape.child(key)
        assert expected is not None, f"{path}.{key} is not in the schema of its own model"
        return re.sub(r"'([^']*)'", r"`\1`", expected.describe())
    titles = [f"{path}.{key}" + ("[]" if _is_list(field) else "") for _ in inner]
    if len(inner) == 1:
        words = [("a list of " if _is_list(field) else "") + f"[{titles[0]}](#{anchor(titles[0])})"]
    else:
        kinds = [_kind(each) or "" for each in inner]
        words = [f"[{kind}](#{anchor(f'{title}, kind: {kind}')})" for title, kind in zip(titles, kinds, strict=True)]
    return " or ".join([*words, *(["null"] if type(None) in get_args(field.annotation) else [])])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        kind = _kind(type(value))
        return f"`{kind}`" if kind else "its defaults"
    return f"`{_value(value)}`"


def _value(value: Any) -> str:
    """A value as one writes it in YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The config models that an annotation names: none, one, or the kinds of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _is_list(field: FieldInfo) -> bool:
    return "tuple[" in str(field.annotation)


def _kind(model: type[BaseModel]) -> str | None:
    """The value of `kind` that selects the model in a union."""
    field = model.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field else None


def anchor(title: str) -> str:
    """The fragment that a Markdown renderer gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def _reports(text: str) -> tuple[str, str]:
    """What the loader says about the file `text`, and what the rules say when its keys and types are mended."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "mine.yaml"
        file.write_text(text)
        # Whatever lies in the working directory must not change the page.
        places = [f"run.directory={directory}/runs/mine", f"data.path={directory}/data/python-stdlib"]
        mended = Path(directory) / "mended.yaml"
        mended.write_text(text.replace("hiden", "hidden").replace('"200"', "200"))
        reports = _report([file], [], {}), _report([mended], places, {})
    first, second = (report.replace(f"{directory}/", "") for report in reports)
    return first, second


def _report(files: Sequence[Path], overrides: Sequence[str], environment: Mapping[str, str]) -> str:
    try:
        config = load_config(files, overrides, environment)
        resolve(config, config.run.ranks or 1, starting=False)
    except ConfigError as error:
        return str(error)
    raise ValueError("the example of a bad configuration has nothing wrong with it; break it again")


if __name__ == "__main__":
    print(page(), end="")
