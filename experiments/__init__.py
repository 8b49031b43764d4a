"""Scripts a researcher runs: `python -m experiments.<name> --gin_file=... [--gin.NAME=value ...]`.

The only code that knows gin. A script parses a config, calls the library and writes a run folder.
"""
