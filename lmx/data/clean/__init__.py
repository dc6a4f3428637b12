"""Cleaning: what is kept of a corpus, and why the rest is not. Filters, deduplication, privacy.

A step is a frozen dataclass of its thresholds. It can be pickled, and depends on nothing but its fields and what it is given.
"""
