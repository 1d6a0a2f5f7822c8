"""What base layers are made of: how to read a weight and what a merge can write back."""
