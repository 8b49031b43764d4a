"""What tests of attention mechanisms need; `conformance` is the shared suite.

`plans` has plans of block-sparse attention that no mechanism would make.
"""
