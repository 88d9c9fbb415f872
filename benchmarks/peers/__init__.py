"""The contestants of training_step.py: a file each, run as `python -m peers.worker`.

A contestant builds its network and optimizer, then trains as many steps as it is told, whenever it
is told. The files import torch and the library they are about, so that each runs with whatever
interpreter has that library.
"""
