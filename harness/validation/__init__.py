"""Theory held against what was published and measured."""
