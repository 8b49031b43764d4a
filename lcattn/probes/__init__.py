"""Measurements on models: what they compute in context, and how."""
