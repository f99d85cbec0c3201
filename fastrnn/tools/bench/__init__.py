"""Timing of recurrent layers against their rivals: what `python -m fastrnn bench` and the suite in
`benchmarks/` share.

`workload` says what is run, `contender` and the rivals how, `measure` times, `machine` tells the
floor below which no time can be, `race` puts a row together, `store` keeps rows on disk.
"""
