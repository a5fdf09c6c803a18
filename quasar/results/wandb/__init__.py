"""Runs in Weights & Biases, made from their files alone: while they run or at any time after.

The files are the truth. Whatever W&B does (fail, hang, be missing) happens in a process of its own or in
``quasar wandb push``; a run neither fails nor waits for it.
"""
