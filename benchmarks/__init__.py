"""Measurements: scripts, protocol and results. See README.md in this folder."""
