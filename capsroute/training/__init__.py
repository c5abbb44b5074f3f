"""Train capsule networks: data, trainer, checkpoints, pictures. Needs `pip install 'capsroute[demo]'`."""
