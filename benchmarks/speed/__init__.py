"""What Vision Remember costs: ``python -m benchmarks.speed --suite op|block|ttft|train|capture --device cpu|cuda``."""
