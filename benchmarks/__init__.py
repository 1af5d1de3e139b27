"""Speed beside peers, in one run: ``python -m benchmarks --help``. ``make benchmark-deps`` installs the peers."""
