"""The payload side of retrieval: documents, chunks, a vector index over them, and a second ranking of what it finds.

Plain synchronous objects that know no pipeline and no model: vectors come from whoever embeds
(``sage_bench.indexing`` through the control plane), the engine of a pipeline calls ``search`` and ``rerank``.
"""
