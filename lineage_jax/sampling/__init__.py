"""From a trained model to what it produces."""
