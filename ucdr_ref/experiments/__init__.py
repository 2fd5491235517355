"""Where both papers meet their images: run folders, methods and tables; the only subpackage that knows both.

Read `experiment` (train, restore, evaluate), then `retrieval` (UCDR-Adapter, zero-shot CLIP, the
closed form) and `classification` (SRE-CLIP); `search` and `report` write what people look at.
"""
