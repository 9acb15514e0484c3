"""What a training step needs of memory, arithmetic and network, from its compiled program and without running it."""
