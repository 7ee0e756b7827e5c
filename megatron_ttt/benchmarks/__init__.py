"""What the project claims about speed and memory, measured: libraries behind tools/benchmark.py."""
