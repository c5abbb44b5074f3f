"""Look at a trained network: figures, and one page of HTML that holds them. Needs `pip install 'capsroute[demo]'`."""
