"""The Trainer: its settings, data loader, training step, states and progress."""
