"""Scans, labels and data sets, and what a network is given of them."""
