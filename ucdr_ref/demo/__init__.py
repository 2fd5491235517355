"""The demonstration: 60 drawn classes in six domains, and the recipe of weights/demo-clip.pt; `python -m ucdr_ref.demo`.

Nothing but `experiments` imports it, and only for the drawn datasets: a copy of the package may leave this folder out.
"""
