"""Logs runs to Weights & Biases (W&B) from their files alone, while they run or at any later time.

All calls to wandb are made in a separate process or in ``quasar wandb push``. A run does not fail or wait if wandb
fails, hangs or is not installed.
"""
