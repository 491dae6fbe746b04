"""The flat space: units, ranges and rectangles, and the buffers that hold them."""
