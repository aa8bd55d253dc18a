"""What a person or a program reads and takes away."""
