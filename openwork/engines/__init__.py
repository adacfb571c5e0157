"""Other ways to run a dense network on a CPU, each in a process of its own, timed in turns with what is compared."""
