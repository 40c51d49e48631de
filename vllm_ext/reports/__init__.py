"""Pages with pictures, and the figures in them."""
