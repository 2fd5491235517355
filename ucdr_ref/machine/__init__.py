"""The computer a run is on: files that are written whole or not at all, and devices, precision and processes.

Read `files`, then `processes`. Nothing here knows of a method or an image.
"""
