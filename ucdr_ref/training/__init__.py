"""The training loop of both papers, and what lets a run that was stopped go on as if it had not been.

Read `loop` (`fit` is the whole of training), then `journal` (last.pt, log.jsonl, the progress line).
"""
