"""A model, images and labels, as the run is given them."""
