"""The verbs of `tinyllama`: each file holds what one verb reads and what it does.

The options of a verb are one frozen dataclass. tyro makes the command line from it, with the
docstrings as the help, and the function beside it takes the same value. Libraries that are slow to
import are imported inside the functions, so that `--help` and mistakes answer at once.
"""
