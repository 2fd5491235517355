"""The computer a run is on: files that are written whole or not at all, devices, precision, processes, entry
points.

Read `files`, `processes` and `command`; `options` are those that every run has. Nothing here knows of a
method or an image.
"""
