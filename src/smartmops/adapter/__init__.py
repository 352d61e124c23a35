"""What an adapter is: its options, its fresh parameters, its name in PEFT, and whether stored tensors are its own."""
