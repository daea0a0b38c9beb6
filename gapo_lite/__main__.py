"""`python -m gapo_lite`: the same as `gapo-lite`, and what `accelerate launch -m` runs."""

from gapo_lite.cli import main

main()
