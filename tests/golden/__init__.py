"""Golden runs: numbers of whole runs, each with its tolerance and the command that makes them."""
