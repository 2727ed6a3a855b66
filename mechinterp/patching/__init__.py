"""Exact effects of activations, and gradient estimates of the same quantity."""
