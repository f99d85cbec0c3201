"""Timing of recurrent layers against their baselines: what `python -m fastrnn bench` and the suite
in `benchmarks/` share.

`workload` says what is run, `implementation` and the baselines how, `measure` times, `machine`
tells the roofline below which no time can be, `comparison` puts a row together, `store` keeps rows
on disk.
"""
