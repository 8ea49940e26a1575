"""Media Generation Service: one job in, one picture stored, one purchase made."""

__version__ = "0.1.0"
