"""Dice per organ and scan: protocols, scoring, results and figures."""
