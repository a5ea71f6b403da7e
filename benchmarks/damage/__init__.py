"""What an engine's store answers once its files are damaged: `python -m benchmarks.damage`.

`damages` makes the damage (pure), `harness` applies it and judges the answers, `ours` and `dbos_store` are the engines,
`dbos_cases` replays six bugs that DBOS had.
"""
