"""What the numbers in docs/ are printed by: `speed`, `drawn` (the drawn benchmark), `real` (real images),
each a command.

`python -m ucdr_ref.bench.speed|drawn|real`. Nothing imports this folder: a copy of the package may leave it
out.
"""
