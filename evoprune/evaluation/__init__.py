"""What a masked model scores."""
