"""Ranks, devices, and their speed."""
