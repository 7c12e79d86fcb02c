"""PIL's operations on uint8 pixels, exact to the bit, in TensorFlow."""
