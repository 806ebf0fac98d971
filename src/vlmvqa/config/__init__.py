"""The configuration: composed once, checked, and converted into one frozen object."""
