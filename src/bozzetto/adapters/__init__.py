"""Targets of other libraries, used as they are: one file per family."""
