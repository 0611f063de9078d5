"""The paper's experiments: Table 1, both halves of Fig. 3, and the pictures of Fig. 2 and 4.

`plan` has the networks of an experiment and their data, `store` trains and evaluates them and keeps
the state, `stats` and `report` compute and write results; then one module per experiment.
"""
