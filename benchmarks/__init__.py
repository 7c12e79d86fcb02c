"""Speed beside competitors: the input pipeline and the compiled steps."""
