"""Rectangles in the language of torch's distributed checkpoint (DCP).

DCP stores each tensor as a set of chunks (offsets and sizes), plans who writes which, and works out which stored
chunks a wanted one overlaps. Its own planners know sharded tensor types; these know rectangles and the memory
that holds them. A chunk's data is a view of the flat space or of the optimizer state: nothing is copied to plan
a save, and a load writes where the data belongs.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a full tensor and the memory that holds it.

    Attributes:
        name: The full tensor: "model.blocks.0.attention.query.weight".
        full_shape: Its shape.
        offsets: First index of the rectangle per dimension.
        data: fp32, in the rectangle's shape; a view.
    """

    name: str
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, self.offsets)

    @property
    def storage(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.data.shape)


class RectangleSavePlanner(SavePlanner):
    """Saves this rank's chunks; those of all ranks must tile every tensor."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = {chunk.index: chunk for chunk in chunks}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing: the chunks are known from the start."""

    def create_local_plan(self) -> SavePlan:
        properties = TensorProperties(dtype=torch.float32)
        return SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(chunk.storage, properties, torch.Size(chunk.full_shape)),
                )
                for index, chunk in self.chunks.items()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            written, whole = sum(prod(chunk.sizes) for chunk in tensor.chunks), prod(tensor.size)
            if written != whole:
                raise RuntimeError(f"all ranks together would write {written} of the {whole} elements of {name!r}")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.chunks[write_item.index].data


class RectangleLoadPlanner(LoadPlanner):
    """Fills this rank's chunks from whatever rectangles were saved."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = {chunk.index: chunk for chunk in chunks}
        self.metadata = Metadata({})

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """What to read.

        Raises:
            ValueError: the checkpoint has no such tensor, has it in another shape or type, or not all of it.
        """
        wanted: dict[str, list[Chunk]] = {}
        for chunk in self.chunks.values():
            wanted.setdefault(chunk.name, []).append(chunk)
        return LoadPlan([item for name, chunks in wanted.items() for item in self._reads(name, chunks)])

    def _reads(self, name: str, chunks: list[Chunk]) -> list[ReadItem]:
        saved = self.metadata.state_dict_metadata.get(name)
        if not isinstance(saved, TensorStorageMetadata):
            raise ValueError(f"the checkpoint has no tensor {name!r}")
        shape = chunks[0].full_shape
        if saved.size != torch.Size(shape) or saved.properties.dtype != torch.float32:
            found = f"{tuple(saved.size)} in {saved.properties.dtype}"
            raise ValueError(f"{name!r} must be {shape} in {torch.float32}; the checkpoint has {found}")
        items = create_read_items_for_chunk_list(name, saved, [chunk.storage for chunk in chunks])
        found_elements = sum(prod(item.lengths) for item in items)
        expected = sum(chunk.data.numel() for chunk in chunks)
        if found_elements != expected:
            raise ValueError(f"the checkpoint has {found_elements} of the {expected} elements of {name!r} needed here")
        return items

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise TypeError(f"{read_item.storage_index.fqn!r} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow(self.chunks[read_item.dest_index].data, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: the data was read into its place."""


def narrow(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A rectangle of `tensor`, as a view."""
    return tensor[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]
