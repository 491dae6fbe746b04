"""Passes: small pure functions from program to program that add what schedule authors leave out."""
