"""How a verdict is reached: error bounds, exact laws of samplers, bets on samples, counted costs."""
