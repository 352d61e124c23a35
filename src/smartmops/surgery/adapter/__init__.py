"""An adapter as config and tensors, and the rules of experts added to it. Knows no model's pass, no data, no files."""
