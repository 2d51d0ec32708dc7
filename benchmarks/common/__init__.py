"""What the benchmarks share: shapes, workloads, child processes, rounds, the machine."""
