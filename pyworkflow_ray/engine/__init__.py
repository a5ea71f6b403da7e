"""The workflow engine: deterministic loop, commands, events, history, driver.

Pure (sans-IO): events in, commands out. No ray, no I/O, no clock, no threads; time and storage are handed in.
"""
