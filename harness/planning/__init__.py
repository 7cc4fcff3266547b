"""What theory says of choices: layouts that fit, and what happens over time in a simulation."""
