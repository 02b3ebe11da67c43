"""The proof: the paper's comparisons, repeated from scratch on rendered pages with small LLaVAs.

``python -m benchmarks.proof --suite all --level cpu`` trains them, ``python -m benchmarks.proof.report`` writes
``docs/proof.md``.
"""
