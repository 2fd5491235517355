"""Where everything meets: benchmarks, methods, run folders, tables; the one wing that knows both papers.

Read `contract` and `experiment` (train, restore, evaluate, whatever the method), then `datasets`, `trees`,
`protocols`, `retrieval` and `ranking` for UCDR, `class_folders`, `classification` and `predictions` for
SRE-CLIP; `run_folder`, `search`, and `report`, `page`, `charts` for what is written.
"""
