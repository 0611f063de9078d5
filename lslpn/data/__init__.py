"""Scans, labels and data sets, and the inputs of the networks."""
