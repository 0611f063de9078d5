"""Segmentation of a scan by labelled scans."""
