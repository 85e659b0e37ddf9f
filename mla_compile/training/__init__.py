"""Fine-tuning of converted models: what is trained, towards what, and by which steps; engines are accelerate's."""
