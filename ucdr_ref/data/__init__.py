"""Image files, and which of them are trained on and searched, whatever the method.

Read `folders` (what lies below a folder), `images` (reading, batches), `benchmarks` (the protocols),
`class_folders` (SRE-CLIP's folders), `features` (encoding by any method's `encode`, kept on the disk).
"""
