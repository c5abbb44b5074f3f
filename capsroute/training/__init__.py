"""Train capsule networks: data, trainer, checkpoints. In a clone of capsroute: `pip install '.[demo]'`."""
