"""What a user says about the data: where the tokens are, and how to make them from text.

A source or tokenizer is one of several kinds; `kind` selects which, and each kind knows only its own keys.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_MAX_BYTES = Field(
    default=None,
    ge=1,
    description="Stop before the document that would exceed this many UTF-8 bytes; null: read all.",
)
_PATHS = Field(
    min_length=1,
    description="Files, read in this order; a name with * or ? stands for all that match, sorted.",
)


class TextSource(_Section):
    """Plain text files, cut into documents at line ends."""

    kind: Literal["text"] = Field(description="Plain UTF-8 text files.")
    paths: tuple[str, ...] = _PATHS
    document_bytes: int = Field(
        default=65536,
        ge=1024,
        description="A longer file is cut at line ends into documents of about this many bytes.",
    )
    max_bytes: int | None = _MAX_BYTES


class JsonlSource(_Section):
    """Files with one JSON object per line, each a document."""

    kind: Literal["jsonl"] = Field(description="Files with one JSON object per line.")
    paths: tuple[str, ...] = _PATHS
    text_field: str = Field(default="text", description="Key of the document's text in each object.")
    max_bytes: int | None = _MAX_BYTES


class DirectorySource(_Section):
    """A directory tree; each file that is UTF-8 text is a document."""

    kind: Literal["directory"] = Field(description="All text files of a directory tree.")
    path: str = Field(description="Top of the tree.")
    include: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="Patterns of the paths below the top to take; * also matches /.",
    )
    exclude: tuple[str, ...] = Field(
        default=(".*", "*/.*"),
        description="Patterns of the paths to leave out; the default leaves out hidden ones.",
    )
    max_bytes: int | None = _MAX_BYTES


class StdlibSource(_Section):
    """The source text of the running interpreter's standard library: real text that is on every machine."""

    kind: Literal["python-stdlib"] = Field(
        description="Source text of the installed Python standard library."
    )
    max_bytes: int | None = _MAX_BYTES


SourceConfig = Annotated[
    TextSource | JsonlSource | DirectorySource | StdlibSource,
    Field(discriminator="kind"),
]


class ByteTokenizerConfig(_Section):
    """One token per UTF-8 byte, and one for the end of a document: 257 tokens."""

    kind: Literal["byte"] = Field(default="byte", description="One token per byte, 257 in all.")


class BpeTokenizerConfig(_Section):
    """Byte-level BPE, learned from the dataset's own training documents."""

    kind: Literal["bpe"] = Field(description="Byte-level BPE learned from the source.")
    vocab_size: int = Field(
        ge=257, description="Tokens to learn, the 256 bytes and the end of document included."
    )
    sample_bytes: int = Field(
        default=2**28,
        ge=1,
        description="The merges are learned from the first training documents, up to so many bytes.",
    )


class FileTokenizerConfig(_Section):
    """A tokenizer in Hugging Face's tokenizer.json format."""

    kind: Literal["file"] = Field(description="Load a Hugging Face tokenizer.json.")
    path: str = Field(description="The tokenizer.json file.")
    eos_token: str | None = Field(
        default=None, description="Special token that ends a document; null: the one with a usual name."
    )


TokenizerConfig = Annotated[
    ByteTokenizerConfig | BpeTokenizerConfig | FileTokenizerConfig,
    Field(discriminator="kind"),
]

_TOKENIZER = Field(default_factory=ByteTokenizerConfig, description="How text becomes tokens.")
_EVAL_FRACTION = Field(
    default=0.05, gt=0, lt=1, description="Share of the documents that is held out for evaluation."
)
_SEED = Field(default=0, ge=0, lt=2**63, description="Decides which documents are held out.")
_SHARD_TOKENS = Field(
    default=2**27, ge=1, description="A shard is closed after the document that reaches so many tokens."
)


class BuildSettings(_Section):
    """Everything that decides what a dataset contains; kept in its manifest."""

    source: SourceConfig = Field(description="Where the text comes from.")
    tokenizer: TokenizerConfig = _TOKENIZER
    eval_fraction: float = _EVAL_FRACTION
    seed: int = _SEED
    shard_tokens: int = _SHARD_TOKENS


class DataConfig(_Section):
    """A dataset directory, and optionally how to build it when it is not there.

    `tokenizer`, `eval_fraction`, `seed` and `shard_tokens` speak about building, so without a `source` they
    have no effect: an existing dataset is then taken as it is.
    """

    path: str = Field(description="Directory of the dataset.")
    source: SourceConfig | None = Field(
        default=None,
        description="Text to build the dataset from where `path` holds none; null: it must be there.",
    )
    tokenizer: TokenizerConfig = _TOKENIZER
    eval_fraction: float = _EVAL_FRACTION
    seed: int = _SEED
    shard_tokens: int = _SHARD_TOKENS
    verify: Literal["auto", "size", "full"] = Field(
        default="auto",
        description="Check sizes, or full checksums, before training; auto: full below 256 MiB in all.",
    )

    def build_settings(self) -> BuildSettings | None:
        """How to build the dataset; None without a source."""
        if self.source is None:
            return None
        return BuildSettings(
            source=self.source,
            tokenizer=self.tokenizer,
            eval_fraction=self.eval_fraction,
            seed=self.seed,
            shard_tokens=self.shard_tokens,
        )
