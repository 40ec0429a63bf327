"""The training and evaluation stages, and the code that starts them."""
