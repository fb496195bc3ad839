"""Signed evidence: the format of the file, its signature, verification, comparison, and a page for people."""
