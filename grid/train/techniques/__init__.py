"""What levels of factors do in a training: one module for each place at which they act."""
