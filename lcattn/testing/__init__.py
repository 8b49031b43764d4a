"""What tests of attention mechanisms need; `conformance` is the shared suite."""
