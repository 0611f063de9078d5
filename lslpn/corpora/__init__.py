"""Public corpora, as they are distributed, into nnU-Net's raw layout.

One module per corpus says where its files lie, what they are called and what its labels mean;
`survey` has what they share, `prepare` goes through the cases and writes. docs/data.md has what a
user needs to know.
"""

from .prepare import NAMES, Outcome, prepare_corpus
from .survey import Problem

__all__ = ["NAMES", "Outcome", "Problem", "prepare_corpus"]
