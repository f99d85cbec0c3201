"""The commands of `python -m fastrnn`."""
