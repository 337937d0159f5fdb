"""What stands around a training step."""
