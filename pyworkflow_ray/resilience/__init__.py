"""Retry, taxonomy, breaker table, deadlines: pure. Clocks and randomness are handed in."""
