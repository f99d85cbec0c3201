"""Times recurrent layers and their baselines, for `python -m fastrnn bench` and the suite in
`benchmarks/`.

`workload` defines the cases, `implementation` and the baselines run them, `measure` times them,
`machine` measures the roofline, `comparison` makes a row of results, and `store` keeps rows on
disk.
"""
