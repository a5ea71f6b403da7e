"""The command line: prints and serves what the api and the storage return; no logic of its own.

`main` holds the group and the exit codes, `screen` what a stream can show, `reading` runs straight from the storage
(no Ray), `runs`, `run` and `admin` the commands.
"""
