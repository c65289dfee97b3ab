"""The shipped models of bozzetto other than `flowers`: a folder each."""

__version__ = "0.2.0"
