"""Starts a run on other machines: Slurm, Cloud TPU, GKE, SkyPilot, and containers of managed training.

A launcher has `define(parser)`, which adds its arguments, and `run(options)`, which starts the run, or with --dry_run
prints what it would submit.
"""
