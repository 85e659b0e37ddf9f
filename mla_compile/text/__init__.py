"""Text becomes windows of tokens; figures of models on them."""
