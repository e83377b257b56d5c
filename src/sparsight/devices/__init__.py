"""Ranks, devices and what they can do."""
