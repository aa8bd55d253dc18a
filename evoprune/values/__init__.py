"""What kept weights are worth and become: training, repair, inheritance."""
