"""Decoder models: plain single-device modules and their configuration."""
