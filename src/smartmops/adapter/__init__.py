"""What an adapter is: its options, its fresh parameters, its name in PEFT, and whether stored tensors are its own."""

# Once PEFT is there, `tuner` enters the method into it, and imports modules of this room: none may be half imported.
import peft  # noqa: F401
