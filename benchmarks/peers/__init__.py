"""The candidates of training_step.py: one file each, run as `python -m peers.worker`.

A candidate builds its network and optimizer, then trains a requested number of steps whenever
asked to. The files import torch and the library they measure, so that each runs with any
interpreter that has that library.
"""
