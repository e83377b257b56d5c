"""`python -m sparsight`, and `torchrun --nproc-per-node 2 -m sparsight train RECIPE`."""

from sparsight.cli import main

main()
