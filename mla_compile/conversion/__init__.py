"""The steps from a request to a converted model."""
