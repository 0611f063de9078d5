"""The paper's experiments: Table 1, the two halves of Fig. 3, and the pictures of Fig. 2 and 4.

`plan` says which networks are to be trained and on what, `store` trains and evaluates them and
remembers what is done, `stats` and `report` make numbers and files of it; then one module per
experiment.
"""
