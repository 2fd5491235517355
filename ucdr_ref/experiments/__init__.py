"""Where everything meets: benchmarks, methods, run folders, tables; the one wing that knows both papers.

Read `protocols` and `retrieval` (UCDR), `class_folders` and `classification` (SRE-CLIP), then `run_folder`
and `report`.
"""
