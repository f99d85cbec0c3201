"""Writes the files for ninja from which setup.py builds the sources beside it."""
