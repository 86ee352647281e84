"""Methods that ask for an image classifier: its blocks, its head, its pixels."""
