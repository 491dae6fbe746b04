"""The files of a checkpoint: written whole or not at all, and never believed unread.

The files are DCP's own: chunks saved by `torch.save` behind one another, and an index that says where each lies,
so that torch's tools read them, too. What differs from DCP's file system storage:

- Memory. A save holds one chunk at a time on the host, where DCP's writer keeps a copy of nearly everything until
  the file is closed; a load reads each stored chunk once and copies it to all the places that want a part of it.
- Checksums. Every chunk has one in the index; torch's own reader checks none.
- The end of a save is the commit: only when every rank has its file on the disk does the first rank give the
  directory its name. DCP carries an error of any rank to all of them, before and in the commit.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

# Its name is part of DCP's file format: the index is pickled.
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainer.checkpoint.directory import begin, commit, partial_path
from trainer.checkpoint.manifest import INDEX, MANIFEST, STATES, CheckpointManifest
from trainer.checkpoint.planner import narrow
from trainer.files import write_synced

_CHECKSUMS = "crc32"


@dataclass(frozen=True)
class _Record:
    """Where a chunk lies in the files, and its checksum."""

    file: str
    offset: int
    length: int
    crc32: int


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint.

    Args:
        directory: The directory of all checkpoints of the run.
        manifest: Everything about the checkpoint but its parameters and files.
        rank: This rank; rank 0 makes the directory and commits it.
        keep: How many checkpoints stay; None: all.
    """

    def __init__(self, directory: Path, manifest: CheckpointManifest, rank: int, keep: int | None) -> None:
        self.directory, self.manifest, self.rank, self.keep = directory, manifest, rank, keep
        self.partial = partial_path(directory, manifest.step)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        raise NotImplementedError("a writer writes one checkpoint: make another")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            begin(self.directory, self.manifest.step)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks into its file and wait until they are on the disk."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name = f"__{self.rank}_0.distcp"
        path = self.partial / name
        if not self.partial.is_dir():
            raise FileNotFoundError(
                errno.ENOENT,
                f"{socket.gethostname()} does not see the directory that rank 0 made; "
                "checkpoints need a file system that all ranks share",
                str(self.partial),
            )
        results, offset = [], 0
        with _errors_name(path), path.open("wb") as stream:
            for item in plan.items:
                data = planner.resolve_data(item)
                assert isinstance(data, Tensor)
                record = _encode(data)
                stream.write(record)
                place = _Record(name, offset, len(record), zlib.crc32(record))
                results.append(WriteResult(item.index, len(record), place))
                offset += len(record)
            stream.flush()
            os.fsync(stream.fileno())
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write index and manifest, and make the checkpoint appear."""
        records: dict[MetadataIndex, _Record] = {each.index: each.storage_data for rank in results for each in rank}
        metadata.storage_data = {
            index: _StorageInfo(record.file, record.offset, record.length) for index, record in records.items()
        }
        metadata.planner_data = {_CHECKSUMS: {index: record.crc32 for index, record in records.items()}}
        metadata.version = CURRENT_DCP_VERSION
        index = pickle.dumps(metadata)
        files = {INDEX: len(index)}
        for record in records.values():
            files[record.file] = max(files.get(record.file, 0), record.offset + record.length)
        manifest = self.manifest.model_copy(
            update={"parameters": _parameters(metadata), "files": files, "index_crc32": zlib.crc32(index)}
        )
        for name, content in ((INDEX, index), (MANIFEST, manifest.to_bytes())):
            with _errors_name(self.partial / name):
                write_synced(self.partial / name, content)
        commit(self.partial, self.keep)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)


class CheckpointReader(StorageReader):
    """Reads one checkpoint, whose index is read and checked at once.

    Raises:
        ValueError: the index is not the one that was written.
        OSError: the index cannot be read.
    """

    def __init__(self, path: Path, manifest: CheckpointManifest) -> None:
        self.path = path
        index = (path / INDEX).read_bytes()
        if zlib.crc32(index) != manifest.index_crc32:
            raise ValueError(f"{path / INDEX} is damaged: its checksum is not the one that it was written with")
        self.metadata: Metadata = pickle.loads(index)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        raise NotImplementedError("a reader reads one checkpoint: make another")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the index is known from the start."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every stored chunk that some item wants, file by file and front to back."""
        wanted: dict[str, dict[int, list[ReadItem]]] = {}
        for item in plan.items:
            info = self.metadata.storage_data[item.storage_index]
            wanted.setdefault(info.relative_path, {}).setdefault(info.offset, []).append(item)
        for name, by_offset in sorted(wanted.items()):
            path = self.path / name
            with _errors_name(path), path.open("rb") as stream:
                for _, items in sorted(by_offset.items()):
                    stored = self._decode(path, stream, items[0].storage_index)
                    for item in items:
                        target = planner.resolve_tensor(item)
                        target.copy_(narrow(stored, item.storage_offsets, item.lengths))
                        planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _decode(self, path: Path, stream: IO[bytes], index: MetadataIndex) -> Tensor:
        info = self.metadata.storage_data[index]
        stream.seek(info.offset)
        record = stream.read(info.length)
        if len(record) != info.length or zlib.crc32(record) != self.metadata.planner_data[_CHECKSUMS][index]:
            what = "is cut short" if len(record) != info.length else "has another checksum than when it was written"
            raise ValueError(f"{path} is damaged: {index.fqn!r} at byte {info.offset} {what}")
        tensor: Tensor = torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
        return tensor

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)


def _encode(data: Tensor) -> memoryview:
    """One tensor as `torch.save` writes it.

    Through numpy, because `torch.save` writes the whole buffer that a view belongs to and a numpy array ends where
    the view ends. Into memory, because `torch.save` turns a full disk into an error that does not speak of disks.
    """
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(data.detach().cpu().numpy()), buffer)
    return buffer.getbuffer()


def _parameters(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Names and full shapes of the parameters, from their weights."""
    weights = f"{STATES[0]}."
    return {
        name.removeprefix(weights): tuple(tensor.size)
        for name, tensor in sorted(metadata.state_dict_metadata.items())
        if name.startswith(weights) and isinstance(tensor, TensorStorageMetadata)
    }


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """An error while a file is written or read names the file, which the operating system's does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
