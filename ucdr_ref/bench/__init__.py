"""What the numbers in docs/ are printed by; nothing imports this folder, so a copy of the package may leave
it out.

`python -m ucdr_ref.bench.speed` (with `peers`), `drawn` (the drawn benchmark), `real` (real images, with
`frozen`: rows that train nothing) and `animals` (SRE-CLIP on real images, with `ridge`).
"""
