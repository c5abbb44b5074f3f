"""Look at a trained network: figures, and an HTML page of them. In a clone of capsroute: `pip install '.[demo]'`."""
