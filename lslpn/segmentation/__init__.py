"""Segmenting a scan by labelled ones."""
