"""The training of a model: `Trainer`, its settings, data loader, step, states and progress."""
