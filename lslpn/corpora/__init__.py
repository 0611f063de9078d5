"""Public corpora, as they are distributed, into nnU-Net's raw layout.

One module per corpus says where its files lie, what they are called and what its labels mean;
`common` reads, checks, merges and writes. docs/data.md has what a user needs to know.
"""

from .common import NAMES, Outcome, Problem, prepare_corpus

__all__ = ["NAMES", "Outcome", "Problem", "prepare_corpus"]
