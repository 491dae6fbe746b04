"""Generators of pipeline schedules: one file and one registered function each, compute actions only."""
