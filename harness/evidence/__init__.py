"""How a verdict is reached: margins from dtype error bounds, and costs that are counted."""
