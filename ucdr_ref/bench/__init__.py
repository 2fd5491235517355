"""What the numbers in docs/ are printed by; nothing imports it: a copy of the package may leave it out.

`python -m ucdr_ref.bench.speed` (time and memory, with `peers`), `drawn` (the drawn benchmark, with
`centring` and `ridge`), `real` (UCDR-Adapter on real images), `animals` (SRE-CLIP on real images). `record`
is what their JSON has in common.
"""
