"""A local Replicate: the provider's HTTP API on your own machine, at no cost.

Start it with ``python -m sandbox``; tests use :class:`sandbox.runner.Sandbox`.  It imports
nothing of the application, so it can stand in for the provider in anybody's tests.
"""
