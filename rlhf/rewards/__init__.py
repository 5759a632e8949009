"""Judges and reward sources."""
