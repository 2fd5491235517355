"""Image files to batches, features and searchable indexes, whatever the method.

Read `listing` (what is below a folder), `batches` (reading, transforms, balanced order), `features`
(extraction by any `encode`), `cache` (a folder encoded once).
"""
