"""What a checkpoint says about itself (`atoll.json`), and whether a run can use it: no torch, no process group.

The manifest repeats what it takes to refuse a checkpoint before a process group exists: the sizes of the model,
the sizes of all files, and a checksum of the index. Layout, ZeRO numbers, precision and versions are there for the
record: any of them may differ when the checkpoint is loaded.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.config.problems import MISSING, ConfigError, Problem
from trainer.config.run import RunConfig
from trainer.models.config import ModelConfig

MANIFEST = "atoll.json"
INDEX = ".metadata"
FORMAT: Final = "atoll-checkpoint"
FORMAT_VERSION = 1
STATES = ("model", "first_moment", "second_moment")
"""The full tensors of a parameter: `model.<name>` are the fp32 master weights."""

_FREE_MODEL_FIELDS = frozenset({"preset", "init_std"})
"""Fields of the model config that say nothing about trained weights."""


class CheckpointManifest(BaseModel):
    """A complete checkpoint.

    Attributes:
        step: Steps of the run done.
        cursor: Global samples consumed.
        updates: Optimizer updates made; smaller than `step` by the skipped ones.
        precision: Type that the model computed in; the checkpoint itself is fp32.
        model: The model config.
        layout: Degree of every axis of the run that saved.
        zero: Over how many ranks it spread parameters, gradients and optimizer state.
        versions: Of Python and the packages that wrote it.
        saved_at: UTC, ISO 8601.
        parameters: Full shape of every parameter; each has a tensor in all of `STATES`.
        files: Size of every file but this one, bytes.
        index_crc32: Checksum of the index, which holds the checksums of all other data.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["atoll-checkpoint"] = FORMAT
    version: int = FORMAT_VERSION
    step: int = Field(ge=0)
    cursor: int = Field(ge=0)
    updates: int = Field(ge=0)
    precision: str
    model: dict[str, Any]
    layout: dict[str, int]
    zero: dict[str, int]
    versions: dict[str, str]
    saved_at: str
    parameters: dict[str, tuple[int, ...]] = {}
    files: dict[str, int] = {}
    index_crc32: int = 0

    def to_bytes(self) -> bytes:
        """The content of `atoll.json`."""
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()


def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest of the checkpoint in directory `path`.

    Raises:
        ConfigError: there is none, it cannot be read, or its format is newer than this program.
    """
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(_absent(path)) from None
    except (OSError, ValueError) as error:  # json's and the decoder's errors are ValueErrors
        raise ConfigError(_damaged(path, file, f"must be readable JSON ({error})")) from error
    version = content.get("version") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(version, int):
        raise ConfigError(_damaged(path, file, f"must be the manifest of a checkpoint, of format {FORMAT!r}"))
    if version > FORMAT_VERSION:
        rule = f"must be of format version {FORMAT_VERSION} or older; a newer atoll wrote this checkpoint"
        raise ConfigError(Problem(str(path), version, rule, "update atoll, or load a checkpoint that this one wrote"))
    try:
        return CheckpointManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(_damaged(path, file, f"field {field!r} must be valid ({first['msg']})")) from error


def check_compatible(path: Path, config: RunConfig) -> list[Problem]:
    """Why a run with `config` cannot continue from the checkpoint in directory `path`; empty if it can.

    Layout, ZeRO numbers, precision, batch and recomputation may differ freely.
    """
    try:
        manifest = read_manifest(path)
    except ConfigError as error:
        return list(error.problems)
    return [*_file_problems(path, manifest), *_model_problems(path, manifest, config.model)]


def _file_problems(path: Path, manifest: CheckpointManifest) -> list[Problem]:
    """Files that are missing or have another size, and an index that was changed."""
    problems = []
    for name, size in {INDEX: None, **manifest.files}.items():
        file = path / name
        try:
            found = file.stat().st_size
        except OSError as error:
            problems.append(_damaged(path, file, f"must be there ({error.strerror})"))
            continue
        if found != size:
            problems.append(_damaged(path, file, f"must have {size} bytes, as when it was written, not {found}"))
        elif name == INDEX and zlib.crc32(file.read_bytes()) != manifest.index_crc32:
            problems.append(_damaged(path, file, "must have the checksum that it was written with"))
    return problems


def _model_problems(path: Path, manifest: CheckpointManifest, model: ModelConfig) -> list[Problem]:
    """Every field in which the checkpoint's model is another one."""
    try:
        saved = ModelConfig.model_validate({**manifest.model, "preset": None})
    except ValidationError as error:
        names = ", ".join(".".join(map(str, each["loc"])) for each in error.errors())
        rule = f"must describe a model that this atoll knows; it does not understand {names}"
        return [Problem(f"{path / MANIFEST}", MISSING, rule, "use the atoll version that wrote the checkpoint")]
    problems = []
    for field in ModelConfig.model_fields:
        here, there = _effective(model, field), _effective(saved, field)
        if field not in _FREE_MODEL_FIELDS and here != there:
            rule = f"must be {there!r}: the checkpoint {path} holds another model"
            fix = f"set model.{field}={_spelled(there)}, or start anew: another run.directory, and no checkpoint.load"
            problems.append(Problem(f"model.{field}", here, rule, fix))
    return problems


def _effective(model: ModelConfig, field: str) -> object:
    """The value of a field with its default resolved, so that null and its meaning are the same."""
    resolved = {"kv_heads": model.key_value_heads, "ffn_hidden": model.feed_forward}
    return resolved.get(field, getattr(model, field))


def _spelled(value: object) -> str:
    """As one writes it in YAML or on the command line."""
    return json.dumps(value) if not isinstance(value, str) else value


def _absent(path: Path) -> Problem:
    fix = "name a step-... directory in which a save has ended"
    nearby = [*path.glob(f"step-*/{MANIFEST}"), *path.glob(f"checkpoints/step-*/{MANIFEST}")]
    if nearby:
        fix += f", e.g. {max(nearby).parent}"
    return Problem(str(path), MISSING, f"must be a complete checkpoint: a directory with {MANIFEST}", fix)


def _damaged(path: Path, file: Path, rule: str) -> Problem:
    fix = f"restore the file, or delete {path} to continue from an older checkpoint"
    return Problem(str(file), MISSING, f"{rule}: the checkpoint is damaged", fix)
