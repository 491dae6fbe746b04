"""A 64-bit mixing function, for hashes and keys that are the same on every machine and in every version of
Python.

The finalizer of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014; the constants are David Stafford's variant 13): a bijection of 64-bit words in which every input bit
moves every output bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring counters land far apart
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(word: int) -> int:
    """The mixed 64-bit word."""
    word &= _MASK
    word = (word ^ (word >> 30)) * _FIRST & _MASK
    word = (word ^ (word >> 27)) * _SECOND & _MASK
    return word ^ (word >> 31)


def mix_array(words: UInt64s) -> UInt64s:
    """`mix` of every word; numpy's unsigned arithmetic wraps at 64 bits as it must."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND)
    return words ^ (words >> np.uint64(31))


def hash_pair(first: int, second: int) -> int:
    """A 64-bit hash of two non-negative integers below 2^64."""
    return mix(mix(first + _GOLDEN) + second * _GOLDEN)


def fraction_of(seed: int, index: int) -> float:
    """A number in [0, 1) that (seed, index) decides, uniform over indices."""
    return (hash_pair(seed, index) >> 11) * 2.0**-53
