"""Converts public corpora, as they are distributed, to nnU-Net's raw layout.

There is a module for each corpus, which knows the names of its files and the meaning of its labels.
`survey` has what they share; `prepare` processes the cases and writes the data set. docs/data.md is
the user's guide.
"""

from .prepare import NAMES, Outcome, prepare_corpus
from .survey import Problem

__all__ = ["NAMES", "Outcome", "Problem", "prepare_corpus"]
