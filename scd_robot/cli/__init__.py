"""The command-line program `scd`."""
