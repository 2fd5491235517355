"""The computer a run is on: files that are written whole or not at all, devices, precision, processes, entry
points.

Read `files`, `processes` and `command`, which know of no method and no image; `options` are those that every
run has.
"""
