"""Configuration: loading, merging, checking, and the words for what is wrong with it."""
