"""Contiguous ranges of a flattened shard as rectangles of the full tensor.

A contiguous range of a row-major matrix is at most three rectangles: the end of a first row, whole rows, the
start of a last row. A tensor-parallel shard is itself a rectangle of the full matrix, so what a ZeRO rank owns
is always a few rectangles of full tensors - the form in which any other layout can read it back.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.flat.space import ParameterSpec, Range


@dataclass(frozen=True)
class Rectangle:
    """A box of the full tensor and the range of the local flattened shard that holds it, row-major.

    Attributes:
        offsets: First index per dimension of the full tensor.
        sizes: Extent per dimension.
        local: The elements of the flattened local shard, in the same order.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local: Range


def rectangles(spec: ParameterSpec, part: Range) -> list[Rectangle]:
    """The rectangles of `spec`'s full tensor that make up elements `part` of its flattened local shard.

    Raises:
        ValueError: the parameter has more than two dimensions, or `part` lies outside the shard.
    """
    if part.start < 0 or part.stop > spec.numel:
        raise ValueError(f"range {part.start}..{part.stop} lies outside {spec.name!r} of {spec.numel} elements")
    if part.length == 0:
        return []
    origin = [0] * len(spec.full_shape)
    if spec.shard_dim is not None:
        origin[spec.shard_dim] = spec.shard_index * spec.shape[spec.shard_dim]
    if len(spec.shape) == 1:
        return [Rectangle((origin[0] + part.start,), (part.length,), part)]
    if len(spec.shape) != 2:
        raise ValueError(f"{spec.name!r} has shape {spec.shape}; only vectors and matrices have rectangles")
    columns = spec.shape[1]
    found = []
    start = part.start
    while start < part.stop:
        row, column = divmod(start, columns)
        if column == 0 and part.stop - start >= columns:
            rows = (part.stop - start) // columns
            sizes = (rows, columns)
        else:
            sizes = (1, min(columns - column, part.stop - start))
        stop = start + sizes[0] * sizes[1]
        found.append(Rectangle((origin[0] + row, origin[1] + column), sizes, Range(start, stop)))
        start = stop
    return found
