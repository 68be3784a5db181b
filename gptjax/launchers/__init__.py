"""Starting a run where the machines are: Slurm, Cloud TPU, GKE, SkyPilot, and containers of managed training.

A launcher has `define(parser)`, its arguments, and `run(options)`, which starts the run, or with --dry_run prints what
it would hand to the engine.
"""
